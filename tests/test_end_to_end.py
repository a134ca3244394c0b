"""The whole pipeline on real parts: comal.sh, vLLM and accelerate, with the demo's models fitted briefly.

    python -m pytest tests/test_end_to_end.py

Where there are GPUs the same tests run on them (vLLM and FSDP 2 in bfloat16), with wider tolerances.
"""

import json
import math
import re
import shutil
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest
import torch
from helpers.finished import WITHOUT_NETWORK, can_leave_the_network
from helpers.judging import PlainJudge
from helpers.loop import ROOT, environment, processes, settle, start, wait_until

pytestmark = pytest.mark.slow

ITERATIONS, PROMPTS = (1, 2), 32  # of 3; prompts an iteration
ON_GPU = torch.cuda.is_available()
LOSS_TOLERANCE = 0.3 if ON_GPU else 1e-3  # bfloat16 moves a response by tenths of a nat, the target is 1.5 nats
JUDGE_TOLERANCE = 0.03 if ON_GPU else 1e-4


def run(command, **settings):
    return subprocess.run(
        command,
        cwd=ROOT,
        env=environment(PYTHON=sys.executable, **settings),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=600,
    )


def stage(script, *flags):
    return run([sys.executable, script, *map(str, flags)])


def records(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").split("\n") if line]


@pytest.fixture
def name():
    name = f"test-{uuid.uuid4().hex[:8]}"
    yield name
    shutil.rmtree(ROOT / "exps" / name, ignore_errors=True)


def test_comal_counts_add_up(finished):
    exp = finished.folder
    for i in ITERATIONS:
        for split, count in (("train", PROMPTS), ("test", PROMPTS // 8)):
            samples, scores = (records(exp / f"iter{i}/{split}.{kind}.jsonl") for kind in ("samples", "scores"))
            assert len(samples) == len(scores) == count
            distinct = [r for r in scores if r["samples"][0]["text"] != r["samples"][1]["text"]]
            pairs, data = records(exp / f"iter{i}/{split}.pairs.jsonl"), records(exp / f"iter{i}/data/{split}.jsonl")
            assert [p["prompt_id"] for p in pairs] == [r["prompt_id"] for r in distinct]
            assert [{k: v for k, v in d.items() if k in pairs[0]} for d in data] == pairs


def test_comal_passes_token_ids_through(finished):
    exp = finished.folder
    samples = {r["prompt_id"]: r for r in records(exp / "iter2/train.samples.jsonl")}
    for pair in records(exp / "iter2/data/train.jsonl"):
        sampled = [s["token_ids"] for s in samples[pair["prompt_id"]]["samples"]]
        assert sorted([pair["chosen_token_ids"], pair["rejected_token_ids"]]) == sorted(sampled)
        assert pair["prompt_token_ids"] == samples[pair["prompt_id"]]["prompt_token_ids"]
        assert pair["chosen_num_tokens"] == len(pair["chosen_token_ids"])


def test_comal_starts_training_from_the_last_policy(finished):
    exp = finished.folder
    for i in ITERATIONS:
        first = records(exp / f"iter{i}/ckpt/metrics.jsonl")[0]
        assert first["normalised_loss"] == pytest.approx(1, abs=LOSS_TOLERANCE)
        assert abs(first["margin"]) < LOSS_TOLERANCE
        assert (exp / f"iter{i}/ckpt/DONE").exists()
        settings = json.loads((exp / f"iter{i}/ckpt/training.json").read_text())
        assert (settings["loss"], settings["eta"], settings["soft_labels"]) == ("inpo", 0.333333, True)
    assert (exp / "round1").resolve() == (exp / "iter2/ckpt").resolve()


def test_comal_prints_the_table_and_the_evaluation(finished):
    exp, output = finished.folder, finished.output
    rows = json.loads((exp / "game.json").read_text())
    assert [row["iteration"] for row in rows] == ["start", 1, 2]
    assert all(0 <= p <= 1 for row in rows[1:] for p in row["win_prob"])
    assert "mountains" in output and "3 iterations in exps/" in output
    for i in ITERATIONS:
        summary = json.loads((exp / f"iter{i}/eval/vs_start.json").read_text())
        comparisons = records(exp / f"iter{i}/eval/vs_start.jsonl")
        probabilities = [r["win_probs"][0][1] for r in comparisons]
        assert summary["mean_win_prob"] == pytest.approx(sum(probabilities) / len(probabilities))
        assert len(comparisons) == len(records(exp / "start/responses.jsonl"))


def test_comal_from_checkpoints_of_the_hub(finished):
    """A run that goes on at the end of a round, without a network where a process can leave it."""
    exp = finished.folder
    assert "=== iteration 1 of 3" in finished.output and "=== iteration 0 of" not in finished.output
    run = json.loads((exp / "run.json").read_text())
    assert (run["FIRST_ITERATION"], run["REFERENCE"]) == ("1", "our/policy-round4")
    (experiment,) = json.loads((exp / "report/summary.json").read_text())["experiments"]
    first, last = experiment["iterations"]
    assert (first["iteration"], last["iteration"]) == ITERATIONS and last["kl_start"] is not None
    assert first["win_rate_start"] is not None
    assert first["win_rate_start"] == first["win_rate_previous"]  # the policy before is the initial one
    assert experiment["start"]["response_tokens"] and not last["reference_moved"]
    assert json.loads((exp / "matrix/iter2.json").read_text())["names"] == ["start", "iter2"]
    tokenizers = {path.name for path in (exp / "iter1/ckpt/model").glob("tokenizer*")}
    assert "tokenizer.json" in tokenizers  # it is saved beside the weights, which came without one


def test_there_is_no_network_in_a_namespace_of_its_own():
    """That the run means something."""
    if not can_leave_the_network():
        pytest.skip("this process may not make a network namespace")
    interfaces = subprocess.run([*WITHOUT_NETWORK, "cat", "/proc/net/dev"], text=True, capture_output=True).stdout
    assert re.findall(r"^ *(\w+):", interfaces, re.M) == ["lo"]


def test_comal_again_recomputes_nothing(finished):
    exp = finished.folder
    before = {path: path.stat().st_mtime_ns for path in exp.rglob("*") if path.is_file()}
    began = time.monotonic()
    again = finished.run()
    assert again.returncode == 0 and time.monotonic() - began < 10
    assert "===" not in again.stdout and "mountains" in again.stdout
    assert {path: path.stat().st_mtime_ns for path in exp.rglob("*") if path.is_file()} == before


def test_comal_refuses_other_settings(finished):
    refused = finished.run(ETA="0.5")
    assert refused.returncode == 1
    assert "ETA: 0.333333 then, 0.5 now" in refused.stdout and "another NAME" in refused.stdout


def test_comal_plan_runs_nothing(finished):
    plan = finished.run("--plan", NAME=f"{finished.name}/planned")
    assert plan.returncode == 0 and plan.stdout.count("inpo.py") == len(ITERATIONS)
    assert not (ROOT / "exps" / finished.name / "planned").exists()


def test_comal_stops_at_the_first_failure(finished):
    failed = finished.run(NAME=f"{finished.name}/failed", MODEL="no-such/policy")
    assert failed.returncode == 1
    assert "iteration 1 of 3, stage sampling failed with exit code 1" in failed.stdout
    assert "    | sampling.py: error: " in failed.stdout and "no such directory" in failed.stdout
    assert "logs/sampling.log" in failed.stdout and "scoring" not in failed.stdout
    assert not list((ROOT / "exps" / finished.name / "failed").rglob("*.jsonl*"))


def test_comal_interrupted_leaves_no_process(name, demo_models):
    folder = ROOT / "exps" / name
    folder.mkdir(parents=True)
    with open(folder / "log", "w+") as log:
        loop = start(log, name, NAME=f"{name}/stopped", DEMO_MODELS=str(demo_models))
        wait_until(lambda: any("spawn_main" in line for line in processes(name).values()), 60)  # sampling's worker
        time.sleep(1)
        assert len(processes(name)) >= 4  # bash, stage.py, the stage, its worker
        loop.send_signal(signal.SIGINT)
        assert loop.wait(30) == 130
        log.seek(0)
        assert "goes on from there" in log.read()
    assert settle(name) == {}
    assert not (folder / "stopped/iter0/train.samples.jsonl").exists()


@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
def test_comal_uses_the_gpus(finished):
    exp = finished.folder
    assert "running on CPU" not in (exp / "iter1/logs/sampling.log").read_text()
    assert "; FSDP, bf16" in (exp / "iter1/logs/training.log").read_text()


@pytest.mark.skipif(ON_GPU, reason="on GPUs vLLM's arithmetic depends on the batch")
@pytest.mark.cpu_engine
def test_sampling_does_not_depend_on_workers_or_chunks(finished, demo_models, tmp_path):
    """Two workers and small chunks sample what one worker did in the loop, beside other files."""
    flags = ["--num_samples", 2, "--max_prompt_tokens", 64, "--max_new_tokens", 32, "--seed", 1, "--gpus", "none"]
    flags += ["--temperature", 1, "--top_p", 1, "--cpu_workers", 2, "--chunk_size", 5]
    source, output = demo_models / "prompts/train_1.jsonl", tmp_path / "samples.jsonl"
    done = stage("sampling.py", "--model", demo_models / "policy", "--input", source, "--output", output, *flags)
    assert done.returncode == 0, done.stdout
    assert output.read_bytes() == (finished.folder / "iter1/train.samples.jsonl").read_bytes()
    assert {s["finish_reason"] for r in records(output) for s in r["samples"]} <= {"stop", "length"}


def test_scoring_reads_the_judge_exactly(finished, demo_models):
    """The engine's label probabilities equal those of a plain forward pass, in both orders."""
    judge = PlainJudge(demo_models / "judge")
    record = next(r for r in records(finished.folder / "iter1/train.scores.jsonl") if r["order_gap"] is not None)
    texts = [sample["text"] for sample in record["samples"]]
    probabilities = [judge(record["prompt"], *pair)[0] for pair in (texts, texts[::-1])]
    assert record["win_probs"][0][1] == pytest.approx(
        (probabilities[0] + 1 - probabilities[1]) / 2, abs=JUDGE_TOLERANCE
    )
    assert record["win_probs"][0][1] + record["win_probs"][1][0] == pytest.approx(1)
    assert record["order_gap"] == pytest.approx(abs(probabilities[0] - (1 - probabilities[1])), abs=2 * JUDGE_TOLERANCE)
    assert 0 < record["label_mass"] <= 1 + 1e-6 and math.isfinite(record["label_mass"])
