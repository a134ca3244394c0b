"""Data sets over JSONL files, and their batches."""

import json

import torch
from torch.utils.data import Dataset

from data_utils import encode_chat, encode_text, end_token_id
from utils import StageError, are_messages, check_probability, check_token_ids, fingerprint, scan_jsonl


class JsonlDataset(Dataset):
    """Random access to the lines of a JSONL file; memory holds an offset, an id and a weight a line, not the records.

    Attributes:
        ids: list of str, the examples' `prompt_id`.
        weights: list of float, each example's share in the mean loss before normalisation.
        lengths: list of int, the tokens of each example, its prompt counted once.
    """

    def __init__(self, path, fields):
        self.path, self.offsets, self.ids, self.weights, self.lengths = path, [], [], [], []
        for offset, record in scan_jsonl(path, fields):
            prompt_id, weight, length = self.check(record)
            self.offsets.append(offset)
            self.ids.append(prompt_id)
            self.weights.append(weight)
            self.lengths.append(length)

    def check(self, record):
        """Validate one record; return its id, weight and length."""
        return record.get("prompt_id"), 1.0, 0

    @property
    def where(self):
        """Which record `check` is looking at."""
        return f"{self.path}, record {len(self.offsets) + 1}"

    def __len__(self):
        return len(self.offsets)

    def __getitem__(self, index):
        with open(self.path, "rb") as file:
            file.seek(self.offsets[index])
            return json.loads(file.readline().decode("utf-8-sig"))


TOKEN_FIELDS = ("prompt_token_ids", "chosen_token_ids", "rejected_token_ids")
PAIR_FIELDS = {"prompt_id": str} | dict.fromkeys(TOKEN_FIELDS, list)
LOGP_FIELDS = dict.fromkeys(
    ("last_chosen_logp", "last_rejected_logp", "ref_chosen_logp", "ref_rejected_logp"), (float, int)
)


TOKENIZER_CHECKS = 100  # records of a file whose token ids are compared with their text


def check_text(where, tokenizer, messages, ids):
    """Raise StageError unless the response's token ids stand for its text."""
    text, decoded = messages[-1]["content"], tokenizer.decode(ids, skip_special_tokens=True)
    if decoded != text:
        raise StageError(
            f"{where}: the token ids are not those of the text under this tokenizer ({decoded[:40]!r} for "
            f"{text[:40]!r}); was the file made with another model's? Name that one with --tokenizer"
        )


class PairDataset(JsonlDataset):
    """Preference pairs with stored log-probabilities (the `data` file of an iteration); every pair weighs 1.

    Raises StageError for a sequence longer than `max_length` or a token outside the vocabulary.
    """

    fields = PAIR_FIELDS | {"win_prob": (float, int)} | LOGP_FIELDS

    def __init__(self, path, tokenizer, max_length, vocab_size):
        self.tokenizer, self.max_length, self.vocab_size = tokenizer, max_length, vocab_size
        super().__init__(path, self.fields)

    def check(self, record):
        where = f"{self.path}, prompt_id {record['prompt_id']}"
        for side in ("chosen", "rejected"):
            check_tokens(self.path, record, f"{side}_token_ids", self.vocab_size, self.max_length)
            if record.get(side) is not None:
                check_messages(where, side, record[side], "assistant", alone=True, may_be_empty=True)
                if len(self.offsets) < TOKENIZER_CHECKS:
                    check_text(where, self.tokenizer, record[side], record[f"{side}_token_ids"])
        check_probability(where, "win_prob", record.get("win_prob", 1.0))
        for name in LOGP_FIELDS:
            # Rounding may lift a certain token above 0.
            if name in record and not (type(record[name]) in (int, float) and -1e30 < record[name] <= 1e-3):
                raise StageError(
                    f"{where}: {name} should be a log-probability, 0 or less, got {repr(record[name])[:100]}"
                )
        return record["prompt_id"], 1.0, sum(len(record[name]) for name in TOKEN_FIELDS)

    def collate(self, records):
        """A batch of pairs: `rows` of (prompt, [chosen, rejected]) token ids, see training/logps.py; `prompt_ids`; and
        as (B,) tensors `last_chosen_logps` ... `ref_rejected_logps`, `win_prob`."""
        batch = {"rows": [(r["prompt_token_ids"], [r["chosen_token_ids"], r["rejected_token_ids"]]) for r in records]}
        batch["win_prob"] = torch.tensor([r.get("win_prob", 1.0) for r in records], dtype=torch.float32)
        for name in LOGP_FIELDS:
            if all(name in record for record in records):
                batch[f"{name}s"] = torch.tensor([r[name] for r in records], dtype=torch.float32)
        batch["prompt_ids"] = [r["prompt_id"] for r in records]
        return batch


class UnscoredPairDataset(PairDataset):
    """Pairs without log-probabilities yet: the `pairs` file of an iteration, or pairs from elsewhere.

    Pairs from elsewhere have only TRL's conversational fields `prompt`, `chosen`, `rejected`. They are tokenised
    here, the end token included, and their label counts as certain (`win_prob` 1) where none is given.
    """

    fields = {"prompt": list, "chosen": list, "rejected": list}

    def __init__(self, path, tokenizer, max_length, vocab_size):
        self.tokenizer, self.end_id, self.seen = tokenizer, end_token_id(tokenizer), set()
        super().__init__(path, tokenizer, max_length, vocab_size)

    def check(self, record):
        record = self.complete(record)
        if record["prompt_id"] in self.seen:
            raise StageError(
                f"{self.where}: prompt_id {record['prompt_id']!r} (made from the text) occurs a second time"
            )
        self.seen.add(record["prompt_id"])
        return super().check(record)

    def __getitem__(self, index):
        return self.complete(super().__getitem__(index))

    def complete(self, record):
        ids = [name for name in TOKEN_FIELDS if name in record]
        has_ids = len(ids) == 3 and "prompt_id" in record
        if ids and not has_ids:
            raise StageError(
                f"{self.where} has {', '.join(ids)} but not all of {', '.join(PAIR_FIELDS)}; "
                "give all of them, or text alone"
            )
        for name, last in (("prompt", "user"), ("chosen", "assistant"), ("rejected", "assistant")):
            check_messages(self.where, name, record[name], last, alone=name != "prompt", may_be_empty=has_ids)
        if has_ids:
            return record | {"prompt_id": str(record["prompt_id"])}
        texts = {side: record[side][-1]["content"] for side in ("chosen", "rejected")}
        ids = {f"{side}_token_ids": encode_text(self.tokenizer, text) + [self.end_id] for side, text in texts.items()}
        everything = json.dumps([record["prompt"], record["chosen"], record["rejected"]])  # prompts may repeat
        prompt_id = str(record.get("prompt_id", fingerprint(everything)))
        return (
            {"win_prob": 1.0}
            | record
            | ids
            | {"prompt_id": prompt_id, "prompt_token_ids": encode_chat(self.tokenizer, record["prompt"])}
        )


def check_messages(where, name, messages, last_role, alone=False, may_be_empty=False):
    """Raise StageError unless `messages` are {role, content} and end with text of `last_role`, which may be empty where
    token ids say what it stands for, and hold nothing else when `alone`."""
    if not (
        are_messages(messages)
        and messages
        and messages[-1]["role"] == last_role
        and (messages[-1]["content"] or may_be_empty)
        and (len(messages) == 1 or not alone)
    ):
        raise StageError(
            f"{where}: {name} should be {'one message' if alone else 'messages'} of {{role, content}} "
            f"{'by' if alone else 'ending with text by'} the {last_role}, got {str(messages)[:200]}"
        )


class ChatDataset(JsonlDataset):
    """Chats for supervised fine-tuning: `messages` ending with the assistant's answer, which alone is learnt.

    An example weighs its optional `weight` (default 1) times its number of response tokens, so that the mean loss
    is the mean over response tokens. Longer chats than `max_length` raise StageError (`make_sft` filters them).
    """

    def __init__(self, path, tokenizer, max_length, vocab_size):
        self.tokenizer, self.end_id = tokenizer, end_token_id(tokenizer)
        self.max_length, self.vocab_size = max_length, vocab_size
        super().__init__(path, {"messages": list})

    def check(self, record):
        tokens = self.encode(record)
        check_tokens(self.path, tokens, "response_token_ids", self.vocab_size, self.max_length)
        weight = record.get("weight", 1.0)
        if not (type(weight) in (int, float) and 0 <= weight < 1e30):
            raise StageError(f"{self.where}: weight should be a number >= 0, got {repr(weight)[:100]}")
        length = len(tokens["prompt_token_ids"]) + len(tokens["response_token_ids"])
        return tokens["prompt_id"], weight * len(tokens["response_token_ids"]), length

    def encode(self, record):
        """{"prompt_id", "prompt_token_ids", "response_token_ids"} of one chat; the end token is part of the answer."""
        messages = record["messages"]
        if not (are_messages(messages) and len(messages) > 1 and messages[-1]["role"] == "assistant"):
            raise StageError(
                f"{self.where}: messages should be {{role, content}} each, a prompt first and the assistant's "
                f"answer last, got {str(messages)[:200]}"
            )
        *context, answer = messages
        return {
            "prompt_id": str(record.get("prompt_id", context[-1]["content"][:40])),
            "prompt_token_ids": encode_chat(self.tokenizer, context),
            "response_token_ids": encode_text(self.tokenizer, answer["content"]) + [self.end_id],
        }

    def collate(self, records):
        """A batch of chats: `rows` of (prompt, [answer]) token ids, see training/logps.py; `num_tokens` of the answers
        (B,); `prompt_ids`."""
        encoded = [self.encode(record) for record in records]
        batch = {"rows": [(e["prompt_token_ids"], [e["response_token_ids"]]) for e in encoded]}
        batch["num_tokens"] = torch.tensor([float(len(e["response_token_ids"])) for e in encoded])
        batch["prompt_ids"] = [e["prompt_id"] for e in encoded]
        return batch


def check_tokens(path, record, field, vocab_size, max_length):
    """Raise StageError unless prompt and response are non-empty, short enough and inside the vocabulary."""
    prompt, response = record["prompt_token_ids"], record[field]
    where = f"{path}, prompt_id {record['prompt_id']}"
    check_token_ids(where, "prompt_token_ids", prompt)
    check_token_ids(where, field, response)
    if not prompt or not response:
        raise StageError(f"{where}: prompt_token_ids and {field} should not be empty")
    if len(prompt) + len(response) > max_length:
        command = "make_sft" if field == "response_token_ids" else "make_pairs"
        raise StageError(
            f"{where}: {len(prompt)} prompt and {len(response)} response tokens exceed --max_length "
            f"{max_length}; raise it, or filter with {command} --max_length"
        )
    outside = [token for token in prompt + response if not 0 <= token < vocab_size]
    if outside:
        raise StageError(
            f"{where}: token {outside[0]} is outside the model's vocabulary of {vocab_size}; "
            "was the file made with another model's tokenizer?"
        )
