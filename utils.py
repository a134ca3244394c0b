"""What every script needs: a checked command line, logging, files that appear whole or not at all, seeds."""

import argparse
import contextlib
import dataclasses
import difflib
import hashlib
import inspect
import json
import logging
import math
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

log = logging.getLogger("comal")


class StageError(RuntimeError):
    """An error whose message says all that the user needs: what, where, and what to do. Shown without a traceback."""


# ---------------------------------------------------------------------------------------------- command line


def run(*commands: Callable[..., None]) -> None:
    """Run a script's `main`, or one of several commands, from the command line.

    Each parameter of the command is a flag and is read as its annotation says: str, int, float, bool (`--flag` or
    `--flag false`), list (words without a flag). A `**` parameter that is annotated with a dataclass stands for all of
    its fields: `def main(input: str, **training: TrainingConfig)`. `--help` takes its text from the docstrings.

    Exit codes: 0 done, 1 the stage failed, 2 the command line is wrong, 130 interrupted, 143 terminated.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # also where the caller ignores it, as nohup's shell does
    signal.signal(signal.SIGTERM, _terminated)
    program, words, command = Path(sys.argv[0]).name, sys.argv[1:], commands[0]
    if len(commands) > 1:
        named = {function.__name__: function for function in commands}
        if not words or words[0] not in named:
            print(f"usage: {program} COMMAND --flag value ...   (COMMAND --help for its flags)", file=sys.stderr)
            for name, function in named.items():
                print(f"  {name:14} {(inspect.getdoc(function) or '').partition(chr(10))[0]}", file=sys.stderr)
            sys.exit(0 if words[:1] in (["--help"], ["-h"]) else 2)
        command = named[words.pop(0)]
        program = f"{program} {command.__name__}"
    try:
        command(**_read_flags(program, command, words))
    except StageError as error:
        _fail(f"{program}: error: {error}", 1)
    except OSError as error:
        _fail(f"{program}: error: {error.strerror or error}{f' ({error.filename})' if error.filename else ''}", 1)
    except KeyboardInterrupt as signalled:
        what, code = ("terminated", 143) if "SIGTERM" in signalled.args else ("interrupted", 130)
        _fail(f"{program}: {what}", code)


def _terminated(number, frame):
    raise KeyboardInterrupt("SIGTERM")  # worker processes are ended and temporary files removed on the way out


def _fail(message: str, code: int) -> NoReturn:
    print(f"\n{message}", file=sys.stderr, flush=True)
    sys.exit(code)


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        _fail(f"{self.prog}: error: {message}; see {self.prog} --help", 2)


def _read_flags(program, command, words):
    """{flag: value}. Ends the process with code 2 where a word is neither a flag nor the value of one."""
    parser = _Parser(program, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    parameters = list(inspect.signature(command).parameters.values())
    config = next((p.annotation for p in parameters if p.kind is p.VAR_KEYWORD), None)
    flags = {p.name: (p.annotation, p.default) for p in parameters if p.kind is not p.VAR_KEYWORD}
    for field in dataclasses.fields(config) if config else ():
        flags[field.name] = field.type, inspect._empty if field.default is dataclasses.MISSING else field.default
    documented = [command, *(inspect.getmro(config)[:-1] if config else ())]
    texts = [inspect.getdoc(one) or "" for one in documented]
    explained = dict(re.findall(r"^ {4}(\w+): (.+(?:\n {8}.+)*)", "\n".join(texts), re.MULTILINE))
    parser.description = texts[0].partition("Args:")[0].strip()
    required = [name for name, (_, default) in flags.items() if default is inspect._empty]
    for name, (kind, default) in flags.items():
        text = " ".join(explained.get(name, "").split()) + (f" (default: {default!r})", " (required)")[name in required]
        options: dict[str, Any] = {
            "help": text.replace("%", "%%"),
            "default": argparse.SUPPRESS,
        }  # the command has its own defaults
        if kind is list:
            parser.add_argument(name, nargs="*", **options)
        else:
            options |= {"nargs": "?", "const": True} if kind is bool else {}
            reader = {bool: _bool, float: _float}.get(kind, kind)
            parser.add_argument(f"--{name}", type=reader, metavar=kind.__name__, **options)
    words = [re.sub("^--[^=]*", lambda flag: "--" + flag[0][2:].replace("-", "_"), word) for word in words]
    has_list = any(kind is list for kind, _ in flags.values())
    values, unknown = (parser.parse_known_intermixed_args if has_list else parser.parse_known_args)(words)
    if unknown:
        close = difflib.get_close_matches(unknown[0].partition("=")[0].removeprefix("--"), flags, n=1)
        parser.error(f"unknown argument {unknown[0]}" + (f"; did you mean --{close[0]}?" if close else ""))
    if missing := [name for name in required if not hasattr(values, name)]:
        parser.error(f"missing --{', --'.join(missing)}")
    return vars(values)


def _bool(text):
    if text.lower() not in ("true", "1", "yes", "false", "0", "no"):
        raise argparse.ArgumentTypeError(f"should be true or false, got {text!r}")
    return text.lower() in ("true", "1", "yes")


def _float(text):
    with contextlib.suppress(ValueError):
        if math.isfinite(value := float(text)):
            return value
    raise argparse.ArgumentTypeError(f"should be a finite number, got {text!r}")


def split_list(value: str) -> list[str]:
    """A comma-separated flag as a list of its non-empty parts."""
    return [part.strip() for part in value.split(",") if part.strip()]


def check_at_least(low: float, **flags: float) -> None:
    """Raise StageError for a flag whose value is lower."""
    for name, value in flags.items():
        if not value >= low:
            raise StageError(f"--{name} should be at least {low}, got {value}")


# What files of other kinds begin with.
_KINDS = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"PAR1": "Parquet", b"\xff\xfe": "UTF-16", b"PK\3\4": "zip"}


def check_input(path: str | Path, also: str = "") -> None:
    """Raise StageError unless `path` is a file of text that is not empty, or of the kind `also`."""
    path = Path(path)
    if not path.is_file():
        raise StageError(f"input file {path} {'is not a file' if path.exists() else 'does not exist'}")
    if path.stat().st_size == 0:
        raise StageError(f"input file {path} is empty; the stage that wrote it has nothing to pass on")
    with open(path, "rb") as file:
        start = file.read(4)
    kind = next((kind for magic, kind in _KINDS.items() if start.startswith(magic)), also)
    if kind != also:
        raise StageError(f"input file {path} is a {kind} file, not JSONL in UTF-8; unpack or convert it first")


def check_output(name: str, path: str | Path) -> None:
    """Raise StageError unless `path`, the value of the flag `name`, can be a file's name."""
    if not str(path):
        raise StageError(f"--{name} should name a file")
    if Path(path).exists() and not Path(path).is_file():
        kind = "a directory" if Path(path).is_dir() else "a device or a pipe"
        raise StageError(f"--{name} {path} is {kind}; give a file name")


def file_lists(**flags: str) -> list[list[Path]]:
    """Comma-separated path flags as equally long lists of paths; `output` and `compared` are outputs.

    Raises StageError when the lists differ in length, for an input that is no file with something in it, and for an
    output that is given twice, is also an input, or is not a file's name.
    """
    lists = {name: [Path(part) for part in split_list(value)] for name, value in flags.items()}
    counts = {name: len(paths) for name, paths in lists.items()}
    if len(set(counts.values())) != 1 or not max(counts.values()):
        found = ", ".join(f"--{name} has {count}" for name, count in counts.items())
        raise StageError(f"these flags need one file each, or equally long comma-separated lists: {found}")
    taken = []
    for name, paths in sorted(lists.items(), key=lambda item: item[0] in ("output", "compared")):
        for path in paths:
            if name not in ("output", "compared"):
                check_input(path)
            else:
                check_output(name, path)
                if path.resolve() in taken:
                    raise StageError(f"--{name} {path} is written twice or is also an input; give another name")
            taken.append(path.resolve())
    return list(lists.values())


def first_line(error: BaseException) -> str:
    """What an exception of a library says, in one line."""
    return (str(error).splitlines() or [repr(error)])[0]


# ---------------------------------------------------------------------------------------------- files


def dump_json(record: Any) -> str:
    """A value as one line of JSON. Raises ValueError for NaN and infinity, which are not JSON."""
    return json.dumps(record, ensure_ascii=False, allow_nan=False)


@contextlib.contextmanager
def atomic_file(path: str | Path):
    """A binary file that takes its name only when the block ends without an error; it then survives a loss of power."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync(path.parent)
    except OSError as error:  # say where: writing to a full disk names no file
        raise OSError(error.errno, error.strerror, error.filename or str(path)) from None
    finally:
        temporary.unlink(missing_ok=True)


def sync(path: str | Path) -> None:
    """Wait until a file's contents, or a directory's names, would survive a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: str | Path, text: str) -> None:
    """Write a small file, whole or not at all."""
    with atomic_file(path) as file:
        file.write(text.encode())


# ---------------------------------------------------------------------------------------------- fingerprints, seeds


def fingerprint(value: Any) -> str:
    """16 hexadecimal digits that tell contents from others: of a text, of a file (a Path), of the records of an
    iterator, of anything else as JSON."""
    if isinstance(value, Path):
        with open(value, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:16]
    digest = hashlib.sha256()
    for part in value if isinstance(value, Iterator) else [value]:
        digest.update((part if isinstance(part, str) else dump_json(part)).encode())
    return digest.hexdigest()[:16]


# Sample k of a prompt is drawn with the prompt's seed + k, so prompt seeds lie further apart than any K.
SEED_SPACING = 4096


def derive_seed(*parts: Any) -> int:
    """A seed below 2**60 from any texts and numbers, a multiple of SEED_SPACING; the same on every machine."""
    digest = hashlib.blake2b("\0".join(map(str, parts)).encode(), digest_size=6).digest()
    return int.from_bytes(digest) * SEED_SPACING


# LEGACY, until the branches are merged
import codecs  # noqa: E402
import ctypes  # noqa: E402
import multiprocessing  # noqa: E402

SAMPLE_FIELDS = {"prompt_id": str, "prompt": str, "prompt_token_ids": list, "samples": list}


PROMPT_FIELDS = {"prompt": str}


WRITTEN_BY = {
    "prompt_token_ids": "sampling.py",
    "samples": "sampling.py",
    "chosen": "data_processing.py make_pairs",
    "rejected": "data_processing.py make_pairs",
    "chosen_token_ids": "data_processing.py make_pairs",
    "rejected_token_ids": "data_processing.py make_pairs",
    "messages": "data_processing.py make_sft",
} | {f"{model}_{side}_logp": "get_logprobs.py" for model in ("last", "ref") for side in ("chosen", "rejected")}


def read_jsonl(path, fields=None, unique="prompt_id"):
    """Yield the objects of a JSONL file, one a line, checked, in one pass that holds one record (and all ids).

    `fields` maps a required field to its type (or tuple of types). `unique` names the key that no two lines may
    share, or None. Lines end at "\\n" only: U+2028 and friends occur inside real prompts; blank ones, "\\r" before the
    end and a byte order mark mean nothing. Raises StageError with file and line number.
    """
    return (record for _, record in scan_jsonl(path, fields, unique))


def scan_jsonl(path, fields=None, unique="prompt_id"):
    """`read_jsonl` with the offset of each line: yields (offset, record)."""
    seen, offset, empty = set(), 0, True
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            where, begin, offset = f"{path}, line {number}", offset, offset + len(line)
            if not line.removeprefix(codecs.BOM_UTF8 if number == 1 else b"").strip():
                continue
            empty = False
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                record = json.loads(text, parse_constant=_refuse_constant, parse_float=_finite)
                if b"\\ud" in line.lower():  # half a surrogate pair is no text: no file can hold it
                    dump_json(record).encode()
            except UnicodeError as error:
                raise StageError(f"{where}: not UTF-8 text ({error})") from None
            except (ValueError, RecursionError) as error:
                raise StageError(f"{where}: not valid JSON ({error}); the file may be truncated") from None
            if not isinstance(record, dict):
                raise StageError(f"{where}: expected a JSON object, got {type(record).__name__}")
            for name, kind in (fields or {}).items():
                if name not in record:
                    writer = f" ({WRITTEN_BY[name]} writes it)" if name in WRITTEN_BY else ""
                    raise StageError(
                        f"{where}: field {name!r} is missing{writer}; found {', '.join(record) or 'no field'}"
                    )
                if not isinstance(record[name], kind) or isinstance(record[name], bool):
                    wanted = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
                    raise StageError(f"{where}: field {name!r} should be {wanted}, got {type(record[name]).__name__}")
            if unique in record:
                if not isinstance(record[unique], (str, int)) or isinstance(record[unique], bool):
                    raise StageError(
                        f"{where}: {unique} should be text or a number, got {type(record[unique]).__name__}"
                    )
                if str(record[unique]) in seen:
                    raise StageError(f"{where}: {unique} {str(record[unique])!r} occurs a second time")
                seen.add(str(record[unique]))
            yield begin, record
    if empty:
        raise StageError(f"{path}: no records")


def _finite(text):
    if math.isinf(number := float(text)):
        raise ValueError(f"{text} is too large a number")
    return number


def _refuse_constant(name):
    raise ValueError(f"{name} is not a JSON value")


PROMPT_FIELDS = {"prompt": str}


def read_prompts(path):
    """Yield prompt records; a record without `prompt_id` gets one made from its text.

    Raises StageError for an empty prompt and for two records with the same id.
    """
    seen = set()
    for number, record in enumerate(read_jsonl(path, PROMPT_FIELDS, unique=None), 1):
        where = f"{path}, record {number}"
        if not record["prompt"].strip():
            raise StageError(f"{where}: the prompt is empty")
        given = record.get("prompt_id")
        if type(given) not in (str, int, type(None)):
            raise StageError(f"{where}: prompt_id should be text or a number, got {type(given).__name__}")
        record["prompt_id"] = fingerprint(record["prompt"]) if given in (None, "") else str(given)
        if record["prompt_id"] in seen:
            origin = " (made from the text)" if given in (None, "") else ""
            raise StageError(f"{where}: prompt_id {record['prompt_id']!r}{origin} occurs a second time")
        seen.add(record["prompt_id"])
        yield record


SAMPLE_FIELDS = {"prompt_id": str, "prompt": str, "prompt_token_ids": list, "samples": list}


def read_samples(path, at_least=2):
    """Yield the records of a samples file (sampling.py): the same number of samples in each, `at_least` so many.

    Raises StageError for a record whose samples are not {text, token_ids, finish_reason}.
    """
    count = None
    for record in read_jsonl(path, SAMPLE_FIELDS):
        where = f"{path}, prompt_id {record['prompt_id']}"
        check_token_ids(where, "prompt_token_ids", record["prompt_token_ids"])
        for sample in record["samples"]:
            if not (isinstance(sample, dict) and isinstance(sample.get("text"), str)):
                raise StageError(
                    f"{where}: each of samples should be {{text, token_ids, finish_reason}}, "
                    f"got {dump_json(sample)[:100]}"
                )
            check_token_ids(where, "token_ids of a sample", sample.get("token_ids"))
        count = len(record["samples"]) if count is None else count
        if len(record["samples"]) != count:
            raise StageError(f"{where}: {len(record['samples'])} samples, but the records before it have {count}")
        if count < at_least:
            raise StageError(
                f"{where}: {count} samples, needed: {at_least}; sample again with --num_samples {at_least} or more"
            )
        yield record


def read_scores(path):
    """Yield the records of a scores file (scoring.py): samples and their K x K win probabilities.

    Raises StageError unless these lie in [0, 1], those of the two orders add up to 1, and the diagonal is null.
    """
    for record in read_samples(path):
        where, rows = f"{path}, prompt_id {record['prompt_id']}", record.get("win_probs")
        count = len(record["samples"])
        if not (
            isinstance(rows, list)
            and len(rows) == count
            and all(isinstance(row, list) and len(row) == count for row in rows)
        ):
            found = (
                "is missing; is this a scores file, as scoring.py writes it?" if rows is None else "has another shape"
            )
            raise StageError(f"{where}: win_probs should be {count} x {count} numbers for {count} samples, it {found}")
        for i in range(count):
            if rows[i][i] is not None:
                raise StageError(f"{where}: win_probs[{i}][{i}] should be null, got {repr(rows[i][i])[:100]}")
            for j in range(i):
                check_probability(where, f"win_probs[{i}][{j}]", rows[i][j])
                check_probability(where, f"win_probs[{j}][{i}]", rows[j][i])
                if abs(rows[i][j] + rows[j][i] - 1) > 1e-6:
                    raise StageError(
                        f"{where}: win_probs[{i}][{j}] and [{j}][{i}] should add up to 1, "
                        f"got {rows[i][j]} and {rows[j][i]}"
                    )
        yield record


def check_token_ids(where, name, ids):
    """Raise StageError unless `ids` is a list of whole numbers, 0 or more."""
    if not (isinstance(ids, list) and all(type(token) is int and token >= 0 for token in ids)):
        raise StageError(f"{where}: {name} should be a list of token ids, got {str(ids)[:100]}")


def check_probability(where, name, value):
    """Raise StageError unless `value` is a number from 0 to 1."""
    if not (type(value) in (int, float) and 0 <= value <= 1):
        raise StageError(f"{where}: {name} should be a probability, got {repr(value)[:100]}")


def are_messages(value):
    """Whether `value` is a list of {role, content} with text in both."""
    return isinstance(value, list) and all(
        isinstance(message, dict) and isinstance(message.get("role"), str) and isinstance(message.get("content"), str)
        for message in value
    )


def first_line(error):
    """What an exception of a library says, in one line."""
    return (str(error).splitlines() or [repr(error)])[0]


def dump_json(record):
    """One record as a line of JSON; refuses NaN and infinity, which are not JSON."""
    return json.dumps(record, ensure_ascii=False, allow_nan=False)


@contextlib.contextmanager
def atomic_file(path):
    """A binary file that takes its name only when the block ends without an error; it then survives a loss of power."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync(path.parent)
    except OSError as error:  # say where: writing to a full disk names no file
        raise OSError(error.errno, error.strerror, error.filename or str(path)) from None
    finally:
        temporary.unlink(missing_ok=True)


def sync(path):
    """Wait until a file's contents, or a directory's names, would survive a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def jsonl_writer(path):
    """A function that appends one record; the file takes its name only when the block ends without an error."""
    with atomic_file(path) as file:
        yield lambda record: file.write(dump_json(record).encode() + b"\n")


def write_text(path, text):
    """Write a small file, whole or not at all."""
    with atomic_file(path) as file:
        file.write(text.encode())


#


def check_made_with(path, what, then, now):
    """Raise StageError unless the settings that something was begun with are those to go on with.

    Args:
        path: where it is.
        what: what it holds, for the message.
        then, now: {setting: value}
    """
    changed = [
        f"{name}: {then.get(name)!r} then, {now.get(name)!r} now"
        for name in {**then, **now}
        if then.get(name) != now.get(name)
    ]
    if changed:
        raise StageError(
            f"{path} holds {what} with other settings ({'; '.join(changed)}); use those again, or remove it"
        )


def die_with_parent():
    """Ask the kernel to kill this process when its parent ends, however that ends (Linux only)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # 1 = PR_SET_PDEATHSIG
    parent = multiprocessing.parent_process()
    if parent and os.getppid() != parent.pid:  # it ended before the kernel was asked
        os._exit(1)


def check_output_file(name, path):
    """Raise StageError unless `path` can be a file's name."""
    if not path:
        raise StageError(f"--{name} should name a file")
    if Path(path).is_dir():
        raise StageError(f"--{name} {path} is a directory; give a file name")


def read_jsonl(path, fields=None, unique="prompt_id"):
    """Yield the objects of a JSONL file, one a line, checked, in one pass that holds one record (and all ids).

    `fields` maps a required field to its type (or tuple of types). `unique` names the key that no two lines may
    share, or None. Lines end at "\\n" only: U+2028 and friends occur inside real prompts; blank ones, "\\r" before the
    end and a byte order mark mean nothing. Raises StageError with file and line number.
    """
    return (record for _, record in scan_jsonl(path, fields, unique))


def scan_jsonl(path, fields=None, unique="prompt_id"):
    """`read_jsonl` with the offset of each line: yields (offset, record)."""
    seen, offset, empty = set(), 0, True
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            where, begin, offset = f"{path}, line {number}", offset, offset + len(line)
            if not line.removeprefix(codecs.BOM_UTF8 if number == 1 else b"").strip():
                continue
            empty = False
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                record = json.loads(text, parse_constant=_refuse_constant, parse_float=_finite)
                if b"\\ud" in line.lower():  # half a surrogate pair is no text: no file can hold it
                    dump_json(record).encode()
            except UnicodeError as error:
                raise StageError(f"{where}: not UTF-8 text ({error})") from None
            except (ValueError, RecursionError) as error:
                raise StageError(f"{where}: not valid JSON ({error}); the file may be truncated") from None
            if not isinstance(record, dict):
                raise StageError(f"{where}: expected a JSON object, got {type(record).__name__}")
            for name, kind in (fields or {}).items():
                if name not in record:
                    writer = f" ({WRITTEN_BY[name]} writes it)" if name in WRITTEN_BY else ""
                    raise StageError(
                        f"{where}: field {name!r} is missing{writer}; found {', '.join(record) or 'no field'}"
                    )
                if not isinstance(record[name], kind) or isinstance(record[name], bool):
                    wanted = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
                    raise StageError(f"{where}: field {name!r} should be {wanted}, got {type(record[name]).__name__}")
            if unique in record:
                if not isinstance(record[unique], (str, int)) or isinstance(record[unique], bool):
                    raise StageError(
                        f"{where}: {unique} should be text or a number, got {type(record[unique]).__name__}"
                    )
                if str(record[unique]) in seen:
                    raise StageError(f"{where}: {unique} {str(record[unique])!r} occurs a second time")
                seen.add(str(record[unique]))
            yield begin, record
    if empty:
        raise StageError(f"{path}: no records")


def _finite(text):
    if math.isinf(number := float(text)):
        raise ValueError(f"{text} is too large a number")
    return number


def _refuse_constant(name):
    raise ValueError(f"{name} is not a JSON value")


def read_prompts(path):
    """Yield prompt records; a record without `prompt_id` gets one made from its text.

    Raises StageError for an empty prompt and for two records with the same id.
    """
    seen = set()
    for number, record in enumerate(read_jsonl(path, PROMPT_FIELDS, unique=None), 1):
        where = f"{path}, record {number}"
        if not record["prompt"].strip():
            raise StageError(f"{where}: the prompt is empty")
        given = record.get("prompt_id")
        if type(given) not in (str, int, type(None)):
            raise StageError(f"{where}: prompt_id should be text or a number, got {type(given).__name__}")
        record["prompt_id"] = fingerprint(record["prompt"]) if given in (None, "") else str(given)
        if record["prompt_id"] in seen:
            origin = " (made from the text)" if given in (None, "") else ""
            raise StageError(f"{where}: prompt_id {record['prompt_id']!r}{origin} occurs a second time")
        seen.add(record["prompt_id"])
        yield record


def read_samples(path, at_least=2):
    """Yield the records of a samples file (sampling.py): the same number of samples in each, `at_least` so many.

    Raises StageError for a record whose samples are not {text, token_ids, finish_reason}.
    """
    count = None
    for record in read_jsonl(path, SAMPLE_FIELDS):
        where = f"{path}, prompt_id {record['prompt_id']}"
        check_token_ids(where, "prompt_token_ids", record["prompt_token_ids"])
        for sample in record["samples"]:
            if not (isinstance(sample, dict) and isinstance(sample.get("text"), str)):
                raise StageError(
                    f"{where}: each of samples should be {{text, token_ids, finish_reason}}, "
                    f"got {dump_json(sample)[:100]}"
                )
            check_token_ids(where, "token_ids of a sample", sample.get("token_ids"))
        count = len(record["samples"]) if count is None else count
        if len(record["samples"]) != count:
            raise StageError(f"{where}: {len(record['samples'])} samples, but the records before it have {count}")
        if count < at_least:
            raise StageError(
                f"{where}: {count} samples, needed: {at_least}; sample again with --num_samples {at_least} or more"
            )
        yield record


def read_scores(path):
    """Yield the records of a scores file (scoring.py): samples and their K x K win probabilities.

    Raises StageError unless these lie in [0, 1], those of the two orders add up to 1, and the diagonal is null.
    """
    for record in read_samples(path):
        where, rows = f"{path}, prompt_id {record['prompt_id']}", record.get("win_probs")
        count = len(record["samples"])
        if not (
            isinstance(rows, list)
            and len(rows) == count
            and all(isinstance(row, list) and len(row) == count for row in rows)
        ):
            found = (
                "is missing; is this a scores file, as scoring.py writes it?" if rows is None else "has another shape"
            )
            raise StageError(f"{where}: win_probs should be {count} x {count} numbers for {count} samples, it {found}")
        for i in range(count):
            if rows[i][i] is not None:
                raise StageError(f"{where}: win_probs[{i}][{i}] should be null, got {repr(rows[i][i])[:100]}")
            for j in range(i):
                check_probability(where, f"win_probs[{i}][{j}]", rows[i][j])
                check_probability(where, f"win_probs[{j}][{i}]", rows[j][i])
                if abs(rows[i][j] + rows[j][i] - 1) > 1e-6:
                    raise StageError(
                        f"{where}: win_probs[{i}][{j}] and [{j}][{i}] should add up to 1, "
                        f"got {rows[i][j]} and {rows[j][i]}"
                    )
        yield record


def check_token_ids(where, name, ids):
    """Raise StageError unless `ids` is a list of whole numbers, 0 or more."""
    if not (isinstance(ids, list) and all(type(token) is int and token >= 0 for token in ids)):
        raise StageError(f"{where}: {name} should be a list of token ids, got {str(ids)[:100]}")


def check_probability(where, name, value):
    """Raise StageError unless `value` is a number from 0 to 1."""
    if not (type(value) in (int, float) and 0 <= value <= 1):
        raise StageError(f"{where}: {name} should be a probability, got {repr(value)[:100]}")


def are_messages(value):
    """Whether `value` is a list of {role, content} with text in both."""
    return isinstance(value, list) and all(
        isinstance(message, dict) and isinstance(message.get("role"), str) and isinstance(message.get("content"), str)
        for message in value
    )


@contextlib.contextmanager
def jsonl_writer(path):
    """A function that appends one record; the file takes its name only when the block ends without an error."""
    with atomic_file(path) as file:
        yield lambda record: file.write(dump_json(record).encode() + b"\n")
