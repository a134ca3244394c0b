"""Figures of the files of an experiment, one function for each kind of file, and the cache that keeps them.

An experiment's records are hundreds of megabytes, of which a report needs a few numbers for each file. `Files` keeps
these from report to report: a file whose size and modification time have not changed is not read again.
"""

import itertools
import json
import math
import os
import statistics
from collections import Counter
from pathlib import Path

from records import Record, read
from utils import StageError, dump_json, fingerprint, write_text

STEP_POINTS = 40  # points of one iteration in a training plot: a curve, not every step of it


# ---------------------------------------------------------------------------------------------- files


def read_json(path: Path, kind: type = dict):
    """The object (or list) in a JSON file; an empty one when the file is missing or damaged."""
    try:
        found = json.loads(Path(path).read_bytes())
    except (OSError, ValueError):
        return kind()
    return found if isinstance(found, kind) else kind()


def whole_records(path, damage):
    """Yield a JSONL file's records up to the first that is not whole; what is wrong with that is added to `damage`."""
    try:
        yield from read(path, Record)
    except (StageError, OSError) as error:
        damage.append(str(error))


def measured(measure, *paths, **options) -> dict:
    """{figures: what `measure` finds in the records of these files, damage: what is wrong with the files}."""
    damage = []
    try:
        figures = measure(*(whole_records(path, damage) for path in paths), **options)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        figures = {}
        damage.append(f"{paths[0]}: these are not the fields that this file should have ({error!r})")
    return {"figures": figures, "damage": damage}


class Files:
    """The files of one experiment, of which each JSONL file is read at most once.

    Args:
        kept: what `read_cache` has found

    Attributes:
        used: the figures of this report, in the form of the cache
    """

    def __init__(self, kept: dict):
        self.kept, self.used, self.damaged = kept, {}, []

    def json(self, path: Path, kind: type = dict):
        """`read_json`, which notes a damaged file."""
        found = read_json(path, kind)
        if not found and path.exists():
            self.damaged.append(f"{path} is not valid JSON, or empty.")
        return found

    def figures(self, measure, *paths: Path) -> dict:
        """What `measure` finds in the records of these files; nothing when one is missing or unreadable."""
        try:
            stamp = [[found.st_size, found.st_mtime_ns] for found in map(os.stat, paths)]
        except OSError:
            return {}
        key = " ".join([measure.__name__, *(str(path.resolve()) for path in paths)])
        entry = self.kept.get(key)
        if not entry or entry["stamp"] != stamp:
            entry = {"stamp": stamp} | measured(measure, *paths)
        self.used[key] = entry
        return entry["figures"]

    def unread(self) -> list:
        """What was wrong with the files, but for a line of metrics.jsonl, which is still being written."""
        entries = [entry for key, entry in self.used.items() if not key.endswith("metrics.jsonl")]
        return self.damaged + [message for entry in entries for message in entry["damage"]]


def code() -> str:
    """Tells this version of the functions below from others, which may measure something else."""
    return fingerprint(Path(__file__))


def read_cache(path: Path) -> dict:
    """The figures that an earlier report has written; none where another version of this file did."""
    cache = read_json(path)
    return cache["figures"] if cache.get("code") == code() else {}


def write_cache(path: Path, experiments: list):
    """Keep the figures that the Files of this report have used, and no others."""
    used = {key: entry for files in experiments for key, entry in files.used.items()}
    write_text(path, dump_json({"code": code(), "figures": used}) + "\n")


# ---------------------------------------------------------------------------------------------- figures of one file


def mean(values) -> float | None:
    """The mean of those that are known, or None."""
    values = [value for value in values if value is not None]
    return sum(values) / len(values) if values else None


def sample_sums(records) -> dict:
    """A samples file: responses, their tokens, and how many ran into the length limit."""
    samples = [
        (len(sample["token_ids"]), sample["finish_reason"] == "length")
        for record in records
        for sample in record["samples"]
    ]
    return {
        "responses": len(samples),
        "tokens": sum(tokens for tokens, _ in samples),
        "truncated": sum(truncated for _, truncated in samples),
    }


def score_sums(records) -> dict:
    """A scores file: prompts, those judged (their responses differ), and sums over these."""
    found = [(record["order_gap"], record["label_mass"]) for record in records]
    judged = [pair for pair in found if None not in pair]
    return {
        "prompts": len(found),
        "judged": len(judged),
        "order_gap": sum(gap for gap, _ in judged),
        "label_mass": sum(mass for _, mass in judged),
    }


def record_count(records) -> dict:
    """Any file: its number of records."""
    return {"records": sum(1 for _ in records)}


def kl_reference(records) -> dict:
    """A data file: the estimate of KL(last policy || reference), the mean over its responses of log(last/ref)."""
    return {
        "kl": mean(
            record[f"last_{side}_logp"] - record[f"ref_{side}_logp"]
            for record in records
            for side in ("chosen", "rejected")
        )
    }


def kl_start(records, start_records) -> dict:
    """A data file and the same pairs under the initial policy: the estimate of KL(last policy || initial policy)."""
    sides = ("chosen", "rejected")
    start = {record["prompt_id"]: [record[f"last_{side}_logp"] for side in sides] for record in start_records}
    return {
        "kl": mean(
            record[f"last_{side}_logp"] - logp
            for record in records
            if record["prompt_id"] in start
            for side, logp in zip(sides, start[record["prompt_id"]])
        )
    }


def training_figures(records) -> dict:
    """A metrics file: its curve in at most STEP_POINTS points, the validations, and the end of training in numbers."""
    names = ("normalised_loss", "margin", "accuracy")
    steps, validation = [], []
    for record in records:
        if "validation_loss" in record:
            validation.append({"step": record["step"]} | {name: record.get(f"validation_{name}") for name in names})
        else:
            steps.append(record)
    end = steps[-math.ceil(len(steps) / 10) :]
    width = max(1, math.ceil(len(steps) / STEP_POINTS))
    groups = [steps[i : i + width] for i in range(0, len(steps), width)]
    speeds = [step["tokens_per_s"] for step in steps if "tokens_per_s" in step]
    return {
        "num_steps": steps[-1]["step"] if steps else 0,
        "steps": [
            {"step": group[-1]["step"]} | {name: mean(step.get(name) for step in group) for name in names}
            for group in groups
        ],
        "validation": validation,
        "kl_moved": mean(step.get("kl_last") for step in end),
        "training_loss": mean(step.get("normalised_loss") for step in end),
        "margin": mean(step.get("margin") for step in end),
        "accuracy": mean(step.get("accuracy") for step in end),
        "tokens_per_s": statistics.median(speeds) if speeds else None,
    }


def stage_seconds(records) -> dict:
    """A times file: {stage: seconds}, those of repeated stages added up."""
    seconds = Counter()
    for record in records:
        seconds[record["stage"]] += record["seconds"]
    return dict(seconds)


def comparison_rows(records, limit: int) -> dict:
    """A comparison file: {prompt_id: {prompt, response, baseline, win_prob}} of its first records."""

    def sample(found):
        return {
            "text": found["text"],
            "tokens": len(found["token_ids"]) if "token_ids" in found else None,
            "truncated": found.get("finish_reason") == "length",
        }

    return {
        record["prompt_id"]: {
            "prompt": record["prompt"],
            "response": sample(record["samples"][0]),
            "baseline": sample(record["samples"][1]),
            "win_prob": record["win_probs"][0][1],
        }
        for record in itertools.islice(records, limit)
    }
