"""What every script needs: a checked command line, logging, files that appear whole or not at all, seeds."""

import argparse
import contextlib
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
    for client in ("httpx", "httpx2"):  # they would log each request
        logging.getLogger(client).setLevel(logging.WARNING)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # also where the caller ignores it, as nohup's shell does
    signal.signal(signal.SIGTERM, _terminated)
    program, words, command = Path(sys.argv[0]).name, sys.argv[1:], commands[0]
    if len(commands) > 1:
        named = {function.__name__: function for function in commands}
        if not words or words[0] not in named:
            usage = [f"usage: {program} COMMAND --flag value ...   (COMMAND --help for its flags)"]
            usage += [f"  {name:14} {(inspect.getdoc(it) or '').partition(chr(10))[0]}" for name, it in named.items()]
            print(*usage, sep="\n", file=sys.stderr)
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
    parameters = list(inspect.signature(command).parameters.values())
    config = parameters.pop().annotation if inspect.getfullargspec(command).varkw else None
    parameters += inspect.signature(config).parameters.values() if config else ()
    flags = {p.name: (str if p.annotation is p.empty else p.annotation, p.default) for p in parameters}
    texts = [inspect.getdoc(one) or "" for one in (command, *(inspect.getmro(config)[:-1] if config else ()))]
    explained = dict(re.findall(r"^ {4}(\w+): (.+(?:\n {8}.+)*)", "\n".join(texts), re.MULTILINE))
    parser = _Parser(program, allow_abbrev=False, argument_default=argparse.SUPPRESS)  # commands have their defaults
    parser.description = texts[0].partition("Args:")[0].strip()
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    required = [name for name, (_, default) in flags.items() if default is inspect._empty]
    for name, (kind, default) in flags.items():
        text = " ".join(explained.get(name, "").split()) + (f" (default: {default!r})", " (required)")[name in required]
        options = {"help": text.replace("%", "%%")}
        if kind is list:
            parser.add_argument(name, nargs="*", **options)
        else:
            options |= {"nargs": "?", "const": True} if kind is bool else {}
            reader = {bool: _bool, float: _float}.get(kind, kind)
            parser.add_argument(f"--{name}", type=reader, metavar=kind.__name__, **options)
    words = [re.sub("^--[^=]*", lambda flag: "--" + flag[0][2:].replace("-", "_"), word) for word in words]
    values, unknown = parser.parse_known_intermixed_args(words)
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


_MAGIC = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"PAR1": "Parquet", b"\xff\xfe": "UTF-16", b"PK\3\4": "zip"}


def check_input(path: str | Path, also: str = "") -> None:
    """Raise StageError unless `path` is a file of text that is not empty, or of the kind `also`."""
    path = Path(path)
    if not path.is_file():
        raise StageError(f"input file {path} {'is not a file' if path.exists() else 'does not exist'}")
    if path.stat().st_size == 0:
        raise StageError(f"input file {path} is empty; the stage that wrote it has nothing to pass on")
    with open(path, "rb") as file:
        start = file.read(4)
    kind = next((kind for magic, kind in _MAGIC.items() if start.startswith(magic)), also)
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
    """Comma-separated path flags, outputs (`output`, `compared`) last, as equally long lists. Raises StageError for
    other lengths, an input without anything in it, and an output that is given twice, an input, or no file."""
    lists = {name: [Path(part) for part in split_list(value)] for name, value in flags.items()}
    if len(set(map(len, lists.values()))) != 1 or not all(lists.values()):
        found = ", ".join(f"--{name} has {len(paths)}" for name, paths in lists.items())
        raise StageError(f"these flags need one file each, or equally long comma-separated lists: {found}")
    taken = []
    for name, paths in lists.items():
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
