"""What one GPU makes of the project's paths: exactness, speed, memory and kernels, each figure beside its goal.

    bash benchmarks/gpu.sh [--only SECTION,...] [--output benchmarks/GPU.md]
    python benchmarks/gpu.py --device cpu --shape tiny          the same code without a GPU

Models are Qwen2-1.5B's shape with random weights; lengths are drawn as UltraFeedback's are distributed. The sections
are the functions of gpu_sections.py, in the order of SECTIONS. One that fails says why in its row, and the others go
on. The table is written again after each of them. Exit code 1: a figure of exactness is off, or could not be had.
"""

import sys
import time
from datetime import date

import common
import gpu_sections
import torch
from gpu_sections import SIZES, Bench, Row

from utils import StageError, first_line, run, split_list, write_text

PACKAGES = ("torch", "transformers", "accelerate", "vllm", "trl")
SECONDS = 400  # no section begins later

# What a faulty kernel may end comes after the others; what starts processes of its own and may take long, last.
SECTIONS = {
    "rates": gpu_sections.rates,
    "exactness": gpu_sections.exactness,
    "throughput": gpu_sections.throughput,
    "memory": gpu_sections.memory,
    "kernels": gpu_sections.kernels,
    "attention": gpu_sections.ways_of_attention,
    "trl": gpu_sections.trl,
    "vllm": gpu_sections.vllm,
}
EXACT = ("exactness", "attention")  # sections that the command fails without
GPU_ONLY = ("memory",)  # a CPU's figures would say nothing


# ---------------------------------------------------------------------------------------------- the table


def run_section(bench, name):
    """Adds its rows, whatever happens."""
    try:
        for row in SECTIONS[name](bench):
            bench.rows.append((name, row))
    except Exception as error:
        why = f"failed: {type(error).__name__}: {first_line(error)[:200]}"
        bench.rows.append((name, Row("", why, good=False, exact=name in EXACT)))


def table(bench, began):
    """The Markdown of what has been measured."""
    rows = []
    for name, row in bench.rows:
        verdict = {None: "", True: "met", False: "**off**" if row.exact else "missed"}[row.good]
        rows.append(f"{name} | {row.what} | {row.figure.replace('|', '/')} | {row.goal} | {verdict}")
    lines = [
        "# One GPU" if bench.device == "cuda" else "# Not a GPU",
        "",
        f"{date.today()}, {common.machine()}; {common.versions(PACKAGES)}; Qwen2 {bench.shape}; "
        f"{time.monotonic() - began:.0f} s",
        "",
        f"    bash benchmarks/gpu.sh {' '.join(sys.argv[1:])}".rstrip(),
        "",
        *common.table("section | measured | figure | goal | ", *rows),
    ]
    return "\n".join(lines) + "\n"


def main(device: str = "cuda", shape: str = "1.5B", only: str = "", output: str = "benchmarks/GPU.md"):
    """Measure, print the table and write it. Exit code 1 where a result is not exact.

    Args:
        device: cuda, or cpu, which tries the code and says nothing about speed
        shape: 1.5B, or tiny
        only: sections, comma-separated: rates, exactness, throughput, memory (of a GPU alone), kernels,
            attention, trl, vllm
        output: the Markdown file
    """
    began = time.monotonic()
    if device not in ("cuda", "cpu") or shape not in SIZES:
        raise StageError(f"--device should be cuda or cpu, --shape {' or '.join(SIZES)}; got {device}, {shape}")
    possible = [name for name in SECTIONS if device == "cuda" or name not in GPU_ONLY]
    names = split_list(only) or possible
    if unknown := [name for name in names if name not in possible]:
        raise StageError(f"--only should be some of {', '.join(possible)}, got {', '.join(unknown)}")
    if device == "cuda" and not torch.cuda.is_available():
        raise StageError("torch sees no GPU; --device cpu --shape tiny tries the code without one")
    bench = Bench(device, shape)
    for name in (name for name in possible if name in names):
        if time.monotonic() - began < SECONDS:
            print(f"{time.monotonic() - began:4.0f} s: {name}", file=sys.stderr, flush=True)
            run_section(bench, name)
        else:
            bench.rows.append((name, Row("", f"left out after {SECONDS} s", exact=name in EXACT, good=False)))
        write_text(output, table(bench, began))
    print(table(bench, began))
    sys.exit(any(row.exact and not row.good for _, row in bench.rows))


if __name__ == "__main__":
    run(main)
