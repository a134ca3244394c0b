"""The whole loop and its stages: what comal.sh takes besides the models' work, and how each stage grows.

    python benchmarks/loop.py iterations [--count 3]
    ray start --head; python benchmarks/loop.py iterations --engine ray     the same on a Ray cluster, to see what that costs
    python benchmarks/loop.py growth --prompts FILE [--sweep prompts|samples|length]

`iterations` runs comal.sh with the demo's models: seconds until its first stage, model loads and seconds an iteration. A
load is a start of vLLM's engine or a model that PyTorch reads, as the stages' logs tell. The start of a stage, from its
command to its first record, is what the loop pays for each of them, whatever the model's size; reading its weights comes
on top (bytes over the disk's rate). Goals: under 2 s to the first stage; five loads an iteration at most.

`growth` runs each stage's own command on files of three sizes, a factor of 10 or more apart, with a random policy of 4
layers of 256 and the demo's judge: by the number of prompts (with K = 4 samples of at most 64 tokens), of samples a
prompt (100 prompts, at most 64 tokens), and of tokens a response (150 prompts, K = 4). The time of its start, that of a
run on four prompts, is subtracted; the exponent is the slope of the logarithms, where the time above the start grows at
all. Memory is the peak of the stage's largest process; an engine's rises until its KV cache, 1 GiB at most on a CPU, has
been used once. Goals: time linear in the prompts; memory of every stage independent of their number; judging quadratic
in K, as all pairs are compared; sampling, log-probabilities and training linear in the response length while the
attention's share is small.
"""

import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from common import ROOT, random_model, read_prompt_texts, record, table

from records import Samples, read
from utils import run

MODELS = "exps/demo-models"


def build_models():
    """The demo's models, where they are missing."""
    command = ["bash", "data/demo/build.sh", MODELS]
    environment = os.environ | {"PYTHON": sys.executable}
    subprocess.run(command, cwd=ROOT, check=True, env=environment, stdout=subprocess.DEVNULL)


# ---------------------------------------------------------------------------------------------- iterations


def run_loop(exp, settings):
    """Seconds until the first stage of comal.sh; ends this process too where the loop fails."""
    shutil.rmtree(exp, ignore_errors=True)
    began, first = time.perf_counter(), None
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    loop = subprocess.Popen(["bash", "comal.sh"], cwd=ROOT, env=os.environ | settings, **output)
    for line in loop.stdout:
        if first is None and line.startswith("==="):
            first = time.perf_counter() - began
    if loop.wait():
        sys.exit(f"comal.sh ended with exit code {loop.returncode}; see {exp}")
    return first


def iteration_rows(exp, number):
    """Rows of the table for one iteration, as the stages' logs tell."""
    logs = exp / f"iter{number}/logs"
    times = {entry["stage"]: entry["seconds"] for entry in map(json.loads, open(logs / "times.jsonl"))}
    loading = r" \d+ (?:workers?|actors?) on | loading "
    loads = {path.stem: len(re.findall(loading, path.read_text())) for path in logs.glob("*.log")}
    after = [stage for stage in ("responses", "evaluation", "matrix") if stage in times]
    for name, stages in ((number, [stage for stage in times if stage not in after]), ("after the last", after)):
        if stages:
            seconds, loaded = (sum(of.get(stage, 0) for stage in stages) for of in (times, loads))
            yield f"{name} | {seconds:.0f} | {loaded} | {', '.join(f'{stage} {times[stage]}' for stage in stages)}"


def iterations(count: int = 3, engine: str = "local"):
    """Run comal.sh; append to RESULTS.md. exps/demo-models is made first where it is missing."""
    name = "benchmark-loop"
    exp = ROOT / "exps" / name
    settings = {"PYTHON": sys.executable, "RECIPE": "demo", "NAME": name, "ROUNDS": "1", "SPLITS": str(count)}
    settings |= {"EVAL_EVERY": "1", "UPDATE_INTERVAL": "0", "ENGINE": engine}
    build_models()
    first = run_loop(exp, settings)
    rows = [row for number in range(count) for row in iteration_rows(exp, number)]
    lines = table("iteration | seconds | model loads | seconds by stage", *rows)
    record(f"The loop, engine {engine}", [f"First stage after {first:.2f} s.", "", *lines])
    shutil.rmtree(exp)


# ---------------------------------------------------------------------------------------------- growth

SWEEPS = {  # (prompts, K, max_new_tokens) of three sizes; the smallest of all tells the start
    "prompts": [(100, 4, 64), (316, 4, 64), (1000, 4, 64)],
    "samples": [(100, 2, 64), (100, 6, 64), (100, 20, 64)],
    "length": [(150, 4, 20), (150, 4, 80), (150, 4, 400)],
}
START = (4, 2, 8)

# Of one iteration; each stage reads what the one before wrote.
COMMANDS = {
    "sampling": "sampling.py --model {policy} --input {folder}/prompts.jsonl --output {folder}/samples.jsonl "
    "--num_samples {num_samples} --max_prompt_tokens 1024 --max_new_tokens {max_new_tokens}",
    "scoring": "scoring.py --judge {judge} --input {folder}/samples.jsonl --output {folder}/scores.jsonl",
    "pairs": "data_processing.py make_pairs --input {folder}/scores.jsonl --output {folder}/pairs.jsonl "
    "--max_length 2048",
    "log-probabilities": "get_logprobs.py --model {policy} --reference {policy} --input {folder}/pairs.jsonl "
    "--output {folder}/data.jsonl --micro_batch_tokens 4096 --max_length 2048",
    "training": "inpo.py --model {policy} --input {folder}/data.jsonl --output {folder}/ckpt --eta 0.002 "
    "--tau_eta_ratio 0.333 --num_epochs 1 --select last --save_minutes 0 --report_to none --micro_batch_tokens 4096 "
    "--max_length 2048",
}


def run_stage(arguments):
    """(seconds, peak MiB of the largest process)."""
    began = time.perf_counter()
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen([sys.executable, *arguments], cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            output.seek(0)
            sys.exit(output.read().decode(errors="replace")[-3000:])
    return time.perf_counter() - began, usage.ru_maxrss / 1024


def run_stages(texts, policy, size):
    """({stage: (seconds, MiB)}, mean response tokens)."""
    count, num_samples, max_new_tokens = size
    values = dict(policy=policy, judge=f"{MODELS}/judge", num_samples=num_samples, max_new_tokens=max_new_tokens)
    with tempfile.TemporaryDirectory() as folder:
        lines = (json.dumps({"prompt": text}) + "\n" for text in texts[:count])
        Path(folder, "prompts.jsonl").write_text("".join(lines), encoding="utf-8")
        found = {
            name: run_stage([word.format(folder=folder, **values) for word in command.split()])
            for name, command in COMMANDS.items()
        }
        samples = (sample for one in read(f"{folder}/samples.jsonl", Samples) for sample in one["samples"])
        mean = statistics.mean(len(sample["token_ids"]) for sample in samples)
    print(size, {name: f"{seconds:.1f} s, {mib:.0f} MiB" for name, (seconds, mib) in found.items()}, flush=True)
    return found, mean


def growth_row(sweep, sizes, stage, beginning, found):
    """A row of the table; sizes: along the sweep; found: [(seconds, MiB)] of the stage at each of them."""
    seconds, mib = zip(*found)
    own = np.array(seconds) - beginning  # only where the work shows beside the start
    grows = own.min() > 0.3 and sorted(own) == list(own)
    exponent = f"{np.polyfit(np.log(sizes), np.log(own), 1)[0]:.2f}" if grows else "-"
    times, peaks = ", ".join(f"{one:.1f}" for one in seconds), ", ".join(f"{one:.0f}" for one in mib)
    return f"{sweep} | {stage} | {beginning:.1f} | {times} | {exponent} | {peaks}"


def growth(prompts: str, sweep: str = ""):
    """Run the stages on files of several sizes; append to RESULTS.md. exps/demo-models is made first where missing."""
    build_models()
    texts, rows = [text for text in dict.fromkeys(read_prompt_texts(prompts)) if len(text) < 400], []
    with tempfile.TemporaryDirectory() as folder:
        policy = random_model(f"{MODELS}/policy", 256, 4, folder)
        start, _ = run_stages(texts, policy, START)
        for name in [sweep] if sweep else SWEEPS:
            found = [run_stages(texts, policy, size) for size in SWEEPS[name]]
            along = {"prompts": [size[0] for size in SWEEPS[name]], "samples": [size[1] for size in SWEEPS[name]]}
            sizes = along.get(name, [mean for _, mean in found])
            described = f"{name} {', '.join(f'{size:.0f}' for size in sizes)}"
            for stage, (beginning, _) in start.items():
                rows.append(growth_row(described, sizes, stage, beginning, [stages[stage] for stages, _ in found]))
    record("Growth", table("growing | stage | start, s | at each size, s | exponent | peak MiB", *rows))


if __name__ == "__main__":
    run(iterations, growth)
