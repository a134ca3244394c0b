"""Report of one or several experiments: a page to read while they run and to choose a checkpoint by.

    python -m analysis.report exps/A [exps/B ...] [--output DIR]

Input: folders of comal.sh, finished, still going or stopped anywhere. What is missing is left out and named; no model
is loaded. Output, in DIR (of one experiment: exps/NAME/report):
    index.html      headline figures, plots (inline SVG), a table by iteration, the settings; loads nothing
    responses.html  answers to the first evaluation prompts side by side: start policy, previous iteration, current
    summary.json    {"experiments": [...]}, what the plots and tables show; null: not known (yet). Each has
        name, path, settings (run.json)
        state           finished, total (iterations; null where run.json has no ROUNDS), last_evaluated, last_written
        start           the start policy's duality_gap, other, response_tokens
        matrix          the newest matrix/iter<N>.json, see eval.py; {} where there is none
        iterations      one row each:
            iteration, finished, round_ends, reference_moved (behind it), weights (is the checkpoint still there)
            win_rate_start, mean_win_prob_start and their _interval; the same against _previous
            duality_gap, other                  the demo's, exact
            response_tokens                     mean of the answers to the evaluation prompts
            length_change                       the same relative to the start policy's: 0.1 is 10 % longer
            sample_tokens, truncated            of all responses sampled; share that ran into the length limit
            kl_reference, kl_start              of the policy sampled from, the checkpoint before: nats a response
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
    cache.json      figures by file, size and modification time: files that have not changed are not read again
"""

import itertools
import json
import math
import os
import re
import statistics
from collections import Counter
from dataclasses import dataclass
from datetime import UTC, datetime
from html import escape
from pathlib import Path

from tqdm import tqdm

from analysis.plots import (
    COLOURS,
    OTHER_STAGE,
    SECTIONS,
    STAGE_COLOURS,
    as_text,
    draw_lines,
    draw_matrix,
    draw_times,
    has_data,
    series,
    stage_names,
)
from utils import StageError, check_at_least, dump_json, fingerprint, log, read_jsonl, run, write_text

STEP_POINTS = 40  # an iteration in a training plot: a curve, not every step of it


# ---------------------------------------------------------------------------------------------- files


def read_json(path, kind=dict):
    """The object (or list) in a JSON file; an empty one when the file is missing or damaged."""
    try:
        found = json.loads(Path(path).read_bytes())
    except (OSError, ValueError):
        return kind()
    return found if isinstance(found, kind) else kind()


def whole_records(path, damage):
    """Yield a JSONL file's records up to the first that is not whole; what is wrong with that is added to `damage`."""
    try:
        yield from read_jsonl(path)
    except (StageError, OSError) as error:
        damage.append(str(error))


class Files:
    """Figures of JSONL files, each read once: they are kept from report to report in `cache_path`."""

    def __init__(self, cache_path):
        self.cache_path = cache_path
        self.code = fingerprint(Path(__file__))  # another version may measure something else
        cache = read_json(cache_path)
        self.known = cache.get("figures", {}) if cache.get("code") == self.code else {}
        self.used = {}
        self.damaged = []  # JSON files that are there and cannot be read

    def read(self, path, kind=dict):
        """`read_json`, which notes a damaged file."""
        found = read_json(path, kind)
        if not found and Path(path).exists():
            self.damaged.append(str(Path(path).resolve()))
        return found

    def figures(self, measure, *paths, **options):
        """What `measure(records, ..., **options)` finds in these files, or {} when one is missing or unreadable."""
        try:
            stamp = [[found.st_size, found.st_mtime_ns] for found in map(os.stat, paths)]
        except OSError:
            return {}
        key = dump_json([measure.__name__, options, *(str(Path(path).resolve()) for path in paths)])
        entry = self.known.get(key)
        if not entry or entry["stamp"] != stamp:
            damage = []
            try:
                found = measure(*(whole_records(path, damage) for path in paths), **options)
            except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
                found = {}
                damage.append(f"{paths[0]}: not the fields that this file should have ({error!r})")
            entry = {"stamp": stamp, "figures": found, "damage": damage}
        self.used[key] = entry
        return entry["figures"]

    def unread(self, folder):
        """What was wrong with the files under a folder; a last line that is being written is nothing wrong."""
        prefix = str(folder.resolve()) + os.sep
        return [f"{path}: no JSON" for path in self.damaged if path.startswith(prefix)] + [
            message
            for key, entry in self.used.items()
            for message in entry["damage"]
            if json.loads(key)[2].startswith(prefix) and not json.loads(key)[2].endswith("metrics.jsonl")
        ]

    def save(self):
        """Keep the figures used in this report, and no others."""
        write_text(self.cache_path, dump_json({"code": self.code, "figures": self.used}) + "\n")


# ---------------------------------------------------------------------------------------------- figures of one file


def mean(values):
    """The mean of those that are known, or None."""
    values = [value for value in values if value is not None]
    return sum(values) / len(values) if values else None


def sample_sums(records):
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


def score_sums(records):
    """A scores file: prompts, those judged (their responses differ), and sums over these."""
    found = [(record["order_gap"], record["label_mass"]) for record in records]
    judged = [pair for pair in found if None not in pair]
    return {
        "prompts": len(found),
        "judged": len(judged),
        "order_gap": sum(gap for gap, _ in judged),
        "label_mass": sum(mass for _, mass in judged),
    }


def record_count(records):
    """Any file: its number of records."""
    return {"records": sum(1 for _ in records)}


def kl_reference(records):
    """A data file: the estimate of KL(last policy || reference), the mean over its responses of log(last/ref)."""
    return {
        "kl": mean(
            record[f"last_{side}_logp"] - record[f"ref_{side}_logp"]
            for record in records
            for side in ("chosen", "rejected")
        )
    }


def kl_start(records, start_records):
    """A data file and the same pairs under the start policy: the estimate of KL(last policy || start policy)."""
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


def training_figures(records):
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


def stage_seconds(records):
    """A times file: {stage: seconds}, those of repeated stages added up."""
    seconds = Counter()
    for record in records:
        seconds[record["stage"]] += record["seconds"]
    return dict(seconds)


def comparison_rows(records, limit):
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


# ---------------------------------------------------------------------------------------------- one experiment


def ratio(part, whole):
    return part / whole if whole else None


def evaluation_figures(files, folder):
    """Win rates with their intervals, and mean lengths, from the summaries in eval/."""
    found = {name: files.read(folder / "eval" / f"vs_{name}.json") for name in ("start", "previous")}
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


def sampling_figures(files, folder):
    """Length of all responses sampled, train and test."""
    sums = sum((Counter(files.figures(sample_sums, folder / f"{part}.samples.jsonl")) for part in PARTS), Counter())
    return {
        "sample_tokens": ratio(sums["tokens"], sums["responses"]),
        "truncated": ratio(sums["truncated"], sums["responses"]),
    }


PARTS = ("train", "test")


def judge_figures(files, folder):
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


def kl_figures(files, folder, reference_is_start):
    """KL estimates of the policy that the iteration samples from, on its test pairs, else its training pairs."""
    paths = [folder / "data" / f"{part}.jsonl" for part in reversed(PARTS)]
    data = next((path for path in paths if path.exists()), paths[0])
    reference = files.figures(kl_reference, data).get("kl")
    start = files.figures(kl_start, paths[0], folder / "eval" / "start_logps.jsonl").get("kl")
    return {"kl_reference": reference, "kl_start": reference if start is None and reference_is_start else start}


def iteration_row(files, folder, number, reference_is_start, training):
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
        **judge_figures(files, folder),
        "seconds": seconds,
        "minutes": sum(seconds.values()) / 60 if seconds else None,
    }


def training_rows(number, training, total, name):
    """The steps (or validations) of one iteration at their places on the axis of iterations."""
    return [
        {"iteration": number + row["step"] / total} | {field: row[field] for field in row if field != "step"}
        for row in training.get(name, [])
    ]


def beginning(path, settings):
    """(number of the first iteration, its reference); a fork begins behind the iteration that FROM names."""
    origin = re.fullmatch(r"(.*/)?([^/]+)/iter(\d+)", settings.get("FROM", "").rstrip("/"))
    if not origin:
        return 0, settings.get("MODEL")
    places = [path.parent / origin[2] / f"iter{origin[3]}", Path(origin.string)]
    return int(origin[3]) + 1, next(
        filter(None, (read_json(place / "next.json").get("reference") for place in places)), None
    )


def iteration_folders(path, first):
    """{number: folder} in order; a fork also holds answers of the iteration before its first, which is not its own."""
    found = {int(folder.name[4:]): folder for folder in path.glob("iter*") if folder.name[4:].isdecimal()}
    return {number: found[number] for number in sorted(found) if number >= first}


def read_experiment(path, files):
    """An experiment as in summary.json, see above. Raises StageError where the folder is none."""
    path = Path(path)
    settings = {name: str(value) for name, value in files.read(path / "run.json").items()}
    first, reference = beginning(path, settings)
    folders = iteration_folders(path, first)
    if not settings and not folders:
        raise StageError(f"{path} is no experiment: it has neither a readable run.json nor iterations (iter0, ...)")
    rows, steps, validation, total = [], [], [], 1
    for number, folder in tqdm(folders.items(), desc=f"reading {path}", unit="iteration", leave=False, disable=None):
        training = files.figures(training_figures, folder / "ckpt" / "metrics.jsonl")
        # Training that goes on has as many steps as the iteration before, unless it has more already.
        done = (folder / "ckpt" / "DONE").exists()
        total = max(1, training.get("num_steps", 0), 0 if done else total)
        from_start = reference is not None and reference == settings.get("MODEL")
        row = iteration_row(files, folder, number, from_start, training)
        then = files.read(folder / "next.json").get("reference")
        row["reference_moved"] = bool(then and reference and then != reference)
        reference = then
        splits = settings.get("SPLITS", "")
        row["round_ends"] = splits.isdecimal() and (number + 1) % max(1, int(splits)) == 0
        rows.append(row)
        steps += training_rows(number, training, total, "steps")
        validation += training_rows(number, training, total, "validation")
    start = add_game(rows, files.read(path / "game.json", list))
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
        "unread": files.unread(path),
    }


def newest_matrix(files, path):
    """What `eval.py matrix` found after the last iteration that it was run behind, or {}."""
    found = {int(file.stem[4:]): file for file in path.glob("matrix/iter*.json") if file.stem[4:].isdecimal()}
    result = files.read(found[max(found)]) if found else {}
    return result if {"names", "win", "worst_case", "nash_mixture"} <= result.keys() else {}


def add_game(rows, game):
    """Put the demo's duality gaps into the rows; returns the start policy's."""
    names = ("duality_gap", "other")
    found = {row.get("iteration"): row for row in game if isinstance(row, dict)}
    for row in rows:
        row.update({name: found.get(row["iteration"], {}).get(name) for name in names})
    return {name: found.get("start", {}).get(name) for name in names}


def state(path, settings, rows):
    """How far the experiment is; its files do not show whether it is running, only when the last was written."""
    rounds, splits = settings.get("ROUNDS", ""), settings.get("SPLITS", "")
    total = int(rounds) * int(splits) if rounds.isdecimal() and splits.isdecimal() else None
    written = path.stat().st_mtime
    for place in [path, path / "start", *path.glob("iter*"), *path.glob("iter*/*")]:
        for file in place.glob("*"):
            if file.is_file() and file.name != ".lock":
                written = max(written, file.stat().st_mtime)
    return {
        "finished": sum(row["finished"] for row in rows),
        "total": 1 if settings.get("METHOD") in ("ipo", "dpo") else total,
        "last_evaluated": next((row["iteration"] for row in rows[::-1] if evaluated(row)), None),
        "last_written": datetime.fromtimestamp(written, UTC).isoformat(timespec="seconds"),
    }


def evaluated(row):
    return row["win_rate_start"] is not None or row["win_rate_previous"] is not None


# ---------------------------------------------------------------------------------------------- text


def interval(bounds, scale=1):
    return f"{as_text(bounds[0], scale=scale)} to {as_text(bounds[1], scale=scale)}" if bounds else ""


def swatch(kind, colour):
    return f'<i class="{kind}" style="color:{colour}"></i>'


def legend(entries):
    """[(kind of swatch, colour, label)] as a line that wraps."""
    return (
        '<p class="legend">'
        + "".join(f"<span>{swatch(kind, colour)}{escape(label)}</span>" for kind, colour, label in entries)
        + "</p>"
    )


def line_legend(plot, experiments):
    """Names where there are several experiments, and what the lines are where there are several kinds."""
    shown = [experiment for experiment in experiments if has_data(plot, [experiment])]
    entries = [("dot", experiment["colour"], experiment["name"]) for experiment in shown if len(experiments) > 1]
    colour = experiments[0]["colour"] if len(experiments) == 1 else "#5c6166"
    kinds = [
        (line.style, colour, line.label)
        for line in plot.lines
        if any(series(line, experiment, 1)[0] for experiment in shown)
    ]
    if plot.start and any(experiment["start"].get(plot.start) is not None for experiment in shown):
        kinds.append(("dotted", colour, "the start policy"))
    return legend(entries + kinds)


def figure_html(title, legend_html, picture, caption):
    return (
        f'<figure><h3>{escape(title)}</h3>{legend_html}<div class="plot">{picture}</div>'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def section_html(title, plots, experiments):
    """A heading with its plots; those without data are named in one line each."""
    pictures, missing = times_html(experiments) if title == "Time" else ([], [])
    for plot in plots:
        shown = [experiment for experiment in experiments if has_data(plot, [experiment])]
        if not shown:
            missing.append(f"{plot.title}: {plot.missing}.")
        elif plot.lines[0].field == "skipped" and not any(row["skipped"] for e in shown for row in e["iterations"]):
            missing.append(f"{plot.title}: none so far.")
        else:
            picture = draw_lines(plot, experiments)
            pictures.append(figure_html(plot.title, line_legend(plot, experiments), picture, plot.caption))
    lines = "".join(f'<p class="missing">{escape(line)}</p>' for line in missing)
    grid = f'<div class="grid">{"".join(pictures)}</div>' if pictures else ""
    return f"<section><h2>{escape(title)}</h2>{grid}{lines}</section>"


def times_html(experiments):
    """([the bars of the time by stage], [a line when there are none])."""
    names = stage_names(experiments)
    if not names:
        return [], ["Time by stage: no times yet (logs/times.jsonl)."]
    several = len(experiments) > 1
    experiments = [experiment for experiment in experiments if any(row["seconds"] for row in experiment["iterations"])]
    entries = [("dot", experiment["colour"], experiment["name"]) for experiment in experiments if several]
    entries += [("block", STAGE_COLOURS.get(name, OTHER_STAGE), name.replace("_", " ")) for name in names]
    caption = "Minutes of each stage, one bar an iteration; the times of a stage that ran more than once add up."
    if len(experiments) > 1:
        caption += " The cap of a bar has its experiment's colour."
    return [figure_html("Time by stage", legend(entries), draw_times(experiments), caption)], []


def matrix_html(experiment):
    """The newest matrix of an experiment and what it says about the last checkpoint; nothing where there is none."""
    result = experiment["matrix"]
    if not result:
        return ""
    names, last = result["names"], result["worst_case"][-1]
    mixture = ", ".join(
        f"{name} {as_text(share, 2)}" for name, share in zip(names, result["nash_mixture"]) if share > 0.005
    )
    kind = "Mean win probability" if result["measure"] == "mean_win_prob" else "Win rate"
    caption = (
        f"{kind} of the row against the column in %, {result['num_prompts']} prompts in both orders. The worst of "
        f"{names[-1]} is {as_text(last['win'], 1, 100)} % against {names[last['against']]} (95 % interval of the worst "
        f"over all: {interval(last['interval'], 100)}). A Nash mixture of these players: {mixture}."
    )
    return figure_html(experiment["name"], "", draw_matrix(result), caption)


# ---------------------------------------------------------------------------------------------- tables


@dataclass
class Column:
    """A column of the table by iteration: heading, unit, the figure and its form; `best` marks the max or min."""

    title: str
    unit: str
    field: str
    decimals: int = 1
    scale: float = 1
    band: str = ""
    best: object = None


COLUMNS = [
    Column("win rate against start", "%", "win_rate_start", scale=100, band="win_rate_start_interval", best=max),
    Column(
        "mean probability against start",
        "%",
        "mean_win_prob_start",
        scale=100,
        band="mean_win_prob_start_interval",
        best=max,
    ),
    Column("win rate against previous", "%", "win_rate_previous", scale=100, band="win_rate_previous_interval"),
    Column(
        "mean probability against previous",
        "%",
        "mean_win_prob_previous",
        scale=100,
        band="mean_win_prob_previous_interval",
    ),
    Column("duality gap", "0: Nash", "duality_gap", 3, best=min),
    Column("other answers", "%", "other", scale=100),
    Column("KL from reference", "nats a response", "kl_reference", 3),
    Column("KL from start", "nats a response", "kl_start", 3),
    Column("KL moved", "nats a response", "kl_moved", 3),
    Column("evaluation length", "tokens", "response_tokens"),
    Column("sample length", "tokens", "sample_tokens"),
    Column("truncated", "%", "truncated", scale=100),
    Column("training loss", "normalised", "training_loss", 3),
    Column("validation loss", "normalised", "validation_loss", 3),
    Column("margin", "nats", "margin", 2),
    Column("accuracy", "%", "accuracy", scale=100),
    Column("order gap", "", "order_gap", 3),
    Column("label mass", "", "label_mass", 3),
    Column("no pair", "%", "dropped", scale=100),
    Column("skipped", "records", "skipped", 0),
    Column("training", "tokens/s", "tokens_per_s", 0),
    Column("time", "minutes", "minutes"),
    Column("checkpoint", "on disk", "weights"),
]


def cell(column, row, best):
    """A figure of an iteration as a cell; an empty one where the experiment has no such iteration."""
    if row is None:
        return "<td></td>"
    if column.field == "weights":
        return f"<td>{'kept' if row['weights'] else '–'}</td>"
    text = as_text(row[column.field], column.decimals, column.scale)
    if column.band and row[column.band]:
        text += f" <small>{interval(row[column.band], column.scale)}</small>"
    return f'<td class="best">{text}</td>' if best is not None and row[column.field] == best else f"<td>{text}</td>"


def iterations_table(experiments):
    """All main figures by iteration; each has one column an experiment."""
    columns = [
        column
        for column in COLUMNS
        if any(row[column.field] is not None for e in experiments for row in e["iterations"])
    ]
    rows = [{row["iteration"]: row for row in experiment["iterations"]} for experiment in experiments]
    bests = {
        (column.field, place): column.best(
            (row[column.field] for row in found.values() if row[column.field] is not None), default=None
        )
        for column in columns
        if column.best
        for place, found in enumerate(rows)
    }
    several = len(experiments) > 1
    heads = "".join(
        f'<th colspan="{len(experiments)}">{column.title}<small>{column.unit or "&nbsp;"}</small></th>'
        for column in columns
    )
    span = ' rowspan="2"' if several else ""
    head = f'<tr><th class="first"{span}>iteration</th>{heads}</tr>'
    if several:
        names = "".join(f'<th class="name">{swatch("dot", e["colour"])}{escape(e["name"])}</th>' for e in experiments)
        head += f"<tr>{names * len(columns)}</tr>"
    body = []
    for iteration in sorted(set().union(*rows)):
        found = [by_number.get(iteration) for by_number in rows]
        marks = "".join(
            f'<i class="moved" style="color:{e["colour"]}">▲</i>'
            for e, row in zip(experiments, found)
            if row and row["reference_moved"]
        )
        cells = "".join(
            cell(column, row, bests.get((column.field, place))) for column in columns for place, row in enumerate(found)
        )
        ends = ' class="ends"' if any(row and row["round_ends"] for row in found) else ""
        body.append(f'<tr{ends}><th class="first">{iteration}{marks}</th>{cells}</tr>')
    return table(head, body, f"figures of{len(experiments)}")


def settings_table(experiments):
    """run.json, one column an experiment; rows that differ are marked."""
    names = list(dict.fromkeys(name for experiment in experiments for name in experiment["settings"]))
    heads = "".join(f"<th>{swatch('dot', e['colour'])}{escape(e['name'])}</th>" for e in experiments)
    body = []
    for name in names:
        values = [experiment["settings"].get(name, "–") for experiment in experiments]
        marked = ' class="differs"' if len(set(values)) > 1 else ""
        shown = "".join(f"<td>{escape(shorter(value))}</td>" for value in values)
        body.append(f'<tr{marked}><th class="first">{escape(name)}</th>{shown}</tr>')
    return table(f'<tr><th class="first">setting</th>{heads}</tr>', body, "settings")


def shorter(value):
    """A hash by its first digits, everything else whole."""
    return value[:12] + "…" if re.fullmatch("[0-9a-f]{64}", value) else value


def table(head, body, kind):
    return (
        f'<div class="scroll" tabindex="0"><table class="{kind}"><thead>{head}</thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


# ---------------------------------------------------------------------------------------------- pages


def headline(experiment):
    """[(label, figure, note)] of the last evaluated iteration."""
    last = experiment["state"]["last_evaluated"]
    rows = {row["iteration"]: row for row in experiment["iterations"]}
    if last is None:
        return []
    row = rows[last]
    cards = [
        (
            f"win rate against {who}",
            as_text(row[f"win_rate_{name}"], scale=100) + " %",
            "95 %: " + interval(row[f"win_rate_{name}_interval"], 100),
        )
        for name, who in (("start", "start"), ("previous", "previous"))
        if row[f"win_rate_{name}"] is not None
    ]
    if row["duality_gap"] is not None:
        start = experiment["start"]["duality_gap"]
        cards.append(
            (
                "duality gap",
                as_text(row["duality_gap"], 3),
                "0 at a Nash policy" + (f"; start {as_text(start, 3)}" if start is not None else ""),
            )
        )
    # A checkpoint's KL is measured on what is sampled from it, one iteration later.
    after = rows.get(last + 1, {}).get("kl_start")
    kl, of = (after, "of this checkpoint") if after is not None else (row["kl_start"], "of the checkpoint before")
    if kl is not None:
        cards.append(("KL from start", as_text(kl, 2), f"nats a response, {of}"))
    if row["length_change"] is not None:
        sign = "+" if row["length_change"] > 0 else ""
        cards.append(
            (
                "mean length",
                f"{sign}{as_text(row['length_change'], scale=100)} %",
                f"{as_text(row['response_tokens'])} tokens; start {as_text(row['start_tokens'])}",
            )
        )
    return cards


def progress(experiment):
    """One sentence about how far the experiment is."""
    found = experiment["state"]
    of = f" of {found['total']}" if found["total"] is not None else ""
    plural = "" if found["finished"] == 1 and not of else "s"
    text = f"{found['finished']}{of} iteration{plural} finished"
    if experiment["iterations"] and not experiment["iterations"][-1]["finished"]:
        text += f", iteration {experiment['iterations'][-1]['iteration']} begun"
    return f"{text}; last file written at {found['last_written'][:16].replace('T', ' ')} UTC"


def experiment_html(experiment):
    """The top of the page: what was run, how far it is, the headline figures."""
    settings, last = experiment["settings"], experiment["state"]["last_evaluated"]
    facts = [
        (name, settings[key])
        for name, key in (("method", "METHOD"), ("model", "MODEL"), ("judge", "JUDGE"), ("fork of", "FROM"))
        if settings.get(key)
    ]
    facts = "".join(f"<span>{name} <b>{escape(value)}</b></span>" for name, value in facts)
    cards = "".join(
        f"<div><dt>{escape(label)}</dt><dd>{figure}<small>{escape(note)}</small></dd></div>"
        for label, figure, note in headline(experiment)
    )
    if cards:
        cards = f'<p class="last">Iteration {last}, the last one evaluated:</p><dl class="cards">{cards}</dl>'
    else:
        cards = '<p class="missing">No iteration has been evaluated yet.</p>'
    unread = "".join(
        f'<p class="missing">Not read to its end: {escape(message)}</p>' for message in experiment["unread"]
    )
    return (
        f'<header style="--accent:{experiment["colour"]}"><h1>{escape(experiment["name"])}</h1>'
        f'<p class="facts">{facts}</p><p class="state">{escape(progress(experiment))}</p>{cards}{unread}</header>'
    )


def page(title, body):
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{CSS}</style></head><body><main>{body}</main></body></html>\n"
    )


def index_html(experiments):
    """The report's page."""
    names = ", ".join(experiment["name"] for experiment in experiments)
    tops = "".join(map(experiment_html, experiments))
    note = '<p class="note"><a href="responses.html">Read responses side by side</a></p>'
    if not any(experiment["iterations"] for experiment in experiments):
        body = '<p class="missing">No iteration has begun.</p>'
    else:
        body = '<p class="note">In the plots faint vertical lines end a round'
        if any(row["reference_moved"] for experiment in experiments for row in experiment["iterations"]):
            body += "; ▲ on the axis: the reference moved there"
        body += ".</p>" + "".join(section_html(title, plots, experiments) for title, plots in SECTIONS.items())
        matrices = "".join(map(matrix_html, experiments))
        if matrices:
            body += f'<section><h2>All against all</h2><div class="grid">{matrices}</div></section>'
        body += (
            "<section><h2>By iteration</h2>"
            + iterations_table(experiments)
            + '<p class="note">In colour: the highest figures against the start and the lowest duality gap. '
            "Intervals: 95 %. KL from reference and start, sample length and truncation are those of the "
            "checkpoint before, which the iteration samples from. A line ends a round; ▲: behind this iteration "
            "the reference moved.</p></section>"
        )
    settings = "<section><h2>Settings</h2>" + settings_table(experiments)
    settings += '<p class="note">Marked rows differ.</p>' if len(experiments) > 1 else ""
    return page(f"COMAL: {names}", f"{tops}{note}{body}{settings}</section>")


def read_responses(path, files, experiment, num_prompts):
    """[{prompt, start, previous, current, win_prob_start, win_prob_previous}] of the last evaluated iteration."""
    last = experiment["state"]["last_evaluated"]
    found = {
        name: files.figures(
            comparison_rows, Path(path) / f"iter{last}" / "eval" / f"vs_{name}.jsonl", limit=num_prompts
        )
        for name in ("start", "previous")
    }
    rows = {}
    for name, comparisons in found.items():
        for prompt_id, row in comparisons.items():
            rows.setdefault(prompt_id, {"prompt": row["prompt"], "current": row["response"]}).update(
                {name: row["baseline"], f"win_prob_{name}": row["win_prob"]}
            )
    return list(rows.values())[:num_prompts]


def response_html(title, sample, note=""):
    """One answer with what is known about it."""
    if sample is None:
        return f'<div><h4>{escape(title)}</h4><p class="missing">no comparison</p></div>'
    facts = [f"{as_text(sample['tokens'], 0)} tokens"] if sample["tokens"] is not None else []
    facts += ["truncated"] * sample["truncated"]
    return (
        f"<div><h4>{escape(title)}</h4><p class='verdict'>{escape(note)}</p>"
        f'<p class="text">{escape(sample["text"])}</p><p class="facts">{", ".join(facts)}</p></div>'
    )


def responses_html(experiments, responses):
    """The page of responses: for each experiment and prompt three columns, which a phone puts below each other."""
    parts = ['<p class="note"><a href="index.html">Back to the report</a></p>']
    for experiment, rows in zip(experiments, responses):
        last = experiment["state"]["last_evaluated"]
        before = f"previous iteration ({last - 1})" if last else "previous iteration (the start policy)"
        parts.append(f'<header style="--accent:{experiment["colour"]}"><h1>{escape(experiment["name"])}</h1></header>')
        if not rows:
            parts.append('<p class="missing">No iteration has been evaluated yet.</p>')
        for place, row in enumerate(rows, 1):
            notes = {
                name: f"current beats this with {as_text(row.get(f'win_prob_{name}'), 0, 100)} %"
                for name in ("start", "previous")
            }
            parts.append(
                f'<article style="--accent:{experiment["colour"]}"><h3>{place}</h3>'
                f'<p class="text prompt">{escape(row["prompt"])}</p><div class="columns">'
                + response_html("start policy", row.get("start"), notes["start"])
                + response_html(before, row.get("previous"), notes["previous"])
                + response_html(f"iteration {last} (current)", row["current"])
                + "</div></article>"
            )
    return page("COMAL: responses", "".join(parts))


CSS = """
:root { --accent: #1f6f8b; --ink: #24282c; --soft: #5c6166; --line: #dedbd4; --paper: #fbfaf7 }
* { box-sizing: border-box }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, "Segoe UI", Roboto, sans-serif;
  overflow-wrap: anywhere }
main { max-width: 1280px; margin: 0 auto; padding: 28px 32px 64px }
header { border-left: 4px solid var(--accent); padding-left: 18px; margin: 0 0 26px }
h1 { font-size: 30px; line-height: 1.2; margin: 0 0 4px; font-weight: 650 }
h2 { font-size: 21px; margin: 44px 0 14px; padding-top: 14px; border-top: 1px solid var(--line); font-weight: 620 }
h3 { font-size: 16px; margin: 0; font-weight: 620 }
p { margin: 0 0 6px } a { color: #1f6f8b }
.facts span { display: inline-block; margin-right: 20px; color: var(--soft) }
.facts b { color: var(--ink); font-weight: 560 }
.state, .note, .missing, .last, figcaption { color: var(--soft); font-size: 14px }
.last { margin: 12px 0 6px }
.missing { font-style: italic } .grid + .missing, .cards + .missing { margin-top: 12px }
.cards { display: flex; flex-wrap: wrap; gap: 12px 36px; margin: 0 }
.cards dt { font-size: 13px; color: var(--soft) }
.cards dd { margin: 0; font-size: 27px; line-height: 1.25; font-weight: 600; color: var(--accent);
  font-variant-numeric: tabular-nums }
.cards small { display: block; font-size: 12.5px; font-weight: 400; color: var(--soft) }
.grid { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 30px 36px }
figure { margin: 0; min-width: 0 }
.plot svg { display: block; width: 100%; height: auto } .plot text { font-family: inherit !important }
.legend { display: flex; flex-wrap: wrap; gap: 0 16px; font-size: 13px; color: var(--soft); margin: 0 }
.legend span { display: inline-flex; align-items: center; gap: 6px }
figcaption { margin-top: 2px; max-width: 62ch }
i { display: inline-block; font-style: normal }
i.solid, i.dashed, i.dotted, i.thin { width: 20px; border-top: 2.5px solid; flex: none }
i.thin { border-top-width: 1.2px } i.dashed { border-top-style: dashed; border-top-width: 2px }
i.dotted { border-top-style: dotted; border-top-width: 2px }
i.dot, i.block, i.points { width: 10px; height: 10px; border-radius: 50%; background: currentColor; flex: none }
i.block { border-radius: 2px } i.points { width: 7px; height: 7px }
.scroll { overflow-x: auto; width: fit-content; max-width: 100%; border: 1px solid var(--line); background: white }
table { border-collapse: collapse; font-size: 13.5px; font-variant-numeric: tabular-nums }
th, td { padding: 4px 12px; text-align: right; white-space: nowrap; overflow-wrap: normal }
thead th { vertical-align: bottom; font-weight: 560; border-bottom: 1px solid var(--line) }
.figures thead th { white-space: normal; min-width: 84px; line-height: 1.25 }
.figures thead th.name { min-width: 0; white-space: nowrap; font-weight: 400; font-size: 12.5px }
th small { display: block; font-weight: 400; color: var(--soft) } td small { color: var(--soft); margin-left: 3px }
.name i, .settings th i { margin-right: 6px }
.first { position: sticky; left: 0; background: white; border-right: 1px solid var(--line); font-weight: 560 }
.figures .first { min-width: 60px; text-align: left }
.of2 td:nth-child(2n), .of3 td:nth-child(3n+2), .of4 td:nth-child(4n+2), .of2 .name:nth-child(2n+1),
.of3 .name:nth-child(3n+1), .of4 .name:nth-child(4n+1) { border-left: 1px solid var(--line) }
.moved { font-size: 10px; margin-left: 5px }
tbody tr:nth-child(even) td, tbody tr:nth-child(even) .first { background: #f7f5f1 }
tr.ends td, tr.ends th { border-bottom: 1px solid #cfcbc2 }
.best { color: #1f6f8b; font-weight: 650 }
.settings th, .settings td { text-align: left } .settings td { white-space: normal; min-width: 150px }
tbody tr.differs td, tbody tr.differs .first { background: #fbeecb }
.settings .first { font-weight: 400; color: var(--soft); white-space: normal; overflow-wrap: anywhere;
  min-width: 175px }
.scroll + .note { margin-top: 8px }
article { margin: 0 0 26px; padding-top: 14px; border-top: 1px solid var(--line) }
article h3 { color: var(--soft); font-weight: 500; font-size: 14px }
.text { white-space: pre-wrap } .prompt { font-weight: 600; max-width: 90ch; margin-bottom: 12px }
.columns { display: grid; grid-template-columns: repeat(3, minmax(0, 1fr)); gap: 20px 28px }
.columns > div { border-top: 2px solid var(--line); padding-top: 6px; font-size: 15px }
.columns > div:last-child { border-color: var(--accent) }
h4 { margin: 0; font-size: 13.5px; font-weight: 600 }
.verdict, .columns .facts { color: var(--soft); font-size: 13px } .verdict { min-height: 1.5em }
@media (max-width: 900px) {
  main { padding: 18px 16px 40px } .grid, .columns { grid-template-columns: minmax(0, 1fr) }
  .cards { gap: 12px 28px } .verdict { min-height: 0 }
}
"""


# ---------------------------------------------------------------------------------------------- the report


def name_apart(experiments):
    """Give each its colour, and those of one name their paths as names."""
    names = Counter(experiment["name"] for experiment in experiments)
    for place, experiment in enumerate(experiments):
        experiment["colour"] = COLOURS[place % len(COLOURS)]
        if names[experiment["name"]] > 1:
            experiment["name"] = experiment["path"]


def write_report(experiments, output=None, num_prompts=40):
    """Write index.html, responses.html and summary.json; returns the path of index.html.

    Args:
        experiments: folders of comal.sh; several are laid over each other
        output: folder; default: `report` in the experiment's, where there is one
        num_prompts: prompts in responses.html

    Raises StageError for a folder that is no experiment, and for several without an output folder.
    """
    paths = [Path(path) for path in experiments]
    if not paths:
        raise StageError("give at least one experiment: exps/NAME")
    if len({path.resolve() for path in paths}) < len(paths):
        raise StageError(f"an experiment is given twice: {', '.join(map(str, paths))}")
    if output is None and len(paths) > 1:
        raise StageError("a report on several experiments needs a folder of its own: --output DIR")
    check_at_least(1, num_prompts=num_prompts)
    output = paths[0] / "report" if output is None else Path(output)
    if output.is_file():
        raise StageError(f"--output {output} is a file; give a folder")
    files = Files(output / "cache.json")
    found = [read_experiment(path, files) for path in paths]
    name_apart(found)
    responses = [read_responses(path, files, experiment, num_prompts) for path, experiment in zip(paths, found)]
    summary = [{name: value for name, value in experiment.items() if name != "colour"} for experiment in found]
    write_text(
        output / "summary.json",
        json.dumps({"experiments": summary}, indent=1, ensure_ascii=False, allow_nan=False) + "\n",
    )
    write_text(output / "responses.html", responses_html(found, responses))
    write_text(output / "index.html", index_html(found))
    files.save()
    log.info("report on %s: %s", ", ".join(experiment["name"] for experiment in found), output / "index.html")
    return output / "index.html"


def main(experiments: list, output: str = "", num_prompts: int = 40):
    """A page with all figures and plots of a run, finished or not, and its responses side by side.

    Args:
        experiments: folder(s) of comal.sh, exps/A [exps/B ...]; several are laid over each other
        output: folder for index.html, responses.html and summary.json; default for one experiment: its report/
        num_prompts: prompts on the page of responses
    """
    write_report(list(map(Path, experiments)), Path(output) if output else None, num_prompts)


if __name__ == "__main__":
    run(main)
