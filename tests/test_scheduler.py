"""workers/scheduler.py, worker.py and local.py: real worker processes, started with spawn, killed, stopped and failing.

python -m pytest tests/test_scheduler.py
"""

import logging
import pickle
import re
import time
from functools import partial
from itertools import count

import pytest
from helpers.children import no_child_left  # noqa: F401
from helpers.work import (
    FunctionWork,
    alive,
    dies_at_start,
    doubled,
    environment,
    fails,
    fails_at_start,
    first_is_slow,
    has_a_child,
    kills,
    notes,
    slowly,
    start,
    unpicklable,
)

from utils import StageError
from workers import scheduler
from workers.local import LocalExecutor
from workers.scheduler import MAX_STARTS, map_chunks
from workers.worker import Worker, is_crash, run_here

CPU = {"CUDA_VISIBLE_DEVICES": ""}


def starts(folder):
    return len(list(folder.glob("pid-*")))


def refuse(task, reason):
    raise StageError(f"gave up on {task}: {reason}")


def run_chunks(tmp_path, work, chunks, workers=1, give_up=refuse, stall_timeout=0, where="result", environments=None):
    executor = LocalExecutor(partial(start, work, tmp_path, where), environments or [CPU] * workers)
    return [dict(pairs) for pairs in map_chunks(executor, chunks, give_up, stall_timeout)]


def merged(found):
    """{task: result}, each task once, of what run_chunks returns."""
    assert sum(map(len, found)) == len(set().union(*found))
    return {task: result for pairs in found for task, result in pairs.items()}


def warnings(caplog):
    return [record.message for record in caplog.records if record.levelno == logging.WARNING]


EIGHT = [[0, 1, 2, 3], [4, 5, 6, 7]]
DOUBLES = {n: 2 * n for n in range(8)}


def test_map_chunks_yields_chunks_as_they_end(tmp_path):
    found = run_chunks(tmp_path, first_is_slow, [[n] for n in range(9)], workers=2)
    assert merged(found) == {n: n for n in range(9)}
    assert [list(pairs) for pairs in found].index([0]) >= 5


def test_map_chunks_sets_each_workers_environment(tmp_path, monkeypatch):
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(name, raising=False)
    gpus = {"CUDA_VISIBLE_DEVICES": "3,5"}
    assert run_chunks(tmp_path, environment, [[0]], environments=[gpus]) == [{0: ["3,5", None, None]}]
    assert run_chunks(tmp_path, environment, [[0]]) == [{0: ["", "PASSIVE", "0"]}]
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")  # the user's own
    assert run_chunks(tmp_path, environment, [[0]]) == [{0: ["", "ACTIVE", "0"]}]


def test_map_chunks_says_how_long_the_work_took_without_the_start(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    began = time.monotonic()
    assert merged(run_chunks(tmp_path, slowly, EIGHT)) == DOUBLES
    taken = time.monotonic() - began
    found = re.search(r"^\S.*\b8 records in (\d+\.\d\d) s, after a start of (\d+\.\d\d) s$", caplog.text, re.MULTILINE)
    work, started = map(float, found.groups())
    assert work >= 0.8 and started > 0 and work + started <= taken + 0.1  # each is rounded


def test_map_chunks_takes_chunks_as_they_are_needed(tmp_path):
    executor = LocalExecutor(partial(start, doubled, tmp_path), [CPU])
    found = map_chunks(executor, ([n] for n in count()), refuse)  # chunks without end
    assert [next(found) for _ in range(3)] == [[(0, 0)], [(1, 2)], [(2, 4)]]
    found.close()


def test_map_chunks_without_chunks_starts_no_worker(tmp_path):
    assert run_chunks(tmp_path, doubled, []) == []
    assert starts(tmp_path) == 0


@pytest.mark.parametrize(
    "how, reason",
    [
        ("kill", "died with exit code -9"),
        ("exit", "died with exit code 7"),
        ("MemoryError", "MemoryError: task five is bad"),
        ("CUDA", "RuntimeError: CUDA error: task five is bad"),
        ("stall", "made no progress for 3 s"),
    ],
)
def test_map_chunks_does_the_chunk_of_a_lost_worker_again(tmp_path, caplog, how, reason):
    found = run_chunks(tmp_path, partial(fails, how, 1), EIGHT, stall_timeout=3 if how == "stall" else 0)
    assert merged(found) == DOUBLES
    assert notes(tmp_path) == ["5"] and starts(tmp_path) == 2
    (warning,) = warnings(caplog)
    assert reason in warning and "another starts in its place" in warning


def test_an_exception_of_a_step_is_the_engines(tmp_path):
    found = run_chunks(tmp_path, partial(fails, "ValueError", 1), EIGHT, where="step")
    assert merged(found) == DOUBLES and starts(tmp_path) == 2


def test_map_chunks_finds_the_task_that_kills_by_halving_depth_first(tmp_path):
    """A chunk of 16 that kills at 5, and 24 more: 16 twice, 8, 4, 2, 1, the six losses that are needed."""
    chunks = [list(range(first, first + 8)) for first in range(16, 40, 8)]
    given_up = {}
    found = run_chunks(
        tmp_path, partial(kills, [5]), [list(range(16)), *chunks], give_up=lambda *pair: given_up.update([pair])
    )
    assert "died with exit code -9" in given_up[5]
    assert merged(found) == {n: 2 * n for n in range(40)} | {5: None}
    assert starts(tmp_path) - 1 == 6 and notes(tmp_path).count("5") == 6
    # The halves go before all that waits: all of the first chunk is done before what was not in hand with it.
    order = [next(iter(pairs)) for pairs in found]
    assert max(order.index(n) for n in order if n < 16) < min(order.index(n) for n in order if n >= 24)


def test_map_chunks_gives_up_on_the_task_that_kills(tmp_path):
    with pytest.raises(StageError, match="gave up on 5: worker .* died with exit code -9"):
        run_chunks(tmp_path, partial(fails, "kill", 99), EIGHT, workers=2)
    assert len(notes(tmp_path)) == 4


def test_the_number_of_restarts_has_a_limit(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(scheduler, "MAX_RESTARTS", 5)
    finished = {}
    with pytest.raises(StageError, match="(?s)died with exit code -9\nThat is one more than the 5 .*start the stage"):
        executor = LocalExecutor(partial(start, partial(kills, [5, 6]), tmp_path), [CPU])
        for pairs in map_chunks(executor, EIGHT, lambda task, reason: None):
            finished |= pairs
    assert starts(tmp_path) == 6 and {0, 1, 2, 3} <= set(finished)  # what was finished before was passed on


@pytest.mark.parametrize("size", [2, 4, 8])
@pytest.mark.parametrize("where", ["begin", "result"])
def test_an_exception_of_one_record_restarts_nothing(tmp_path, caplog, size, where):
    chunks = [list(range(first, first + size)) for first in range(0, 8, size)]
    with pytest.raises(StageError, match="gave up on 5: ValueError: task five is bad$"):
        run_chunks(tmp_path, partial(fails, "ValueError", 99), chunks, where=where)
    assert starts(tmp_path) == 1 and notes(tmp_path) == ["5"] and not warnings(caplog)
    assert "Traceback" in caplog.text and "in fails" in caplog.text


def test_the_others_go_on_where_one_record_raises(tmp_path):
    for where in ("begin", "result"):
        found = run_chunks(tmp_path, partial(fails, "ValueError", 99), EIGHT, where=where, give_up=lambda *pair: pair)
        assert merged(found) == DOUBLES | {5: (5, "ValueError: task five is bad")}
    assert starts(tmp_path) == 2  # one each
    assert merged(run_chunks(tmp_path, partial(fails, "ValueError", 99), [[5]], give_up=lambda *pair: 0)) == {5: 0}


def test_map_chunks_passes_on_a_stage_error_at_once(tmp_path):
    with pytest.raises(StageError, match=r"worker 0 \(CPU, pid \d+\) failed:\ntask five is bad$"):
        run_chunks(tmp_path, partial(fails, "StageError", 99), EIGHT)
    assert len(notes(tmp_path)) == 1


def test_map_chunks_knows_the_record_whose_result_cannot_be_sent(tmp_path):
    with pytest.raises(StageError, match="gave up on 5: .*pickle"):
        run_chunks(tmp_path, unpicklable, EIGHT)
    assert starts(tmp_path) == 1


def test_map_chunks_passes_on_a_failed_start(tmp_path):
    with pytest.raises(StageError, match="failed:\nthe model does not exist$"):
        list(map_chunks(LocalExecutor(partial(fails_at_start, tmp_path), [CPU]), [[0]], refuse))


def test_map_chunks_gives_up_on_a_worker_that_never_starts(tmp_path):
    with pytest.raises(StageError, match="died with exit code 7\nas did the 2 before it"):
        list(map_chunks(LocalExecutor(partial(dies_at_start, tmp_path), [CPU]), [[0]], refuse))
    assert notes(tmp_path) == ["start"] * MAX_STARTS


def test_map_chunks_passes_on_an_error_among_the_chunks(tmp_path):
    def chunks():
        yield [0]
        raise StageError("line 2 is bad")

    with pytest.raises(StageError, match="line 2 is bad"):
        run_chunks(tmp_path, doubled, chunks())


def test_map_chunks_ends_what_a_killed_worker_had_started(tmp_path):
    assert merged(run_chunks(tmp_path, has_a_child, [[1]])) == {1: 2}
    (child,) = notes(tmp_path)
    assert not alive(int(child))


# ---- An executor without processes ----


class Scripted:
    """An executor whose events are written down beforehand; it notes what it is asked to do."""

    def __init__(self, count, waits_for_room, script):
        self.count, self.waits_for_room, self.script, self.calls = count, waits_for_room, iter(script), []

    def __len__(self):
        return self.count

    def start(self, slot):
        self.calls.append(("start", slot))
        return f"worker {slot}"

    def send(self, slot, number, tasks):
        self.calls.append(("send", slot, number, list(tasks.values())))

    def events(self):
        yield from next(self.script, [])

    def stop(self, slot, wait=0):
        self.calls.append(("stop", slot))


def test_a_worker_that_waits_for_room_is_no_failure_while_another_is_ready():
    def script():
        for _ in range(10):
            time.sleep(0.03)
            yield [(0, "ready", None, None)]
        yield [(0, "done", 0, {})]

    executor = Scripted(2, True, script())
    assert list(map_chunks(executor, [[]], refuse, stall_timeout=0.1)) == [[]]
    assert executor.calls.count(("start", 1)) == 1
    executor = Scripted(2, True, iter(lambda: time.sleep(0.01) or [], None))
    with pytest.raises(StageError, match="no worker was there after 0.1 s .*room"):
        list(map_chunks(executor, [[0]], refuse, stall_timeout=0.1))


def test_a_lost_chunk_does_not_wait_for_the_end_of_all_others():
    """Its worker does not come back, so the other one gets nothing new until it is free for it."""
    script = [
        [(slot, "ready", None, None) for slot in range(2)],
        [(0, "lost", None, "was lost")],
        [(1, "done", 1, {})],
        [(1, "done", 3, {})],
        [(1, "done", 4, {0: pickle.dumps("found")})],
    ]
    executor = Scripted(2, True, script)
    found = map_chunks(executor, (["bad"] if n == 0 else [] for n in count()), refuse)
    assert [next(found) for _ in range(3)] == [[], [], [("bad", "found")]]
    found.close()
    sent = [call[1:] for call in executor.calls if call[0] == "send"]
    assert sent == [(0, 0, ["bad"]), (1, 1, []), (0, 2, []), (1, 3, []), (1, 4, ["bad"])]


# ---- Inside a worker ----


def test_run_here_gives_results_in_order(tmp_path):
    assert run_here(FunctionWork(doubled, tmp_path), [3, 1, 2]) == [6, 2, 4]


def test_worker_tells_when_all_records_of_a_chunk_have_failed(tmp_path):
    worker = Worker(FunctionWork(partial(fails, "ValueError", 9), tmp_path, where="begin"))
    failed, done = worker.begin(4, {0: 5})
    assert failed[:2] == ("failed", 4) and failed[2][:2] == (0, "ValueError: task five is bad")
    assert done == ("done", 4, {}) and not worker.left


def test_is_crash_tells_engines_from_bugs():
    import torch

    class EngineDeadError(Exception):
        """vLLM's, by its name."""

    for error in (MemoryError(), torch.OutOfMemoryError(), torch.AcceleratorError(), EngineDeadError()):
        assert is_crash(error)
    assert is_crash(RuntimeError("CUDA error: an illegal memory access"))
    for error in (ValueError("CUDA"), RuntimeError("no"), KeyError("x"), AssertionError()):
        assert not is_crash(error)
