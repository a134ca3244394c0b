"""comal.sh as the tests start it: whole loops of the demo, or loops whose stages a script stands in for."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# What a shell, a user or a scheduler may have set for another purpose, and comal.sh reads.
READ = ("METHOD", "NAME", "SEED", "MODEL", "NODES", "NODE_RANK", "MASTER_ADDR", "SLURM_NODEID", "SLURM_STEP_NUM_NODES")
READ += ("SETUP_FOR",)
STAGE = r"""#!/usr/bin/env bash
# Stands in for the interpreter: writes the files that --output names, or sleeps in the stage that SLEEP names, or fails
# in the one that FAIL names.
# launch/setup.sh asks what is not installed, launch/nodes.sh why there could be no engine.
if [[ $1 == -c && $2 =~ find_spec|no_cpu_engine ]]; then exit; fi
if [[ $1 == -c ]]; then echo "torch 1"; exit; fi
if [[ $1 == "${SLEEP-}" ]]; then setsid sleep 300 & sleep 300; fi
if [[ $1 == "${FAIL-}" ]]; then
  printf 'pairs: %s0%%|#####| %s/2 [00:01<00:01, 1.9it/s]\r' 5 1 10 2 >&2
  echo "no luck with $1" >&2
  exit 3
fi
if [[ "$1 $2" == "-m accelerate"* ]]; then while [[ $1 != *.py ]]; do shift; done; fi
script=$1
outputs=()
while (($#)); do
  if [[ $1 == --output || $1 == --compared ]]; then outputs+=(${2//,/ }); fi
  shift
done
[[ $script == */game.py ]] || echo "Triton is installed, but a stage ran"
for output in "${outputs[@]}"; do
  if [[ $script == *po.py ]]; then
    mkdir -p "$output"/{model,last,resume-1}
    echo 1 >"$output/model/model.safetensors"
    output+=/DONE
  fi
  mkdir -p "$(dirname "$output")"
  echo 1 >"$output"
  touch "$output.partial"
  [[ $script != eval.py && $output != */vs_* ]] || cp "$output" "${output%l}"
done
exit 0
"""


def wait_until(condition, seconds=10):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def default_signals():
    """In a child before its program runs: comal.sh cannot trap a signal that is ignored when it starts, and `nohup` or
    `&` in a shell have their children begin so."""
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)


def environment(**settings):
    """The environment of a loop: the caller's, without what comal.sh would read of it."""
    return {name: value for name, value in os.environ.items() if name not in READ} | settings


def start(log, mark, **settings):
    """A demo loop whose processes all inherit `mark`."""
    return subprocess.Popen(
        ["bash", "comal.sh"],
        cwd=ROOT,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        env=environment(**{"RECIPE": "demo", "PYTHON": sys.executable, "FAULTS_MARK": mark} | settings),
        preexec_fn=default_signals,
    )


def processes(mark):
    """{pid: command line} of the living processes that inherited the mark."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"FAULTS_MARK={mark}".encode() in (process / "environ").read_bytes().split(b"\0"):
                found[int(process.name)] = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
    return {pid: command for pid, command in found.items() if command}


def settle(mark, seconds=10):
    """The processes that are left after some seconds at most."""
    deadline = time.monotonic() + seconds
    while (left := processes(mark)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return left


def commands(plan, script):
    """The flags of every planned run of a script, in order."""
    lines = [line.split() for line in plan.split("\n") if f" {script} " in line]
    return [dict(zip(words, words[1:])) for words in lines]


class Loop:
    """comal.sh in a folder of its own in exps/, its stages played by STAGE."""

    def __init__(self, folder, name):
        self.folder, self.name, self.exps = folder, name, ROOT / "exps" / name
        models = folder / "models"
        for model in ("policy", "judge"):
            (models / model / "model").mkdir(parents=True)
            (models / model / "DONE").touch()
            (models / model / "model/model.safetensors").write_text("1")
        (models / "prompts").mkdir()
        for prompts in ("train_0", "train_1", "test", "eval"):
            (models / f"prompts/{prompts}.jsonl").write_text(prompts)
        self.python = folder / "python"
        self.python.write_text(STAGE)
        self.python.chmod(0o755)

    def settings(self, **changed):
        return {
            "RECIPE": "demo",
            "NAME": f"{self.name}/run",
            "DEMO_MODELS": str(self.folder / "models"),
            "ROUNDS": "2",
            "SPLITS": "2",
            "UPDATE_INTERVAL": "2",
            "FAULTS_MARK": self.name,
            "PYTHON": str(self.python),
            "CUDA_VISIBLE_DEVICES": "",  # the same on a machine with GPUs
        } | changed

    def start(self, *arguments, **settings):
        return subprocess.Popen(
            ["bash", "comal.sh", *arguments],
            cwd=ROOT,
            env=environment(**self.settings(**settings)),
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=default_signals,
        )

    def run(self, *arguments, **settings):
        process = self.start(*arguments, **settings)
        return process.communicate(timeout=60)[0], process.returncode

    def planned(self, *scripts, **settings):
        """Of each of the scripts, the flags of every run in the plan."""
        plan = self.run("--plan", **settings)[0]
        return [commands(plan, script) for script in scripts]

    def sleeping(self, **settings):
        process = self.start(SLEEP="scoring.py", **settings)
        wait_until(lambda: sum("sleep 300" in line for line in processes(self.name).values()) == 2, 20)
        return process

    def models(self, name="run", kind="model"):
        return sorted(int(path.parents[1].name[4:]) for path in (self.exps / name).glob(f"iter*/ckpt/{kind}"))
