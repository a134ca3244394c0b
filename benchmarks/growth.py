"""How time and memory of every stage grow with the number of prompts, of samples a prompt (K), and of tokens a
response.

    python benchmarks/growth.py --prompts FILE [--sweep prompts|samples|length]

Each stage's own command is run on files of three sizes, a factor of 10 or more apart, with a random policy of 4 layers
of 256 and the demo's judge. The time of its start, that of a run on four prompts, is subtracted; the exponent is the
slope of the logarithms, where the time above the start grows at all. Memory is the peak of the stage's largest process;
an engine's rises until its KV cache, 1 GiB at most on a CPU, has been used once.

Goals: time linear in the prompts; memory of every stage independent of their number; judging quadratic in K, as all
pairs are compared; sampling, log-probabilities and training linear in the response length while the attention's share
is small.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from common import ROOT, random_model, read_prompt_texts, record

from records import Samples, read
from utils import run

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


def measure(texts, policy, judge, size):
    """({stage: (seconds, MiB)}, mean response tokens)."""
    count, num_samples, max_new_tokens = size
    with tempfile.TemporaryDirectory() as folder:
        lines = (json.dumps({"prompt": text}) + "\n" for text in texts[:count])
        Path(folder, "prompts.jsonl").write_text("".join(lines), encoding="utf-8")
        values = dict(policy=policy, judge=judge, folder=folder, num_samples=num_samples, max_new_tokens=max_new_tokens)
        found = {
            name: run_stage([word.format(**values) for word in command.split()]) for name, command in COMMANDS.items()
        }
        mean = statistics.mean(
            len(sample["token_ids"]) for one in read(f"{folder}/samples.jsonl", Samples) for sample in one["samples"]
        )
    print(size, {name: f"{seconds:.1f} s, {mib:.0f} MiB" for name, (seconds, mib) in found.items()}, flush=True)
    return found, mean


def main(prompts: str, sweep: str = "", policy: str = "exps/demo-models/policy", judge: str = "exps/demo-models/judge"):
    """Measure and append to RESULTS.md."""
    texts = [text for text in dict.fromkeys(read_prompt_texts(prompts)) if len(text) < 400]
    with tempfile.TemporaryDirectory() as folder:
        policy = random_model(policy, 256, 4, folder)
        start, _ = measure(texts, policy, judge, START)
        for name in [sweep] if sweep else SWEEPS:
            found = [measure(texts, policy, judge, size) for size in SWEEPS[name]]
            values = [
                mean if name == "length" else size[["prompts", "samples"].index(name)]
                for size, (_, mean) in zip(SWEEPS[name], found)
            ]
            lines = [
                f"| stage | start | {' | '.join(f'{value:.0f}' for value in values)} | exponent | peak MiB |",
                "|---" * (len(values) + 4) + "|",
            ]
            for stage, (beginning, _) in start.items():
                seconds = [one[stage][0] for one, _ in found]
                own = np.array(seconds) - beginning  # only where the work shows beside the start
                exponent = (
                    np.polyfit(np.log(values), np.log(own), 1)[0]
                    if own.min() > 0.3 and sorted(own) == list(own)
                    else np.nan
                )
                lines.append(
                    f"| {stage} | {beginning:.1f} s | {' | '.join(f'{value:.1f} s' for value in seconds)} | "
                    f"{'-' if np.isnan(exponent) else f'{exponent:.2f}'} | "
                    f"{', '.join(f'{one[stage][1]:.0f}' for one, _ in found)} |"
                )
            described = {
                "prompts": "prompts (K = 4, at most 64 tokens)",
                "samples": "K (100 prompts, at most 64 tokens)",
                "length": "mean tokens of a response (150 prompts, K = 4)",
            }[name]
            record(f"Growth with {described}", lines, packages=("torch", "transformers", "vllm"))


if __name__ == "__main__":
    run(main)
