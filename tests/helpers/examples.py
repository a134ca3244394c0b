"""One valid record of every file, for the tiny models of the tests, and how tests change and write them."""

import json


def ids(text):
    """Token ids of printable ASCII without spaces: the tiny tokenizers' single bytes, from `!` on, follow the policy's
    three special tokens."""
    return [ord(character) - ord("!") + 3 for character in text]


END = 2  # <|im_end|>
VOCABULARY = 664


def message(role, text):
    return {"role": role, "content": text}


def sample(text):
    return {"text": text, "token_ids": [*ids(text), END], "finish_reason": "stop"}


PROMPT = {"prompt_id": "a", "prompt": "where?"}
SAMPLES = PROMPT | {"prompt_token_ids": ids("where?"), "samples": [sample("sea"), sample("city")]}
SCORES = SAMPLES | {"win_probs": [[None, 0.75], [0.25, None]], "order_gap": 0.1, "label_mass": 0.9}
TEXTS = {
    "prompt": [message("user", "where?")],
    "chosen": [message("assistant", "sea")],
    "rejected": [message("assistant", "city")],
}
TOKENS = {
    "prompt_token_ids": ids("where?"),
    "chosen_token_ids": [*ids("sea"), END],
    "rejected_token_ids": [*ids("city"), END],
}
PAIR = {"prompt_id": "a"} | TEXTS | TOKENS | {"win_prob": 0.75, "score_chosen": 0.75, "score_rejected": 0.25}
DATA = PAIR | {
    "last_chosen_logp": -3.0,
    "last_rejected_logp": -4.0,
    "ref_chosen_logp": -3.0,
    "ref_rejected_logp": -4.0,
    "chosen_num_tokens": 4,
    "rejected_num_tokens": 5,
}
CHAT = {"prompt_id": "a", "messages": [message("user", "where?"), message("assistant", "sea")]}


def but(record, **changes):
    """The record under prompt_id b, with changes; ... removes a field."""
    changed = record | {"prompt_id": "b"} | changes
    return {name: value for name, value in changed.items() if value is not ...}


def content(records):
    """Records as the bytes of a JSONL file; bytes stay what they are."""
    return b"".join(record if isinstance(record, bytes) else json.dumps(record).encode() + b"\n" for record in records)
