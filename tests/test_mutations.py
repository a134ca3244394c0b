"""Whatever a file holds, its reader raises StageError or returns what the documented format promises, and nothing else.

    python -m pytest tests/test_mutations.py

Valid files are damaged at random, in their bytes, lines and records, and read by the function that reads them in its
stage. What comes out is compared with a plain reading of the file and checked against the format, stated here again.
"""

import copy
import json
import logging
import math
import warnings

import pytest
from helpers.examples import CHAT, DATA, END, PAIR, SAMPLES, SCORES, TEXTS, VOCABULARY, ids, message, sample
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st

import data_processing
from analysis.comparisons import join_responses
from records import Prompt, Samples, Scores, read
from training.datasets import ChatDataset, PairDataset, UnscoredPairDataset
from utils import StageError, check_input

MAX_LENGTH = 64
LOGPS = ("last_chosen_logp", "last_rejected_logp", "ref_chosen_logp", "ref_rejected_logp")


# ---------------------------------------------------------------------------------------------- valid files

PROMPTS = ["where?", "when\u2028?", "why? <|im_end|>", "\U0001f600"]


def renumbered(record, text=None):
    """Four records like one, each with its own id and, where `text` says how, its own prompt."""
    prompts = [{"prompt": text(prompt)} for prompt in PROMPTS] if text else [{}] * 4
    return [copy.deepcopy(record | {"prompt_id": f"p{n}"} | prompt) for n, prompt in enumerate(prompts)]


def chat_prompt(prompt):
    return [message("user", prompt)]


RESPONSES = {"prompt_id": "a", "prompt": "x", "samples": [sample("sea")]}
VALID = {
    "prompts": renumbered({}, str),
    "samples": renumbered(SAMPLES, str),
    "scores": renumbered(SCORES, str),
    "pairs_file": renumbered(SCORES, str),
    "pairs": renumbered(PAIR, chat_prompt),
    "texts": [TEXTS | {"prompt": chat_prompt(prompt)} for prompt in PROMPTS],
    "data": renumbered(DATA, chat_prompt),
    "chats": renumbered(CHAT) + [CHAT | {"prompt_id": 7, "weight": 0.5}],
    "responses": renumbered(RESPONSES, str),
}


# ---------------------------------------------------------------------------------------------- damage

TOO_LARGE = "@1e999@"  # stands for the number, which Python cannot write
NESTED = json.loads("[" * 200 + "]" * 200)
VALUES = [None, True, False, 0, 1, -1, 1.5, 0.5, -1.0, TOO_LARGE, float("nan"), 10**400, -(10**400)]
VALUES += ["", "b", "p1", "\ud800", "\u2028", "<|im_end|>"]
VALUES += [[], {}, [0], ["x"], [None], [{}], [[]], [0] * 5000, NESTED, ids("sea"), [END], [VOCABULARY]]
VALUES += [{"role": "user"}, *([message(*turn)] for turn in (("assistant", "x"), ("user", "x"), ("assistant", None)))]


def write(records):
    return "".join(json.dumps(record) + "\n" for record in records).replace(f'"{TOO_LARGE}"', "1e999").encode()


def damage_bytes(random, data):
    position = random.randrange(len(data) + 1)
    kind = random.choice(["flip", "insert", "delete", "cut", "start", "ends"])
    if kind == "flip" and position < len(data):
        return data[:position] + bytes([data[position] ^ 1 << random.randrange(8)]) + data[position + 1 :]
    if kind == "insert":
        inserted = random.choice(
            [b"\n", b"\r", b"\0", b'"', b"{", b"]", b"\xff", b"9", b"\xe2\x80\xa8", b" ", b"-", b"e", b"\\ud800", b","]
        )
        return data[:position] + inserted + data[position:]
    if kind == "delete":
        return data[:position] + data[position + random.randrange(1, 9) :]
    if kind == "start":
        return random.choice([b"\xef\xbb\xbf", b"\n", b"\xff\xfe", b"\x1f\x8b", b"\xef\xbb\xbf\n", b" "]) + data
    return data[:position] if kind == "cut" else data.replace(b"\n", random.choice([b"\r\n", b"\n\n", b" \n", b"\r"]))


def damage_lines(random, data):
    lines = data.splitlines(keepends=True) or [b""]
    first, second = random.randrange(len(lines)), random.randrange(len(lines))
    if random.random() < 0.5:
        lines.insert(second, lines[first])
    else:
        lines[first], lines[second] = lines[second], lines[first]
    return b"".join(lines)


def damage_record(random, data):
    """Remove, replace or add a value anywhere in a record."""
    try:
        records = [json.loads(line) for line in data.decode().split("\n") if line]
        place = random.choice(records)
    except (ValueError, IndexError):
        return data  # damaged already
    while isinstance(place, (dict, list)) and place:
        key = random.choice(list(place) if isinstance(place, dict) else range(len(place)))
        if not isinstance(place[key], (dict, list)) or not place[key] or random.random() < 0.4:
            break
        place = place[key]
    else:
        return data
    value, action = copy.deepcopy(random.choice(VALUES)), random.random()
    if action < 0.2:
        del place[key]
    elif action < 0.4 and isinstance(place, dict):
        place[random.choice(["extra", "weight", "prompt_id", "win_prob", *LOGPS])] = value
    else:
        place[key] = value
    return write(records)


def damage(random, data):
    for _ in range(random.randrange(4)):
        data = random.choice([damage_bytes, damage_lines, damage_record, damage_record, damage_record])(random, data)
    return data


# ---------------------------------------------------------------------------------------------- the formats again


def plainly_read(path):
    """The file's objects: what is between line feeds, by Python's own reader."""
    text = path.read_bytes().removeprefix(b"\xef\xbb\xbf").decode()
    return [json.loads(line) for line in text.split("\n") if line.strip(" \t\r\n\f\v")]


def is_text(value):
    return isinstance(value, str) and value.encode() is not None


def are_tokens(value, vocabulary=math.inf):
    return isinstance(value, list) and all(type(token) is int and 0 <= token < vocabulary for token in value)


def is_number(value, low, high):
    return type(value) in (int, float) and low <= value <= high and abs(value) < 1e300


def check_samples(records, at_least=2):
    assert {len(record["samples"]) for record in records} == {max(at_least, len(records[0]["samples"]))}
    for record in records:
        assert is_text(record["prompt"]) and are_tokens(record["prompt_token_ids"])
        assert all(is_text(sample["text"]) and are_tokens(sample["token_ids"]) for sample in record["samples"])


def check_scores(records):
    check_samples(records)
    for record in records:
        numbers = range(len(record["samples"]))
        assert len(record["win_probs"]) == len(numbers)
        for i in numbers:
            assert len(record["win_probs"][i]) == len(numbers) and record["win_probs"][i][i] is None
            for j in set(numbers) - {i}:
                assert is_number(record["win_probs"][i][j], 0, 1)
                assert record["win_probs"][i][j] + record["win_probs"][j][i] == pytest.approx(1)


def is_chat(messages, last):
    return (
        all(is_text(message["role"]) and is_text(message["content"]) for message in messages)
        and messages[-1]["role"] == last
    )


def check_pair(record):
    assert is_text(record["prompt_id"]) and is_chat(record["prompt"], "user")
    for side in ("chosen", "rejected"):
        assert is_chat(record[side], "assistant") and len(record[side]) == 1
        assert are_tokens(record[f"{side}_token_ids"], VOCABULARY) and record[f"{side}_token_ids"]
    assert are_tokens(record["prompt_token_ids"], VOCABULARY) and record["prompt_token_ids"]
    assert is_number(record.get("win_prob", 1), 0, 1)


def check_rows(dataset, records, prompts, *responses):
    """Prompt and responses in every row, as long as allowed, inside the vocabulary."""
    rows = [(prompt, list(own)) for prompt, *own in zip(prompts, *responses, strict=True)]
    assert [dataset.row(record) for record in records] == rows
    assert dataset.lengths == [len(prompt) + sum(map(len, own)) for prompt, own in rows]
    for prompt, own in rows:
        assert all(len(prompt + response) <= MAX_LENGTH for response in own)
        assert all(0 <= token < VOCABULARY for tokens in [prompt, *own] for token in tokens)


def all_records(dataset):
    return [dataset[index] for index in range(len(dataset))]


# ---------------------------------------------------------------------------------------------- the readers


def read_file(kind, path, tokenizer):
    """What the stages get out of the file, checked; raises what they raise."""
    check_input(path)
    if kind == "prompts":
        records = list(read(path, Prompt))
        for record in records:
            assert is_text(record["prompt"]) and record["prompt"].strip() and is_text(record["prompt_id"])
        assert [record["prompt"] for record in records] == [record["prompt"] for record in plainly_read(path)]
    elif kind == "samples":
        records = list(read(path, Samples))
        check_samples(records)
        assert records == plainly_read(path)
    elif kind == "scores":
        records = list(read(path, Scores))
        check_scores(records)
        assert records == plainly_read(path)
    elif kind == "pairs_file":
        output = path.with_name("out.jsonl")
        output.unlink(missing_ok=True)
        try:
            data_processing.make_pairs(str(path), str(output), max_length=MAX_LENGTH)
        except StageError:
            assert not output.exists()
            raise
        records, sources = plainly_read(output), {record["prompt_id"]: record for record in plainly_read(path)}
        for record in records:
            source = sources[record["prompt_id"]]
            assert are_tokens(record["prompt_token_ids"]) and record["prompt"] == chat_prompt(source["prompt"])
            chosen, rejected = (
                sample(record[side][0]["content"]) | {"token_ids": record[f"{side}_token_ids"]}
                for side in ("chosen", "rejected")
            )
            texts = [{name: one[name] for name in ("text", "token_ids")} for one in source["samples"]]
            assert all({name: one[name] for name in ("text", "token_ids")} in texts for one in (chosen, rejected))
            assert is_number(record["win_prob"], 0, 1) and record["score_chosen"] >= record["score_rejected"]
    elif kind in ("pairs", "texts", "data"):
        dataset = (PairDataset if kind == "data" else UnscoredPairDataset)(path, tokenizer, MAX_LENGTH, VOCABULARY)
        records = all_records(dataset)
        check_rows(
            dataset,
            records,
            *([record[f"{name}_token_ids"] for record in records] for name in ("prompt", "chosen", "rejected")),
        )
        assert dataset.ids == [record["prompt_id"] for record in records]
        assert all(is_number(record["win_prob"], 0, 1) for record in records)
        for record in records:
            if kind == "data":
                assert all(is_number(record[name], -math.inf, 0.001) for name in LOGPS)
                for side in ("chosen", "rejected"):  # where there is text, it is that of the ids
                    text = tokenizer.decode(record[f"{side}_token_ids"], skip_special_tokens=True)
                    assert record.get(side) is None or record[side][-1]["content"] == text
            else:
                check_pair(record)
        if kind == "data":
            batch = dataset.collate(records)
            assert ((batch["win_prob"] >= 0) & (batch["win_prob"] <= 1)).all()
            assert all(batch[f"{name}s"].isfinite().all() for name in LOGPS)
    elif kind == "chats":
        dataset = ChatDataset(path, tokenizer, MAX_LENGTH, VOCABULARY)
        records = all_records(dataset)
        assert all(is_chat(record["messages"], "assistant") and len(record["messages"]) > 1 for record in records)
        batch = dataset.collate(records)
        names = ("prompt_token_ids", "response_token_ids")
        check_rows(dataset, records, *([record[name] for record in records] for name in names))
        assert batch["num_tokens"].tolist() == [len(record["response_token_ids"]) for record in records]
        assert all(is_number(weight, 0, math.inf) for weight in dataset.weights)
        assert all(type(record.get("weight", 1)) is not bool for record in records)
        plain = plainly_read(path)
        assert all(map(is_text, dataset.ids)) and [record["messages"] for record in records] == [
            record["messages"] for record in plain
        ]
    else:
        baseline = path.with_name("baseline.jsonl")
        baseline.write_bytes(write(VALID["responses"]))
        records = list(join_responses(path, baseline))
        sources = plainly_read(path)
        assert [(record["prompt_id"], record["prompt"], record["samples"][0]) for record in records] == [
            (source["prompt_id"], source["prompt"], source["samples"][0]) for source in sources
        ]
        assert all(
            len(record["samples"]) == 2 and is_text(sample["text"])
            for record in records
            for sample in record["samples"]
        )
    if kind != "chats":
        found = [record["prompt_id"] for record in records]
        assert len(found) == len(set(found)) and all(map(is_text, found))
    json.dumps(records, ensure_ascii=False, allow_nan=False).encode()  # what the next stage can be given
    return records


class Complaints(logging.Handler):
    def emit(self, record):
        raise AssertionError(f"logged: {record.getMessage()}")


class Place:
    """Where the files are written, the policy's tokenizer, and what the valid files give."""

    def __init__(self, folder, tokenizer):
        self.path, self.tokenizer, self.valid = folder / "in.jsonl", tokenizer, {}
        for kind, records in VALID.items():
            self.path.write_bytes(write(records))
            self.valid[kind] = read_file(kind, self.path, tokenizer)
            assert len(self.valid[kind]) == len(records)


@pytest.fixture(scope="module")
def place(tmp_path_factory, tokenizers):
    return Place(tmp_path_factory.mktemp("mutations"), tokenizers["policy"])


def check(kind, data, place):
    """The property, of one damaged file. Returns whether it was taken."""
    place.path.write_bytes(data)
    handler = Complaints(logging.WARNING)
    loggers = [logging.getLogger(name) for name in ("comal", "transformers")]
    for logger in loggers:
        logger.addHandler(handler)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            records = read_file(kind, place.path, place.tokenizer)
    except StageError as error:
        assert str(place.path.parent) in str(error)
        assert len(str(error)) < 2000
        return False
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
    if plainly_read(place.path) == VALID[kind]:
        assert records == place.valid[kind]
    return True


@pytest.mark.parametrize("kind", VALID)
@settings(max_examples=250, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(random=st.randoms(use_true_random=False))
def test_damaged_files(place, kind, random):
    data = damage(random, write(VALID[kind]))
    note(repr(data))
    check(kind, data, place)
