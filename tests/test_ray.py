"""Sampling and scoring on a Ray cluster of two nodes, of which an actor and then a node are lost on the way.

pip install ray; python -m pytest tests/test_ray.py
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT
from helpers import work
from helpers.work import RecordWork

from workers.ray_executor import RayExecutor
from workers.scheduler import map_chunks

cluster_utils = pytest.importorskip("ray.cluster_utils", reason="Ray is optional: pip install ray")


@pytest.fixture(scope="module")
def cluster():
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])  # of the actors
    with contextlib.ExitStack() as stack:
        cluster = cluster_utils.Cluster(
            initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False}
        )
        stack.callback(cluster.shutdown)
        cluster.second = cluster.add_node(num_cpus=1)
        cluster.wait_for_nodes()
        yield cluster


def start(*arguments, **environment):
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=os.environ | environment,
    )


def finish(process):
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output
    return output


def actors():
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (process / "cmdline").read_bytes().startswith(b"ray::Actor"):
                found.append(int(process.name))
    return sorted(found)


def wait_for(condition, process, seconds=180):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.cpu_engine
def test_an_actor_and_a_node_are_lost(cluster, demo_models, tmp_path):
    prompts = list(
        dict.fromkeys(
            json.loads(line)["prompt"]
            for split in ("train_0", "train_1", "test", "eval")
            for line in open(demo_models / f"prompts/{split}.jsonl", encoding="utf-8")
        )
    )
    source, there, here = (tmp_path / f"{name}.jsonl" for name in ("prompts", "ray", "local"))
    source.write_text(
        "".join(json.dumps({"prompt": f"{prompt} Trip {k}."}) + "\n" for k in range(12) for prompt in prompts),
        encoding="utf-8",
    )
    arguments = [
        "sampling.py",
        "--model",
        demo_models / "policy",
        "--input",
        source,
        "--num_samples",
        "3",
        "--temperature",
        "1",
        "--max_prompt_tokens",
        "128",
        "--max_new_tokens",
        "64",
        "--gpus",
        "none",
        "--chunk_size",
        "16",
    ]
    finish(start(*arguments, "--output", here))
    partial = tmp_path / "ray.jsonl.partial"
    finished = lambda: len(partial.read_bytes().splitlines()) - 1 if partial.exists() else 0
    process = start(*arguments, "--output", there, "--engine", "ray", "--cpu_workers", "2", RAY_ADDRESS=cluster.address)
    wait_for(lambda: finished() >= 16 and len(actors()) == 2, process)
    os.kill(actors()[0], signal.SIGKILL)
    before = finished()
    wait_for(lambda: finished() > before + 32, process)
    cluster.remove_node(cluster.second, allow_graceful=False)
    after = finished()
    output = finish(process)
    total = len(source.read_text().splitlines())
    assert 16 <= before < after < total, (before, after, total)
    assert "an actor of Ray's was lost" in output
    assert there.read_bytes() == here.read_bytes()


@pytest.mark.cpu_engine
def test_scoring_with_what_is_left_of_the_cluster(cluster, demo_models, tmp_path):
    source = tmp_path / "samples.jsonl"
    with open(demo_models / "prompts/test.jsonl", encoding="utf-8") as file:
        prompts = [json.loads(line)["prompt"] for line in file]
    source.write_text(
        "".join(
            json.dumps(
                {
                    "prompt_id": str(i),
                    "prompt": prompt,
                    "prompt_token_ids": [1],
                    "samples": [
                        {"text": text, "token_ids": [3], "finish_reason": "stop"} for text in ("The sea.", "A city.")
                    ],
                }
            )
            + "\n"
            for i, prompt in enumerate(prompts)
        ),
        encoding="utf-8",
    )
    arguments = [
        "scoring.py",
        "--judge",
        demo_models / "judge",
        "--input",
        source,
        "--max_prompt_tokens",
        "1000",
        "--gpus",
        "none",
    ]
    finish(start(*arguments, "--output", tmp_path / "here.jsonl"))
    finish(start(*arguments, "--output", tmp_path / "there.jsonl", "--engine", "ray", RAY_ADDRESS=cluster.address))
    assert (tmp_path / "there.jsonl").read_bytes() == (tmp_path / "here.jsonl").read_bytes()
    process = start(
        *arguments,
        "--output",
        tmp_path / "o.jsonl",
        "--engine",
        "ray",
        "--tensor_parallel_size",
        "2",
        RAY_ADDRESS=cluster.address,
    )
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 1 and "--tensor_parallel_size 2, but Ray's cluster has 0 GPUs" in output


class Fragile(RecordWork):
    """Doubles numbers, but 13 ends its process and 40 is a record that it cannot work on."""

    def __call__(self, task):
        if task == 13:
            os._exit(1)
        if task == 40:
            raise ValueError("forty is bad")
        return 2 * task


class CountingExecutor(RayExecutor):
    """Counts the actors that it starts."""

    started = 0

    def start(self, slot):
        self.started += 1
        return super().start(slot)


def test_the_record_that_ends_its_actor_is_found_and_no_other(cluster, monkeypatch, caplog):
    import ray

    for module in (sys.modules[__name__], work):
        ray.cloudpickle.register_pickle_by_value(module)
    given_up, found = {}, {}
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    try:
        executor = CountingExecutor(Fragile, "none", 1, 2)  # for the second actor there is no room any more
        chunks = [list(range(first, first + 8)) for first in range(0, 64, 8)]
        for pairs in map_chunks(executor, chunks, lambda task, reason: given_up.update({task: reason})):
            found |= pairs
    finally:
        ray.shutdown()
    assert list(given_up) == [13, 40] or list(given_up) == [40, 13]
    assert given_up[40] == "ValueError: forty is bad" and "was lost" in given_up[13]
    assert found == {n: 2 * n for n in range(64)} | {13: None, 40: None}
    assert executor.started == 2 + 5  # the chunk of 8 twice, then 4, 2, 1; none for the exception
    assert "in __call__" in caplog.text


def test_no_cluster_is_a_plain_error(demo_models, tmp_path):
    process = start(
        "sampling.py",
        "--model",
        demo_models / "policy",
        "--input",
        demo_models / "prompts/test.jsonl",
        "--output",
        tmp_path / "o.jsonl",
        "--engine",
        "ray",
        "--gpus",
        "none",
        RAY_ADDRESS="127.0.0.1:1",
    )
    output = process.communicate(timeout=200)[0]
    assert process.returncode == 1 and "no Ray cluster at 127.0.0.1:1" in output and "Traceback" not in output, output
