"""records.py: what each file may hold, and what is said of what it may not.

python -m pytest tests/test_records.py
"""

import json

import pytest

import records
from records import Chat, Comparison, Data, Message, Pair, Prompt, Responses, Samples, Scores, SkippedPrompt
from utils import StageError

MESSAGE = {"role": "assistant", "content": "y"}
SAMPLE = {"text": "a", "token_ids": [1], "finish_reason": "stop"}


def scored(prompt_id="a", count=2, **changes):
    """A record of a scores file."""
    return {
        "prompt_id": prompt_id,
        "prompt": "x",
        "prompt_token_ids": [1],
        "samples": [{"text": str(n), "token_ids": [n], "finish_reason": "stop"} for n in range(count)],
        "win_probs": [[None if i == j else 0.5 for j in range(count)] for i in range(count)],
    } | changes


PAIR = {
    "prompt_id": "a",
    "prompt": [{"role": "user", "content": "x"}],
    "chosen": [MESSAGE],
    "rejected": [MESSAGE | {"content": "z"}],
    "prompt_token_ids": [1],
    "chosen_token_ids": [2],
    "rejected_token_ids": [3],
    "win_prob": 0.75,
}
LOGPS = dict.fromkeys(("last_chosen_logp", "last_rejected_logp", "ref_chosen_logp", "ref_rejected_logp"), -1.5)
VALID = {
    Message: MESSAGE,
    Prompt: {"prompt_id": "a", "prompt": "x"},
    Samples: {name: value for name, value in scored().items() if name != "win_probs"},
    Scores: scored(),
    Responses: {"prompt_id": "a", "prompt": "x", "samples": [{"text": "from elsewhere"}]},
    Comparison: scored(),
    Pair: PAIR,
    Data: PAIR | LOGPS,
    Chat: {"prompt_id": "a", "messages": [{"role": "user", "content": "x"}, MESSAGE], "weight": 1},
    SkippedPrompt: {"prompt_id": "a", "skipped": "too long"},
}


def without(record, name):
    return {key: value for key, value in record.items() if key != name}


def refusal(path, schema):
    with pytest.raises(StageError) as refused:
        list(records.read(path, schema))
    return str(refused.value)


@pytest.mark.parametrize("schema", VALID, ids=lambda schema: schema.__name__)
def test_read_keeps_fields_that_the_schema_does_not_know(jsonl, tmp_path, schema):
    record = VALID[schema] | {"mine": {"x": [1, None]}}
    assert list(records.read(jsonl("a.jsonl", record), schema)) == [record]
    with records.writer(tmp_path / "b.jsonl", schema) as write:
        write(record)
    assert list(records.read(tmp_path / "b.jsonl", schema)) == [record]


@pytest.mark.parametrize(
    "schema, name", [(schema, name) for schema, record in VALID.items() for name in sorted(schema.__required_keys__)]
)
def test_read_names_the_field_that_is_missing(jsonl, schema, name):
    found = refusal(jsonl("a.jsonl", without(VALID[schema], name)), schema)
    assert "a.jsonl, line 1: " in found and f"field {name} is missing" in found


def test_read_says_which_stage_writes_a_missing_field(jsonl):
    assert "scoring.py writes it" in refusal(jsonl("a.jsonl", VALID[Samples]), Scores)
    assert "get_logprobs.py writes it" in refusal(jsonl("a.jsonl", PAIR), Data)


GOOD = '{"prompt_id": "a", "prompt": "x"}\n'


@pytest.mark.parametrize(
    "second, words",
    [
        (b"not json\n", "not valid JSON"),
        (b'{"prompt_id": "b", "prompt": "x", "sco', "not valid JSON"),  # the file was cut
        (b"{}\0\0\n", "not valid JSON"),
        (b"[" * 100_000 + b"\n", "not valid JSON"),
        (b'{"prompt_id": "b", "prompt": "x", "score": NaN}\n', "not valid JSON"),
        (b'{"prompt_id": "b", "prompt": "x", "score": 1e999}\n', "not valid JSON"),
        (b'{"prompt_id": "\xff"}\n', "not valid JSON in UTF-8"),
        (b'{"prompt": "\\ud83d"}\n', "not valid JSON"),  # half an emoji: no tokenizer takes it
        (b"\xef\xbb\xbf{}\n", "not valid JSON in UTF-8"),  # a byte order mark elsewhere than at the beginning
        (b"[1, 2]\n", "should be a JSON object, got [1, 2]"),
        (b'{"prompt_id": "b", "score": 2}\n', "field prompt is missing; found prompt_id, score"),
        (b'{"prompt_id": "b", "prompt": ["x"]}\n', "prompt_id b: prompt should be str, got ['x']"),
        (b'{"prompt_id": true, "prompt": "x"}\n', "prompt_id should be"),
        (b'{"prompt_id": ["3"], "prompt": "x"}\n', "prompt_id should be"),
        (b'{"prompt_id": "b", "prompt": " \\n"}\n', "prompt should be text that is not blank"),
        (GOOD.encode(), "prompt_id a: the id"),
    ],
)
def test_read_names_file_and_line(tmp_path, second, words):
    path = tmp_path / "a.jsonl"
    path.write_bytes(GOOD.encode() + second)
    found = refusal(path, Prompt)
    assert "a.jsonl, line 2: " in found and words in found


def test_read_overlooks_what_editors_leave(tmp_path):
    """A byte order mark, carriage returns, blank lines."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + GOOD.replace("\n", "\r\n").encode() + b"\r\n\n \n")
    assert [record["prompt_id"] for record in records.read(path, Prompt)] == ["a"]


def test_read_refuses_a_file_without_records(jsonl):
    assert "no records" in refusal(jsonl("a.jsonl"), Prompt)


def test_read_splits_at_line_feeds_only(jsonl):
    texts = ["a\u2028b", "a\u2029b", "a\x85b", "a\rb", "a\nb"]
    expected = [{"prompt_id": str(i), "prompt": text} for i, text in enumerate(texts)]
    path = jsonl("a.jsonl", *expected)
    assert path.read_bytes().count(b"\n") == 5  # only ASCII control characters are escaped in JSON
    assert list(records.read(path, Prompt)) == expected


def test_read_makes_the_keys_of_prompts_from_their_text(jsonl):
    path = jsonl("a.jsonl", {"prompt": "x"}, {"prompt": "y", "prompt_id": "mine"}, {"prompt": "z", "prompt_id": 3})
    # The first 16 hex digits of sha256("x").
    assert [record["prompt_id"] for record in records.read(path, Prompt)] == ["2d711642b726b044", "mine", "3"]
    path = jsonl("a.jsonl", *({"prompt": "x", "prompt_id": number} for number in range(3)))
    assert [record["prompt_id"] for record in records.read(path, Prompt)] == ["0", "1", "2"]


@pytest.mark.parametrize(
    "first, second",
    [({"prompt": "x"}, {"prompt": "x"}), ({"prompt": "x", "prompt_id": "3"}, {"prompt": "y", "prompt_id": 3})],
)
def test_read_refuses_prompts_with_one_key(jsonl, first, second):
    assert "occurs a second time" in refusal(jsonl("a.jsonl", first, second), Prompt)


@pytest.mark.parametrize(
    "record, words",
    [
        (scored(count=1), "samples has 1 entries, needed: 2"),
        (scored(count=3), "samples has 3 entries, but the records before it have 2"),
        (scored(prompt_token_ids=["1"]), "prompt_token_ids[0] should be int"),
        (scored(prompt_token_ids=[True]), "prompt_token_ids[0] should be int"),
        (scored(prompt_token_ids=[-1]), "prompt_token_ids[0] should be int >= 0, got -1"),
        (scored(samples=["a", "b"]), "samples[0] should be an object, got 'a'"),
        (scored(samples=[SAMPLE, {"text": "a"}]), "samples[1]: field token_ids is missing"),
        (scored(samples=[SAMPLE | {"text": 1}] * 2), "samples[0].text should be str, got 1"),
        (scored(win_probs=None), "win_probs should be a list, got None"),
        (scored(win_probs=[[None], [None]]), "win_probs should be 2 x 2 numbers"),
        (scored(win_probs=[[None, None], [None, None]]), "win_probs[1][0] and [0][1] should be probabilities"),
        (scored(win_probs=[[None, 1.2], [-0.2, None]]), "win_probs[0][1] should be float"),
    ],
)
def test_read_refuses_scores(jsonl, record, words):
    found = refusal(jsonl("a.jsonl", *([scored("first")] if len(record["samples"]) == 3 else []), record), Scores)
    assert "a.jsonl, line " in found and "prompt_id a" in found and words in found


def test_writer_takes_its_name_at_the_end(tmp_path):
    path = tmp_path / "new" / "a.jsonl"
    expected = [
        {"prompt_id": "1", "prompt": "naïve 東京\u2028\n", "p": 0.1},
        {"prompt_id": "2", "prompt": "y", "p": None},
    ]
    with records.writer(path, Prompt) as write:
        for record in expected:
            write(record)
        assert not path.exists()
    assert [json.loads(line) for line in path.read_bytes().split(b"\n") if line] == expected
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_writer_leaves_nothing_after_an_exception(tmp_path, error):
    with pytest.raises(error), records.writer(tmp_path / "a.jsonl", Prompt) as write:
        write({"prompt": "x"})
        raise error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("record", [{"prompt": "x", "score": float("nan")}, {"prompt": 1}, {}])
def test_writer_keeps_the_old_file_when_a_record_is_wrong(tmp_path, jsonl, record):
    path = jsonl("a.jsonl", {"prompt": "old"})
    with pytest.raises(ValueError), records.writer(path, Prompt) as write:
        write(record)
    assert [record["prompt"] for record in records.read(path, Prompt)] == ["old"]
    assert list(tmp_path.iterdir()) == [path]
