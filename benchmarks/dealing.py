"""How evenly the examples of an update are dealt to GPUs, and in how many forward passes; no GPU is needed.

    python benchmarks/dealing.py --prompts FILE [--count 32] [--updates 200]

Pairs are those of the other benchmarks. Positions are tokens and padding; perfect dealing has no padding, and the same
for each process. "In a row" is how a process would go through its passes alone, "in step" how they go where all wait for
the slowest one in each pass, as fully sharded parameters make them. Before, micro-batches were as full as possible and
dealt in turn, and a process had nothing to do in the last passes.

Goals: at most 1.35, and in a row 1.1 where rows are not padded to each other (0 tokens: one pair a pass).
"""

from types import SimpleNamespace

import numpy as np
from common import make_pairs, read_prompt_texts, record

from training.models import local_batches, micro_batches
from utils import run


def before(order, lengths, tokens, processes):
    """The micro-batches of each process, and None where it had none."""
    batches = micro_batches(order, lengths, tokens)
    batches += [None] * (-len(batches) % processes)
    return [batches[process::processes] for process in range(processes)]


def now(order, lengths, tokens, processes):
    batches = micro_batches(order, lengths, tokens, processes)
    ranks = [SimpleNamespace(num_processes=processes, process_index=index) for index in range(processes)]
    return [[batch if counts else None for batch, counts in local_batches(batches, lengths, rank)] for rank in ranks]


def measure(dealt, lengths):
    """(passes, the slowest process in a row and in step over perfect dealing)."""
    positions = np.array(
        [[len(batch) * max(lengths[i] for i in batch) if batch else 0 for batch in passes] for passes in dealt]
    )
    perfect = sum(lengths) / len(dealt)
    return positions.shape[1], positions.sum(1).max() / perfect, positions.max(0).sum() / perfect


def main(prompts: str, count: int = 32, updates: int = 200, longest: int = 1024, seed: int = 0):
    """Deal and append to RESULTS.md.

    Args:
        prompts: file of prompts
        count: pairs of an update
        updates: random ones, whose mean is shown
        longest: response, in tokens
        seed: of the pairs and updates
    """
    pairs = make_pairs(prompts, len(read_prompt_texts(prompts)), seed, longest)
    every = np.array([sum(map(len, pair)) for pair in pairs])
    lines = [
        f"{updates} updates of {count} pairs, of {np.median(every):.0f} tokens in the median and {every.max():,} at most.",
        "",
        "| GPUs | tokens of a pass | passes before | now | in a row before | now | in step before | now |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for processes in (4, 8):
        for tokens in (0, 4096, 8192, 16_384):
            generator = np.random.default_rng(seed)
            found = []
            for _ in range(updates):
                lengths = generator.choice(every, count, replace=False).tolist()
                found.append([measure(way(range(count), lengths, tokens, processes), lengths) for way in (before, now)])
            figures = np.mean(found, axis=0).T.flatten()  # each figure before, then now
            lines.append(f"| {processes} | {tokens:,} | " + " | ".join(f"{figure:.2f}" for figure in figures) + " |")
    record("Dealing", lines)


if __name__ == "__main__":
    run(main)
