"""data_processing.py: prompt splits and SFT data from local files.

python -m pytest tests/test_data_processing.py
"""

import random

import pytest

from data_processing import (
    first_exchange,
    make_prompts,
    make_sft,
)
from data_utils import encode_prompt, encode_text
from records import Record, read
from training.datasets import ChatDataset
from utils import StageError, fingerprint

# ---- make_prompts ----


NUM_PROMPTS = 40


def ultrafeedback(seed=0):
    """Rows in UltraFeedback's format: 40 different instructions, some twice, one with spaces, one missing."""
    rows = [{"instruction": f"Instruction {i}: café\u2028東京\n", "source": "x"} for i in range(NUM_PROMPTS)]
    rows += [
        rows[3],
        {"instruction": f"  {rows[5]['instruction']}  ", "source": "y"},
        {"instruction": "  ", "source": "z"},
        {"instruction": None, "source": "z"},
    ]
    random.Random(seed).shuffle(rows)
    return rows


def prompts(directory):
    return {
        path.stem: [record["prompt"] for record in read(path, Record)] for path in sorted(directory.glob("*.jsonl"))
    }


@pytest.fixture
def split(jsonl, tmp_path):
    """A function that runs make_prompts on these rows and returns {file: prompts}."""

    def split(name, rows, **settings):
        local_file = jsonl(f"{name}-rows.jsonl", *rows)
        make_prompts(str(tmp_path / name), str(local_file), **{"num_splits": 3, "num_test": 10} | settings)
        return prompts(tmp_path / name)

    return split


def test_make_prompts_splits_are_disjoint_and_complete(split, tmp_path):
    found = split("a", ultrafeedback())
    sizes = {name: len(texts) for name, texts in found.items()}
    assert sizes == {"test": 10, "train": 30, "train_0": 10, "train_1": 10, "train_2": 10}
    everything = {f"Instruction {i}: café\u2028東京" for i in range(NUM_PROMPTS)}
    assert set(found["test"]) | set(found["train"]) == everything
    assert len(set(found["test"] + found["train"])) == NUM_PROMPTS
    assert sorted(found["train_0"] + found["train_1"] + found["train_2"]) == sorted(found["train"])
    record = next(read(tmp_path / "a" / "test.jsonl", Record))
    assert record == {"prompt_id": fingerprint(record["prompt"]), "prompt": record["prompt"]}


def test_make_prompts_uneven_splits_are_complete(split):
    found = split("a", ultrafeedback(), num_splits=6, num_test=9)
    assert [len(found[f"train_{i}"]) for i in range(6)] == [6, 5, 5, 5, 5, 5]
    assert sorted(sum((found[f"train_{i}"] for i in range(6)), [])) == sorted(found["train"])


def test_make_prompts_refuses_to_leave_splits_of_another_number(split, tmp_path):
    before = split("a", ultrafeedback(), num_splits=3)
    with pytest.raises(StageError, match="train_2.jsonl of another number of splits"):
        split("a", ultrafeedback(), num_splits=2)
    assert prompts(tmp_path / "a") == before


def test_make_prompts_does_not_depend_on_the_order_of_rows(split):
    assert split("a", ultrafeedback(seed=0)) == split("b", ultrafeedback(seed=1))


def test_make_prompts_shuffles_by_seed(split):
    first, second = split("a", ultrafeedback()), split("b", ultrafeedback(), seed=1)
    assert first["test"] != second["test"]
    assert sorted(first["test"] + first["train"]) == sorted(second["test"] + second["train"])
    assert first["train"] != sorted(first["train"])


def test_make_prompts_leaves_out_excluded_prompts(split, jsonl):
    everything = split("a", ultrafeedback())
    unwanted = jsonl("unwanted.jsonl", *({"prompt": f" {text}\n"} for text in everything["test"]))
    found = split("b", ultrafeedback(), exclude=str(unwanted))
    assert set(found["test"]) | set(found["train"]) == set(everything["train"])


# ---- make_sft ----


SYSTEM = {"role": "system", "content": "s"}


def turns(*contents, first="user"):
    roles = ["user", "assistant"] if first == "user" else ["assistant", "user"]
    return [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]


@pytest.mark.parametrize(
    "messages, expected",
    [
        (turns("q", "a", "more", "b"), turns("q", "a")),
        ([SYSTEM, *turns("q", "a", "more")], [SYSTEM, *turns("q", "a")]),
        (turns("q", " \n", "more", "b"), None),
        (turns("q"), None),
        ([], None),
        (turns("  ", "a"), None),
        (turns("a", "q", first="assistant"), None),
    ],
)
def test_first_exchange_ends_with_the_first_answer(messages, expected):
    assert first_exchange(messages) == expected


def ultrachat():
    """Rows in UltraChat's format: 12 chats of growing answers, and three without one."""
    chats = [turns(f"q{i} <|im_end|>\u2028", "a" * i, "more", "b") for i in range(1, 13)]
    return [{"prompt": "x", "messages": messages} for messages in chats + [turns("x"), turns("x", ""), turns("", "x")]]


@pytest.fixture
def sft(jsonl, tmp_path):
    """A function that runs make_sft on the rows above and returns (train records, validation records)."""

    def sft(**settings):
        outputs, rows = [tmp_path / "sft.jsonl", tmp_path / "sft_test.jsonl"], jsonl("rows.jsonl", *ultrachat())
        make_sft(*map(str, outputs), str(rows), **{"num_validation": 4} | settings)
        return tuple(list(read(path, Record)) for path in outputs)

    return sft


def test_make_sft_writes_first_exchanges(sft, caplog):
    caplog.set_level("INFO")
    train, validation = sft()
    assert (len(train), len(validation)) == (8, 4)
    found = {record["prompt_id"]: record["messages"] for record in train + validation}
    assert found == {str(i - 1): turns(f"q{i} <|im_end|>\u2028", "a" * i) for i in range(1, 13)}
    assert "12 examples, 3 without an answer; 8 train, 4 validation" in caplog.text


@pytest.mark.parametrize("missing", [0, 1])
def test_make_sft_drops_what_is_too_long_for_the_tokenizer(sft, model_dirs, tokenizers, tmp_path, missing):
    tokenizer = tokenizers["policy"]
    # Prompt, answer and end token; the limit is the length of the ninth chat, or one token less.
    lengths = [
        len(encode_prompt(tokenizer, f"q{i} <|im_end|>\u2028")) + len(encode_text(tokenizer, "a" * i)) + 1
        for i in range(1, 13)
    ]
    limit = lengths[8] - missing
    train, validation = sft(tokenizer=model_dirs["policy"], max_length=limit)
    fit = {str(i) for i, length in enumerate(lengths) if length <= limit}
    assert {record["prompt_id"] for record in train + validation} == fit
    assert 4 < len(fit) < 12 and ("8" in fit) == (not missing)
    # What is kept is what mle.py takes at the same length.
    for name, records in (("sft.jsonl", train), ("sft_test.jsonl", validation)):
        assert len(ChatDataset(tmp_path / name, tokenizer, limit, len(tokenizer))) == len(records)


def test_make_sft_shuffles_by_seed_and_takes_no_more_than_the_limit(sft):
    first, again, other = sft(), sft(), sft(seed=1)
    assert first == again != other
    train, validation = sft(limit=6)
    assert validation == first[1] and train == first[0][:2]


def test_make_sft_refuses_one_file_for_two_purposes(jsonl, tmp_path):
    rows = jsonl("rows.jsonl", *ultrachat())
    before = rows.read_text()
    for output, validation in (("a", "a"), ("rows.jsonl", "b"), ("a", "rows.jsonl")):
        with pytest.raises(StageError, match="--local_file should be different files"):
            make_sft(str(tmp_path / output), str(tmp_path / validation), str(rows), num_validation=4)
    assert rows.read_text() == before and list(tmp_path.iterdir()) == [rows]
