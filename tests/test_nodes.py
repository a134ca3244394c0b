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
import torch
from helpers.finished import copy_run
from helpers.loop import ROOT, default_signals, environment, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.cpu_engine]


def settings(rank, **changed):
    return {"NODES": "2", "NODE_RANK": str(rank), "MASTER_ADDR": "10.77.0.1", "GLOO_SOCKET_IFNAME": f"cable{rank}"} | {
        "GPUS": "none",
        "OMP_NUM_THREADS": "1",
        **changed,
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


def start(machines, rank, log, **changed):
    with open(log, "w") as output:
        return subprocess.Popen(
            ["ip", "netns", "exec", machines[rank], "bash", "comal.sh"],
            cwd=ROOT,
            env=environment(**settings(rank, **changed)),
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=default_signals,
        )


@pytest.mark.skipif(torch.cuda.is_available(), reason="the run to compare with was made on a GPU")
def test_two_machines_train_as_one(machines, finished, tmp_path):
    """The first iteration of a run, from its pairs on: the rest is there, as one machine has made it."""
    run, iteration = finished.folder.parent / "nodes", finished.folder.parent / "nodes/iter1"
    copy_run(finished, run)
    again = ("*.pairs.jsonl", "data", "ckpt", "next.json")
    for path in (path for pattern in again for path in iteration.glob(pattern)):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    logs = [tmp_path / f"node{rank}.log" for rank in range(2)]
    changed = finished.settings | {"NAME": f"{finished.name}/nodes"}
    # The second is there first, and waits.
    processes = [start(machines, rank, logs[rank], **changed) for rank in (1, 0)]
    for process in processes:
        assert process.wait(timeout=600) == 0, "\n".join(log.read_text()[-3000:] for log in logs)
    texts = [log.read_text() for log in logs]
    assert "waits for node 0 to begin" in texts[1]
    assert "node 1 has no more to do" in texts[1] and "done after" in texts[0]
    assert re.findall(r"^    (\w+)  ", texts[1], re.MULTILINE) == ["logprobs", "training"]
    wait_until(lambda: not (run / ".node0").exists(), 15)
    # The same as on one machine, up to the order of sums.
    alone = finished.folder / "iter1"
    for one, other in zip(read(iteration / "data/test.jsonl"), read(alone / "data/test.jsonl"), strict=True):
        for name in ("last_chosen_logp", "ref_rejected_logp"):
            assert one[name] == pytest.approx(other[name], abs=1e-4)
    losses = [
        [row["loss"] for row in read(folder / "ckpt/metrics.jsonl") if "loss" in row] for folder in (iteration, alone)
    ]
    assert max(abs(one - other) / abs(other) for one, other in zip(*losses, strict=True)) < 1e-3


def test_the_others_end_when_node_0_does(machines, demo_models, tmp_path):
    name = f"test-{uuid.uuid4().hex[:8]}"
    changed = {"RECIPE": "demo", "NAME": name, "DEMO_MODELS": str(demo_models), "PYTHON": sys.executable}
    logs = [tmp_path / f"node{rank}.log" for rank in range(2)]
    first, second = (start(machines, rank, logs[rank], **changed) for rank in range(2))
    try:
        for _ in range(600):
            if "waits for exps/" in logs[1].read_text():
                break
            with pytest.raises(subprocess.TimeoutExpired):
                first.wait(timeout=0.1)
        else:
            pytest.fail("node 1 does not wait for the samples")
        os.kill(first.pid, signal.SIGKILL)
        assert second.wait(timeout=30) == 1
        assert "node 0 has stopped" in logs[1].read_text()
    finally:
        for process in (first, second):
            process.kill()
        shutil.rmtree(ROOT / "exps" / name, ignore_errors=True)
