"""workers.py: real worker processes, started with spawn, killed, stopped and failing; and what is kept of their work.

python -m pytest tests/test_workers.py
"""

import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from functools import partial
from itertools import count
from pathlib import Path

import pytest
from conftest import ChunkWork

from utils import StageError, read_jsonl
from workers.pool import MAX_STARTS, Journal, PoolConfig, _chunks, map_chunks, map_files, worker_environments

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def nvidia_smi(tmp_path, monkeypatch):
    """A function that puts an nvidia-smi with this shell body first on PATH; CUDA_VISIBLE_DEVICES is unset."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def install(body):
        program = tmp_path / "bin" / "nvidia-smi"
        program.parent.mkdir(exist_ok=True)
        program.write_text(f"#!/bin/sh\n{body}\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")

    install("printf '0\\n1\\n2\\n3\\n'")
    return install


def devices(*args, **settings):
    return [environment["CUDA_VISIBLE_DEVICES"] for environment in worker_environments(*args, **settings)]


def test_worker_environments_takes_the_gpus_that_nvidia_smi_lists(nvidia_smi):
    assert devices("auto") == ["0", "1", "2", "3"]
    assert devices("auto", gpus_per_worker=2) == ["0,1", "2,3"]
    assert devices("3, 1") == ["3", "1"]
    assert devices("none", cpu_workers=3) == ["", "", ""]


@pytest.mark.parametrize(
    "visible, expected", [("2,5", ["2", "5"]), ("GPU-a,GPU-b", ["GPU-a", "GPU-b"]), ("", [""]), ("-1", [""])]
)
def test_worker_environments_stays_within_cuda_visible_devices(nvidia_smi, monkeypatch, visible, expected):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)  # -1 is CUDA's own way to say: none
    assert devices("auto") == expected
    assert devices("none") == [""]
    with pytest.raises(StageError, match="--gpus names 0, but CUDA_VISIBLE_DEVICES allows"):
        devices("0")


@pytest.mark.parametrize("body", ["exit 9", "echo 'NVIDIA-SMI has failed'; exit 1", ":"])
def test_worker_environments_uses_the_cpu_where_there_is_no_gpu(nvidia_smi, body):
    nvidia_smi(body)
    assert devices("auto", cpu_workers=2) == ["", ""]
    with pytest.raises(StageError, match="--gpus names 0, but nvidia-smi lists none"):
        devices("0")


def test_worker_environments_refuses_an_unknown_gpu(nvidia_smi):
    with pytest.raises(StageError, match="--gpus names 4,x, but nvidia-smi lists 0,1,2,3"):
        devices("0,4,x")


def test_worker_environments_refuses_an_uneven_split(nvidia_smi):
    with pytest.raises(StageError, match="4 GPUs cannot be split into groups of 3"):
        devices("auto", gpus_per_worker=3)


@pytest.mark.parametrize(
    "gpus, settings", [("0,0", {}), ("auto", {"gpus_per_worker": 0}), ("none", {"cpu_workers": 0})]
)
def test_worker_environments_refuses_impossible_settings(nvidia_smi, gpus, settings):
    # A GPU given to two engines, groups of none, and no worker at all, for which map_chunks would wait for ever.
    with pytest.raises(StageError):
        worker_environments(gpus, **settings)


# The functions of the worker processes: `work(folder, tasks)`, where the folder takes notes of what happened.


class FunctionWork(ChunkWork):
    def __init__(self, function, folder):
        self.function, self.folder = function, folder

    def __call__(self, tasks):
        return self.function(self.folder, tasks)


def start(function, folder):
    (folder / f"pid-{os.getpid()}").touch()
    return FunctionWork(function, folder)


def note(folder, text):
    with open(folder / "notes", "a") as notes:
        notes.write(f"{text}\n")


def notes(folder):
    return (folder / "notes").read_text().split("\n")[:-1] if (folder / "notes").exists() else []


def doubled(folder, tasks):
    return [2 * task for task in tasks]


def visible_devices(folder, tasks):
    return [os.environ["CUDA_VISIBLE_DEVICES"]]


def first_is_slow(folder, tasks):
    """Task 0 ends only after task 5 has ended, which so has to run elsewhere."""
    deadline = time.monotonic() + 60
    while tasks == [0] and not (folder / "done-5").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    (folder / f"done-{tasks[0]}").touch()
    return tasks


def fails(how, times, folder, tasks):
    """Ends in one way or another at task 5, so many times."""
    if 5 in tasks and len(notes(folder)) < times:
        note(folder, " ".join(map(str, tasks)))
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "stall":
            os.kill(os.getpid(), signal.SIGSTOP)
        if how == "exit":
            os._exit(7)
        raise {"ValueError": ValueError, "StageError": StageError}[how]("task five is bad")
    return doubled(folder, tasks)


def dies_at_start(folder):
    note(folder, "start")
    os._exit(7)


def fails_at_start(folder):
    raise StageError("the model does not exist")


def unpicklable(folder, tasks):
    return lambda: tasks


def has_a_child(folder, tasks):
    """Starts a process, as an engine does, and is killed."""
    if not notes(folder):
        note(folder, subprocess.Popen(["sleep", "600"]).pid)
        os.kill(os.getpid(), signal.SIGKILL)
    return doubled(folder, tasks)


@pytest.fixture(autouse=True)
def no_child_left(tmp_path):
    """After the test, every worker that it started has ended."""
    yield
    assert multiprocessing.active_children() == []
    for mark in tmp_path.glob("pid-*"):
        assert not alive(int(mark.name.removeprefix("pid-")))


def alive(pid):
    try:
        return (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def refuse(task, reason):
    raise StageError(f"gave up on {task}: {reason}")


def run_chunks(tmp_path, work, chunks, workers=1, give_up=refuse, stall_timeout=0):
    return list(map_chunks(partial(start, work, tmp_path), chunks, [{}] * workers, give_up, stall_timeout))


def results(pairs):
    """{task: result} of what map_chunks yields."""
    return {task: result for tasks, values in pairs for task, result in zip(tasks, values, strict=True)}


EIGHT = [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_map_chunks_yields_chunks_as_they_end(tmp_path):
    found = run_chunks(tmp_path, first_is_slow, [[n] for n in range(9)], workers=2)
    assert sorted(tasks for tasks, _ in found) == [[n] for n in range(9)]
    assert [tasks for tasks, _ in found].index([0]) >= 5
    assert all(tasks == result for tasks, result in found)


def test_map_chunks_sets_each_workers_environment(tmp_path):
    (found,) = map_chunks(partial(start, visible_devices, tmp_path), [[0]], [{"CUDA_VISIBLE_DEVICES": "3,5"}], refuse)
    assert found == ([0], ["3,5"])


def test_map_chunks_takes_chunks_as_they_are_needed(tmp_path):
    found = map_chunks(partial(start, doubled, tmp_path), ([n] for n in count()), [{}], refuse)  # chunks without end
    assert [next(found) for _ in range(3)] == [([0], [0]), ([1], [2]), ([2], [4])]
    found.close()


def test_map_chunks_without_chunks_starts_no_worker(tmp_path):
    assert run_chunks(tmp_path, doubled, []) == []
    assert not list(tmp_path.glob("pid-*"))


@pytest.mark.parametrize(
    "how, reason",
    [
        ("kill", "died with exit code -9"),
        ("exit", "died with exit code 7"),
        ("ValueError", "ValueError: task five is bad"),
        ("stall", "made no progress for 3 s"),
    ],
)
def test_map_chunks_does_the_chunk_of_a_lost_worker_again(tmp_path, caplog, how, reason):
    found = run_chunks(tmp_path, partial(fails, how, 1), EIGHT, stall_timeout=3 if how == "stall" else 0)
    assert results(found) == {n: 2 * n for n in range(8)}
    assert notes(tmp_path) == ["4 5 6 7"]
    (warning,) = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert reason in warning and "another starts in its place" in warning


def test_map_chunks_finds_the_task_that_kills_by_halving(tmp_path):
    found = run_chunks(tmp_path, partial(fails, "kill", 99), EIGHT, workers=2, give_up=lambda task, reason: reason)
    reasons = results(found)
    assert "died with exit code -9" in reasons.pop(5)
    assert reasons == {n: 2 * n for n in (0, 1, 2, 3, 4, 6, 7)}
    assert notes(tmp_path) == ["4 5 6 7", "4 5 6 7", "4 5", "5"]


def test_map_chunks_gives_up_on_the_task_that_kills(tmp_path):
    with pytest.raises(StageError, match="gave up on 5: worker .* died with exit code -9"):
        run_chunks(tmp_path, partial(fails, "kill", 99), EIGHT)
    assert len(notes(tmp_path)) == 4


def test_map_chunks_passes_on_a_stage_error_at_once(tmp_path):
    with pytest.raises(StageError, match=r"worker 0 \(CPU, pid \d+\) failed:\ntask five is bad$"):
        run_chunks(tmp_path, partial(fails, "StageError", 99), EIGHT)
    assert len(notes(tmp_path)) == 1


def test_map_chunks_passes_on_a_result_that_cannot_be_sent(tmp_path):
    with pytest.raises(StageError, match="(?s)gave up on 0: .*pickle"):
        run_chunks(tmp_path, unpicklable, [[0]])


def test_map_chunks_passes_on_a_failed_start(tmp_path):
    with pytest.raises(StageError, match="failed:\nthe model does not exist$"):
        list(map_chunks(partial(fails_at_start, tmp_path), [[0]], [{}], refuse))


def test_map_chunks_gives_up_on_a_worker_that_never_starts(tmp_path):
    with pytest.raises(StageError, match="died with exit code 7\nas did the 2 before it"):
        list(map_chunks(partial(dies_at_start, tmp_path), [[0]], [{}], refuse))
    assert notes(tmp_path) == ["start"] * MAX_STARTS


def test_map_chunks_passes_on_an_error_among_the_chunks(tmp_path):
    def chunks():
        yield [0]
        raise StageError("line 2 is bad")

    with pytest.raises(StageError, match="line 2 is bad"):
        run_chunks(tmp_path, doubled, chunks())


def test_map_chunks_ends_what_a_killed_worker_had_started(tmp_path):
    assert results(run_chunks(tmp_path, has_a_child, [[1]])) == {1: 2}
    (child,) = notes(tmp_path)
    assert not alive(int(child))


# ---- Files ----


def answered(folder, tasks):
    """One record a task: skipped where the prompt says so."""
    return [
        {"prompt_id": record["prompt_id"], "skipped": "too long"}
        if record["prompt"] == "skip"
        else record | {"job": job, "pid": os.getpid()}
        for job, record in tasks
    ]


def plain(folder, tasks):
    """One record a task, the same whoever makes it; notes what was asked for."""
    note(folder, " ".join(record["prompt"] for _, record in tasks))
    return [record | {"text": "\u2028" + 3 * record["prompt"]} for _, record in tasks]


def fails_at_first(folder, tasks):
    """Fails at the prompt "e" when it is asked for the first time."""
    if any(record["prompt"] == "e" for _, record in tasks) and not (folder / "failed").exists():
        (folder / "failed").touch()
        raise StageError("asked to fail")
    return plain(folder, tasks)


def dies_on_request(folder, tasks):
    if any(record["prompt"] == "die" for _, record in tasks):
        os.kill(os.getpid(), signal.SIGKILL)
    return plain(folder, tasks)


def run_files(tmp_path, work, *inputs, made_with=(), **pool):
    """Paths of one output a list of prompts."""
    jobs = []
    for number, prompts in enumerate(inputs):
        records = [{"prompt_id": f"{number}-{i}", "prompt": prompt} for i, prompt in enumerate(prompts)]
        jobs.append((partial(iter, records), tmp_path / "out" / f"{number}.jsonl", dict(made_with)))
    map_files(jobs, partial(start, work, tmp_path), PoolConfig(**{"gpus": "none", "chunk_size": 2} | pool), "working")
    return [path for _, path, _ in jobs]


def ids(path):
    return [record["prompt_id"] for record in read_jsonl(path)]


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_map_files_writes_each_job_in_order_with_one_start(tmp_path):
    first, second = run_files(tmp_path, answered, "abc", "defg")
    assert ids(first) == ["0-0", "0-1", "0-2"]
    assert ids(second) == ["1-0", "1-1", "1-2", "1-3"]
    found = [record for path in (first, second) for record in read_jsonl(path)]
    assert [record["job"] for record in found] == [0, 0, 0, 1, 1, 1, 1]
    assert len({record["pid"] for record in found}) == 1
    assert names(first.parent) == ["0.jsonl", "1.jsonl"]


def test_map_files_counts_and_lists_skipped_records(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    first, second = run_files(tmp_path, answered, ["a", "skip", "b"], ["c"])
    assert (ids(first), ids(second)) == (["0-0", "0-2"], ["1-0"])
    listing = first.with_name("0.skipped.jsonl")
    assert list(read_jsonl(listing)) == [{"prompt_id": "0-1", "skipped": "too long"}]
    assert not first.with_name("1.skipped.jsonl").exists()
    assert f"{first}: 2 records written, 1 skipped" in caplog.messages
    # A list of an earlier run does not outlive it.
    run_files(tmp_path, answered, ["a", "b"])
    assert not listing.exists()


PROMPTS = ["a", "b", "c"], ["d", "e", "f"]


@pytest.fixture
def undisturbed(tmp_path):
    """The bytes of both files of a run that nothing happened to."""
    folder = tmp_path / "undisturbed"
    folder.mkdir()
    return [path.read_bytes() for path in run_files(folder, plain, *PROMPTS)]


def stopped(tmp_path):
    """Run until it fails with four of six records finished; returns the two partial files."""
    with pytest.raises(StageError, match="asked to fail"):
        run_files(tmp_path, fails_at_first, *PROMPTS)
    assert names(tmp_path / "out") == ["0.jsonl.partial", "1.jsonl.partial"]
    assert notes(tmp_path) == ["a b", "c d"]
    return [tmp_path / "out" / name for name in names(tmp_path / "out")]


def test_map_files_keeps_what_is_finished(tmp_path, undisturbed):
    stopped(tmp_path)
    again = run_files(tmp_path, fails_at_first, *PROMPTS)
    assert notes(tmp_path) == ["a b", "c d", "e f"]
    assert [path.read_bytes() for path in again] == undisturbed
    assert names(tmp_path / "out") == ["0.jsonl", "1.jsonl"]


@pytest.mark.parametrize(
    "damage, redone",
    [
        (lambda text: text[:-1], "b"),
        (lambda text: text[:-30], "b"),
        (lambda text: text + b'{"prompt_id": "0-', ""),
        (lambda text: text[:-40] + b"\0" * 40, "b"),
        (lambda text: text[:30], "a b"),
        (lambda text: b"", "a b"),
    ],
)
def test_map_files_does_again_what_a_torn_line_held(tmp_path, undisturbed, damage, redone):
    stopped(tmp_path)
    partial_file = tmp_path / "out" / "0.jsonl.partial"  # holds a, b and c
    lines = partial_file.read_bytes().splitlines(keepends=True)
    assert len(lines) == 4
    partial_file.write_bytes(damage(b"".join(lines[:3])))  # as if the kill had come while b was written
    again = run_files(tmp_path, fails_at_first, *PROMPTS)
    assert " ".join(notes(tmp_path)[2:]) == f"{redone} c e f".strip()
    assert [path.read_bytes() for path in again] == undisturbed


def test_map_files_starts_no_worker_when_all_is_finished(tmp_path, undisturbed):
    """Killed between the last record and the removal of the partial files."""
    partial_files = stopped(tmp_path)
    jobs = len(partial_files)
    with open(partial_files[1], "a") as file:
        for line in undisturbed[1].decode().split("\n")[1:3]:
            file.write(line + "\n")
    (tmp_path / "out" / "0.jsonl").write_bytes(undisturbed[0])
    before = len(list(tmp_path.glob("pid-*")))
    again = run_files(tmp_path, plain, *PROMPTS)
    assert [path.read_bytes() for path in again] == undisturbed and len(again) == jobs
    assert len(list(tmp_path.glob("pid-*"))) == before
    assert names(tmp_path / "out") == ["0.jsonl", "1.jsonl"]


def test_map_files_refuses_to_mix_settings(tmp_path):
    partial_files = stopped(tmp_path)
    before = [path.read_bytes() for path in partial_files]
    with pytest.raises(
        StageError,
        match=r"0.jsonl.partial holds 3 finished records made with other settings "
        r"\(temperature: None then, 0.5 now\); use those again, or remove it",
    ):
        run_files(tmp_path, plain, *PROMPTS, made_with={"temperature": 0.5})
    with pytest.raises(StageError, match="0.jsonl.partial .*input: "):
        run_files(tmp_path, plain, ["a", "b", "changed"], PROMPTS[1])
    assert [path.read_bytes() for path in partial_files] == before


def test_map_files_names_the_record_that_kills(tmp_path):
    with pytest.raises(StageError, match="(?s)died with exit code -9.*prompt_id 0-2 .*--on_error skip"):
        run_files(tmp_path, dies_on_request, ["a", "b", "die", "c"], chunk_size=4)


def test_map_files_leaves_out_the_record_that_kills(tmp_path):
    (path,) = run_files(tmp_path, dies_on_request, ["a", "b", "die", "c"], chunk_size=4, on_error="skip")
    assert ids(path) == ["0-0", "0-1", "0-3"]
    (listed,) = read_jsonl(path.with_name("0.skipped.jsonl"))
    assert listed["prompt_id"] == "0-2" and "died with exit code -9" in listed["skipped"]


def test_map_files_fails_without_an_output_when_all_is_skipped(tmp_path):
    with pytest.raises(StageError, match="every record of .*0.jsonl was skipped; see .*0.skipped.jsonl"):
        run_files(tmp_path, answered, ["skip", "skip"])
    assert len(ids(tmp_path / "out" / "0.skipped.jsonl")) == 2
    assert names(tmp_path / "out") == ["0.skipped.jsonl"]


def test_map_files_checks_every_record_before_it_starts(tmp_path, jsonl):
    good = jsonl("good.jsonl", {"prompt_id": "a", "prompt": "x"})
    bad = jsonl("bad.jsonl", {"prompt_id": "a", "prompt": "x"}, {"prompt_id": "b"})
    fields = {"prompt_id": str, "prompt": str}
    jobs = [(partial(read_jsonl, path, fields), tmp_path / "out" / path.name, {}) for path in (good, bad)]
    with pytest.raises(StageError, match="bad.jsonl, line 2: field 'prompt' is missing"):
        map_files(jobs, partial(start, answered, tmp_path), PoolConfig(gpus="none"), "working")
    assert not list(tmp_path.glob("pid-*")) and not (tmp_path / "out").exists()


def test_journal_says_when_the_disk_is_full(tmp_path):
    journal = Journal(tmp_path / "out.jsonl", {})
    journal.path.unlink()
    journal.path.symlink_to("/dev/full")
    with pytest.raises(
        StageError, match="out.jsonl.partial: No space left on device; what was finished before is kept"
    ):
        journal.append([{"prompt_id": "a"}])


@pytest.mark.parametrize(
    "setting",
    [
        {"on_error": "retry"},
        {"chunk_size": 0},
        {"stall_timeout": -1.0},
        {"stall_timeout": float("nan")},
        {"gpus": "99"},
    ],
)
def test_pool_config_refuses(setting):
    with pytest.raises(StageError, match=f"--{next(iter(setting))}"):
        PoolConfig(**setting)


STAGE = '''
import os, subprocess, sys, time
from functools import partial
from pathlib import Path
sys.path[:0] = [{root!r}, {root!r} + "/tests"]
from conftest import ChunkWork
from utils import run
from workers.pool import PoolConfig, map_files

class Slow(ChunkWork):
    def __init__(self):
        Path("children").write_text(str(subprocess.Popen(["sleep", "600"]).pid))  # as an engine on several GPUs does

    def __call__(self, tasks):
        with open("pids", "a") as file:
            file.write(f"{{os.getpid()}}\\n")
        time.sleep(0.3)
        return [record for _, record in tasks]

def main(number: int):
    """Works."""
    records = [dict(prompt_id=str(n), prompt="x") for n in range(number)]
    map_files([(partial(iter, records), "out.jsonl", {{}})], Slow, PoolConfig(gpus="none", chunk_size=1), "slow")

if __name__ == "__main__":
    run(main)
'''


@pytest.mark.parametrize("sent, code", [(signal.SIGKILL, -9), (signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_killed_stage_leaves_no_worker_and_goes_on(tmp_path, sent, code):
    (tmp_path / "stage.py").write_text(STAGE.format(root=str(ROOT)))
    command = [sys.executable, "stage.py", "--number", "8"]
    stage = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    kept = tmp_path / "out.jsonl.partial"
    deadline = time.monotonic() + 60
    while not (kept.exists() and kept.read_bytes().count(b"\n") >= 3) and time.monotonic() < deadline:
        time.sleep(0.02)
    stage.send_signal(sent)
    assert stage.wait(30) == code, stage.stderr.read()
    started = {int(pid) for name in ("pids", "children") for pid in (tmp_path / name).read_text().split()}
    deadline = time.monotonic() + 5
    while any(map(alive, started)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(alive, started))
    finished = kept.read_bytes().count(b"\n") - 1
    asked = len((tmp_path / "pids").read_text().split())
    assert subprocess.run(command, cwd=tmp_path, stderr=subprocess.PIPE, timeout=60).returncode == 0
    assert len((tmp_path / "pids").read_text().split()) - asked == 8 - finished < 8
    assert ids(tmp_path / "out.jsonl") == [str(n) for n in range(8)] and not kept.exists()


def test_chunks_get_smaller_towards_the_end():
    sizes = [len(chunk) for chunk in _chunks(iter(range(2000)), 2000, 128, 4)]
    assert sum(sizes) == 2000 and sizes == sorted(sizes, reverse=True)
    assert sizes[0] == 128 and sizes[-1] <= 8 and len(sizes) < 50
    assert [len(chunk) for chunk in _chunks(iter(range(300)), 300, 128, 1)] == [128, 128, 44]
    assert list(_chunks(iter([]), 0, 128, 2)) == []
