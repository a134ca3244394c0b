"""The loop of comal.sh: locks, ends of every kind, forks, pins, what it keeps. A script stands in for the stages.

python -m pytest tests/test_comal.py
"""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import time
import uuid
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
STAGE = r"""#!/usr/bin/env bash
# Stands in for the interpreter: writes the files that --output names, or sleeps in the stage that SLEEP names.
if [[ $1 == -c ]]; then echo "torch 1 transformers 1"; exit; fi
if [[ $1 == "${SLEEP-}" ]]; then setsid sleep 300 & sleep 300; fi
script=$1
outputs=()
while (($#)); do
  if [[ $1 == --output || $1 == --compared ]]; then outputs+=(${2//,/ }); fi
  shift
done
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


class Loop:
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
        (folder / "bin").mkdir()

    def start(self, *arguments, **settings):
        environment = (
            os.environ
            | {
                "PATH": f"{self.folder}/bin:{os.environ['PATH']}",
                "RECIPE": "demo",
                "NAME": f"{self.name}/run",
                "DEMO_MODELS": str(self.folder / "models"),
                "ROUNDS": "2",
                "SPLITS": "2",
                "UPDATE_INTERVAL": "2",
                "COMAL_TEST_MARK": self.name,
            }
            | settings
        )
        # The interpreter's own check belongs to setup.sh, which tests/test_setup.py tests.
        command = f"PYTHON={self.python}; source() {{ if [[ $1 != launch/setup.sh ]]; then builtin source $1; fi; }}; "
        command += 'export PYTHON; export -f source; exec bash comal.sh "$@"'
        return subprocess.Popen(
            ["bash", "-c", command, "bash", *arguments],
            cwd=ROOT,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def run(self, *arguments, **settings):
        process = self.start(*arguments, **settings)
        return process.communicate(timeout=40)[0], process.returncode

    def sleeping(self, **settings):
        process = self.start(SLEEP="scoring.py", **settings)
        wait_until(lambda: sum("sleep 300" in line for line in self.processes().values()) == 2)
        return process

    def processes(self):
        found = {}
        for process in Path("/proc").glob("[0-9]*"):
            try:
                if f"COMAL_TEST_MARK={self.name}\0".encode() in (process / "environ").read_bytes():
                    found[int(process.name)] = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                pass
        return found

    def models(self, name="run", kind="model"):
        return sorted(int(path.parents[1].name[4:]) for path in (self.exps / name).glob(f"iter*/ckpt/{kind}"))


def wait_until(condition, seconds=10):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.fixture
def loop(tmp_path):
    loop = Loop(tmp_path, f"test-{uuid.uuid4().hex[:8]}")
    yield loop
    for pid in loop.processes():
        with contextlib.suppress(ProcessLookupError):  # it has just ended
            os.kill(pid, signal.SIGKILL)
    shutil.rmtree(loop.exps, ignore_errors=True)


def test_one_run_a_folder_and_none_is_left_by_sigkill(loop):
    first = loop.sleeping()
    output, code = loop.run()
    assert code == 1 and f"in use by another comal.sh (pid {first.pid})" in output
    os.kill(first.pid, signal.SIGKILL)
    wait_until(lambda: not loop.processes(), 5)
    output, code = loop.run(KEEP_CKPTS="rounds")
    assert code == 0 and "stage sampling" not in output.split("iteration 1")[0], output


def test_a_killed_stage_stops_the_loop(loop):
    process = loop.sleeping()
    pid = next(pid for pid, line in loop.processes().items() if "scoring.py" in line and "comal.sh" not in line)
    os.kill(pid, signal.SIGKILL)
    output = process.communicate(timeout=15)[0]
    assert process.returncode == 1 and "stage scoring failed with exit code 137" in output, output
    wait_until(lambda: not loop.processes(), 5)


@pytest.mark.parametrize("keep, models", [("all", [0, 1, 2, 3]), ("rounds", [1, 3]), ("last", [3])])
def test_what_is_kept(loop, keep, models):
    output, code = loop.run(KEEP_CKPTS=keep, UPDATE_INTERVAL="0")
    assert code == 0, output
    assert loop.models() == loop.models(kind="last") == models and loop.models(kind="DONE") == [0, 1, 2, 3]
    assert not loop.models(kind="resume-1") and not list(loop.exps.rglob("*.partial"))


def test_last_keeps_the_reference(loop):
    assert loop.run(KEEP_CKPTS="last", UPDATE_INTERVAL="3")[1] == 0
    assert loop.models() == [2, 3]


@pytest.mark.parametrize(
    "every, scorings, at_the_end", [("1", [[0], [1], [2]], [3]), ("2", [[0, 1]], [2, 3]), ("4", [], [0, 1, 2, 3])]
)
def test_comparisons_share_the_judge_of_a_scoring(loop, every, scorings, at_the_end):
    plan = loop.run("--plan", EVAL_EVERY=every)[0]
    compared = lambda flag, script: [
        sorted({int(i) for i in re.findall(r"/iter(\d+)/eval/vs_", line)})
        for line in plan.splitlines()
        if script in line and flag in line
    ]
    assert compared("--compared", "scoring.py") == scorings
    assert compared("--output", "eval.py compare") == [at_the_end]
    output, code = loop.run(EVAL_EVERY=every)
    assert code == 0 and len(list(loop.exps.glob("run/iter*/eval/vs_*.json"))) == 8, output


def test_pins_and_forks(loop):
    assert loop.run(KEEP_CKPTS="rounds")[1] == 0
    run, fork = f"exps/{loop.name}/run", {"NAME": f"{loop.name}/fork", "ETA": "0.5", "KEEP_CKPTS": "rounds"}
    assert json.loads((ROOT / run / "iter2/next.json").read_text()) == {
        "policy": f"{run}/iter2/ckpt",
        "reference": f"{run}/iter1/ckpt",
    }
    output, code = loop.run(FROM=f"{run}/iter1", **fork)
    assert code == 0 and "iteration 2 of 4, stage sampling" in output and "iteration 1 of" not in output, output
    assert loop.models("fork") == [3] and (loop.exps / "fork/start/responses.jsonl").exists()
    plan = loop.run("--plan", FROM=f"{run}/iter1", NAME=f"{loop.name}/planned")[0]
    assert f"--model {run}/iter1/ckpt --reference {run}/iter1/ckpt" in plan
    for changed, message in (
        ({"FROM": f"{run}/iter9"}, "no such folder"),
        ({"FROM": run}, "should be an iteration's"),
        ({"FROM": f"{run}/iter3"}, "raise ROUNDS"),
        ({"FROM": f"{run}/iter0"}, "no weights any more"),
        ({"FROM": f"{run}/iter1", "NAME": f"{loop.name}/run"}, "another NAME"),
    ):
        output, code = loop.run(**({"NAME": f"{loop.name}/other"} | changed))
        assert code == 1 and message in output, output
    settings = json.loads((loop.exps / "run/run.json").read_text())
    (loop.exps / "run/run.json").write_text((loop.exps / "run/run.json").read_text().replace(settings["code"], "old"))
    output, code = loop.run(KEEP_CKPTS="rounds")
    assert code == 0 and "WARNING" in output and '"code": "old"' in output
    (loop.folder / "models/prompts/train_1.jsonl").write_text("changed")
    output, code = loop.run()
    assert code == 1 and "prompts/train_1.jsonl" in output and "train_0" not in output and "or fork: FROM=" in output


def test_any_judge_reaches_the_stages(loop):
    models = loop.folder / "models"
    plan, code = loop.run(
        "--plan", JUDGE=f"{models}/judge,{models}/policy", JUDGE_TYPE="offsetbias-lm,bt-mixture", JUDGE_WEIGHTS="1,3"
    )
    flags = f"--judge {models}/judge,{models}/policy --judge_type offsetbias-lm,bt-mixture --judge_weights 1,3"
    assert code == 0 and plan.count(flags) == 6, plan  # four scorings, the last evaluation, the matrix
    plan = loop.run("--plan", JUDGE_FLAGS="--labels 'A x,B x' --reward_temperature 2")[0]
    assert plan.count("--labels A\\ x\\,B\\ x --reward_temperature 2") == 6, plan
    output, code = loop.run(JUDGE=f"{models}/judge,no-such-model", JUDGE_TYPE="bt-mixture")
    assert code == 1 and "no-such-model (MODEL or JUDGE): no such directory" in output
    plan, code = loop.run("--plan", JUDGE="some-model", JUDGE_TYPE="openai", API_BASE="http://127.0.0.1:8000/v1")
    assert (
        code == 0 and "--judge some-model --judge_type openai" in plan and "--api_base http://127.0.0.1:8000/v1" in plan
    )


def test_the_disk_is_checked(loop):
    df = loop.folder / "bin/df"
    df.write_text("#!/bin/sh\necho '/dev/x 9999999 9999 2048 99% /'\n")
    df.chmod(0o755)
    output, code = loop.run()
    assert code == 1 and "needs about 100 MiB" in output and "2 MiB free" in output and "KEEP_CKPTS=last" in output


@pytest.mark.parametrize(
    "setting, message",
    [
        ("ETA=0", "greater than 0"),
        ("BETA=0.0", "greater than 0"),
        ("LEARNING_RATE=0e-5", "greater than 0"),
        ("TOP_P=0", "greater than 0"),
        ("TOP_P=1.1", "at most 1"),
        ("WARMUP_RATIO=2", "at most 1"),
        ("KEEP_CKPTS=some", "choose one of: all rounds last"),
        ("ON_ERROR=no", "choose one of: fail skip"),
        ("SAVE_STEPS=x", "whole number"),
        ("STALL_TIMEOUT=-1", "whole number"),
        ("GPUS=97", "nvidia-smi lists"),
        ("JUDGE_TYPE=bt", "should be offsetbias-lm, bt-mixture or openai"),
        ("JUDGE_WEIGHTS=x", "should be numbers"),
        ("JUDGE_TYPE=openai", "OPENAI_API_KEY is not set"),
    ],
)
def test_wrong_settings_are_refused(loop, setting, message):
    output, code = loop.run(**dict([setting.split("=")]))
    assert code == 1 and message in output and not loop.exps.exists(), output
