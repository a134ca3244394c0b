"""Figures of the files of an experiment, one function for each kind of file, and the cache that keeps them.

An experiment's records are hundreds of megabytes, of which a report needs a few numbers for each file. `Files` keeps
these from report to report: a file whose size and modification time have not changed is not read again.
"""

import json
import math
import statistics
from collections import Counter
from pathlib import Path

from records import Record, read
from utils import StageError, dump_json, fingerprint

STEP_POINTS = 40  # points of one iteration in a training plot: a curve, not every step of it


# ---------------------------------------------------------------------------------------------- files


def read_json(path: Path, kind: type = dict):
    """The object (or list) in a JSON file; an empty one when the file is missing or damaged."""
    try:
        found = json.loads(Path(path).read_bytes())
    except (OSError, ValueError):
        return kind()
    return found if isinstance(found, kind) else kind()


def whole_records(path, damage, schema=Record):
    """Yield a JSONL file's records up to the first that is not whole; what is wrong with that is added to `damage`."""
    try:
        yield from read(path, schema)
    except (StageError, OSError) as error:
        damage.append(str(error))


def measured(measure, paths) -> dict:
    """{figures: what `measure` finds in the records of these files, damage: what is wrong with the files}."""
    figures, damage = {}, []
    try:
        figures = measure(*(whole_records(path, damage) for path in paths))
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        damage.append(f"{paths[0]}: these are not the fields that this file should have ({error!r})")
    return {"figures": figures, "damage": damage}


class Files:
    """The files of one experiment, of which each JSONL file is read at most once.

    Args:
        kept: the cache, what an earlier report has `used`

    Attributes:
        used: the figures of this report, {what was measured, of which files: {figures, damage}}
    """

    def __init__(self, kept: dict):
        self.kept, self.used, self.damaged = kept, {}, []
        self.code = fingerprint(Path(__file__))  # another version of the functions below may measure something else

    def json(self, path: Path, kind: type = dict):
        """`read_json`, which notes a damaged file."""
        found = read_json(path, kind)
        if not found and path.exists():
            self.damaged.append(f"{path} is not valid JSON, or empty.")
        return found

    def figures(self, measure, *paths: Path) -> dict:
        """What `measure` finds in the records of these files; nothing when one is missing or unreadable."""
        try:
            stamps = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
        except OSError:
            return {}
        key = dump_json([self.code, measure.__name__, *stamps])
        self.used[key] = self.kept.get(key) or measured(measure, paths)
        return self.used[key]["figures"]

    def unread(self) -> list:
        """What was wrong with the files, but for a line of metrics.jsonl, which is still being written."""
        entries = [entry for key, entry in self.used.items() if "/metrics.jsonl" not in key]
        return self.damaged + [message for entry in entries for message in entry["damage"]]


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
