"""comal.sh --try: how it measures memory, the command, and one real trial.

python -m pytest tests/test_trial.py
"""

import json
import os
import re
import shutil
import subprocess
import sys
import uuid

import pytest
from helpers.loop import ROOT, environment

# ---------------------------------------------------------------------------------------------- memory


def measure(tmp_path, code, path="", **environment):
    """Run Python code under launch/stage.py; what it has noted."""
    times = tmp_path / "times.jsonl"
    command = [sys.executable, "-S", "launch/stage.py", "--parent", str(os.getpid()), "--name", "it", "--where", "here"]
    command += ["--log", tmp_path / "log", "--times", times, "--gpus", environment.pop("GPUS", "auto")]
    found = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"} | environment
    found["PATH"] = f"{path}:{found['PATH']}" if path else found["PATH"]
    done = subprocess.run([*command, "--", sys.executable, "-S", "-c", code], cwd=ROOT, env=found, timeout=60)
    assert done.returncode == 0
    return json.loads(times.read_text())


HOLDS = """
import os, sys, time
held = bytearray(b"x") * (200 * 2**20)
if os.fork() == 0:
    os.setsid()
    more = bytearray(b"x") * (100 * 2**20)
    time.sleep(2)
    os._exit(0)
time.sleep(2)
"""


def test_the_hosts_memory_is_that_of_all_processes(tmp_path):
    """200 MiB in one process, 100 in its child of another session; the 200 are shared by both, and count in each."""
    found = measure(tmp_path, HOLDS, GPUS="none")
    assert 295 < found["host_mib"] < 550 and 2 < found["seconds"] < 20, found
    assert "gpu_mib" not in found


def test_the_fullest_gpu_counts(tmp_path):
    """nvidia-smi prints a line a GPU, again and again."""
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin/nvidia-smi"
    program.write_text(
        '#!/bin/sh\necho "$@" >"$(dirname "$0")/flags"\nprintf "10, 81559\\n700, 81559\\n"; sleep 0.5\n'
        'printf "900, 81559\\n800, 81559\\n"; exec sleep 60\n'
    )
    program.chmod(0o755)
    found = measure(tmp_path, "import time; time.sleep(1.5)", path=str(tmp_path / "bin"), GPUS="0,2")
    assert (found["gpu_mib"], found["gpu_total_mib"]) == (900, 81559)
    flags = (tmp_path / "bin/flags").read_text()
    assert flags.startswith("-i 0,2 -l 2 --query-gpu=memory.used,memory.total")
    (tmp_path / "times.jsonl").unlink()
    found = measure(tmp_path, "", path=str(tmp_path / "bin"), CUDA_VISIBLE_DEVICES="")
    assert "gpu_mib" not in found


# ---------------------------------------------------------------------------------------------- the command


def helper(command, folder, **state):
    """launch/trial.py as comal.sh calls it."""
    values = {"exp": folder, "first": 0, "whole": 4, "policy": "sft", "reference": "sft", "MODEL": "sft", "SPLITS": 2}
    values |= {"UPDATE_INTERVAL": 2, "KL_FROM_START": "true", "ONE_ITERATION": "false"}
    values |= {"PROMPTS_DIR": folder.parent, "EVAL_PROMPTS": folder.parent / "train_eval.jsonl"} | state
    return subprocess.run(
        [sys.executable, "-S", "launch/trial.py", command],
        cwd=ROOT,
        text=True,
        capture_output=True,
        env=environment(**{name: str(value) for name, value in values.items()}),
    )


def test_a_trial_takes_the_first_prompts_and_replaces_an_earlier_one(tmp_path):
    counts = {"train_0": 100, "train_1": 120, "test": 10, "train_eval": 70}
    for name, count in counts.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(f'{{"prompt": "{name} {i}"}}\n\n' for i in range(count)))
    folder = tmp_path / "run-try"
    (folder / "logs").mkdir(parents=True)
    assert helper("begin", folder).returncode == 0
    for name, kept in {"train_0": 64, "train_1": 64, "test": 10, "evaluation": 64}.items():
        lines = (folder / f"prompts/{name}.jsonl").read_text().splitlines()
        assert len(lines) == kept and json.loads(lines[-1])["prompt"].endswith(f" {kept - 1}")
    found = json.loads((folder / "trial.json").read_text())
    assert found["trial"] == dict(iterations=1, train=64, test=10, evaluation=64, models=1, from_start=0, cells=1)
    # Models: 1, 2, 1, 2. The second round ends with another reference; the matrix has start and two rounds.
    assert found["whole"] == dict(iterations=4, train=110, test=10, evaluation=70, models=6, from_start=1, cells=3)
    (folder / "iter0").mkdir()
    (folder / "run.json").touch()
    assert helper("begin", folder).returncode == 0
    assert {path.name for path in folder.iterdir()} == {"logs", "prompts", "trial.json"}


def test_a_trial_replaces_no_experiment(tmp_path):
    (tmp_path / "run-try/iter0").mkdir(parents=True)
    done = helper("begin", tmp_path / "run-try")
    assert done.returncode == 1 and "holds an experiment, which a trial would replace" in done.stderr
    assert (tmp_path / "run-try/iter0").exists()


def test_a_trial_at_a_rounds_end_reports_the_log_probabilities_of_the_initial_policy(tmp_path):
    """After a fork, where the reference is not MODEL; all stages worked for 2 s."""
    folder, iteration = tmp_path / "run-try", tmp_path / "run-try/iter1"

    def write(name, *records):
        (iteration / name).parent.mkdir(parents=True, exist_ok=True)
        (iteration / name).write_text("".join(json.dumps(record) + "\n" for record in records))

    judged = {"samples": [{"text": "a", "token_ids": [1] * 9}, {"text": "b", "token_ids": [1] * 9}]}
    pair = {"prompt_token_ids": [1] * 4, "chosen_token_ids": [1] * 8, "rejected_token_ids": [1] * 8, "win_prob": 0.9}
    stages = ("start_responses", "sampling", "scoring", "logprobs", "start_logprobs", "training", "evaluation")
    write("logs/times.jsonl", *({"stage": stage, "seconds": 10, "host_mib": 100} for stage in stages))
    for stage in stages:
        (iteration / f"logs/{stage}.log").write_text("8 records in 2.00 s, after a start of 5.00 s\n")
    for part in ("train", "test"):
        write(f"{part}.samples.jsonl", judged), write(f"{part}.scores.jsonl", judged), write(f"data/{part}.jsonl", pair)
    write("eval/vs_start.jsonl", judged), write("eval/vs_start.skipped.jsonl", {"prompt_id": "a", "skipped": "long"})
    write("ckpt/metrics.jsonl", {"loss": 62_500, "normalised_loss": 1, "margin": 0, "tokens_per_s": 10})
    write("ckpt/model/model.safetensors")
    size = dict(iterations=1, train=1, test=1, evaluation=1, models=2, from_start=1, cells=1)
    (folder / "trial.json").write_text(json.dumps({"trial": size, "whole": size}))
    state = {
        "iter": iteration,
        "i": 1,
        "first": 1,
        "TRAINER": "inpo",
        "ETA": "0.002",
        "NUM_EPOCHS": 3,
        "SAVE_MINUTES": 10,
    }
    state |= {"GLOBAL_BATCH_SIZE": 32, "EVAL_STEPS": 500, "NUM_SAMPLES": 2, "MAX_NEW_TOKENS": 32, "KEEP_CKPTS": "all"}
    done = helper("report", folder, **state)
    assert done.returncode == 0, done.stderr
    assert row(done.stdout, "start_logprobs").split()[1:3] == ["10.0", "8.0"]
    assert row(done.stdout, "start_logprobs").endswith("  10 tokens/s")  # 20 tokens of the test pair
    assert row(done.stdout, "logprobs").endswith("  40 tokens/s")  # of both pairs, with two models


def test_a_trial_is_no_plan(loop):
    output, code = loop.run("--try", "--plan")
    assert code == 1 and "--try runs a trial" in output and not loop.exps.exists()
    output, code = loop.run("--tri")
    assert code == 1 and "Did you mean --try?" in output, output


@pytest.fixture(scope="module")
def trial(demo_models, served):
    """(folder, output) of a real trial of the demo, with a setting. A server judges, where there can be one."""
    name = f"test-{uuid.uuid4().hex[:8]}"
    settings = {"RECIPE": "demo", "NAME": f"{name}/run", "DEMO_MODELS": str(demo_models), "PYTHON": sys.executable}
    settings |= served.settings if served else {}
    try:
        done = subprocess.run(
            ["bash", "comal.sh", "--try", "MAX_JUDGE_TOKENS=1000", "KEEP_CKPTS=last"],
            cwd=ROOT,
            env=environment(**settings),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, done.stdout[-4000:]
        yield ROOT / "exps" / name / "run-try", done.stdout
    finally:
        shutil.rmtree(ROOT / "exps" / name, ignore_errors=True)


def row(output, name):
    output = output.partition("=== what each stage took")[2]
    return re.search(rf"^    {re.escape(name)} .*$", output, re.MULTILINE)[0]


@pytest.mark.slow
def test_a_real_trial(trial):
    folder, output = trial
    assert "a trial: one iteration on the first prompts" in output and "=== iteration 0 of 1" in output
    sizes = json.loads((folder / "trial.json").read_text())
    assert sizes["whole"]["iterations"] == 12 and sizes["whole"]["models"] == 22 and sizes["trial"]["train"] == 32
    times = {line["stage"]: line for line in map(json.loads, (folder / "iter0/logs/times.jsonl").open())}
    for stage in ("sampling", "scoring", "logprobs", "training", "responses", "evaluation", "matrix"):
        assert 30 < times[stage]["host_mib"] < 8000, times
        seconds, start = map(float, re.search(r"(\d+\.\d)  +(\d+\.\d)  ", row(output, stage)).groups())
        assert seconds == times[stage]["seconds"] and 0 < start <= seconds, output  # rounded
    units = {"sampling": "tokens", "scoring": "judgements", "logprobs": "tokens", "training": "tokens"}
    for stage, unit in units.items():
        assert re.search(rf"[\d,]+ {unit}/s$", row(output, stage)), output
    assert re.search(r"first normalised_loss +1  ", output) and re.search(r"first margin +0 nats  ", output), output
    first = json.loads((folder / "iter0/ckpt/metrics.jsonl").open().readline())
    assert f"{first['loss']:,.5g}" in row(output, "first loss") and "at most (1/(2 eta))^2 = 2.25" in output
    assert re.search(r"label mass +[01]\.\d{3}  +near 1", output) and "=== what looks wrong\n" in output
    assert "12 x 32 train, 4 test and " in output and "memory: " in output
    assert re.search(r"disk: checkpoints 2 x [\d.]+ MiB = [\d.]+ MiB \(KEEP_CKPTS=last\)", output), output
    assert not list(folder.rglob("*.safetensors")) and "what looks wrong" in (folder / "logs/comal.log").read_text()
