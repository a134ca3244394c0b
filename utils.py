"""What every stage needs: a checked command line, JSONL in and out, logging, seeds."""

import codecs
import contextlib
import ctypes
import dataclasses
import difflib
import hashlib
import inspect
import json
import logging
import math
import multiprocessing
import os
import re
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import fire

log = logging.getLogger("comal")


class StageError(RuntimeError):
    """An error whose message says all that the user needs: what, where, and what to do. Shown without a traceback."""


# ---------------------------------------------------------------------------------------------- command line


def run(*commands):
    """Run a stage's `main` (or one of several commands) from the command line.

    Fire 0.7 runs a function on its defaults before it complains about a mistyped flag, and guesses types (`0,1`
    becomes a tuple). So the flags are checked against the signature before anything runs, and every value is
    read as its annotation says (`str`, `int`, `float`, `bool`, `list`: comma-separated, and words without a flag go
    there). A command's `**` parameter may be annotated with a
    dataclass, whose fields are flags too: `def main(input: str, **training: TrainingConfig)`.

    Exit codes: 0 done, 1 the stage failed, 2 the command line is wrong, 130 interrupted, 143 terminated.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    signal.signal(signal.SIGTERM, _terminated)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where a shell started this with & or nohup
    argv = sys.argv[1:]
    program = Path(sys.argv[0]).name
    try:
        command = commands[0]
        if len(commands) > 1:
            names = {function.__name__: function for function in commands}
            if argv and argv[0] in names:
                command = names[argv.pop(0)]
                program = f"{program} {command.__name__}"
            else:
                wants_help = argv and argv[0] in ("--help", "-h")
                if argv and not wants_help:
                    print(f"{program}: error: unknown command {argv[0]!r}", file=sys.stderr)
                print(f"usage: {program} COMMAND --flag value ...   (COMMAND --help for its flags)", file=sys.stderr)
                for name, function in names.items():
                    print(f"  {name:14} {inspect.getdoc(function).splitlines()[0]}", file=sys.stderr)
                sys.exit(0 if wants_help else 2)
        flags = _flags(command)
        argv = _check_flags(program, argv, flags)
        if argv == ["--help"]:
            _print_help(program, command, flags)
            return
        fire.Fire(_fire_command(program, command, flags), command=argv, name=program)
    except StageError as error:
        _fail(f"{program}: error: {error}", 1)
    except KeyboardInterrupt as signalled:
        terminated = "SIGTERM" in signalled.args
        _fail(f"{program}: {'terminated' if terminated else 'interrupted'}", 143 if terminated else 130)
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        _fail(f"{program}: error: {error.strerror or error}{where}", 1)


def _terminated(number, frame):
    raise KeyboardInterrupt("SIGTERM")  # worker processes are ended and temporary files removed on the way out


def _fail(message, code):
    print(f"\n{message}", file=sys.stderr, flush=True)
    sys.exit(code)


def _config(command):
    """The dataclass that annotates the command's `**` parameter, or None."""
    return next((p.annotation for p in inspect.signature(command).parameters.values() if p.kind is p.VAR_KEYWORD), None)


def _flags(command):
    """{flag name: inspect.Parameter}, the command's own flags first, then the fields of its configuration."""
    own = [p for p in inspect.signature(command).parameters.values() if p.kind is not p.VAR_KEYWORD]
    fields = dataclasses.fields(_config(command)) if _config(command) else ()
    settings = [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            annotation=field.type,
            default=inspect.Parameter.empty if field.default is dataclasses.MISSING else field.default,
        )
        for field in fields
    ]
    return {p.name: p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own + settings}


def _check_flags(program, argv, flags):
    """The command line as `--name=value` words, which Fire cannot misread, or `--help` alone.

    Exits with code 2 if a word is not a known flag or the value of one.
    """
    words, given = list(argv), {}
    listed = next((name for name, p in flags.items() if p.annotation is list), None)
    while words:
        word = words.pop(0)
        if word in ("--help", "-h"):
            return ["--help"]
        if listed and not word.startswith("--"):
            given[listed] = f"{given[listed]},{word}" if listed in given else word
            continue
        if not word.startswith("--") or word == "--":
            _fail(f"{program}: error: unexpected argument {word!r}; every setting is a --flag", 2)
        name, has_value, value = word[2:].partition("=")
        name = name.replace("-", "_")
        if name not in flags:
            close = difflib.get_close_matches(name, flags, n=1)
            hint = f"; did you mean --{close[0]}?" if close else f"; see {program} --help"
            _fail(f"{program}: error: unknown flag --{name}{hint}", 2)
        if name in given:
            _fail(f"{program}: error: --{name} is given twice", 2)
        if not has_value and flags[name].annotation is bool:
            value = words.pop(0) if words and words[0].lower() in _BOOLS else "true"
        elif not has_value:
            if not words or words[0].startswith("--"):
                _fail(f"{program}: error: --{name} needs a value", 2)
            value = words.pop(0)
        given[name] = value
    missing = [f"--{name}" for name, p in flags.items() if p.default is p.empty and name not in given]
    if missing:
        _fail(f"{program}: error: missing {', '.join(missing)}; see {program} --help", 2)
    return [f"--{name}={value}" for name, value in given.items()]


def _print_help(program, command, flags):
    """What the command does, and each flag with its type, default and one line of explanation."""
    documentation = _documentation(command)
    explained = dict(re.findall(r"^ {4}(\w+): (.+(?:\n {8}.+)*)", documentation, re.MULTILINE))
    print(f"{program}: {documentation.partition('Args:')[0].strip()}\n")
    for name, flag in flags.items():
        default = "required" if flag.default is flag.empty else f"default {flag.default!r}"
        print(f"  --{name} ({flag.annotation.__name__}, {default})")
        print("      " + " ".join(explained.get(name, "").split()))


_BOOLS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


def _fire_command(program, command, flags):
    """The function handed to Fire: one parameter per flag, each read strictly by its annotation."""

    def call(**values):
        command(**values)  # returns None: Fire prints and chains whatever is returned

    def reader(name, kind):
        def read(text):
            try:
                if kind is bool:
                    return _BOOLS[text.lower()]
                if kind is list:
                    return split_list(text)
                value = text if kind is inspect.Parameter.empty else kind(text)
                if kind is float and not math.isfinite(value):
                    raise ValueError
                return value
            except (ValueError, KeyError):
                _fail(f"{program}: error: --{name} takes {kind.__name__}, got {text!r}", 2)

        return read

    call.__name__ = command.__name__
    call.__doc__ = _documentation(command)
    call.__signature__ = inspect.Signature(list(flags.values()))
    return fire.decorators.SetParseFns(**{n: reader(n, p.annotation) for n, p in flags.items()})(call)


def _documentation(command):
    """The command's docstring, its `Args:` continued with those of its configuration and what that inherits from."""
    text = inspect.getdoc(command)
    sections = [
        inspect.getdoc(base).partition("Args:\n")[2].rstrip()
        for base in inspect.getmro(_config(command) or object)
        if dataclasses.is_dataclass(base)
    ]
    text = text if "Args:" in text or not sections else text + "\n\nArgs:"
    return "\n".join([text.rstrip(), *sections])


# ---------------------------------------------------------------------------------------------- files


def split_list(value):
    """A comma-separated flag as a list of its non-empty parts."""
    return [part.strip() for part in value.split(",") if part.strip()]


def file_lists(**flags):
    """Comma-separated path flags as equally long lists of paths, inputs first.

    Raises StageError when the lists differ in length, an input is not a readable non-empty file, an output (`output`,
    `compared`) is given twice or is also an input.
    """
    lists = {name: [Path(part) for part in split_list(value)] for name, value in flags.items()}
    counts = {name: len(paths) for name, paths in lists.items()}
    if len(set(counts.values())) != 1 or not max(counts.values()):
        raise StageError(
            "these flags need one file each, or equally long comma-separated lists: "
            + ", ".join(f"--{name} has {count}" for name, count in counts.items())
        )
    inputs = [path for name, paths in lists.items() if name not in ("output", "compared") for path in paths]
    for path in inputs:
        check_input(path)
    (flag,) = {"output", "compared"} & set(lists) or {"output"}
    outputs = [path.resolve() for path in lists.get(flag, [])]
    for path in outputs:
        if outputs.count(path) > 1 or path in [other.resolve() for other in inputs]:
            raise StageError(f"--{flag} {path} is written twice or is also an input; give another name")
        if path.is_dir():
            raise StageError(f"--{flag} {path} is a directory; give a file name")
    return list(lists.values())


def check_at_least(low, **flags):
    """Raise StageError for a flag whose value is lower."""
    for name, value in flags.items():
        if not value >= low:
            raise StageError(f"--{name} should be at least {low}, got {value}")


def check_output_file(name, path):
    """Raise StageError unless `path` can be a file's name."""
    if not path:
        raise StageError(f"--{name} should name a file")
    if Path(path).is_dir():
        raise StageError(f"--{name} {path} is a directory; give a file name")


def check_input(path, also=""):
    """Raise StageError unless `path` is a non-empty file of text, or of the format `also`."""
    path = Path(path)
    if not path.is_file():
        raise StageError(f"input file {path} {'is not a file' if path.exists() else 'does not exist'}")
    if path.stat().st_size == 0:
        raise StageError(f"input file {path} is empty; the stage that wrote it has nothing to pass on")
    with open(path, "rb") as file:
        start = file.read(4)
    for magic, kind in _FORMATS.items():
        if start.startswith(magic) and kind != also:
            raise StageError(f"input file {path} is {kind}, not JSONL text; unpack or convert it first")


_FORMATS = {
    b"\x1f\x8b": "compressed with gzip",
    b"\x28\xb5\x2f\xfd": "compressed with zstd",
    b"PK\x03\x04": "a zip archive",
    b"PAR1": "a Parquet file",
    b"\xff\xfe": "UTF-16 text",
    b"\xfe\xff": "UTF-16 text",
}


# Which stage a field comes from, for whoever hands a file to the wrong one.
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


# ---------------------------------------------------------------------------------------------- fingerprints


def fingerprint(value):
    """16 hexadecimal digits that tell contents from others: of a text, of a file (a Path), of the records of an
    iterator, of anything else as JSON."""
    if isinstance(value, Path):
        with open(value, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:16]
    digest = hashlib.sha256()
    for part in value if isinstance(value, Iterator) else [value]:
        digest.update((part if isinstance(part, str) else dump_json(part)).encode())
    return digest.hexdigest()[:16]


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


# ---------------------------------------------------------------------------------------------- seeds

# Sample k of a prompt is drawn with the prompt's seed + k, so prompt seeds lie further apart than any K.
SEED_SPACING = 4096


def derive_seed(*parts):
    """A seed below 2**60 from any texts and numbers, a multiple of SEED_SPACING; the same on every machine."""
    digest = hashlib.blake2b("\0".join(map(str, parts)).encode(), digest_size=6).digest()
    return int.from_bytes(digest) * SEED_SPACING


# ---------------------------------------------------------------------------------------------- processes


def die_with_parent():
    """Ask the kernel to kill this process when its parent ends, however that ends (Linux only)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # 1 = PR_SET_PDEATHSIG
    parent = multiprocessing.parent_process()
    if parent and os.getppid() != parent.pid:  # it ended before the kernel was asked
        os._exit(1)
