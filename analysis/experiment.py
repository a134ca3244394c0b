"""One experiment as the report knows it: its settings, how far it is, and all figures by iteration.

`read_experiment` returns what stands in summary.json under "experiments", for each; null means not known (yet):
    name, path, settings (run.json)
    state           finished, total (iterations; null where run.json does not tell), last_evaluated, last_written
    start           the initial policy's duality_gap, other, response_tokens
    matrix          the newest matrix/iter<N>.json, see eval.py; {} where there is none
    iterations      one row each:
        iteration, finished, round_ends, weights (whether the checkpoint is still there)
        reference_moved                     after this iteration
        win_rate_start, mean_win_prob_start and their _interval; the same against _previous
        duality_gap, other                  the demo's, exact; duality_gap is 2 (max_y P(y beats the policy) - 1/2)
        response_tokens                     mean of the answers to the evaluation prompts
        length_change                       the same relative to the initial policy's: 0.1 is 10 % longer
        sample_tokens, truncated            of all responses sampled; share that reached the length limit
        kl_reference, kl_start              of the policy sampled from, the checkpoint before: nats per response
        kl_moved                            kl_last at the end of training: how far the iteration moved
        training_loss, margin, accuracy     normalised loss, ...: means over the last tenth of the steps
        validation_loss                     normalised, the last one
        order_gap, label_mass, dropped      of the judge; share of judged prompts without a pair
        skipped                             number of records in *.skipped.jsonl
        tokens_per_s                        of training, the median of the steps
        seconds                             {stage: seconds}, and their sum in `minutes`
    steps           training over all iterations: iteration (3.5: the middle of iteration 3), normalised_loss,
                    margin, accuracy, each the mean over a few steps where an iteration has many
    validation      the same figures of the validation pairs
    unread          files that could not be read to their end, and why
"""

import itertools
import re
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path

from tqdm import tqdm

from analysis.figures import (
    Files,
    kl_reference,
    kl_start,
    read_json,
    record_count,
    sample_sums,
    score_sums,
    stage_seconds,
    training_figures,
    whole_records,
)
from records import Comparison
from utils import StageError

PARTS = ("train", "test")


def ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None


# ---------------------------------------------------------------------------------------------- one iteration


def evaluation_figures(files: Files, folder: Path) -> dict:
    """Win rates with their intervals, and mean lengths, from the summaries in eval/."""
    found = {name: files.json(folder / "eval" / f"vs_{name}.json") for name in ("start", "previous")}
    figures = {
        f"{field}_{name}{ending}": found[name].get(field + ending)
        for name in found
        for field in ("win_rate", "mean_win_prob")
        for ending in ("", "_interval")
    }
    tokens, start_tokens = found["start"].get("mean_tokens") or [None, None]
    tokens = tokens if tokens is not None else (found["previous"].get("mean_tokens") or [None])[0]
    return figures | {
        "response_tokens": tokens,
        "start_tokens": start_tokens,
        "length_change": tokens / start_tokens - 1 if start_tokens else None,
    }


def sampling_figures(files: Files, folder: Path) -> dict:
    """Length of all responses sampled, train and test."""
    sums = sum((Counter(files.figures(sample_sums, folder / f"{part}.samples.jsonl")) for part in PARTS), Counter())
    return {
        "sample_tokens": ratio(sums["tokens"], sums["responses"]),
        "truncated": ratio(sums["truncated"], sums["responses"]),
    }


def judging_figures(files: Files, folder: Path) -> dict:
    """What the judge did with the sampled responses, and what it led to."""
    sums, pairs, prompts = Counter(), 0, 0
    for part in PARTS:
        found = Counter(files.figures(score_sums, folder / f"{part}.scores.jsonl"))
        sums.update(found)
        kept = files.figures(record_count, folder / f"{part}.pairs.jsonl")
        if kept and found:
            pairs, prompts = pairs + kept["records"], prompts + found["prompts"]
    listings = [*sorted(folder.glob("*.skipped.jsonl")), *sorted(folder.glob("*/*.skipped.jsonl"))]
    return {
        "order_gap": ratio(sums["order_gap"], sums["judged"]),
        "label_mass": ratio(sums["label_mass"], sums["judged"]),
        "dropped": ratio(prompts - pairs, prompts),
        "skipped": sum(files.figures(record_count, path).get("records", 0) for path in listings),
    }


def kl_figures(files: Files, folder: Path, reference_is_start: bool) -> dict:
    """KL estimates of the policy that the iteration samples from, on its test pairs, else its training pairs."""
    paths = [folder / "data" / f"{part}.jsonl" for part in reversed(PARTS)]
    data = next((path for path in paths if path.exists()), paths[0])
    reference = files.figures(kl_reference, data).get("kl")
    start = files.figures(kl_start, paths[0], folder / "eval" / "start_logps.jsonl").get("kl")
    return {"kl_reference": reference, "kl_start": reference if start is None and reference_is_start else start}


def iteration_row(files: Files, folder: Path, number: int, reference_is_start: bool, training: dict) -> dict:
    """All figures of one iteration but those that need the ones around it."""
    seconds = files.figures(stage_seconds, folder / "logs" / "times.jsonl")
    model = folder / "ckpt" / "model"
    return {
        "iteration": number,
        "finished": (folder / "next.json").exists(),
        "weights": any(model.glob("*.safetensors")) or any(model.glob("*.bin")),
        **evaluation_figures(files, folder),
        **sampling_figures(files, folder),
        **kl_figures(files, folder, reference_is_start),
        **{name: training.get(name) for name in ("kl_moved", "training_loss", "margin", "accuracy", "tokens_per_s")},
        "validation_loss": next((row["normalised_loss"] for row in training.get("validation", [])[::-1]), None),
        **judging_figures(files, folder),
        "seconds": seconds,
        "minutes": sum(seconds.values()) / 60 if seconds else None,
    }


def training_rows(number: int, training: dict, total: int, name: str) -> list:
    """The steps (or validations) of one iteration at their places on the axis of iterations."""
    return [
        {"iteration": number + row["step"] / total} | {field: row[field] for field in row if field != "step"}
        for row in training.get(name, [])
    ]


# ---------------------------------------------------------------------------------------------- all iterations


def whole_number(settings: dict, name: str) -> int | None:
    """A setting as a number, or None where it is missing or none."""
    return int(settings[name]) if settings.get(name, "").isdecimal() else None


def beginning(path: Path, settings: dict) -> tuple:
    """(number of the first iteration, its reference); a fork begins after the iteration that FROM names."""
    origin = re.fullmatch(r"(.*/)?([^/]+)/iter(\d+)", settings.get("FROM", "").rstrip("/"))
    if not origin:
        return whole_number(settings, "FIRST_ITERATION") or 0, settings.get("REFERENCE") or settings.get("MODEL")
    places = [path.parent / origin[2] / f"iter{origin[3]}", Path(origin.string)]
    return int(origin[3]) + 1, next(
        filter(None, (read_json(place / "next.json").get("reference") for place in places)), None
    )


def iteration_folders(path: Path, first: int) -> dict:
    """{number: folder} in order; a fork also holds answers of the iteration before its first, which is not its own."""
    found = {int(folder.name[4:]): folder for folder in path.glob("iter*") if folder.name[4:].isdecimal()}
    return {number: found[number] for number in sorted(found) if number >= first}


def read_iterations(files: Files, path: Path, folders: dict, settings: dict, reference: str | None) -> tuple:
    """(rows, steps, validation) of all iterations; the first one begins with this reference."""
    rows, steps, validation, total = [], [], [], 1
    splits = whole_number(settings, "SPLITS")
    for number, folder in tqdm(folders.items(), desc=f"reading {path}", unit="iteration", leave=False, disable=None):
        training = files.figures(training_figures, folder / "ckpt" / "metrics.jsonl")
        # Training that goes on has as many steps as the iteration before, unless it has more already.
        done = (folder / "ckpt" / "DONE").exists()
        total = max(1, training.get("num_steps", 0), 0 if done else total)
        from_start = reference is not None and reference == settings.get("MODEL")
        row = iteration_row(files, folder, number, from_start, training)
        then = files.json(folder / "next.json").get("reference")
        row["reference_moved"] = bool(then and reference and then != reference)
        reference = then
        row["round_ends"] = splits is not None and (number + 1) % max(1, splits) == 0
        rows.append(row)
        steps += training_rows(number, training, total, "steps")
        validation += training_rows(number, training, total, "validation")
    return rows, steps, validation


def read_experiment(path: Path, files: Files) -> dict:
    """An experiment as described above. Raises StageError where the folder is none."""
    settings = {name: str(value) for name, value in files.json(path / "run.json").items()}
    first, reference = beginning(path, settings)
    folders = iteration_folders(path, first)
    if not settings and not folders:
        raise StageError(f"{path} is no experiment: it has neither a readable run.json nor iterations (iter0, ...)")
    rows, steps, validation = read_iterations(files, path, folders, settings, reference)
    start = add_game(rows, files.json(path / "game.json", list))
    start["response_tokens"] = next((row["start_tokens"] for row in rows if row["start_tokens"]), None)
    return {
        "name": path.resolve().name,
        "path": str(path),
        "settings": settings,
        "state": state(path, settings, rows),
        "start": start,
        "matrix": newest_matrix(files, path),
        "iterations": rows,
        "steps": steps,
        "validation": validation,
        "unread": files.unread(),
    }


def newest_matrix(files: Files, path: Path) -> dict:
    """What `eval.py matrix` found after the last iteration that it was run after, or {}."""
    found = {int(file.stem[4:]): file for file in path.glob("matrix/iter*.json") if file.stem[4:].isdecimal()}
    result = files.json(found[max(found)]) if found else {}
    return result if {"names", "win", "worst_case", "nash_mixture"} <= result.keys() else {}


def add_game(rows: list, game: list) -> dict:
    """Put the demo's duality gaps into the rows; returns the initial policy's."""
    names = ("duality_gap", "other")
    found = {row.get("iteration"): row for row in game if isinstance(row, dict)}
    for row in rows:
        row.update({name: found.get(row["iteration"], {}).get(name) for name in names})
    return {name: found.get("start", {}).get(name) for name in names}


def state(path: Path, settings: dict, rows: list) -> dict:
    """How far the experiment is; its files do not show whether it is running, only when the last was written."""
    rounds, splits = whole_number(settings, "ROUNDS"), whole_number(settings, "SPLITS")
    total = whole_number(settings, "ITERATIONS")
    if total is None and None not in (rounds, splits):  # an experiment of version 0.9, which did not write it
        total = rounds * splits
    evaluated = [row["iteration"] for row in rows if (row["win_rate_start"], row["win_rate_previous"]) != (None, None)]
    written = path.stat().st_mtime
    for place in [path, path / "start", *path.glob("iter*"), *path.glob("iter*/*")]:
        for file in place.glob("*"):
            if file.is_file() and file.name != ".lock":
                written = max(written, file.stat().st_mtime)
    return {
        "finished": sum(row["finished"] for row in rows),
        "total": total,
        "last_evaluated": evaluated[-1] if evaluated else None,
        "last_written": datetime.fromtimestamp(written, UTC).isoformat(timespec="seconds"),
    }


def read_responses(experiment: dict, num_prompts: int) -> list:
    """[{prompt, start, previous, current, win_prob_start, win_prob_previous}] of the last evaluated iteration.

    The three answers are samples. The win probabilities are those of the current answer over the other two.
    Only the first records of the comparisons are read, so nothing of this is kept in the cache.
    """
    folder = Path(experiment["path"]) / f"iter{experiment['state']['last_evaluated']}" / "eval"
    rows = {}
    for name in ("start", "previous"):
        comparisons = whole_records(folder / f"vs_{name}.jsonl", [], Comparison)
        for record in itertools.islice(comparisons, num_prompts):
            ours, theirs = record["samples"]
            row = rows.setdefault(record["prompt_id"], {"prompt": record["prompt"], "current": ours})
            row |= {name: theirs, f"win_prob_{name}": record["win_probs"][0][1]}
    return list(rows.values())[:num_prompts]
