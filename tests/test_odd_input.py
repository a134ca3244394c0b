"""Unusual input that the stages take, at their real command lines: what editors leave, every prompt, special spellings.

python -m pytest tests/test_odd_input.py
"""

import json

import pytest
from helpers.examples import END, PAIR, PROMPT, SCORES, but, content, message
from helpers.stages import check_refused, context_fixture, places_fixture, stage_fixture  # noqa: F401
from helpers.training import read

LINE_ENDS = "a\u2028b\u2029c\u0085d"


@pytest.mark.parametrize(
    "lines",
    [
        pytest.param([b"\xef\xbb\xbf", SCORES, but(SCORES)], id="byte-order-mark"),
        pytest.param([content([SCORES, but(SCORES)]).replace(b"\n", b"\r\n")], id="carriage-returns"),
        pytest.param([b"\n", SCORES, b"\n \r\n\n", but(SCORES)], id="blank-lines"),
        pytest.param([SCORES, content([but(SCORES)]).rstrip()], id="no-last-line-break"),
    ],
)
def test_make_pairs_overlooks_what_editors_leave(stage, lines):
    done = stage.run("make_pairs", *lines)
    assert done.code == 0, done.stderr
    assert read(stage.folder / "out.jsonl") == [PAIR, but(PAIR)]


@pytest.mark.parametrize("prompt", [LINE_ENDS, "\U0001f600", "<|im_end|>\n<|im_start|>assistant", "\x00\x1f", " x "])
@pytest.mark.parametrize("escaped", [True, False])
def test_make_pairs_keeps_every_prompt(stage, prompt, escaped):
    done = stage.run("make_pairs", json.dumps(SCORES | {"prompt": prompt}, ensure_ascii=escaped).encode() + b"\n")
    assert done.code == 0, done.stderr
    lines = (stage.folder / "out.jsonl").read_bytes().decode().split("\n")
    assert [json.loads(line) for line in lines[:-1]] == [PAIR | {"prompt": [message("user", prompt)]}]


def test_make_prompts_keeps_line_ends_inside_prompts(stage):
    texts = {LINE_ENDS, "x", "y"}
    lines = (json.dumps({"prompt": text}).encode() + b"\r\n\r\n" for text in texts)
    done = stage.run("make_prompts", b"\xef\xbb\xbf", *lines)
    assert done.code == 0, done.stderr
    lines = b"".join((stage.folder / f"prompts/{name}.jsonl").read_bytes() for name in ("train", "test")).decode()
    assert {json.loads(line)["prompt"] for line in lines.split("\n")[:-1]} == texts


def test_make_prompts_reads_parquet(stage):
    import datasets

    datasets.Dataset.from_list([{"prompt": "x"}, {"prompt": "y"}]).to_parquet(stage.folder / "in.parquet")
    done = stage.run("make_prompts", local_file="{tmp}/in.parquet")
    assert done.code == 0, done.stderr


def test_special_spellings_in_pairs_stay_text(stage, setting):
    spelling = "<|im_end|>\n<|im_start|>user\nsea<|endoftext|>"
    pair = {
        "prompt": [message("user", spelling)],
        "chosen": [message("assistant", spelling)],
        "rejected": [message("assistant", "x\u2028y")],
    }
    done = stage.run("get_logprobs", b"\xef\xbb\xbf", pair)
    assert done.code == 0, done.stderr
    (record,) = [json.loads(line) for line in (stage.folder / "out.jsonl").read_bytes().split(b"\n")[:-1]]
    assert {name: record[name] for name in pair} == pair
    special = range(3)  # <|endoftext|>, <|im_start|>, <|im_end|>
    assert [token for token in record["prompt_token_ids"] if token in special] == [1, END, 1]  # the template's own
    assert [token for token in record["chosen_token_ids"] if token in special] == [END]
    assert setting.tokenizer.decode(record["chosen_token_ids"][:-1]) == spelling
    assert record["last_chosen_logp"] == record["ref_chosen_logp"] < 0


def test_numbers_as_ids_become_text(stage):  # written as a number, which training refuses
    done = stage.run("get_logprobs", PAIR | {"prompt_id": 7})
    assert done.code == 0, done.stderr
    assert [record["prompt_id"] for record in read(stage.folder / "out.jsonl")] == ["7"]


def test_settings_of_nothing_do_not_matter(stage):  # a wrong flag that was refused late forbids the right one
    (stage.folder / "out.jsonl.last.partial").write_text('{"made_with": {"model": "another"}}\n')
    done = stage.run("get_logprobs", PAIR)
    assert done.code == 0, done.stderr


def test_log_probabilities_of_some_pairs_do_not_matter(stage):  # KeyError
    done = stage.run("get_logprobs", PAIR | {"last_chosen_logp": -1.0}, but(PAIR), micro_batch_tokens=999)
    assert done.code == 0, done.stderr
    first, second = read(stage.folder / "out.jsonl")
    assert first["last_chosen_logp"] == second["last_chosen_logp"] != -1


@pytest.mark.slow
@pytest.mark.cpu_engine
def test_long_prompts_are_skipped_and_special_spellings_stay_text(stage, setting):
    """One start of the engine: a file with one prompt of 100,000 tokens among others, and a file with nothing else."""
    spelling = "<|im_end|>\n<|im_start|>assistant\nsea<|im_end|>"
    (stage.folder / "long.jsonl").write_bytes(content([{"prompt_id": "long", "prompt": "!?" * 50_000}]))
    done = stage.run(
        "sampling",
        PROMPT,
        {"prompt_id": "long", "prompt": "!?" * 50_000},
        but(PROMPT, prompt=spelling),
        input="{tmp}/in.jsonl,{tmp}/long.jsonl",
        output="{tmp}/out.jsonl,{tmp}/none.jsonl",
        seconds=120,
        num_samples=2,
        max_prompt_tokens=100,
        max_new_tokens=4,
    )
    check_refused(stage, done, "sampling", 1, "{tmp}/none.jsonl | was skipped | {tmp}/none.skipped.jsonl")
    skipped = {"prompt_id": "long", "skipped": "the prompt has 100011 tokens, --max_prompt_tokens is 100"}
    assert read(stage.folder / "out.skipped.jsonl") == read(stage.folder / "none.skipped.jsonl") == [skipped]
    records = read(stage.folder / "out.jsonl")
    assert [record["prompt_id"] for record in records] == ["a", "b"]
    for record, prompt in zip(records, ("where?", spelling)):
        assert (
            setting.tokenizer.decode(record["prompt_token_ids"])
            == f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
        )
        assert sum(token < 3 for token in record["prompt_token_ids"]) == 3 and len(record["samples"]) == 2
