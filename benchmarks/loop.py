"""The loop's own share: seconds until its first stage, model loads and seconds an iteration, with the demo's models.

    python benchmarks/loop.py [--iterations 3]
    ray start --head; python benchmarks/loop.py --engine ray        the same on a Ray cluster, to see what that costs

A load is a start of vLLM's engine or a model that PyTorch reads, as the stages' logs tell. The start of a stage, from
its command to its first record, is what the loop pays for each of them, whatever the model's size; reading its weights
comes on top (bytes over the disk's rate).

Goals: under 2 s to the first stage; five loads an iteration at most.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import time

from common import ROOT, record

from utils import run


def run_loop(exp, settings):
    """Seconds until the first stage of comal.sh; ends this process too where the loop fails."""
    shutil.rmtree(exp, ignore_errors=True)
    began, first = time.perf_counter(), None
    loop = subprocess.Popen(
        ["bash", "comal.sh"],
        cwd=ROOT,
        env=os.environ | settings,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    for line in loop.stdout:
        if first is None and line.startswith("==="):
            first = time.perf_counter() - began
    if loop.wait():
        sys.exit(f"comal.sh ended with exit code {loop.returncode}; see {exp}")
    return first


def iteration_lines(exp, number):
    """Lines of the table for one iteration, as the stages' logs tell."""
    logs = exp / f"iter{number}/logs"
    times = {entry["stage"]: entry["seconds"] for entry in map(json.loads, open(logs / "times.jsonl"))}
    loads = {
        path.stem: len(re.findall(r" \d+ (?:workers?|actors?) on | loading ", path.read_text()))
        for path in logs.glob("*.log")
    }
    after = [stage for stage in ("responses", "evaluation", "matrix") if stage in times]
    for name, stages in ((number, [stage for stage in times if stage not in after]), ("after the last", after)):
        if stages:
            seconds, each = (
                sum(times[stage] for stage in stages),
                ", ".join(f"{stage} {times[stage]}" for stage in stages),
            )
            yield f"| {name} | {seconds} | {sum(loads.get(stage, 0) for stage in stages)} | {each} |"


def main(iterations: int = 3, engine: str = "local", name: str = "benchmark-loop"):
    """Measure and append to RESULTS.md. exps/demo-models is made first where it is missing."""
    exp = ROOT / "exps" / name
    settings = {"PYTHON": sys.executable, "RECIPE": "demo", "NAME": name, "ROUNDS": "1", "SPLITS": str(iterations)}
    settings |= {"EVAL_EVERY": "1", "UPDATE_INTERVAL": "0", "ENGINE": engine}
    subprocess.run(
        ["bash", "data/demo/build.sh", "exps/demo-models"],
        cwd=ROOT,
        check=True,
        env=os.environ | {"PYTHON": sys.executable},
        stdout=subprocess.DEVNULL,
    )
    first = run_loop(exp, settings)
    lines = [line for number in range(iterations) for line in iteration_lines(exp, number)]
    record(
        f"The loop, engine {engine}",
        [
            f"First stage after {first:.2f} s.",
            "",
            "| iteration | seconds | model loads | seconds by stage |",
            "|---|---|---|---|",
            *lines,
        ],
        packages=("torch", "transformers", "vllm"),
    )
    shutil.rmtree(exp)


if __name__ == "__main__":
    run(main)
