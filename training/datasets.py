"""Data sets over JSONL files, and their batches. records.py has the files' schemas."""

import torch

from data_utils import encode_chat, encode_text, end_token_id
from records import Chat, Data, Pair, read_at, scan
from utils import StageError

TEXT_CHECKS = 100  # records of a file whose token ids are compared with their text
LOGP_FIELDS = ("last_chosen_logp", "last_rejected_logp", "ref_chosen_logp", "ref_rejected_logp")


class JsonlDataset:
    """Random access to the records of a JSONL file; memory holds four numbers a record, not the records.

    Args:
        path: the file.
        tokenizer: of the model.
        max_length: prompt and response tokens together, at most.
        vocab_size: of the model.

    Attributes:
        ids: list of str, the examples' `prompt_id`.
        weights: list of float, each example's share in the mean loss before normalisation.
        lengths: list of int, the tokens of each example, its prompt counted once.

    Raises StageError with the place for a record that its schema does not allow, that is too long, or that holds a
    token outside the vocabulary.
    """

    schema: type
    responses: tuple[str, ...]  # the fields of a complete record that hold its responses' token ids

    def __init__(self, path, tokenizer, max_length: int, vocab_size: int):
        self.path, self.tokenizer, self.max_length, self.vocab_size = path, tokenizer, max_length, vocab_size
        self.end_id = end_token_id(tokenizer)
        self.offsets, self.ids, self.weights, self.lengths = [], [], [], []
        for offset, record in scan(path, self.schema):
            record = self.complete(record)
            try:
                self.check(record)
            except ValueError as error:
                raise StageError(f"{path}, prompt_id {record['prompt_id']}: {error}") from None
            prompt, responses = self.row(record)
            self.offsets.append(offset)
            self.ids.append(record["prompt_id"])
            self.weights.append(self.weight(record))
            self.lengths.append(len(prompt) + sum(map(len, responses)))

    def __len__(self):
        return len(self.offsets)

    def __getitem__(self, index: int) -> dict:
        return self.complete(read_at(self.path, self.offsets[index], self.schema))

    def complete(self, record: dict) -> dict:
        """The record with the fields that may be absent."""
        return record

    def row(self, record: dict) -> tuple[list[int], list[list[int]]]:
        """(prompt, [response, ...]) of a complete record as token ids, see logps.py."""
        return record["prompt_token_ids"], [record[name] for name in self.responses]

    def weight(self, record: dict) -> float:
        return 1.0

    def check(self, record: dict) -> None:
        """Raise ValueError unless prompt and responses are non-empty, short enough, and inside the vocabulary."""
        prompt, responses = self.row(record)
        for name, response in zip(self.responses, responses):
            if not prompt or not response:
                raise ValueError(f"prompt_token_ids and {name} should not be empty")
            if len(prompt) + len(response) > self.max_length:
                command = "make_sft" if self.schema is Chat else "make_pairs"
                raise ValueError(
                    f"{len(prompt)} prompt and {len(response)} response tokens exceed --max_length {self.max_length}; "
                    f"raise it, or filter with {command} --max_length"
                )
            if (largest := max(*prompt, *response)) >= self.vocab_size:
                raise ValueError(
                    f"token {largest} is outside the model's vocabulary of {self.vocab_size}; was the file made with "
                    "another model's tokenizer?"
                )


class PairDataset(JsonlDataset):
    """Preference pairs with stored log-probabilities: the data file of an iteration. Every pair weighs 1."""

    schema: type = Data
    responses = "chosen_token_ids", "rejected_token_ids"

    def check(self, record):
        """Raise ValueError also where a response's token ids do not stand for its text."""
        super().check(record)
        for side in ("chosen", "rejected"):
            if side in record and len(self) < TEXT_CHECKS:
                text = record[side][-1]["content"]
                decoded = self.tokenizer.decode(record[f"{side}_token_ids"], skip_special_tokens=True)
                if decoded != text:
                    raise ValueError(
                        f"the token ids are not those of the text under this tokenizer ({decoded[:40]!r} for "
                        f"{text[:40]!r}); was the file made with another model's? Name that one with --tokenizer"
                    )

    def collate(self, records: list[dict]) -> dict:
        """A batch of B pairs: `rows`; and as (B,) tensors `win_prob`, `last_chosen_logps` ... `ref_rejected_logps`."""
        batch = {"rows": [self.row(record) for record in records]}
        batch["win_prob"] = torch.tensor([record["win_prob"] for record in records], dtype=torch.float32)
        for name in LOGP_FIELDS:
            batch[f"{name}s"] = torch.tensor([record[name] for record in records], dtype=torch.float32)
        return batch


class UnscoredPairDataset(PairDataset):
    """Pairs without log-probabilities yet, for `row` alone: the pairs file of an iteration, or pairs from elsewhere.

    Pairs from elsewhere have texts alone. They are tokenised here, the end token included, and their label counts as
    certain (`win_prob` 1) where none is given.
    """

    schema = Pair

    def complete(self, record):
        record = {"win_prob": 1.0} | record
        if "prompt_token_ids" in record:
            return record
        record["prompt_token_ids"] = encode_chat(self.tokenizer, record["prompt"])
        for side in ("chosen", "rejected"):
            record[f"{side}_token_ids"] = [*encode_text(self.tokenizer, record[side][-1]["content"]), self.end_id]
        return record


class ChatDataset(JsonlDataset):
    """Chats for supervised fine-tuning: `messages` that end with the assistant's answer, which alone is learnt.

    An example weighs its optional `weight` (default 1) times its number of response tokens, so that the mean loss
    is the mean over response tokens. make_sft leaves out chats that are too long.
    """

    schema = Chat
    responses = ("response_token_ids",)

    def complete(self, record):
        *context, answer = record["messages"]
        return {
            "prompt_id": context[-1]["content"][:40],
            **record,
            "prompt_token_ids": encode_chat(self.tokenizer, context),
            "response_token_ids": [*encode_text(self.tokenizer, answer["content"]), self.end_id],
        }

    def weight(self, record):
        return record.get("weight", 1.0) * len(record["response_token_ids"])

    def collate(self, records: list[dict]) -> dict:
        """A batch of B chats: `rows`; `num_tokens` of the answers, (B,)."""
        return {
            "rows": [self.row(record) for record in records],
            "num_tokens": torch.tensor([float(len(record["response_token_ids"])) for record in records]),
        }
