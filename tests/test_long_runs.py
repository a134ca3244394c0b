"""A run that a scheduler stops before its time limit: SIGUSR1 through comal.sh and stage.py to training, and SLURM.

python -m pytest tests/test_long_runs.py
"""

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
from helpers.loop import ROOT, STAGE, default_signals, environment, processes, wait_until
from helpers.training import environment as on_cpu
from helpers.training import run_here, words

import inpo
from training.trainer import TrainingConfig

# A launcher that leaves signals alone, and a process in a session of its own, as torch's launcher starts them, which
# takes longer to end than the time after which a stage is killed that does not end on SIGTERM.
LAUNCHER = """
import subprocess, sys
sys.exit(subprocess.run([sys.executable, "-c", sys.argv[1], *sys.argv[2:]], start_new_session=True).returncode)
"""
WORKER = """
import signal, sys, time
from pathlib import Path
asked = []
signal.signal(signal.SIGUSR1, lambda *_: asked.append(time.monotonic()))
Path(sys.argv[1], "ready").touch()
while not asked or time.monotonic() < asked[0] + 1.5:
    time.sleep(0.05)
Path(sys.argv[1], "written").touch()
sys.exit(1)
"""


def test_the_stage_runner_waits_for_the_processes_that_handle_the_signal(tmp_path):
    command = [sys.executable, "-c", LAUNCHER, WORKER, str(tmp_path)]
    patience = "import runpy, sys; sys.argv[0] = 'launch/stage.py'; import stage; stage.STOPPING_SECONDS = 0.5"
    runner = subprocess.Popen(
        [sys.executable, "-c", f"{patience}; sys.exit(stage.main())", "--parent", str(os.getpid()), "--", *command],
        env=environment(PYTHONPATH=str(ROOT / "launch")),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    wait_until((tmp_path / "ready").exists)
    runner.send_signal(signal.SIGUSR1)
    assert runner.wait(20) == 128 + signal.SIGUSR1 and (tmp_path / "written").exists()


@pytest.mark.slow
def test_training_stopped_before_a_time_limit_goes_on_to_the_same_weights(loop, setting, tmp_path):
    loop.python.write_text(
        STAGE.replace("script=$1\n", f'if [[ $1 == inpo.py ]]; then exec {sys.executable} "$@"; fi\nscript=$1\n')
    )
    (loop.exps / "run/iter0/data").mkdir(parents=True)
    for name in ("train", "test"):
        shutil.copy(setting.data, loop.exps / f"run/iter0/data/{name}.jsonl")
    settings = {"ROUNDS": "1", "SPLITS": "1", "MODEL": setting.policy, "TOKENIZER": "", "KL_FROM_START": "false"}
    settings |= {"GLOBAL_BATCH_SIZE": "4", "NUM_EPOCHS": "12", "SELECT": "last", "OMP_NUM_THREADS": "1"}
    checkpoint = loop.exps / "run/iter0/ckpt"
    metrics = checkpoint / "metrics.jsonl"
    process = loop.start(**settings)
    wait_until(lambda: process.poll() is not None or (metrics.exists() and metrics.read_text().count("\n") > 3), 60)
    process.send_signal(signal.SIGUSR1)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 138 and "SIGUSR1 received, stopped; what is complete is kept" in output, output
    log = (loop.exps / "run/iter0/logs/training.log").read_text()
    (point,) = checkpoint.glob("resume-*")
    assert (
        f"told to stop (SIGUSR1): exps/{loop.name}/run/iter0/ckpt has a resume point after update {point.name[7:]};"
        in log
    )
    output, code = loop.run(**settings)
    assert code == 0 and "    training " in output and not list(checkpoint.glob("resume-*")), output
    recorded = json.loads((checkpoint / "training.json").read_text())
    flags = {name: recorded[name] for name in ("eta", "tau_eta_ratio", "soft_labels", *TrainingConfig.__annotations__)}
    run_here(inpo.main, **(flags | {"output": str(tmp_path / "undisturbed"), "report_to": "none"}))
    weights = [(folder / "model/model.safetensors").read_bytes() for folder in (checkpoint, tmp_path / "undisturbed")]
    assert weights[0] == weights[1]


@pytest.mark.slow
def test_the_signal_reaches_training_through_its_launcher(setting, tmp_path):
    """Two processes: test_fsdp.py shows that what they leave is gone on with bit for bit."""
    output = tmp_path / "ckpt"
    flags = words(model=setting.policy, input=setting.data, output=output, num_epochs=500, global_batch_size=4)
    launcher = ["-m", "accelerate.commands.launch", "--config_file", "fsdp_config.yaml", "--mixed_precision", "no"]
    command = [sys.executable, *launcher, "--num_processes", "2", "inpo.py", "--report_to", "none", *flags]
    log = tmp_path / "log"
    process = subprocess.Popen(
        [sys.executable, "launch/stage.py", "--parent", str(os.getpid()), "--quiet", "--log", log, "--", *command],
        cwd=ROOT,
        env=on_cpu(),
    )
    metrics = output / "metrics.jsonl"
    wait_until(lambda: process.poll() is not None or (metrics.exists() and metrics.read_text().count("\n") > 2), 100)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(60) == 138, log.read_text()
    (point,) = output.glob("resume-*/progress.json")
    assert log.read_text().count(f"has a resume point after update {json.loads(point.read_text())['step']};") == 2


# ---------------------------------------------------------------------------------------------- SLURM

SRUN = """#!/usr/bin/env bash
while [[ $1 == --* ]]; do shift; done
exec "$@"
"""
SCONTROL = """#!/usr/bin/env bash
if [[ $1 == show ]]; then echo "$3"; else echo "$*" >>"$REQUEUED"; fi
"""


@pytest.mark.parametrize("requeue", ["true", ""])
def test_slurm_queues_a_job_again_that_its_time_limit_stops(loop, tmp_path, requeue):
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    slurm = {
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_JOB_ID": "17",
        "SLURM_JOB_NODELIST": "n0",
        "SLURM_JOB_NUM_NODES": "1",
    }
    slurm |= {
        "PATH": f"{tmp_path}/bin:{os.environ['PATH']}",
        "REQUEUED": str(tmp_path / "requeued"),
        "REQUEUE": requeue,
    }
    job = subprocess.Popen(
        ["bash", "launch/slurm.sh"],
        cwd=ROOT,
        env=environment(**loop.settings(SLEEP="scoring.py", **slurm)),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        preexec_fn=default_signals,
    )
    wait_until(lambda: sum("sleep 300" in line for line in processes(loop.name).values()) == 2, 20)
    for pid in processes(loop.name):
        if pid != job.pid:  # all processes of the step get it, the batch script does not
            os.kill(pid, signal.SIGUSR1)
    output = job.communicate(timeout=30)[0]
    assert job.returncode == 138 and "SIGUSR1 received, stopped" in output, output
    assert (tmp_path / "requeued").exists() == bool(requeue) and ("is queued again" in output) == bool(requeue)
    assert not requeue or (tmp_path / "requeued").read_text() == "requeue 17\n"
    wait_until(lambda: not processes(loop.name), 5)
