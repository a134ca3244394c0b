"""Others' outputs, matched with our responses by the instruction's text.

python -m pytest tests/test_outside.py
"""

import json

import pytest

from analysis.outside import align, read_outputs
from utils import StageError


def rows(*texts):
    return [{"instruction": text, "output": f"to {text}", "generator": "gpt4", "dataset": "d"} for text in texts]


def ours(*texts):
    return [
        {"prompt_id": f"alpaca_eval-{number}", "prompt": text, "samples": [{"text": "ours", "token_ids": [1]}]}
        for number, text in enumerate(texts)
    ]


@pytest.fixture
def outputs(tmp_path):
    """A function that writes rows as a JSON file and reads them as outputs."""

    def write(content, encoding="utf-8"):
        path = tmp_path / "model_outputs.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding=encoding)
        return read_outputs(path)

    return write


def test_read_outputs_are_responses_records(outputs):
    import msgspec

    from records import Responses

    records = outputs(rows("one", "two\u2028"))
    assert [record["prompt"] for record in records] == ["one", "two\u2028"]
    assert [record["samples"] for record in records] == [[{"text": "to one"}], [{"text": "to two\u2028"}]]
    assert len({record["prompt_id"] for record in records}) == 2
    for record in records:
        msgspec.convert(record, Responses)


@pytest.mark.parametrize(
    "content, message",
    [
        (rows("one", "two", "one"), "occurs 2 times: 'one'"),
        ([], "no outputs"),
        ("", "is empty"),
        ({"one": "two"}, "should be a JSON list .*object"),
        ([{"instruction": "one"}], r"missing required field `output` - at `\$\[0\]`"),
        ([*rows("one"), {"instruction": "two", "output": None}], r"got `null` - at `\$\[1\].output`"),
        ('{"prompt": "one"}\n{"prompt": "two"}\n', "should be a JSON list"),
    ],
)
def test_read_outputs_says_what_is_wrong(outputs, content, message):
    with pytest.raises(StageError, match=message):
        outputs(content)


def test_read_outputs_of_no_file(tmp_path):
    with pytest.raises(StageError, match="none.json does not exist"):
        read_outputs(tmp_path / "none.json")


def test_read_outputs_with_byte_order_mark(outputs):
    assert outputs(rows("one"), encoding="utf-8-sig")[0]["prompt"] == "one"


def test_align_takes_our_order_and_ids_and_the_exact_text_first(outputs):
    found = align(ours("b", " c\n", "a "), outputs(rows("a", "x", "c", "b", "a ")))
    assert found == [
        {"prompt_id": "alpaca_eval-0", "prompt": "b", "samples": [{"text": "to b"}]},
        {"prompt_id": "alpaca_eval-1", "prompt": " c\n", "samples": [{"text": "to c"}]},
        {"prompt_id": "alpaca_eval-2", "prompt": "a ", "samples": [{"text": "to a "}]},
    ]


def test_align_names_the_first_prompts_without_output(outputs):
    with pytest.raises(StageError, match="gpt4.json has no output to 12 of our prompts, first alpaca_eval-1, .*-10$"):
        align(ours("0", *(f"prompt {number}" for number in range(12))), outputs(rows("0")), "gpt4.json")


def test_align_refuses_several_outputs_that_fit_equally(outputs):
    with pytest.raises(StageError, match="several outputs to 1 of our prompts, first alpaca_eval-0"):
        align(ours("a"), outputs(rows("a ", " a")))
