"""Records through workers, losing nothing: `map_files(jobs, make_work, pool, description)`.

Each worker owns its GPUs (or none). Records are handed out in chunks, the next one before the last is finished, so that
no worker waits (scheduler.py); a worker is a process of this machine (local.py) or an actor of a Ray cluster
(ray_executor.py). What is finished is kept in `<output>.partial` until the output is complete (journal.py), so a stage
that is killed goes on where it stopped.
"""

import itertools
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path

from tqdm import tqdm

from utils import StageError, atomic_file, check_at_least, fingerprint, log, split_list
from workers.journal import Journal, Skipped, list_skipped
from workers.local import LocalExecutor
from workers.ray_executor import RayExecutor
from workers.scheduler import IN_FLIGHT, map_chunks
from workers.worker import Work

Job = tuple[Callable[[], Iterator[dict]], str | Path, dict]  # records, output path, {setting: value}


@dataclass(kw_only=True)
class PoolConfig:
    """The worker processes of a stage.

    Args:
        engine: local, worker processes of this machine; ray, actors on a Ray cluster (workers/ray_executor.py)
        gpus: auto, none, or GPUs as `nvidia-smi -L` lists them: numbers (0,2,3) or UUIDs (GPU-..., MIG-...)
        tensor_parallel_size: GPUs that share one copy of the model
        cpu_workers: engines without GPUs
        chunk_size: prompts handed to a worker at once
        on_error: what becomes of a record that kills its workers or raises an exception in one: fail (the stage fails
            and names it) or skip (it is left out, counted and listed)
        stall_timeout: seconds without a finished chunk after which a worker counts as dead; 0: never
    """

    engine: str = "local"
    gpus: str = "auto"
    tensor_parallel_size: int = 1
    cpu_workers: int = 1
    chunk_size: int = 128
    on_error: str = "fail"
    stall_timeout: float = 1800.0

    def __post_init__(self):
        if self.on_error not in ("fail", "skip"):
            raise StageError(f"--on_error should be fail or skip, got {self.on_error}")
        check_at_least(1, chunk_size=self.chunk_size)
        if not 0 <= self.stall_timeout < float("inf"):
            raise StageError(f"--stall_timeout should be a number of seconds, 0 or more, got {self.stall_timeout}")
        if self.engine not in ("local", "ray"):
            raise StageError(f"--engine should be local or ray, got {self.engine}")
        if self.engine == "local":
            self.environments()

    def environments(self) -> list[dict[str, str]]:
        """The environment variables of each worker process: which GPUs it owns, or none.

        With CUDA_VISIBLE_DEVICES set, only what is named there may be used, as it is named there; `auto` is all that
        may be used, or the CPU. Raises StageError for a GPU that does not exist, or numbers that do not divide evenly.
        """
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        named = [] if (visible or "").strip() == "-1" else split_list(visible or "")
        numbers, uuids = _physical_gpus() if visible is None else (named, [])
        chosen = [] if self.gpus == "none" else numbers if self.gpus == "auto" else split_list(self.gpus)
        size = self.tensor_parallel_size
        if min(size, self.cpu_workers) < 1 or len(set(chosen)) < len(chosen):
            raise StageError(
                f"--gpus {self.gpus}, --tensor_parallel_size {size}, --cpu_workers {self.cpu_workers}: each GPU "
                "may be named once, and the numbers should be at least 1"
            )
        unknown = [gpu for gpu in chosen if gpu not in numbers + uuids]
        if unknown:
            source = "nvidia-smi lists" if visible is None else "CUDA_VISIBLE_DEVICES allows"
            raise StageError(f"--gpus names {','.join(unknown)}, but {source} {','.join(numbers) or 'none'}")
        if not chosen and size > 1:
            raise StageError(f"--tensor_parallel_size {size}: there is no GPU to share")
        if not chosen:
            return [{"CUDA_VISIBLE_DEVICES": ""}] * self.cpu_workers
        if len(chosen) % size:
            raise StageError(f"{len(chosen)} GPUs cannot be split into groups of {size} (--tensor_parallel_size)")
        groups = [chosen[i : i + size] for i in range(0, len(chosen), size)]
        # CUDA's own order is by speed: on a node with different GPUs its numbers are not those of nvidia-smi.
        return [{"CUDA_VISIBLE_DEVICES": ",".join(group), "CUDA_DEVICE_ORDER": "PCI_BUS_ID"} for group in groups]


def _physical_gpus():
    """(numbers of the GPUs, UUIDs of them and of their MIG instances), as nvidia-smi lists them."""
    try:
        listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return [], []
    found = listing.stdout if listing.returncode == 0 else ""
    return re.findall(r"^GPU (\d+):", found, re.MULTILINE), re.findall(r"\(UUID: ([^)]+)\)", found)


def no_cpu_engine() -> str:
    """Why the installed vLLM cannot run on a CPU, or an empty text.

    vLLM's builds for GPUs stop there with "Failed to infer device type". This is the rule of its platforms/__init__.py,
    by the installed packages alone: importing vLLM takes seconds.
    """
    if os.environ.get("VLLM_TARGET_DEVICE") == "cpu" or metadata.entry_points(group="vllm.platform_plugins"):
        return ""
    try:
        version = metadata.version("vllm")
    except metadata.PackageNotFoundError:  # there is none, or it is the build for the CPU, which has another name
        return ""
    if "cpu" in version:
        return ""
    return (
        f"vLLM {version} of {sys.prefix} is a build for GPUs and cannot run on a CPU; SETUP_FOR=cpu bash comal.sh "
        "makes .venv anew with the build for CPUs (in another environment: see requirements-cpu.txt)"
    )


# ---------------------------------------------------------------------------------------------- files


def map_files(jobs: list[Job], make_work: Callable[[], Work], pool: PoolConfig, description: str) -> None:
    """Run records through workers and write one output file per job, in input order.

    Everything is read, and so checked, before a worker starts. What a killed run has finished is not done again.

    Args:
        jobs: list of (function that returns an iterator of records, output path, {setting: value} that the output
            depends on), all done with one start of the workers.
        make_work: called once in each worker; see worker.Work. A task is (job number, record), its result a record, or
            a Skipped: that record is left out of the output, counted, and listed in `<output>.skipped.jsonl`.
        pool: PoolConfig
        description: of the progress bar

    Raises StageError as `map_chunks` does, for settings that differ from those of what is finished, for a record that
    cannot be worked on unless --on_error is skip, and for an output of which every record was skipped.
    """
    ids = [[] for _ in jobs]  # of all records
    digests = [fingerprint(_noting(records(), own)) for (records, _, _), own in zip(jobs, ids)]
    journals = [
        Journal(path, settings | {"contents of --input": digest}) for (_, path, settings), digest in zip(jobs, digests)
    ]
    finished, total = sum(len(journal.offsets) for journal in journals), sum(map(len, ids))
    if finished:
        log.info("going on after %d finished records", finished)
    executor = _executor(make_work, pool)
    chunks = _chunks(_tasks(jobs, journals), total - finished, pool.chunk_size, len(executor))
    with tqdm(
        total=total,
        initial=finished,
        desc=description,
        unit="record",
        smoothing=0.1,
        mininterval=float(os.environ.get("TQDM_MININTERVAL", 0.1 if sys.stderr.isatty() else 10)),
    ) as bar:
        for done in map_chunks(executor, chunks, partial(_give_up, pool.on_error), pool.stall_timeout):
            for number, journal in enumerate(journals):
                journal.append([result for (job, _), result in done if job == number])
            bar.update(len(done))
    for journal, job_ids in zip(journals, ids):
        _write_output(journal, job_ids)
    for journal in journals:  # only when all outputs are in place
        journal.remove()


def _noting(records, ids):
    """The records; their prompt_ids are added to the list `ids`."""
    for record in records:
        ids.append(record["prompt_id"])
        yield record


def _tasks(jobs, journals):
    """(job number, record) of all records that are not finished yet."""
    for number, (records, _, _) in enumerate(jobs):
        for record in records():
            if record["prompt_id"] not in journals[number].offsets:
                yield number, record


def _executor(make_work, pool):
    if pool.engine == "local":
        return LocalExecutor(make_work, pool.environments())
    return RayExecutor(make_work, pool.gpus, pool.tensor_parallel_size, pool.cpu_workers)


def _give_up(on_error, task, reason):
    """The verdict on a record that cannot be worked on, or StageError."""
    prompt_id = task[1]["prompt_id"]
    if on_error == "fail":
        raise StageError(
            f"{reason}\nThe record with prompt_id {prompt_id} causes this. What is finished is kept; --on_error skip "
            "leaves that record out"
        )
    log.warning("prompt_id %s is left out: %s", prompt_id, reason)
    return Skipped(prompt_id, reason)


def _chunks(tasks, left, size, num_workers):
    """Lists of `size` tasks, smaller ones towards the end, so that all workers end at about the same time."""
    while left > 0:
        share = -(-left // (IN_FLIGHT * num_workers))
        chunk = list(itertools.islice(tasks, min(size, max(share, 8)) if num_workers > 1 else size))
        left -= len(chunk)
        yield chunk


def _write_output(journal, ids):
    """The output and the list of skipped records, from the journal, in input order."""
    path, skipped = journal.output, journal.skipped
    try:
        list_skipped(path, [skipped[prompt_id] for prompt_id in ids if prompt_id in skipped], len(ids))
    except StageError:  # nothing is left that could be kept
        journal.remove()
        raise
    with atomic_file(path) as file:
        file.writelines(journal.lines(prompt_id for prompt_id in ids if prompt_id not in skipped))
    log.info("%s: %d records written, %d skipped", path, len(ids) - len(skipped), len(skipped))
