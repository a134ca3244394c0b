"""comal.sh on two machines: network namespaces of their own, joined by a virtual cable, with one file system.

python -m pytest tests/test_nodes.py        as root, with ip from iproute2
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import uuid

import pytest
from helpers.loop import ROOT, default_signals, environment, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.cpu_engine]

SETTINGS = {
    "RECIPE": "demo",
    "ROUNDS": "1",
    "SPLITS": "1",
    "MAX_JUDGE_TOKENS": "1000",
    "NUM_EPOCHS": "1",
    "GPUS": "none",
    "REPORT_TO": "none",
    "NODES": "2",
    "MASTER_ADDR": "10.77.0.1",
    "OMP_NUM_THREADS": "1",
}


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def ip(*arguments):
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@pytest.fixture(scope="module")
def machines():
    """Names of two network namespaces that reach each other as 10.77.0.1 and 10.77.0.2."""
    names = [f"comal-{uuid.uuid4().hex[:6]}-{number}" for number in range(2)]
    try:
        for name in names:
            ip("netns", "add", name)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("network namespaces need root and ip (iproute2)")
    try:
        ip("link", "add", "cable0", "netns", names[0], "type", "veth", "peer", "name", "cable1", "netns", names[1])
        for number, name in enumerate(names):
            ip("-n", name, "addr", "add", f"10.77.0.{number + 1}/24", "dev", f"cable{number}")
            for device in ("lo", f"cable{number}"):
                ip("-n", name, "link", "set", device, "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


@pytest.fixture
def experiment(demo_models):
    name = f"test-{uuid.uuid4().hex[:8]}"
    yield name
    shutil.rmtree(ROOT / "exps" / name, ignore_errors=True)


def start(machines, rank, name, models, log):
    settings = SETTINGS | {
        "NAME": f"{name}/run",
        "DEMO_MODELS": str(models),
        "NODE_RANK": str(rank),
        "PYTHON": sys.executable,
        "GLOO_SOCKET_IFNAME": f"cable{rank}",
    }
    with open(log, "w") as output:
        return subprocess.Popen(
            ["ip", "netns", "exec", machines[rank], "bash", "comal.sh"],
            cwd=ROOT,
            env=environment(**settings),
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=default_signals,
        )


def test_two_machines_run_the_loop_together(machines, experiment, demo_models, tmp_path):
    logs = [tmp_path / f"node{rank}.log" for rank in range(2)]
    # The second is there first, and waits.
    processes = [start(machines, rank, experiment, demo_models, logs[rank]) for rank in (1, 0)]
    for process in processes:
        assert process.wait(timeout=600) == 0, "\n".join(log.read_text()[-3000:] for log in logs)
    run, texts = ROOT / "exps" / experiment / "run", [log.read_text() for log in logs]
    assert (
        "waits for node 0 to begin" in texts[1] and "node 1 has no more to do" in texts[1] and "done after" in texts[0]
    )
    assert re.findall(r"^    (\w+)  ", texts[1], re.MULTILINE) == ["logprobs", "training"]
    wait_until(lambda: not (run / ".node0").exists(), 15)
    # The same as on one machine, up to the order of sums.
    iteration = run / "iter0"
    subprocess.run(
        [
            sys.executable,
            "get_logprobs.py",
            "--model",
            demo_models / "policy",
            "--reference",
            demo_models / "policy",
            "--input",
            iteration / "test.pairs.jsonl",
            "--output",
            tmp_path / "alone.jsonl",
            "--max_length",
            "128",
        ],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    for one, other in zip(read(iteration / "data/test.jsonl"), read(tmp_path / "alone.jsonl"), strict=True):
        for name in ("last_chosen_logp", "ref_rejected_logp"):
            assert one[name] == pytest.approx(other[name], abs=1e-4)
    settings = json.loads((iteration / "ckpt/training.json").read_text())
    command = [
        sys.executable,
        "inpo.py",
        "--input",
        iteration / "data/train.jsonl",
        "--output",
        tmp_path / "ckpt",
        "--model",
        demo_models / "policy",
    ]
    for flag in (
        "eta",
        "tau_eta_ratio",
        "soft_labels",
        "learning_rate",
        "num_epochs",
        "warmup_ratio",
        "global_batch_size",
        "micro_batch_tokens",
        "max_length",
        "max_grad_norm",
        "seed",
    ):
        command += [f"--{flag}", str(settings[flag])]
    subprocess.run(
        [*map(str, command), "--select", "last", "--report_to", "none"], cwd=ROOT, check=True, capture_output=True
    )
    losses = [
        [row["loss"] for row in read(folder / "metrics.jsonl") if "loss" in row]
        for folder in (iteration / "ckpt", tmp_path / "ckpt")
    ]
    assert max(abs(one - other) / abs(other) for one, other in zip(*losses, strict=True)) < 1e-3


def test_the_others_end_when_node_0_does(machines, experiment, demo_models, tmp_path):
    logs = [tmp_path / f"node{rank}.log" for rank in range(2)]
    first, second = (start(machines, rank, experiment, demo_models, logs[rank]) for rank in range(2))
    try:
        for _ in range(600):
            if "waits for exps/" in logs[1].read_text():
                break
            with pytest.raises(subprocess.TimeoutExpired):
                first.wait(timeout=0.1)
        os.kill(first.pid, signal.SIGKILL)
        assert second.wait(timeout=30) == 1
        assert "node 0 has stopped" in logs[1].read_text()
    finally:
        for process in (first, second):
            process.kill()
