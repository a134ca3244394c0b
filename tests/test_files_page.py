"""docs/files.md: every schema of records.py with every field, its type and an example, and no other.

python -m pytest tests/test_files_page.py
"""

import json
import re
import types
import typing

import pytest
from helpers.pages import table_rows, text

import records

SCHEMAS = {name: kind for name, kind in vars(records).items() if typing.is_typeddict(kind) and kind.__annotations__}

TYPES = {
    str: "text",
    int: "whole number",
    float: "number",
    records.Text: "text, not blank",
    records.TokenIds: "token ids",
    records.Probability: "number from 0 to 1",
    records.LogProbability: "number, at most 0",
}


def in_words(kind):
    """A type of records.py as files.md names it, and whether the field may be missing."""
    if typing.get_origin(kind) is typing.NotRequired:
        return in_words(typing.get_args(kind)[0])[0], "no"
    for known, words in TYPES.items():
        if kind == known:
            return words, "yes"
    if typing.is_typeddict(kind):
        return kind.__name__, "yes"
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Annotated:
        limits = [
            f"{words} {getattr(meta, name)}"
            for meta in kind.__metadata__
            for name, words in (("min_length", "at least"), ("max_length", "at most"))
            if getattr(meta, name) is not None
        ]
        same = re.sub(r"at least (\d+), at most \1$", r"exactly \1", ", ".join(limits))
        return ", ".join(filter(None, (in_words(arguments[0])[0], same))), "yes"
    if origin is list:
        return f"list of {in_words(arguments[0])[0]}", "yes"
    if origin in (types.UnionType, typing.Union):
        return " or ".join("null" if part is type(None) else in_words(part)[0] for part in arguments), "yes"
    raise TypeError(kind)


def sections():
    """{heading: text} of the second level of files.md's headings, for those that name a schema."""
    parts = re.split(r"^### (.+)$", text("docs/files.md"), flags=re.MULTILINE)[1:]
    return {
        re.match(r"\w+", name)[0]: re.split("^## ", part, flags=re.MULTILINE)[0]
        for name, part in zip(parts[::2], parts[1::2])
    }


def test_files_page_has_every_schema_and_no_other():
    assert list(sections()) == list(SCHEMAS)


@pytest.mark.parametrize("name", SCHEMAS)
def test_files_page_has_every_field_with_its_type_and_no_other(name):
    hints = typing.get_type_hints(SCHEMAS[name], include_extras=True)
    written = [(row[0].strip("`"), row[1], row[2]) for row in table_rows(sections()[name])]
    assert written == [(field, *in_words(kind)) for field, kind in hints.items()]


@pytest.mark.parametrize("name", SCHEMAS)
def test_files_page_has_an_example_that_its_schema_allows(name):
    example = re.search(r"```json\n(.*?)```", sections()[name], re.DOTALL)[1]
    line = json.dumps(json.loads(example)).encode()
    record = records.decode(line, SCHEMAS[name])
    records.check(record, SCHEMAS[name], record, set())
    assert not record.keys() - typing.get_type_hints(SCHEMAS[name]).keys() - {"prompt_id"}
