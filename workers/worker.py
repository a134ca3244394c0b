"""What runs inside a worker process, whichever executor has started it: the chunks that it was given, record by record.

An exception in `begin` or `result` of the work is that record's: it is reported, and the worker goes on with the
others. What makes the process useless (`is_crash`), and every exception of `step`, is the engine's: it ends the worker.
"""

import contextlib
import os
import pickle
import traceback
from collections.abc import Callable
from typing import Any, Protocol

from utils import StageError, first_line


class Work(Protocol):
    """The work of a worker, about single records."""

    def begin(self, key, task) -> None:
        """Take a record on."""

    def step(self) -> list:
        """Move everything that has begun on for a moment; the list of the keys that are ready."""

    def result(self, key) -> Any:
        """A ready record's result: a record, or a journal.Skipped."""


class Worker:
    """The chunks of a worker process.

    Both methods return events:
        ("failed", number of the chunk, (position, reason, traceback))   a record of it could not be worked on
        ("done", number of the chunk, {position: pickled result})        all others of its records are finished
    """

    def __init__(self, work: Work):
        self.work = work
        self.left = {}  # by number: how many records are neither finished nor failed
        self.found = {}  # by number: {position: pickled result}

    def begin(self, number: int, tasks: dict) -> list[tuple]:
        """Begin a chunk, {position: task}."""
        self.left[number], self.found[number], events = len(tasks), {}, []
        for position, task in tasks.items():
            with self._blame(number, position, events):
                self.work.begin((number, position), task)
        return events + self._done()

    def step(self) -> list[tuple]:
        """Move all chunks on for a moment."""
        events = []
        for number, position in self.work.step():
            with self._blame(number, position, events):
                # Pickled one by one, so that the record whose result cannot be sent is known.
                self.found[number][position] = pickle.dumps(self.work.result((number, position)))
                self.left[number] -= 1
        return events + self._done()

    @contextlib.contextmanager
    def _blame(self, number, position, events):
        """Report an exception of one record, unless it ends the stage or the worker."""
        try:
            yield
        except StageError:
            raise
        except Exception as error:
            if is_crash(error):
                raise
            self.left[number] -= 1
            reason = f"{type(error).__name__}: {first_line(error)}"
            events.append(("failed", number, (position, reason, traceback.format_exc())))

    def _done(self):
        finished = [number for number, left in self.left.items() if not left]
        for number in finished:
            del self.left[number]
        return [("done", number, self.found.pop(number)) for number in finished]


def start_work(make_work: Callable[[], Work]) -> Work:
    """`make_work()`. Raises StageError for an error of the code, which another start would meet again; what else goes
    wrong, as when a GPU's memory is still in use, may go well the next time."""
    try:
        return make_work()
    except (TypeError, AttributeError, NameError, ImportError):
        raise StageError(traceback.format_exc().rstrip()) from None


def is_crash(error: BaseException) -> bool:
    """Whether an exception says that its process is of no more use: memory ran out, CUDA failed, the engine died."""
    names = {kind.__name__ for kind in type(error).__mro__}  # by name: torch and vLLM may not be imported
    return bool(
        names & {"MemoryError", "OutOfMemoryError", "AcceleratorError", "EngineDeadError"}
        or (isinstance(error, RuntimeError) and "CUDA" in str(error))
    )


def prepare_threads() -> None:
    """On a CPU, let threads that wait sleep instead of spin, unless the user has said otherwise.

    Beside another busy process, spinning costs a factor of eight. The libraries read this when they are loaded.
    """
    if not os.environ.get("CUDA_VISIBLE_DEVICES"):
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        os.environ.setdefault("GOMP_SPINCOUNT", "0")


def run_here(work: Work, tasks: list) -> list:
    """The results of tasks, in order, in this process and without any care for failures: for benchmarks and tests."""
    results = {}
    for key, task in enumerate(tasks):
        work.begin(key, task)
    while len(results) < len(tasks):
        results |= {key: work.result(key) for key in work.step()}
    return [results[key] for key in range(len(tasks))]
