"""That a training run which was stopped goes on to the same bits.

python -m pytest tests/test_resume.py
"""

import json
import logging
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from helpers.training import (
    ETA,
    ROOT,
    R,
    column,
    environment,
    read,
    run_here,
    run_process,
    swap,
    words,
    write,
)

import inpo
from training.checkpoints import Checkpoints, Progress, find_progress
from training.trainer import Trainer
from utils import StageError

# Eight updates of six and five pairs; a resume point after each one, a validation after each second one.
RESUMED = dict(
    eta=ETA,
    tau_eta_ratio=R,
    global_batch_size=6,
    micro_batch_tokens=150,
    num_epochs=4,
    learning_rate=3e-5,
    max_grad_norm=1.0,
    save_minutes=1e-9,
)


SELDOM = {"save_minutes": 60}  # then only where the validation loss is the lowest so far

LINES = 12  # of metrics.jsonl: 8 updates, 4 validations

UNFINISHED = {"metrics.jsonl", "training.json", "tensorboard"}


def kill_at(line, output, **flags):
    """SIGKILL inpo.py as soon as metrics.jsonl has so many lines and there is a resume point."""
    process = subprocess.Popen(
        [sys.executable, "inpo.py", *words(**(RESUMED | flags | {"output": output}))],
        cwd=ROOT,
        env=environment(),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    metrics = output / "metrics.jsonl"
    while not (
        metrics.exists() and metrics.read_bytes().count(b"\n") >= line and list(output.glob("resume-*/progress.json"))
    ):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL and not (output / "DONE").exists()


def check_same_result(output, expected):
    """Equal to the last bit, and nothing is left."""
    weights = [(directory / "model/model.safetensors").read_bytes() for directory in (output, expected)]
    assert weights[0] == weights[1]
    metrics = [
        [
            {name: value for name, value in record.items() if not name.endswith("tokens_per_s")}
            for record in read(directory / "metrics.jsonl")
        ]
        for directory in (output, expected)
    ]
    assert metrics[0] == metrics[1] and len(metrics[0]) == LINES
    assert (output / "DONE").read_text() == (expected / "DONE").read_text()
    assert {path.name for path in output.iterdir()} == UNFINISHED | {"model", "DONE"}


@pytest.fixture(scope="module")
def undisturbed(setting, tmp_path_factory):
    """Runs that nothing stopped, without resume points: their `flags` and `output`. The validation loss of `best` and
    `last` falls, that of `swapped` rises."""
    directory = tmp_path_factory.mktemp("undisturbed")
    swapped = write(directory / "swapped.jsonl", [swap(record) for record in setting.records])
    runs = {}
    for name, select, validation in (
        ("best", "best", setting.data),
        ("swapped", "best", swapped),
        ("last", "last", setting.data),
    ):
        flags = dict(model=setting.policy, input=setting.data, validation=validation, select=select)
        run_here(inpo.main, **(RESUMED | flags | {"output": str(directory / name), "save_minutes": 0}))
        runs[name] = SimpleNamespace(flags=flags, output=directory / name)
    return runs


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_bits(undisturbed, train, tmp_path, caplog, capsys):
    caplog.set_level(logging.INFO)
    run, output = undisturbed["best"], tmp_path / "ckpt"
    kill_at(5, output, **run.flags)
    newest = max(int(path.parent.name[7:]) for path in output.glob("resume-*/progress.json"))
    train(**(RESUMED | run.flags))
    printed = capsys.readouterr().out
    assert f"resuming after step {newest} of 8" in caplog.text and f"step {newest + 1}/8" in printed
    assert f"step {newest}/8" not in printed and "untouched policy" not in caplog.text
    check_same_result(output, run.output)
    (tmp_path / "usual").touch()
    assert (output / "model/model.safetensors").stat().st_mode == (tmp_path / "usual").stat().st_mode


@pytest.fixture
def stopped(train, monkeypatch):
    """A function that trains in this process as `undisturbed` did and is stopped where `method` would run for the n-th
    time."""

    def run(method, count=1, **flags):
        owner = Checkpoints if hasattr(Checkpoints, method) else Trainer
        calls, original = [], getattr(owner, method)

        def stop(self, *args):
            calls.append(0)
            if len(calls) == count:
                raise KeyboardInterrupt
            return original(self, *args)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(owner, method, stop)
            train(**(RESUMED | flags))

    return run


@pytest.mark.parametrize("name", ["best", "swapped"])
@pytest.mark.parametrize(
    "method, count, often", [("save_resume_point", 2, {}), ("tidy", 2, {}), ("update", 6, {}), ("update", 6, SELDOM)]
)
def test_a_stop_between_any_two_files_is_mended(undisturbed, train, stopped, tmp_path, name, method, count, often):
    # Before the resume point that would know the newest best weights; before what it replaces is removed; right after
    # one; and where updates have to be made again.
    run = undisturbed[name]
    stopped(method, count, **(run.flags | often))
    assert list((tmp_path / "ckpt").glob("best-*")) and not (tmp_path / "ckpt/DONE").exists()
    (tmp_path / "ckpt/resume.tmp").mkdir()
    (tmp_path / "ckpt/training.json.tmp").write_text("{")
    with open(tmp_path / "ckpt/metrics.jsonl", "a") as file:
        file.write('{"step": 9')  # a line that was being written
    check_same_result(train(**(RESUMED | run.flags)), run.output)


@pytest.mark.parametrize("name", ["best", "swapped", "last"])
def test_a_stop_between_the_weights_and_the_marker_is_mended(undisturbed, train, monkeypatch, tmp_path, name):
    run = undisturbed[name]

    def stop(path, text):
        if path.name == "DONE":
            raise KeyboardInterrupt
        path.write_text(text)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("training.checkpoints.write_text", stop)
        train(**(RESUMED | run.flags))
    left = {path.name for path in (tmp_path / "ckpt").iterdir()}
    assert "model" in left and "DONE" not in left and any(name.startswith("resume-") for name in left)
    check_same_result(train(**(RESUMED | run.flags)), run.output)


def test_only_the_newest_resume_point_and_the_best_weights_are_kept(undisturbed, stopped, tmp_path):
    stopped("update", 8, **undisturbed["swapped"].flags)
    assert {path.name for path in (tmp_path / "ckpt").iterdir()} == UNFINISHED | {"resume-7", "best-2"}


def test_resume_points_come_by_elapsed_time(undisturbed, stopped, tmp_path, monkeypatch):
    # Each update takes 25 seconds by this clock: the minute is over after the third and after the sixth one.
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr("training.checkpoints.time", SimpleNamespace(monotonic=lambda: clock.now))
    original, points = Trainer.update, []

    def update(self, *args):
        points.append(sorted(path.name for path in (tmp_path / "ckpt").glob("resume-*")))
        clock.now += 25
        return original(self, *args)

    monkeypatch.setattr(Trainer, "update", update)
    stopped("update", 8, **(undisturbed["last"].flags | {"save_minutes": 1}))
    assert points == [[]] * 3 + [["resume-3"]] * 3 + [["resume-6"]]


def tell_before(monkeypatch, step):
    """SIGUSR1 to this process while it makes the update after `step`."""
    original = Trainer.update

    def update(self, at, indices):
        if at == step:
            os.kill(os.getpid(), signal.SIGUSR1)
        return original(self, at, indices)

    monkeypatch.setattr(Trainer, "update", update)


def test_a_run_that_is_told_to_stop_leaves_a_resume_point(undisturbed, train, tmp_path, monkeypatch):
    run, flags = undisturbed["best"], RESUMED | undisturbed["best"].flags | SELDOM
    with monkeypatch.context() as patch:
        tell_before(patch, 4)
        with pytest.raises(StageError, match=r"told to stop \(SIGUSR1\): .*ckpt has a resume point after update 5;"):
            train(**flags)
    assert {path.name for path in (tmp_path / "ckpt").iterdir()} == UNFINISHED | {"resume-5", "best-4"}
    check_same_result(train(**flags), run.output)


def test_a_run_that_is_told_to_stop_in_its_last_update_finishes(undisturbed, train, monkeypatch):
    tell_before(monkeypatch, 7)
    check_same_result(train(**(RESUMED | undisturbed["last"].flags | SELDOM)), undisturbed["last"].output)


def test_without_resume_points_training_begins_again(undisturbed, train, stopped, tmp_path):
    run = undisturbed["best"]
    stopped("update", 6, **(run.flags | {"save_minutes": 0}))
    assert {path.name for path in (tmp_path / "ckpt").iterdir()} == UNFINISHED | {"best-4"}
    check_same_result(train(**(RESUMED | run.flags | {"save_minutes": 0})), run.output)


def test_an_unfinished_run_goes_on_with_the_same_settings_and_files_alone(
    undisturbed, train, stopped, setting, tmp_path, caplog
):
    flags = undisturbed["last"].flags
    data = write(tmp_path / "data.jsonl", setting.records)
    stopped("update", 5, **(flags | {"input": data}))
    before = {path.name for path in (tmp_path / "ckpt").iterdir()}
    again = RESUMED | flags | {"input": data}
    message = (
        r"unfinished run with other settings \(learning_rate: 3e-05 then, 2e-05 now\); use those again, or remove it"
    )
    with pytest.raises(StageError, match=message):
        train(**(again | {"learning_rate": 2e-5}))
    with pytest.raises(
        StageError, match=r"other settings \(eta: .*; contents of --model: '\w{16}' then, '\w{16}' now\)"
    ):
        train(**(again | {"model": setting.reference, "eta": 0.03}))
    write(data, setting.records[::-1])
    with pytest.raises(StageError, match=r"other settings \(contents of --input: '\w{16}' then, '\w{16}' now\)"):
        train(**again)
    assert {path.name for path in (tmp_path / "ckpt").iterdir()} == before
    # The same contents elsewhere, and settings that the result does not depend on.
    moved = write(tmp_path / "moved.jsonl", setting.records)
    train(**(again | {"input": moved, "micro_batch_tokens": 99, "save_minutes": 0, "gradient_checkpointing": True}))
    assert column(tmp_path / "ckpt", "step")[-1] == 8
    assert "WARNING: micro_batch_tokens 150 then, 99 now; sums are rounded otherwise" in caplog.text


def test_find_progress_takes_the_run_with_the_same_fingerprint_alone(tmp_path):
    (tmp_path / "resume-3").mkdir()
    recorded = {"step": 3, "best": None, "first_loss": 0.5}
    (tmp_path / "resume-3/progress.json").write_text(json.dumps(recorded | {"fingerprint": {"eta": 0.1}}))
    assert find_progress(tmp_path, {"eta": 0.1}) == Progress(**recorded)
    with pytest.raises(StageError, match="unfinished run with other settings"):
        find_progress(tmp_path, {"eta": 0.2})
    (tmp_path / "resume-3/progress.json").write_text(json.dumps(recorded))
    with pytest.raises(StageError, match="unfinished run with other settings"):
        find_progress(tmp_path, {"eta": 0.1})


# A file system of a few megabytes, in a mount namespace of its own. $1: the directory, $2: its size in KiB; then
# inpo.py's command, which fills it up. What it leaves is copied to where there is space.
FULL_DISK = """
mount -t tmpfs -o size=$2k none "$1" || exit 77
directory=$1; shift 2
"$@"; echo "exit code $?:" $(ls "$directory/ckpt")
cp -r "$directory/ckpt" "$directory-result"
"""


@pytest.mark.slow
def test_a_full_disk_is_a_message_and_the_run_goes_on_later(undisturbed, train, tmp_path, caplog):
    run, disk = undisturbed["swapped"], tmp_path / "disk"
    disk.mkdir()
    size = (run.output / "model/model.safetensors").stat().st_size // 1024
    # The best weights and one resume point (weights and the optimiser's two averages) fit, a second one does not.
    command = [sys.executable, "inpo.py", *words(**(RESUMED | run.flags | {"output": disk / "ckpt"}))]
    done = run_process(["unshare", "-m", "bash", "-c", FULL_DISK, "bash", disk, str(size * 6 + 200), *command])
    if "unshare failed" in done.stdout or done.returncode == 77:
        pytest.skip("may not mount a small file system")
    printed, left = done.stdout.split("exit code ")
    assert (
        "resume-2 could not be saved: " in printed and "MiB free there); free some space and start again: " in printed
    )
    assert "all up to update 1 is kept" in printed and "Traceback" not in printed
    assert left == "1: best-2 metrics.jsonl resume-1 tensorboard training.json\n"
    caplog.set_level(logging.INFO)
    check_same_result(train(output="disk-result", **(RESUMED | run.flags)), run.output)
    assert "resuming after step 1 of 8" in caplog.text
