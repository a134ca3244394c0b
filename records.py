"""Every file that passes between stages: one schema each, read, checked and written here.

A file holds one JSON object a line, in UTF-8; lines end at "\\n" alone, because U+2028 and its like occur in real
prompts. A record is a dictionary. Its schema says which fields it has and of which type; fields that the schema does
not know are kept and passed on. `prompt_id` is the key: text, unique in a file, and what files are joined on.
"""

import codecs
import contextlib
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, NotRequired, TypedDict

import msgspec
from msgspec import Meta

from utils import StageError, atomic_file, dump_json, fingerprint

Text = Annotated[str, Meta(pattern=r"\S")]  # with something other than white space in it
TokenIds = list[Annotated[int, Meta(ge=0)]]
Probability = Annotated[float, Meta(ge=0, le=1)]
LogProbability = Annotated[float, Meta(gt=-1e30, le=1e-3)]  # rounding may lift that of a certain token above 0
OneMessage = Annotated[list["Message"], Meta(min_length=1, max_length=1)]


# ---------------------------------------------------------------------------------------------- schemas


class Message(TypedDict):
    """One turn of a chat."""

    role: str  # system, user or assistant
    content: str


class Prompt(TypedDict):
    """What a policy answers (data/prompts). A record without `prompt_id` gets one made from the text."""

    prompt_id: NotRequired[str | int | None]
    prompt: Text


class Sample(TypedDict):
    """One response of a policy."""

    text: str
    token_ids: TokenIds  # as sampled, with the end token where one was sampled
    finish_reason: NotRequired[str | None]  # stop, or length: it ran into the limit


class Samples(TypedDict):
    """K responses to a prompt, K the same in the whole file (sampling.py)."""

    prompt_id: str
    prompt: str
    prompt_token_ids: TokenIds  # the chat-encoded prompt
    samples: list[Sample]


class Scores(Samples):
    """Samples and the judge's verdicts on them (scoring.py)."""

    win_probs: list[list[Probability | None]]  # (K, K): [i][j] = P(sample i beats sample j), null on the diagonal
    order_gap: NotRequired[float | None]  # mean absolute disagreement of the two presentation orders (position bias)
    label_mass: NotRequired[float | None]  # mean probability that the judge puts on its two labels together


class Response(TypedDict):
    """One response of any system; others' have no token ids."""

    text: str
    token_ids: NotRequired[TokenIds]
    finish_reason: NotRequired[str | None]


class Responses(TypedDict):
    """One response to a prompt of an evaluation set (eval.py generate): `samples` with one entry."""

    prompt_id: str
    prompt: str
    samples: Annotated[list[Response], Meta(min_length=1)]


class Comparison(TypedDict):
    """Two systems' responses to a prompt, ours first, and the judge's verdict (eval.py compare)."""

    prompt_id: str
    prompt: str
    samples: Annotated[list[Response], Meta(min_length=2, max_length=2)]
    win_probs: list[list[Probability | None]]  # (2, 2)
    order_gap: NotRequired[float | None]
    label_mass: NotRequired[float | None]


class Pair(TypedDict):
    """A preference pair, in TRL's conversational format (data_processing.py make_pairs, or from elsewhere).

    Pairs from elsewhere may hold `prompt`, `chosen` and `rejected` alone; get_logprobs.py adds the other fields, and
    takes their label for certain.
    """

    prompt_id: NotRequired[str | int]
    prompt: Annotated[list[Message], Meta(min_length=1)]
    chosen: OneMessage
    rejected: OneMessage
    prompt_token_ids: NotRequired[TokenIds]
    chosen_token_ids: NotRequired[TokenIds]
    rejected_token_ids: NotRequired[TokenIds]
    win_prob: NotRequired[Probability]  # P(chosen beats rejected)
    score_chosen: NotRequired[Probability]  # mean win probability against the other samples
    score_rejected: NotRequired[Probability]


class Data(TypedDict):
    """A pair and its log-probabilities under two models, summed over response tokens, natural (get_logprobs.py)."""

    prompt_id: str
    prompt: NotRequired[list[Message]]
    chosen: NotRequired[OneMessage]
    rejected: NotRequired[OneMessage]
    prompt_token_ids: TokenIds
    chosen_token_ids: TokenIds
    rejected_token_ids: TokenIds
    win_prob: Probability
    last_chosen_logp: LogProbability  # under the policy that the responses were sampled from
    last_rejected_logp: LogProbability
    ref_chosen_logp: LogProbability  # under the reference
    ref_rejected_logp: LogProbability
    chosen_num_tokens: NotRequired[int]
    rejected_num_tokens: NotRequired[int]


class Chat(TypedDict):
    """A chat for supervised fine-tuning (data_processing.py make_sft): the last message is the answer to learn."""

    prompt_id: NotRequired[str | int]
    messages: Annotated[list[Message], Meta(min_length=2)]
    weight: NotRequired[Annotated[float, Meta(ge=0, lt=1e30)]]  # of the example in the loss; default 1


class Record(TypedDict):
    """Any record, for readers that take what they find, as the report does with files that may be unfinished."""


class SkippedPrompt(TypedDict):
    """A record that a stage left out, and why (<output>.skipped.jsonl)."""

    prompt_id: str
    skipped: str


# ---------------------------------------------------------------------------------------------- what types cannot say


def _check_win_probs(record, first):
    rows, count = record["win_probs"], len(record["samples"])
    if [len(row) for row in rows] != [count] * count:
        raise ValueError(f"win_probs should be {count} x {count} numbers for {count} samples, it has another shape")
    for i in range(count):
        if rows[i][i] is not None:
            raise ValueError(f"win_probs[{i}][{i}] should be null, got {rows[i][i]}")
        for j in range(i):
            both = [rows[i][j], rows[j][i]]
            if None in both or abs(sum(both) - 1) > 1e-6:
                found = " and ".join(map(dump_json, both))
                raise ValueError(f"win_probs[{i}][{j}] and [{j}][{i}] should be probabilities of sum 1, got {found}")


def _check_samples(record, first):
    count, expected = len(record["samples"]), len(first["samples"])
    if count != expected:
        raise ValueError(f"samples has {count} entries, but the records before it have {expected}")
    if count < 2:
        raise ValueError(f"samples has {count} entries, needed: 2; sample again with --num_samples 2 or more")


PAIR_TOKEN_IDS = ("prompt_token_ids", "chosen_token_ids", "rejected_token_ids")


def _check_pair(record, first):
    present = [name for name in PAIR_TOKEN_IDS if name in record]
    complete = len(present) == len(PAIR_TOKEN_IDS)
    if present and not complete:
        names = ", ".join(PAIR_TOKEN_IDS)
        raise ValueError(f"it has {', '.join(present)} but not all of {names}; give all of them, or text alone")
    for name, role in (("prompt", "user"), ("chosen", "assistant"), ("rejected", "assistant")):
        _check_last_message(record, name, role, may_be_empty=complete)  # an empty response may be the end token alone


def _check_last_message(record, name, role, may_be_empty):
    last = record[name][-1]
    if last["role"] != role or not (last["content"] or may_be_empty):
        raise ValueError(f"{name} should end with text by the {role}, got {repr(last)[:200]}")


CHECKS: dict[type, list[Callable[[dict, dict], None]]] = {  # called with a record and the file's first one
    Samples: [_check_samples],
    Scores: [_check_samples, _check_win_probs],
    Comparison: [_check_win_probs],
    Pair: [_check_pair],
    Chat: [lambda record, first: _check_last_message(record, "messages", "assistant", may_be_empty=True)],
}

# What the key of a record that has none is made from.
KEYS: dict[type, Callable[[dict], Any]] = {
    Prompt: lambda record: record["prompt"],
    Pair: lambda record: [record["prompt"], record["chosen"], record["rejected"]],  # prompts may repeat
}

# Which stage writes a field, for whoever hands a file to the wrong one.
WRITERS = {
    "sampling.py": ["samples", "prompt_token_ids"],
    "scoring.py": ["win_probs"],
    "data_processing.py make_pairs": ["chosen", "rejected", "chosen_token_ids", "rejected_token_ids", "win_prob"],
    "data_processing.py make_sft": ["messages"],
    "get_logprobs.py": ["last_chosen_logp", "last_rejected_logp", "ref_chosen_logp", "ref_rejected_logp"],
}

# What a value should be, in msgspec's words and in a user's.
WORDS = {
    r"str matching regex.*": "text that is not blank",
    r"float (<= 0.001|> -1e.?30)": "a log-probability, 0 or less",
    r"int \| str( \| null)?": "text or a number",
    "^array": "a list",
    "^object": "an object",
}


# ---------------------------------------------------------------------------------------------- reading and writing


def read(path: str | Path, schema: type) -> Iterator[dict]:
    """Yield the records of a file, checked, in one pass that holds one record (and all keys) in memory. Blank lines,
    "\\r" at the end of a line and a byte order mark mean nothing.

    Raises StageError with file, line, `prompt_id`, field and what was found for a record that its schema does not
    allow, for a key that occurs twice, and for a file without records.
    """
    return (record for _, record in scan(path, schema))


def scan(path: str | Path, schema: type) -> Iterator[tuple[int, dict]]:
    """`read` with the offset of each line: yields (offset, record)."""
    seen, offset, first = set(), 0, None
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            begin, offset = offset, offset + len(line)
            line = line.removeprefix(codecs.BOM_UTF8) if begin == 0 else line
            if not line.strip():
                continue
            try:
                record = decode(line, schema)
                first = first or record
                check(record, schema, first, seen)
            except ValueError as error:
                raise StageError(f"{path}, line {number}: {error}") from None
            yield begin, record
    if first is None:
        raise StageError(f"{path}: no records")


def read_at(path: str | Path, offset: int, schema: type) -> dict:
    """The record at an offset that `scan` has given."""
    with open(path, "rb") as file:
        file.seek(offset)
        return decode(file.readline().removeprefix(b"" if offset else codecs.BOM_UTF8), schema)


def check(record, schema, first, seen):
    """What a schema's types cannot say, and that the key is not in `seen`, to which it is added. Raises ValueError."""
    key = record.get("prompt_id")
    try:
        for check_more in CHECKS.get(schema, []):
            check_more(record, first)
        if key in seen:
            made = schema in KEYS and key == fingerprint(KEYS[schema](record))
            raise ValueError(f"the id{' (made from the text)' * made} occurs a second time")
    except ValueError as error:
        raise ValueError(f"prompt_id {key[:100]}: {error}" if key is not None else str(error)) from None
    if key is not None:
        seen.add(key)


def decode(line: bytes, schema: type) -> dict:
    """The record of one line, with its key as text. Raises ValueError, with the `prompt_id` where there is one."""
    try:
        record = msgspec.json.decode(line)
    except (ValueError, RecursionError):
        cut = "" if line.endswith(b"\n") else "; the file may have been cut off here"
        raise ValueError(f"not valid JSON in UTF-8: {_why_not_json(line)}{cut}") from None
    try:
        msgspec.convert(record, schema)
    except msgspec.ValidationError as error:
        raise ValueError(_explain(error, record)) from None
    key = record.get("prompt_id")
    if key in (None, "") and schema in KEYS:
        key = fingerprint(KEYS[schema](record))
    if key is not None:
        record["prompt_id"] = str(key)
    return record


def _why_not_json(line):
    try:
        json.loads(line)
    except (ValueError, RecursionError) as error:
        return error
    return "NaN, a number that is too large, or half a character (a lone surrogate)"  # which Python's parser takes


def _explain(error, record):
    """What msgspec finds wrong with a record, in a user's words: which field, what it should be, what it is."""
    if not isinstance(record, dict):
        return f"should be a JSON object, got {dump_json(record)[:100]}"
    message, _, place = str(error).replace("`", "").partition(" - at ")
    place = place.lstrip("$.")
    where = f"prompt_id {str(record['prompt_id'])[:100]}: " if "prompt_id" in record else ""
    if missing := re.fullmatch(r"Object missing required field (\w+)", message):
        where += f"{place}: " if place else ""
        writer = "".join(f" ({stage} writes it)" for stage, fields in WRITERS.items() if missing[1] in fields)
        return f"{where}field {missing[1]} is missing{writer}; found {', '.join(_at(record, place)) or 'no field'}"
    expected = message.partition(", got ")[0].removeprefix("Expected ")
    for pattern, words in WORDS.items():
        expected = re.sub(pattern, words, expected)
    return f"{where}{place} should be {expected}, got {repr(_at(record, place))[:100]}"


def _at(value, place):
    """What lies at `samples[0].text` in a record."""
    for name, index in re.findall(r"(\w+)|\[(\d+)\]", place):
        value = value[name] if name else value[int(index)]
    return value


@contextlib.contextmanager
def writer(path: str | Path, schema: type):
    """A function that appends one record to a file, which takes its name only when the block ends without an error.

    Raises ValueError for a record that its schema does not allow, and for NaN and infinity, which JSON has not.
    """
    with atomic_file(path) as file:

        def write(record: dict) -> None:
            msgspec.convert(record, schema)
            file.write(dump_json(record).encode() + b"\n")

        yield write
