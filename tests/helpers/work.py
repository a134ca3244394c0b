"""What worker processes of the tests do. They import this module, which imports little, so that they start quickly."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

from utils import StageError
from workers.journal import Skipped


class RecordWork:
    """Work of a worker process (workers/worker.py) that does a record a step: subclasses are called with its task."""

    waiting = ()

    def begin(self, key, task):
        self.waiting = *self.waiting, (key, task)

    def step(self):
        return [self.waiting[0][0]]

    def result(self, key):
        (_, task), *self.waiting = self.waiting
        return self(task)


class LengthJudge(RecordWork):
    """Stands in for a judge, also in worker processes: prefers the longer response with probability 3/4."""

    needs_engine, has_labels, settings = True, True, ()

    def __init__(self, config):
        pass

    @staticmethod
    def check(config):
        pass

    @staticmethod
    def report(paths):
        pass

    def __call__(self, task):
        _, record = task
        if record["prompt"] == "skip":
            return Skipped(record["prompt_id"], "too long")
        return record | self.compare([sample["text"] for sample in record["samples"]])

    @staticmethod
    def compare(texts):
        from judges.base import win_matrix

        return win_matrix(
            texts,
            {
                (first, second): (0.75 if len(first) > len(second) else 0.25, 1.0)
                for first in texts
                for second in texts
                if first != second
            },
        )


class CountingJudge(LengthJudge):
    """Notes the texts of each pair that it judges, as one line of the file JUDGED."""

    def compare(self, texts):
        with open(os.environ["JUDGED"], "a", encoding="utf-8") as file:
            file.write(json.dumps(texts) + "\n")
        return LengthJudge.compare(texts)


class TinySampler(RecordWork):
    """Stands in for a policy: its response is as many letters as its folder's name says."""

    def __init__(self, config, num_samples, temperature, **_):
        self.length = int(Path(config.model_path).name)
        with open(os.environ["SAMPLED"], "a", encoding="utf-8") as file:
            file.write(f"{self.length} {config.tokenizer} {temperature} {config.max_prompt_tokens} {config.seed}\n")

    def __call__(self, task):
        _, record = task
        sample = {"text": record["prompt_id"] * self.length, "token_ids": [1] * self.length}
        return record | {"prompt_token_ids": [1], "samples": [sample]}


def note(folder, text):
    with open(folder / "notes", "a") as notes:
        notes.write(f"{text}\n")


def notes(folder):
    return (folder / "notes").read_text().split("\n")[:-1] if (folder / "notes").exists() else []


def alive(pid):
    try:
        return (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


# ---- Functions as work ----


class FunctionWork(RecordWork):
    """Calls the function with each task, in a step, in `begin` or in `result`."""

    def __init__(self, function, folder, where="result"):
        self.function, self.folder, self.where = function, folder, where

    def begin(self, key, task):
        if self.where == "begin":
            self.function(self.folder, task)
        super().begin(key, task)

    def step(self):
        if self.where == "step":
            self.function(self.folder, self.waiting[0][1])
        return super().step()

    def __call__(self, task):
        return self.function(self.folder, task) if self.where == "result" else 2 * task


def start(function, folder, where="result"):
    (folder / f"pid-{os.getpid()}").touch()
    return FunctionWork(function, folder, where)


# ---- Of tasks: `function(folder, task)`, where the folder takes notes of what happened ----


def doubled(folder, task):
    return 2 * task


def slowly(folder, task):
    time.sleep(0.1)
    return 2 * task


def environment(folder, task):
    return [os.environ.get(name) for name in ("CUDA_VISIBLE_DEVICES", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT")]


def first_is_slow(folder, task):
    """Task 0 ends only after task 5 has ended, which so has to run elsewhere."""
    deadline = time.monotonic() + 60
    while task == 0 and not (folder / "done-5").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    (folder / f"done-{task}").touch()
    return task


def fails(how, times, folder, task):
    """Ends in one way or another at task 5, so many times; the tasks that it has begun with are noted."""
    if task == 5 and len(notes(folder)) < times:
        note(folder, task)
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "stall":
            os.kill(os.getpid(), signal.SIGSTOP)
        if how == "exit":
            os._exit(7)
        kinds = {"ValueError": ValueError, "StageError": StageError, "MemoryError": MemoryError, "CUDA": RuntimeError}
        raise kinds[how]("CUDA error: task five is bad" if how == "CUDA" else "task five is bad")
    return 2 * task


def kills(bad, folder, task):
    """Notes each task; one of the bad ones ends the process."""
    note(folder, task)
    if task in bad:
        os.kill(os.getpid(), signal.SIGKILL)
    return 2 * task


def dies_at_start(folder):
    note(folder, "start")
    os._exit(7)


def fails_at_start(folder):
    raise StageError("the model does not exist")


def unpicklable(folder, task):
    return (lambda: task) if task == 5 else 2 * task


def has_a_child(folder, task):
    """Starts a process, as an engine does, and is killed."""
    if not notes(folder):
        note(folder, subprocess.Popen(["sleep", "600"]).pid)
        os.kill(os.getpid(), signal.SIGKILL)
    return 2 * task


# ---- Of tasks (number of the job, record) ----


def answered(folder, task):
    """A record; skipped where the prompt says so."""
    job, record = task
    if record["prompt"] == "skip":
        return Skipped(record["prompt_id"], "too long")
    return record | {"job": job, "pid": os.getpid()}


def plain(folder, task):
    """A record, the same whoever makes it; notes what was asked for."""
    _, record = task
    note(folder, record["prompt"])
    return record | {"text": "\u2028" + 3 * record["prompt"]}


def fails_at_first(folder, task):
    """Fails at the prompt "e" when it is asked for the first time."""
    if task[1]["prompt"] == "e" and not (folder / "failed").exists():
        (folder / "failed").touch()
        raise StageError("asked to fail")
    return plain(folder, task)


def dies_on_request(folder, task):
    if task[1]["prompt"] == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    return plain(folder, task)


def raises_on_request(folder, task):
    if task[1]["prompt"] == "raise":
        raise KeyError("of no record")
    return plain(folder, task)
