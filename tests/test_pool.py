"""workers/pool.py: files through real worker processes: what is kept, skipped, refused.

python -m pytest tests/test_pool.py
"""

import logging
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from helpers.children import no_child_left  # noqa: F401
from helpers.work import (
    alive,
    answered,
    dies_on_request,
    fails_at_first,
    notes,
    plain,
    raises_on_request,
    start,
)

from records import Prompt, Record, read
from utils import StageError
from workers.pool import PoolConfig, _chunks, map_files

ROOT = Path(__file__).resolve().parents[1]


def starts(folder):
    return len(list(folder.glob("pid-*")))


def run_files(tmp_path, work, *inputs, settings=(), **pool):
    """Paths of one output a list of prompts."""
    jobs = []
    for number, prompts in enumerate(inputs):
        records = [{"prompt_id": f"{number}-{i}", "prompt": prompt} for i, prompt in enumerate(prompts)]
        jobs.append((partial(iter, records), tmp_path / "out" / f"{number}.jsonl", dict(settings)))
    map_files(jobs, partial(start, work, tmp_path), PoolConfig(**{"gpus": "none", "chunk_size": 2} | pool), "working")
    return [path for _, path, _ in jobs]


def ids(path):
    return [record["prompt_id"] for record in read(path, Record)]


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_map_files_writes_each_job_in_order_with_one_start(tmp_path):
    first, second = run_files(tmp_path, answered, "abc", "defg")
    assert ids(first) == ["0-0", "0-1", "0-2"]
    assert ids(second) == ["1-0", "1-1", "1-2", "1-3"]
    found = [record for path in (first, second) for record in read(path, Record)]
    assert [record["job"] for record in found] == [0, 0, 0, 1, 1, 1, 1]
    assert len({record["pid"] for record in found}) == 1
    assert names(first.parent) == ["0.jsonl", "1.jsonl"]


def test_map_files_counts_and_lists_skipped_records(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    first, second = run_files(tmp_path, answered, ["a", "skip", "b"], ["c"])
    assert (ids(first), ids(second)) == (["0-0", "0-2"], ["1-0"])
    listing = first.with_name("0.skipped.jsonl")
    assert list(read(listing, Record)) == [{"prompt_id": "0-1", "skipped": "too long"}]
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
    assert notes(tmp_path) == ["a", "b", "c", "d"]
    return [tmp_path / "out" / name for name in names(tmp_path / "out")]


def test_map_files_keeps_what_is_finished(tmp_path, undisturbed):
    stopped(tmp_path)
    again = run_files(tmp_path, fails_at_first, *PROMPTS)
    assert notes(tmp_path) == ["a", "b", "c", "d", "e", "f"]
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
    assert " ".join(notes(tmp_path)[4:]) == f"{redone} c e f".strip()
    assert [path.read_bytes() for path in again] == undisturbed


def test_map_files_starts_no_worker_when_all_is_finished(tmp_path, undisturbed):
    """Killed between the last record and the removal of the partial files."""
    partial_files = stopped(tmp_path)
    jobs = len(partial_files)
    with open(partial_files[1], "a") as file:
        for line in undisturbed[1].decode().split("\n")[1:3]:
            file.write(line + "\n")
    (tmp_path / "out" / "0.jsonl").write_bytes(undisturbed[0])
    before = starts(tmp_path)
    again = run_files(tmp_path, plain, *PROMPTS)
    assert [path.read_bytes() for path in again] == undisturbed and len(again) == jobs
    assert starts(tmp_path) == before
    assert names(tmp_path / "out") == ["0.jsonl", "1.jsonl"]


def test_map_files_refuses_to_mix_settings(tmp_path):
    partial_files = stopped(tmp_path)
    before = [path.read_bytes() for path in partial_files]
    with pytest.raises(
        StageError,
        match=r"0.jsonl.partial holds 3 finished records made with other settings "
        r"\(temperature: None then, 0.5 now\); use those again, or remove it",
    ):
        run_files(tmp_path, plain, *PROMPTS, settings={"temperature": 0.5})
    with pytest.raises(StageError, match="0.jsonl.partial .*input: "):
        run_files(tmp_path, plain, ["a", "b", "changed"], PROMPTS[1])
    assert [path.read_bytes() for path in partial_files] == before


def test_map_files_names_the_record_that_kills(tmp_path):
    with pytest.raises(StageError, match="(?s)died with exit code -9.*prompt_id 0-2 .*--on_error skip"):
        run_files(tmp_path, dies_on_request, ["a", "b", "die", "c"], chunk_size=4)


def test_map_files_leaves_out_the_record_that_kills(tmp_path):
    (path,) = run_files(tmp_path, dies_on_request, ["a", "b", "die", "c"], chunk_size=4, on_error="skip")
    assert ids(path) == ["0-0", "0-1", "0-3"]
    (listed,) = read(path.with_name("0.skipped.jsonl"), Record)
    assert listed["prompt_id"] == "0-2" and "died with exit code -9" in listed["skipped"]


def test_map_files_names_the_record_that_raises_and_restarts_nothing(tmp_path, caplog):
    with pytest.raises(StageError, match="(?s)KeyError: 'of no record'\n.*prompt_id 0-4 .*--on_error skip"):
        run_files(tmp_path, raises_on_request, ["a", "b", "c", "d", "raise", "e"], chunk_size=4)
    assert starts(tmp_path) == 1 and "Traceback" in caplog.text


def test_map_files_leaves_out_the_record_that_raises(tmp_path):
    (path,) = run_files(tmp_path, raises_on_request, ["a", "b", "raise", "c"], chunk_size=4, on_error="skip")
    assert ids(path) == ["0-0", "0-1", "0-3"] and starts(tmp_path) == 1
    listed = {"prompt_id": "0-2", "skipped": "KeyError: 'of no record'"}
    assert list(read(path.with_name("0.skipped.jsonl"), Record)) == [listed]


def test_a_field_called_skipped_is_no_verdict(tmp_path):
    records = [{"prompt_id": "a", "prompt": "x", "skipped": "no"}, {"prompt_id": "b", "prompt": "skip"}]
    path = tmp_path / "out.jsonl"
    map_files([(partial(iter, records), path, {})], partial(start, answered, tmp_path), PoolConfig(gpus="none"), "")
    assert [(record["prompt_id"], record["skipped"]) for record in read(path, Record)] == [("a", "no")]
    assert ids(path.with_name("out.skipped.jsonl")) == ["b"]


def test_map_files_fails_without_an_output_when_all_is_skipped(tmp_path):
    with pytest.raises(StageError, match="every record of .*0.jsonl was skipped; see .*0.skipped.jsonl"):
        run_files(tmp_path, answered, ["skip", "skip"])
    assert len(ids(tmp_path / "out" / "0.skipped.jsonl")) == 2
    assert names(tmp_path / "out") == ["0.skipped.jsonl"]


def test_map_files_checks_every_record_before_it_starts(tmp_path, jsonl):
    good = jsonl("good.jsonl", {"prompt_id": "a", "prompt": "x"})
    bad = jsonl("bad.jsonl", {"prompt_id": "a", "prompt": "x"}, {"prompt_id": "b"})
    jobs = [(partial(read, path, Prompt), tmp_path / "out" / path.name, {}) for path in (good, bad)]
    with pytest.raises(StageError, match="bad.jsonl, line 2: prompt_id b: field prompt is missing"):
        map_files(jobs, partial(start, answered, tmp_path), PoolConfig(gpus="none"), "working")
    assert not list(tmp_path.glob("pid-*")) and not (tmp_path / "out").exists()


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
from helpers.work import RecordWork
from utils import run
from workers.pool import PoolConfig, map_files

class Slow(RecordWork):
    def __init__(self):
        Path("children").write_text(str(subprocess.Popen(["sleep", "600"]).pid))  # as an engine on several GPUs does

    def __call__(self, task):
        with open("pids", "a") as file:
            file.write(f"{{os.getpid()}}\\n")
        time.sleep(0.3)
        return task[1]

def main(number: int):
    """Works."""
    records = [dict(prompt_id=str(n), prompt="x") for n in range(number)]
    map_files([(partial(iter, records), "out.jsonl", {{}})], Slow, PoolConfig(gpus="none", chunk_size=1), "slow")

if __name__ == "__main__":
    run(main)
'''


def default_handlers():
    """Of signals that the suite may have been started with ignored, as `nohup` in the background does."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


@pytest.mark.parametrize("sent, code", [(signal.SIGKILL, -9), (signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_killed_stage_leaves_no_worker_and_goes_on(tmp_path, sent, code):
    (tmp_path / "stage.py").write_text(STAGE.format(root=str(ROOT)))
    command = [sys.executable, "stage.py", "--number", "8"]
    stage = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, preexec_fn=default_handlers)
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
