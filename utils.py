"""What every stage needs: a checked command line, JSONL in and out, logging, seeds, local worker processes."""

import contextlib
import ctypes
import dataclasses
import difflib
import hashlib
import inspect
import itertools
import json
import logging
import multiprocessing
import multiprocessing.connection
import os
import re
import signal
import subprocess
import sys
import traceback
from pathlib import Path

import fire
from tqdm import tqdm

log = logging.getLogger("comal")


class StageError(RuntimeError):
    """An error whose message says all that the user needs: what, where, and what to do. Shown without a traceback."""


# ---------------------------------------------------------------------------------------------- command line

def run(*commands):
    """Run a stage's `main` (or one of several commands) from the command line.

    Fire 0.7 runs a function on its defaults before it complains about a mistyped flag, and guesses types (`0,1`
    becomes a tuple). So the flags are checked against the signature before anything runs, and every value is
    read as its annotation says (`str`, `int`, `float`, `bool`). A command's `**` parameter may be annotated with a
    dataclass, whose fields are flags too: `def main(input: str, **training: TrainingConfig)`.

    Exit codes: 0 done, 1 the stage failed, 2 the command line is wrong, 130 interrupted.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr)
    logging.getLogger("httpx").setLevel(logging.WARNING)
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
    except KeyboardInterrupt:
        _fail(f"{program}: interrupted", 130)
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        _fail(f"{program}: error: {error.strerror or error}{where}", 1)


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
    settings = [inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, annotation=field.type, default=
                inspect.Parameter.empty if field.default is dataclasses.MISSING else field.default) for field in fields]
    return {p.name: p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own + settings}


def _check_flags(program, argv, flags):
    """The command line as `--name=value` words, which Fire cannot misread, or `--help` alone.

    Exits with code 2 if a word is not a known flag or the value of one.
    """
    words, given = list(argv), {}
    while words:
        word = words.pop(0)
        if word in ("--help", "-h"):
            return ["--help"]
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
                return text if kind is inspect.Parameter.empty else kind(text)
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
    sections = [inspect.getdoc(base).partition("Args:\n")[2].rstrip()
                for base in inspect.getmro(_config(command) or object) if dataclasses.is_dataclass(base)]
    text = text if "Args:" in text or not sections else text + "\n\nArgs:"
    return "\n".join([text.rstrip(), *sections])


# ---------------------------------------------------------------------------------------------- files

def split_list(value):
    """A comma-separated flag as a list of its non-empty parts."""
    return [part.strip() for part in value.split(",") if part.strip()]


def file_lists(**flags):
    """Comma-separated path flags as equally long lists of paths, inputs first, outputs in `output`.

    Raises StageError when the lists differ in length, an input is not a readable non-empty file, an output is
    given twice or is also an input.
    """
    lists = {name: [Path(part) for part in split_list(value)] for name, value in flags.items()}
    counts = {name: len(paths) for name, paths in lists.items()}
    if len(set(counts.values())) != 1 or not max(counts.values()):
        raise StageError("these flags need one file each, or equally long comma-separated lists: "
                         + ", ".join(f"--{name} has {count}" for name, count in counts.items()))
    inputs = [path for name, paths in lists.items() if name != "output" for path in paths]
    for path in inputs:
        check_input(path)
    outputs = [path.resolve() for path in lists.get("output", [])]
    for path in outputs:
        if outputs.count(path) > 1 or path in [other.resolve() for other in inputs]:
            raise StageError(f"--output {path} is written twice or is also an input; give another name")
        if path.is_dir():
            raise StageError(f"--output {path} is a directory; give a file name")
    return list(lists.values())


def check_input(path):
    """Raise StageError unless `path` is a non-empty file."""
    path = Path(path)
    if not path.is_file():
        raise StageError(f"input file {path} {'is not a file' if path.exists() else 'does not exist'}")
    if path.stat().st_size == 0:
        raise StageError(f"input file {path} is empty; the stage that wrote it has nothing to pass on")


def read_jsonl(path, fields=None, unique="prompt_id"):
    """Yield the objects of a JSONL file, one a line, checked.

    `fields` maps a required field to its type (or tuple of types). `unique` names the key that no two lines may
    share. Lines end at "\\n" only: U+2028 and friends occur inside real prompts. Raises StageError with file and
    line number.
    """
    seen = set()
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            where = f"{path}, line {number}"
            try:
                record = json.loads(line, parse_constant=_refuse_constant)
                if b"\\ud" in line.lower():  # half a surrogate pair is no text: no file can hold it
                    dump_json(record).encode()
            except ValueError as error:
                raise StageError(f"{where}: not valid JSON ({error}); the file may be truncated") from None
            if not isinstance(record, dict):
                raise StageError(f"{where}: expected a JSON object, got {type(record).__name__}")
            for name, kind in (fields or {}).items():
                if name not in record:
                    raise StageError(f"{where}: field {name!r} is missing; found {', '.join(record) or 'no field'}")
                if not isinstance(record[name], kind):
                    wanted = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
                    raise StageError(f"{where}: field {name!r} should be {wanted}, "
                                     f"got {type(record[name]).__name__}")
            if unique in record:
                if not isinstance(record[unique], (str, int)):
                    raise StageError(f"{where}: {unique} should be text or a number, got {type(record[unique]).__name__}")
                if record[unique] in seen:
                    raise StageError(f"{where}: {unique} {record[unique]!r} occurs a second time")
                seen.add(record[unique])
            yield record
    if not seen and unique in (fields or {}):
        raise StageError(f"{path}: no records")


def _refuse_constant(name):
    raise ValueError(f"{name} is not a JSON value")


PROMPT_FIELDS = {"prompt": str}


def read_prompts(path):
    """Yield prompt records; a record without `prompt_id` gets one made from its text.

    Raises StageError for an empty prompt and for two records with the same id.
    """
    seen = set()
    for number, record in enumerate(read_jsonl(path, PROMPT_FIELDS), 1):
        if not record["prompt"].strip():
            raise StageError(f"{path}, line {number}: the prompt is empty")
        given = record.get("prompt_id")
        record["prompt_id"] = text_id(record["prompt"]) if given in (None, "") else str(given)
        if record["prompt_id"] in seen:
            raise StageError(f"{path}, line {number}: prompt_id {record['prompt_id']!r} (made from the text where "
                             "the file has none) occurs a second time")
        seen.add(record["prompt_id"])
        yield record
    if not seen:
        raise StageError(f"{path}: no records")


def text_id(text):
    """A stable 16-digit id of a text."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def dump_json(record):
    """One record as a line of JSON; refuses NaN and infinity, which are not JSON."""
    return json.dumps(record, ensure_ascii=False, allow_nan=False)


@contextlib.contextmanager
def jsonl_writer(path):
    """A function that appends one record; the file takes its name only when the block ends without an error."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "w", encoding="utf-8", newline="\n") as file:
            yield lambda record: file.write(dump_json(record) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path, text):
    """Write a small file under a temporary name, then rename it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


# ---------------------------------------------------------------------------------------------- seeds

# Sample k of a prompt is drawn with the prompt's seed + k, so prompt seeds lie further apart than any K.
SEED_SPACING = 4096


def derive_seed(*parts):
    """A seed below 2**60 from any texts and numbers, a multiple of SEED_SPACING; the same on every machine."""
    digest = hashlib.blake2b("\0".join(map(str, parts)).encode(), digest_size=6).digest()
    return int.from_bytes(digest) * SEED_SPACING


# ---------------------------------------------------------------------------------------------- workers

def worker_environments(gpus="auto", gpus_per_worker=1, cpu_workers=1):
    """The environment variables of each worker process: which GPUs it owns, or none.

    `gpus`: `auto` (all that this process may use, or the CPU where there are none), a comma-separated list of
    physical numbers as nvidia-smi shows them, or `none`. With CUDA_VISIBLE_DEVICES set, only GPUs named there
    may be used. Raises StageError for a GPU that does not exist, or numbers that do not divide evenly.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    allowed = _physical_gpus() if visible is None else [] if visible.strip() == "-1" else split_list(visible)
    chosen = [] if gpus == "none" else allowed if gpus == "auto" else split_list(gpus)
    if min(gpus_per_worker, cpu_workers) < 1 or len(set(chosen)) < len(chosen):
        raise StageError(f"--gpus {gpus}, --gpus_per_worker {gpus_per_worker}, --cpu_workers {cpu_workers}: each GPU "
                         "may be named once, and the numbers should be at least 1")
    unknown = [gpu for gpu in chosen if gpu not in allowed]
    if unknown:
        source = "nvidia-smi lists" if visible is None else "CUDA_VISIBLE_DEVICES allows"
        raise StageError(f"--gpus names {','.join(unknown)}, but {source} {','.join(allowed) or 'none'}")
    if not chosen:
        log.info("running on CPU with %d worker%s", cpu_workers, "s" * (cpu_workers > 1))
        return [{"CUDA_VISIBLE_DEVICES": ""}] * cpu_workers
    if len(chosen) % gpus_per_worker:
        raise StageError(f"{len(chosen)} GPUs cannot be split into groups of {gpus_per_worker} (--gpus_per_worker)")
    groups = [chosen[i:i + gpus_per_worker] for i in range(0, len(chosen), gpus_per_worker)]
    return [{"CUDA_VISIBLE_DEVICES": ",".join(group)} for group in groups]


def _physical_gpus():
    try:
        listing = subprocess.run(["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"],
                                 capture_output=True, text=True, timeout=60)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return []
    return listing.stdout.split() if listing.returncode == 0 else []


def die_with_parent():
    """Ask the kernel to kill this process when its parent ends, however that ends (Linux only)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # 1 = PR_SET_PDEATHSIG


def _worker_main(make_work, environment, connection):
    os.environ.update(environment)
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then ends the workers
    try:
        work = make_work()
        connection.send(("ready", None))
        while (task := connection.recv()) is not None:
            connection.send(("done", work(task)))
    except StageError as error:
        connection.send(("error", str(error)))
    except (EOFError, BrokenPipeError):
        pass
    except BaseException:
        connection.send(("error", traceback.format_exc()))


class _Worker:
    def __init__(self, number, make_work, environment):
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_worker_main, args=(make_work, environment, theirs), daemon=False)
        self.process.start()
        theirs.close()
        gpus = environment.get("CUDA_VISIBLE_DEVICES")
        self.name = f"worker {number} ({'GPU ' + gpus if gpus else 'CPU'}, pid {self.process.pid})"
        self.task = None  # index of the chunk it works on
        self.ready = False

    def stop(self, wait):
        with contextlib.suppress(OSError):
            self.connection.send(None)
        self.process.join(wait)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        self.connection.close()


MAX_ATTEMPTS = 3


def map_chunks(make_work, chunks, environments):
    """Yield `(chunk, work(chunk))` for every chunk, in order, computed by one worker process per environment.

    `make_work()` is called once in each worker and returns the function `work`. Chunks are handed out one at a
    time, so a fast worker takes more of them. A worker that dies is named and replaced, and its chunk is tried
    again; a chunk that is lost MAX_ATTEMPTS times, or an exception inside a worker, raises StageError.
    """
    tasks, more = enumerate(chunks), True
    handed, redo, finished, attempts = {}, [], {}, {}  # chunks in work; lost ones; results held for order; tries
    next_index = 0
    workers = [_Worker(number, make_work, environment) for number, environment in enumerate(environments)]
    try:
        while True:
            for worker in workers:
                if not worker.ready or worker.task is not None:
                    continue
                if redo:
                    worker.task = redo.pop(0)
                elif more and len(finished) < 4 * len(workers):  # bounds what is held back for the order
                    index, chunk = next(tasks, (None, None))
                    more = index is not None
                    worker.task = index
                    handed.update({index: chunk} if more else {})
                if worker.task is not None:
                    with contextlib.suppress(BrokenPipeError):  # it has died; noticed below
                        worker.connection.send(handed[worker.task])
            if not more and not handed:
                break
            multiprocessing.connection.wait(
                [worker.connection for worker in workers] + [worker.process.sentinel for worker in workers])
            for number, worker in enumerate(workers):
                kind, value = _receive(worker)
                if kind == "ready":
                    worker.ready = True
                elif kind == "done":
                    finished[worker.task] = (handed.pop(worker.task), value)
                    worker.task = None
                elif kind == "error":
                    worker.ready, worker.task = True, None  # it is on its way out
                    raise StageError(f"{worker.name} failed:\n{value}")
                elif kind == "died":
                    place = worker.task if worker.task is not None else f"start of worker {number}"
                    attempts[place] = attempts.get(place, 0) + 1
                    message = f"{worker.name} died with exit code {worker.process.exitcode}"
                    if attempts[place] == MAX_ATTEMPTS:
                        raise StageError(f"{message}, as did {MAX_ATTEMPTS - 1} before it at the same place; out of "
                                         "memory? See the messages above and the system log")
                    log.warning("%s; another starts in its place", message)
                    if worker.task is not None:
                        redo.append(worker.task)
                    workers[number] = _Worker(number, make_work, environments[number])
            while next_index in finished:
                yield finished.pop(next_index)
                next_index += 1
    finally:
        for worker in workers:
            worker.stop(wait=10 if worker.ready and worker.task is None else 0)


def _receive(worker):
    """('ready' | 'done' | 'error' | 'died' | None, value) of one worker, without blocking."""
    try:
        if worker.connection.poll():
            return worker.connection.recv()
    except (EOFError, OSError):
        worker.process.join()
        return "died", None
    return ("died", None) if worker.process.exitcode is not None and not worker.connection.poll() else (None, None)


def map_files(jobs, make_work, environments, chunk_size, description):
    """Run records through worker processes and write one output file per job, in input order.

    `jobs`: list of (function that returns an iterator of records, output path), all done with one start of the
    workers. `work(list of (job number, record))` returns one record each; a record with a `skipped` reason is
    left out of the output, counted, and listed in `<output>.skipped.jsonl`.
    """
    total = sum(sum(1 for _ in records()) for records, _ in jobs)  # reads, and so checks, everything first
    stream = ((number, record) for number, (records, _) in enumerate(jobs) for record in records())
    chunks = iter(lambda: list(itertools.islice(stream, chunk_size)), [])
    counts = [[0, []] for _ in jobs]
    with contextlib.ExitStack() as stack:
        writers = [stack.enter_context(jsonl_writer(path)) for _, path in jobs]
        bar = stack.enter_context(tqdm(total=total, desc=description, unit="record", smoothing=0.1))
        for chunk, results in map_chunks(make_work, chunks, environments):
            for (number, _), result in zip(chunk, results, strict=True):
                if "skipped" in result:
                    counts[number][1].append({"prompt_id": result["prompt_id"], "skipped": result["skipped"]})
                else:
                    writers[number](result)
                    counts[number][0] += 1
                bar.update()
        bar.close()
        for (_, path), (written, skipped) in zip(jobs, counts):
            _report_skipped(Path(path), written, skipped)


def _report_skipped(path, written, skipped):
    log.info("%s: %d records written, %d skipped", path, written, len(skipped))
    listing = path.with_name(path.name.removesuffix(".jsonl") + ".skipped.jsonl")
    listing.unlink(missing_ok=True)
    if skipped:
        with jsonl_writer(listing) as write:
            for record in skipped:
                write(record)
        first = "; ".join(f"{r['prompt_id']}: {r['skipped']}" for r in skipped[:3])
        log.warning("skipped records are listed in %s (%s%s)", listing, first, " ..." * (len(skipped) > 3))
    if not written:
        raise StageError(f"every record of {path} was skipped; see {listing}")
