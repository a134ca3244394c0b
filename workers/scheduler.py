"""Chunks of tasks through workers, losing nothing: the queue, what is tried again, and when it is given up.

How a worker is started, spoken to and stopped is the affair of an executor: processes of this machine (local.py) or
Ray's actors (ray_executor.py).
"""

import pickle
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

from utils import StageError, log

IN_FLIGHT = 2  # chunks that a worker has at once: while the last of one are finished, the next keeps the engine full
MAX_STARTS = 3  # of one worker, until it gets ready once
MAX_RESTARTS = 32  # of workers that had been ready, in one stage; a record that kills in a chunk of 128 takes nine


class Executor(Protocol):
    """Starts workers, one in each of its slots, hands them chunks, and tells what came back.

    `waits_for_room`: a worker that is not ready may be waiting for room, which is no failure while another is ready.
    """

    waits_for_room: bool

    def __len__(self) -> int: ...

    def start(self, slot: int) -> str:
        """Start a worker; returns its name, for messages."""

    def send(self, slot: int, number: int, tasks: dict) -> None:
        """Hand a worker the chunk of this number, {position: task}."""

    def events(self) -> Iterator[tuple]:
        """Wait for a moment, then yield (slot, kind, number, value) of what has happened:

        "ready"; "done" and "failed" of a chunk, as worker.Worker has them; "error" with the message of a StageError;
        "lost" with the reason.
        """

    def stop(self, slot: int, wait: float = 0) -> None:
        """End a worker, if there is one, politely when there is time to `wait`, with all that it has started."""


@dataclass
class Chunk:
    tasks: dict  # {position: task}
    lost: bool = False  # whether a worker was lost over it


@dataclass
class _Slot:
    number: int
    name: str = ""
    ready: bool = False
    starts: int = 0  # since a worker of this slot was ready
    since: float = 0.0  # when it was last heard of or given something
    chunks: dict = field(default_factory=dict)  # {number: Chunk} in its hands

    def takes(self, chunk):
        """Whether it should get this Chunk now: one that a worker was lost over goes alone."""
        return self.ready and (
            not self.chunks
            or (len(self.chunks) < IN_FLIGHT and not any(other.lost for other in (chunk, *self.chunks.values())))
        )


def map_chunks(
    executor: Executor, chunks: Iterable[list], give_up: Callable[[Any, str], Any], stall_timeout: float = 0
) -> Iterator[list[tuple]]:
    """Yield [(task, result), ...] of chunks, lists of tasks, as they are finished, in any order.

    A worker has IN_FLIGHT chunks at most, so a fast one takes more of them. A worker that dies or finishes no chunk for
    `stall_timeout` seconds (0: never) is named and replaced. Its chunks are tried a second time, each alone, then in
    halves, before anything else that waits, down to the one task that does it. For that task, and for one that raises
    an exception in its worker, which lives on, `give_up(task, reason)` returns a result or raises StageError.

    Raises StageError when one is raised in a worker, when a worker does not get ready in MAX_STARTS starts, and when
    workers had to be replaced more than MAX_RESTARTS times.
    """
    scheduler = _Scheduler(executor, chunks, give_up, stall_timeout)
    try:
        yield from scheduler.run()
    finally:
        for slot in scheduler.slots:
            executor.stop(slot.number, wait=10 if slot.ready and not slot.chunks else 0)


class _Scheduler:
    def __init__(self, executor, chunks, give_up, stall_timeout):
        self.executor, self.give_up, self.stall_timeout = executor, give_up, stall_timeout
        self.chunks = (Chunk(dict(enumerate(tasks))) for tasks in chunks)
        self.fresh = next(self.chunks, None)  # the next one that was not tried yet
        self.lost = []  # to be tried again, first come first
        self.handed = self.restarts = self.done = 0
        self.began, self.ready_at = time.monotonic(), []  # when each worker was ready for the first time
        self.slots = [_Slot(number) for number in range(len(executor))] if self.fresh else []

    def run(self):
        for slot in self.slots:
            self.start(slot)
        while self.fresh or self.lost or any(slot.chunks for slot in self.slots):
            self.hand_out()
            for number, *event in self.executor.events():
                yield from self.handle(self.slots[number], *event)
            yield from self.replace_late()
        self.report()

    def report(self):
        """Print how long the work took, apart from the workers' start, which does not grow with the work."""
        if self.ready_at:
            ready = sum(self.ready_at) / len(self.ready_at)
            log.info(
                "%d records in %.2f s, after a start of %.2f s", self.done, time.monotonic() - ready, ready - self.began
            )

    def start(self, slot):
        slot.starts += 1
        slot.ready, slot.chunks, slot.since = False, {}, time.monotonic()
        slot.name = self.executor.start(slot.number)

    def hand_out(self):
        for _ in range(IN_FLIGHT):  # all get their first one before any gets its second
            for slot in self.slots:
                if self.lost and slot.takes(self.lost[0]):
                    self.hand(slot, self.lost.pop(0))
                elif self.fresh and slot.takes(self.fresh) and not self.is_kept_free(slot):
                    self.hand(slot, self.fresh)
                    self.fresh = next(self.chunks, None)

    def hand(self, slot, chunk):
        slot.chunks[self.handed], slot.since = chunk, time.monotonic()
        self.executor.send(slot.number, self.handed, chunk.tasks)
        self.handed += 1

    def is_kept_free(self, slot):
        """Whether a lost chunk waits for this worker, the one with the least to do, to have nothing else."""
        return bool(self.lost) and slot is min(
            (other for other in self.slots if other.ready), key=lambda other: len(other.chunks)
        )

    def handle(self, slot, kind, number, value):
        if kind == "error":
            raise StageError(f"{slot.name} failed:\n{value}")
        if kind == "lost":
            yield from self.replace(slot, value)
            return
        slot.since = time.monotonic()
        if kind == "ready":
            slot.ready, slot.starts = True, 0
            if len(self.ready_at) < len(self.slots):
                self.ready_at.append(slot.since)
        elif kind == "failed":
            position, reason, details = value
            task = slot.chunks[number].tasks.pop(position)
            log.error("%s could not work on a record:\n%s", slot.name, details.rstrip())
            yield [(task, self.give_up(task, reason))]
        elif kind == "done":
            tasks = slot.chunks.pop(number).tasks
            self.done += len(tasks)
            yield [(task, pickle.loads(value[position])) for position, task in tasks.items()]

    def replace_late(self):
        """Replace the workers that have made no progress for too long."""
        for slot in self.slots:
            late = self.stall_timeout and time.monotonic() - slot.since > self.stall_timeout
            if not late or (slot.ready and not slot.chunks):
                continue
            if slot.ready or not self.executor.waits_for_room:
                yield from self.replace(slot, f"made no progress for {self.stall_timeout:g} s (--stall_timeout)")
            elif not any(other.ready for other in self.slots):
                raise StageError(
                    f"no worker was there after {self.stall_timeout:g} s (--stall_timeout); has the cluster room for "
                    "them (ray status)?"
                )

    def replace(self, slot, reason):
        """Start another worker in the place of a lost one, and see to the chunks that it had."""
        self.executor.stop(slot.number)
        log.warning("%s %s; another starts in its place", slot.name, reason)
        lines = reason.splitlines()
        summary = f"{slot.name} {lines[0]}" + (f" {lines[-1]}" if len(lines) > 1 else "")
        chunks, was_ready, slot.chunks = slot.chunks.values(), slot.ready, {}
        again = []
        for chunk in chunks:
            tasks = list(chunk.tasks.items())
            if chunk.lost and len(tasks) == 1:
                culprit = tasks[0][1]
                yield [(culprit, self.give_up(culprit, summary))]
                continue
            middle = len(tasks) // 2
            parts = [tasks[:middle], tasks[middle:]] if chunk.lost else [tasks]
            again += [Chunk(dict(part), lost=True) for part in parts if part]
        self.lost = again + self.lost
        self.restarts += was_ready
        if self.restarts > MAX_RESTARTS:
            raise StageError(
                f"{summary}\nThat is one more than the {MAX_RESTARTS} workers that one stage may lose. What is "
                "finished is kept. Look above and in the system log for what ends them (memory, a GPU, many bad "
                "records), mend it, and start the stage again: it goes on from there"
            )
        if slot.starts == MAX_STARTS:
            raise StageError(
                f"{slot.name} {reason}\nas did the {MAX_STARTS - 1} before it, all while starting; out of memory? See "
                "the messages above and the system log"
            )
        self.start(slot)
