"""Records through local worker processes, losing nothing: `map_files(jobs, make_work, pool, description)`.

Each worker owns its GPUs (or none). Records are handed out in chunks, the next one before the last is finished, so that
no worker waits; one that dies or stalls is replaced and its records are tried again, and one that always kills its
worker is found by halving the chunk. What is finished is kept in `<output>.partial` until the output is complete, so a
stage that is killed goes on where it stopped.
"""

import contextlib
import gc
import hashlib
import itertools
import json
import multiprocessing
import multiprocessing.connection
import multiprocessing.util
import os
import signal
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tqdm import tqdm

from utils import StageError, atomic_file, check_made_with, die_with_parent, dump_json, jsonl_writer, log, split_list


@dataclass(kw_only=True)
class PoolConfig:
    """The worker processes of a stage.

    Args:
        engine: local, worker processes of this machine; ray, actors on a Ray cluster (workers/ray_executor.py)
        gpus: auto, none, or physical GPU numbers (0,2,3)
        gpus_per_worker: GPUs that share one copy of the model (tensor parallel)
        cpu_workers: engines without GPUs
        chunk_size: prompts handed to a worker at once
        on_error: what becomes of a record that kills its workers: fail (the stage fails and names it) or skip (it is
            left out, counted and listed)
        stall_timeout: seconds without a finished chunk after which a worker counts as dead; 0: never
    """

    engine: str = "local"
    gpus: str = "auto"
    gpus_per_worker: int = 1
    cpu_workers: int = 1
    chunk_size: int = 128
    on_error: str = "fail"
    stall_timeout: float = 1800.0

    def __post_init__(self):
        if self.on_error not in ("fail", "skip"):
            raise StageError(f"--on_error should be fail or skip, got {self.on_error}")
        if self.chunk_size < 1:
            raise StageError(f"--chunk_size should be at least 1, got {self.chunk_size}")
        if not 0 <= self.stall_timeout < float("inf"):
            raise StageError(f"--stall_timeout should be a number of seconds, 0 or more, got {self.stall_timeout}")
        if self.engine not in ("local", "ray"):
            raise StageError(f"--engine should be local or ray, got {self.engine}")
        if self.engine == "local":
            self.environments()

    def environments(self):
        """One dictionary of environment variables a worker. Raises StageError for GPUs that are not there."""
        return worker_environments(self.gpus, self.gpus_per_worker, self.cpu_workers)


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
        raise StageError(
            f"--gpus {gpus}, --gpus_per_worker {gpus_per_worker}, --cpu_workers {cpu_workers}: each GPU "
            "may be named once, and the numbers should be at least 1"
        )
    unknown = [gpu for gpu in chosen if gpu not in allowed]
    if unknown:
        source = "nvidia-smi lists" if visible is None else "CUDA_VISIBLE_DEVICES allows"
        raise StageError(f"--gpus names {','.join(unknown)}, but {source} {','.join(allowed) or 'none'}")
    if not chosen and gpus_per_worker > 1:
        raise StageError(f"--gpus_per_worker {gpus_per_worker}: there is no GPU to share")
    if not chosen:
        return [{"CUDA_VISIBLE_DEVICES": ""}] * cpu_workers
    if len(chosen) % gpus_per_worker:
        raise StageError(f"{len(chosen)} GPUs cannot be split into groups of {gpus_per_worker} (--gpus_per_worker)")
    groups = [chosen[i : i + gpus_per_worker] for i in range(0, len(chosen), gpus_per_worker)]
    return [{"CUDA_VISIBLE_DEVICES": ",".join(group)} for group in groups]


def _physical_gpus():
    try:
        listing = subprocess.run(
            ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"], capture_output=True, text=True, timeout=60
        )
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return []
    return listing.stdout.split() if listing.returncode == 0 else []


# ---------------------------------------------------------------------------------------------- one worker


def _worker_main(make_work, environment, connection):
    os.environ.update(environment)
    die_with_parent()
    os.setpgid(0, 0)  # with whatever the engine starts, it can be killed as a group
    _end_group_with_this_process()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then ends the workers
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    gc.disable()  # nothing to collect while libraries are imported; saves 2 of 10 seconds
    try:
        work = make_work()
        gc.enable()
        connection.send(("ready", None))
        running = 0
        while True:
            if not running or connection.poll():
                if (message := connection.recv()) is None:
                    break
                work.begin(*message)
                running += 1
            else:
                for done in work.step():
                    running -= 1
                    connection.send(("done", done))
    except StageError as error:
        connection.send(("error", str(error)))
    except (EOFError, BrokenPipeError):
        pass
    except BaseException:
        connection.send(("broken", traceback.format_exc()))
    if not multiprocessing.active_children():  # those of an engine on several GPUs want an orderly end
        multiprocessing.util._exit_function()  # as at the end of any such process: semaphores are removed
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)  # taking the libraries down would take 3 seconds


def _end_group_with_this_process():
    """Start a process that kills this one's group once this one has ended in whatever way: an engine on several GPUs is
    processes of its own, which would stay, with the GPUs' memory, behind a worker that is killed."""
    leader = os.getpid()
    if os.fork() == 0:
        while os.getppid() == leader:
            time.sleep(0.5)
        os.killpg(leader, signal.SIGKILL)


class _Worker:
    def __init__(self, number, make_work, environment):
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_worker_main, args=(make_work, environment, theirs), daemon=False)
        self.process.start()
        theirs.close()
        gpus = environment.get("CUDA_VISIBLE_DEVICES")
        self.name = f"worker {number} ({'GPU ' + gpus if gpus else 'CPU'}, pid {self.process.pid})"
        self.ready, self.chunks, self.since = False, {}, time.monotonic()
        self.numbers = itertools.count()

    def takes(self, chunk):
        """Whether it should get this Chunk now: one that a worker was lost over goes alone."""
        return self.ready and (
            not self.chunks
            or (len(self.chunks) < IN_FLIGHT and not any(other.losses for other in (chunk, *self.chunks.values())))
        )

    def hand(self, chunk):
        """Give it a Chunk to work on."""
        number, self.since = next(self.numbers), time.monotonic()
        self.chunks[number] = chunk
        with contextlib.suppress(BrokenPipeError):  # it has died; noticed when it is asked
            self.connection.send((number, chunk.tasks))

    def ask(self, stall_timeout):
        """('ready' | 'done' | 'error' | 'lost' | None, value), without blocking; of a lost one the reason."""
        try:
            if self.connection.poll():
                kind, value = self.connection.recv()
                return ("lost", f"failed:\n{value.rstrip()}") if kind == "broken" else (kind, value)
        except (EOFError, OSError):
            self.process.join()
        if self.process.exitcode is not None:
            return "lost", f"died with exit code {self.process.exitcode}"
        if stall_timeout and (self.chunks or not self.ready) and time.monotonic() - self.since > stall_timeout:
            return "lost", f"made no progress for {stall_timeout:g} s (--stall_timeout)"
        return None, None

    def stop(self, wait=0):
        """End it, politely when there is time to `wait`, with every process that it started."""
        with contextlib.suppress(OSError):
            self.connection.send(None)
        self.process.join(wait)
        for kill in (lambda: os.killpg(self.process.pid, signal.SIGKILL), self.process.kill):
            with contextlib.suppress(OSError):
                kill()
        self.process.join()
        self.connection.close()


# ---------------------------------------------------------------------------------------------- all workers


@dataclass
class Chunk:
    tasks: list
    losses: int = 0  # workers that were lost over it


MAX_STARTS = 3  # of one worker, until it gets ready once
IN_FLIGHT = 2  # chunks that a worker has at once: while the last of one are finished, the next keeps the engine full


def map_chunks(make_work, chunks, environments, give_up, stall_timeout=0):
    """Yield `(tasks, results)` for every chunk, a list of tasks, as they are finished, in any order.

    One worker process per environment; `make_work()` is called once in each and returns an object with two methods:
    `begin(number, tasks)` takes a chunk, `step()` works on all chunks for a moment and returns [(number, results)] of
    those that are finished. A worker has IN_FLIGHT chunks at most, so a fast one takes more of them. A worker that
    dies, raises an exception or finishes no chunk for `stall_timeout` seconds is named and replaced, and its chunks are
    tried a second time, each alone, then in halves, each of them once, down to the one task that does it:
    `give_up(task, reason)` raises StageError or returns a result. A StageError inside a worker, and a worker that never
    gets ready in MAX_STARTS starts, end everything.
    """
    chunks, redo, starts = map(Chunk, chunks), [], [1] * len(environments)
    chunk = next(chunks, None)
    workers = [_Worker(n, make_work, environment) for n, environment in enumerate(environments)] if chunk else []
    try:
        while chunk or redo or any(worker.chunks for worker in workers):
            for _ in range(IN_FLIGHT):  # all get their first one before any gets its second
                for worker in workers:
                    if redo and worker.takes(redo[0]):
                        worker.hand(redo.pop(0))
                    elif chunk and worker.takes(chunk):
                        worker.hand(chunk)
                        chunk = next(chunks, None)
            multiprocessing.connection.wait(
                [worker.connection for worker in workers] + [worker.process.sentinel for worker in workers], timeout=1
            )
            for number, worker in enumerate(workers):
                kind, value = worker.ask(stall_timeout)
                if kind == "ready":
                    worker.ready, starts[number] = True, 0
                elif kind == "done":
                    done, results = value
                    worker.since = time.monotonic()
                    yield worker.chunks.pop(done).tasks, results
                elif kind == "error":
                    raise StageError(f"{worker.name} failed:\n{value}")
                elif kind == "lost":
                    reason = f"{worker.name} {value}"
                    worker.stop()
                    if starts[number] == MAX_STARTS:
                        raise StageError(
                            f"{reason}\nas did the {MAX_STARTS - 1} before it, all while starting; out of "
                            "memory? See the messages above and the system log"
                        )
                    starts[number] += 1
                    log.warning("%s; another starts in its place", reason)
                    workers[number] = _Worker(number, make_work, environments[number])
                    for lost in worker.chunks.values():
                        retried, culprit = retry(lost)
                        redo += retried
                        if culprit:
                            yield culprit, [give_up(culprit[0], reason)]
    finally:
        for worker in workers:
            worker.stop(wait=10 if worker.ready and not worker.chunks else 0)


def retry(lost):
    """(chunks to try instead of a lost one, the single task to give up as a list or None)."""
    if not lost.losses:
        return [Chunk(lost.tasks, 1)], None
    if len(lost.tasks) == 1:
        return [], lost.tasks
    middle = len(lost.tasks) // 2
    return [Chunk(lost.tasks[:middle], 1), Chunk(lost.tasks[middle:], 1)], None


# ---------------------------------------------------------------------------------------------- finished records


class Journal:
    """The finished records of an output that is not complete yet: `<output>.partial`.

    Its first line tells what the records were made with; each further one is a record, in the order in which they were
    finished. A line that a kill or a loss of power has torn, and all behind it, is dropped.

    Args:
        path: the output's path.
        made_with: {setting: value}, all that the records depend on.

    Raises StageError when the file was made with other settings.
    """

    def __init__(self, path, made_with):
        self.output = Path(path)
        self.path = self.output.with_name(self.output.name + ".partial")
        self.offsets = {}  # of each prompt_id's line
        self.path.parent.mkdir(parents=True, exist_ok=True)
        header, self.size = None, 0
        with open(self.path, "a+b") as file:
            file.seek(0)
            for line in file:
                record = _whole_record(line)
                if record is None:
                    break
                if header is None:
                    header = record
                else:
                    self.offsets[record.get("prompt_id")] = self.size
                self.size += len(line)
            if not self.offsets:  # settings of nothing do not matter
                header, self.size = None, 0
            if header is not None:
                found = f"{len(self.offsets)} finished records made"
                check_made_with(self.path, found, header.get("made_with", {}), made_with)
            file.truncate(self.size)
        if header is None:
            self.write([{"made_with": made_with}])

    def append(self, records):
        """Keep finished records; they survive a kill from here on."""
        places = self.write(records)
        self.offsets.update((record["prompt_id"], place) for record, place in zip(records, places))

    def write(self, records):
        """Append records; returns where each one begins. Raises StageError when the disk is full."""
        lines = [dump_json(record).encode() + b"\n" for record in records]
        places = list(itertools.accumulate(map(len, lines), initial=self.size))
        data = b"".join(lines)
        try:
            with open(self.path, "ab", buffering=0) as file:
                while data:
                    data = data[file.write(data) :]
        except OSError as error:
            raise StageError(
                f"{self.path}: {error.strerror}; what was finished before is kept there. Make room and start again"
            ) from None
        self.size = places[-1]
        return places

    def lines(self, ids):
        """The records of these prompt_ids as lines of bytes, in this order."""
        with open(self.path, "rb") as file:
            for prompt_id in ids:
                file.seek(self.offsets[prompt_id])
                yield file.readline()

    def remove(self):
        self.path.unlink(missing_ok=True)


def _whole_record(line):
    try:
        record = json.loads(line) if line.endswith(b"\n") else None
        return record if isinstance(record, dict) else None
    except ValueError:
        return None


def map_files(jobs, make_work, pool, description):
    """Run records through worker processes and write one output file per job, in input order.

    Everything is read, and so checked, before a worker starts. What a killed run has finished is not done again.

    Args:
        jobs: list of (function that returns an iterator of records, output path, {setting: value} that the output
            depends on), all done with one start of the workers.
        make_work: as `map_chunks` has it; a task is (job number, record), its result a record; one with a `skipped`
            reason is left out of the output, counted, and listed in `<output>.skipped.jsonl`.
        pool: PoolConfig
        description: of the progress bar
    """
    ids, journals = [], []
    for records, _, _ in jobs:
        job_ids = []
        ids.append((job_ids, digest_of(records(), job_ids)))
    for (_, path, made_with), (_, digest) in zip(jobs, ids):
        journals.append(Journal(path, made_with | {"contents of --input": digest}))
    tasks = (
        (number, record)
        for number, (records, _, _) in enumerate(jobs)
        for record in records()
        if record["prompt_id"] not in journals[number].offsets
    )
    finished, total = sum(len(journal.offsets) for journal in journals), sum(len(job_ids) for job_ids, _ in ids)
    if finished:
        log.info("going on after %d finished records", finished)

    def give_up(task, reason):
        prompt_id = task[1]["prompt_id"]
        if pool.on_error == "fail":
            raise StageError(
                f"{reason}\nThe record with prompt_id {prompt_id} does this to every worker; what the others "
                "gave is kept. --on_error skip leaves it out"
            )
        log.warning("prompt_id %s is left out: %s", prompt_id, reason)
        return {"prompt_id": prompt_id, "skipped": f"it ends every worker: {reason.splitlines()[-1]}"}

    chunks = partial(_chunks, tasks, total - finished, pool.chunk_size)
    if pool.engine == "ray":
        from workers import ray_executor as ray_workers

        count = ray_workers.connect(pool)
        found = ray_workers.map_chunks(make_work, chunks(count), count, pool, give_up)
    else:
        environments = pool.environments()
        gpus = [environment["CUDA_VISIBLE_DEVICES"] for environment in environments]
        log.info(
            "%d worker%s on %s", len(gpus), "s" * (len(gpus) > 1), f"GPUs {' '.join(gpus)}" if any(gpus) else "CPU"
        )
        found = map_chunks(make_work, chunks(len(environments)), environments, give_up, pool.stall_timeout)
    with tqdm(
        total=total,
        initial=finished,
        desc=description,
        unit="record",
        smoothing=0.1,
        mininterval=float(os.environ.get("TQDM_MININTERVAL", 0.1 if sys.stderr.isatty() else 10)),
    ) as bar:
        for done, results in found:
            for number, journal in enumerate(journals):
                journal.append([result for task, result in zip(done, results, strict=True) if task[0] == number])
            bar.update(len(done))
    for journal, (job_ids, _) in zip(journals, ids):
        _write_output(journal, job_ids)
    for journal in journals:  # only when all outputs are in place
        journal.remove()


def digest_of(records, ids=None):
    """16 digits that tell these records from others; their prompt_ids are added to the list `ids`."""
    digest = hashlib.sha256()
    for record in records:
        digest.update(dump_json(record).encode())
        if ids is not None:
            ids.append(record["prompt_id"])
    return digest.hexdigest()[:16]


def listing_of(path):
    """The list of an output's skipped records."""
    path = Path(path)
    return path.with_name(path.name.removesuffix(".jsonl") + ".skipped.jsonl")


def list_skipped(path, skipped):
    """Write the list of an output's skipped records, if there are any, and tell of it."""
    listing = listing_of(path)
    listing.unlink(missing_ok=True)
    if skipped:
        with jsonl_writer(listing) as write:
            for record in skipped:
                write(record)
        first = "; ".join(f"{r['prompt_id']}: {r['skipped']}" for r in skipped[:3])
        log.warning("skipped records are listed in %s (%s%s)", listing, first, " ..." * (len(skipped) > 3))


def _chunks(tasks, left, size, num_workers):
    """Lists of `size` tasks, smaller ones towards the end, so that all workers end at about the same time."""
    while left > 0:
        share = -(-left // (IN_FLIGHT * num_workers))
        chunk = list(itertools.islice(tasks, min(size, max(share, 8)) if num_workers > 1 else size))
        left -= len(chunk)
        yield chunk


def _write_output(journal, ids):
    """The output and the list of skipped records, from the journal, in input order."""
    path = journal.output
    lines = [line for line in journal.lines(ids) if b'"skipped"' in line]
    skipped = [record for record in map(json.loads, lines) if "skipped" in record]
    left_out = {record["prompt_id"] for record in skipped}
    list_skipped(path, skipped)
    if len(skipped) == len(ids):
        journal.remove()
        raise StageError(f"every record of {path} was skipped; see {listing_of(path)}")
    with atomic_file(path) as file:
        file.writelines(journal.lines(prompt_id for prompt_id in ids if prompt_id not in left_out))
    log.info("%s: %d records written, %d skipped", path, len(ids) - len(skipped), len(skipped))
