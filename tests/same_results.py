"""Do two runs of comal.sh hold the same results? Every JSONL and JSON file is compared value by value.

    python tests/same_results.py exps/reference exps/demo-comal [--tolerance 1e-12]

What may differ: times, speeds, commits, and what the second run has besides: settings and fields of a newer version.
Numbers may differ by the tolerance, absolute or relative. Prints a line for each kind of file. Exit code 0 means that
all results are the same.
"""

import argparse
import json
import math
import re
import sys
from collections import defaultdict
from pathlib import Path

MAY_DIFFER = {"tokens_per_s", "validation_tokens_per_s"}
LEFT_OUT = {
    "logs",
    "cells",
    "report",
    "tensorboard",
    "run.json",
    "training.json",
    "next.json",
    "game.json",
    "start_logps.jsonl",
}


def files(folder):
    """{path in the folder: path} of the results."""
    found = {str(path.relative_to(folder)): path for path in folder.rglob("*.json*") if "model" not in path.parts}
    return {name: path for name, path in found.items() if not LEFT_OUT & set(Path(name).parts)}


def values(path):
    """The JSON values of a file, one a line or the whole file."""
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text.split("\n") if line] if path.suffix == ".jsonl" else [json.loads(text)]


def difference(a, b):
    """The largest difference of two JSON values: 0 where they are the same, infinite where they are not alike."""
    if isinstance(a, dict) and isinstance(b, dict):
        names = a.keys() - MAY_DIFFER  # a newer version may add fields
        return max((difference(a[n], b[n]) if n in b else math.inf for n in names), default=0)
    if isinstance(a, list) and isinstance(b, list):
        return max((difference(x, y) for x, y in zip(a, b)), default=0) if len(a) == len(b) else math.inf
    if type(a) in (int, float) and type(b) in (int, float):
        return abs(a - b) / max(1, abs(a), abs(b))
    if isinstance(a, str) and isinstance(b, str):  # paths name the experiment
        return 0 if re.sub(r"\S*exps/[^/]+", "", a) == re.sub(r"\S*exps/[^/]+", "", b) else math.inf
    return 0 if a == b else math.inf


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("runs", type=Path, nargs=2)
    parser.add_argument("--tolerance", type=float, default=1e-12)
    options = parser.parse_args()
    first, second = map(files, options.runs)
    largest, same = defaultdict(float), True
    for name in sorted(first.keys() | second.keys()):
        missing = name not in first or name not in second
        found = math.inf if missing else difference(values(first[name]), values(second[name]))
        if found > options.tolerance:
            same = False
            print(f"{name}: {'only in one of the runs' if missing else f'differs by {found:.3g}'}")
        kind = re.sub(r"\d+", "N", name)
        largest[kind] = max(largest[kind], found)
    for kind, found in sorted(largest.items()):
        print(f"{kind:40} {found:.3g}")
    weights = [sorted(run.glob("iter*/ckpt/model/*.safetensors")) for run in options.runs]
    equal = sum(a.read_bytes() == b.read_bytes() for a, b in zip(*weights))
    print(
        f"{len(first)} files compared; weights of {equal} of {len(weights[0])} checkpoints are the same, byte for byte"
    )
    sys.exit(0 if same and first else 1)


if __name__ == "__main__":
    main()
