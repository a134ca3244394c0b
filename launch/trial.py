"""A trial before a run of days, `bash comal.sh --try`: one iteration on the first prompts of each file, with the models
and settings of the run, in exps/NAME-try. Each is a command, with comal.sh's state in the environment:

    begin     empty the folder; write its prompts, and trial.json: how large the trial is, and the whole run
    report    print what each stage took, the first figures beside what is normal, what looks wrong, and what the whole
              run will take

All of it comes from the stages' own files: logs/times.jsonl, the lines of the logs that say how long a stage worked,
the records, ckpt/metrics.jsonl, and the figures of the report. The arithmetic is in forecast.py, what is normal in
checks.py. Like settings.py it needs nothing but Python 3.9.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from dataclasses import asdict
from pathlib import Path

import checks
from experiment import disk_lines, experiment, json_lines, kept_checkpoints, resume_size, state, training_files, write
from forecast import Size, Stage, each, forecast, logprobs_stage, references, training_stages, validations_ratio, worked
from settings import Refused, amount, current, run
from summary import duration, rows

PROMPTS = 64  # of each file: two updates of 32 pairs an epoch, and enough for a mean; a few minutes for an 8B judge


# ---------------------------------------------------------------------------------------------- before the trial


def sources() -> list[tuple[str, str]]:
    """(prompt file of the run, its name in the trial's folder), the train prompts first."""
    values = current()
    found = [(path, Path(path).name) for path in training_files()]
    return [*found, (f"{values['PROMPTS_DIR']}/test.jsonl", "test.jsonl"), (values["EVAL_PROMPTS"], "evaluation.jsonl")]


def size(first: int, iterations: int, counts: list[int]) -> Size:
    """Of the iterations from `first` on, with so many prompts in the files of `sources`."""
    values = current()
    splits, interval = int(values["SPLITS"]), int(state("UPDATE_INTERVAL"))
    models, away = references(first, iterations, state("policy"), state("reference"), values["MODEL"], interval, splits)
    players = 1 + sum((i + 1) % splits == 0 or i == iterations - 1 for i in range(first, iterations))
    *train, test, evaluation = counts
    return Size(
        iterations=iterations - first,
        train=sum(train) / len(train),
        test=test,
        evaluation=evaluation,
        models=models,
        from_start=away if values["KL_FROM_START"] == "true" else 0,
        cells=players * (players - 1) // 2,
    )


def begin() -> None:
    """Replace an earlier trial. Raises Refused where the folder holds something else."""
    folder, first = experiment(), int(state("first"))
    if next(folder.glob("iter*"), None) and not (folder / "trial.json").exists():
        raise Refused(f"{folder} holds an experiment, which a trial would replace; take another NAME")
    for path in folder.iterdir():
        if path.name not in (".lock", "logs"):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    counts = []
    (folder / "prompts").mkdir()
    for path, name in sources():
        with open(path, "rb") as file:
            lines = [line for line in file if line.strip()]
        (folder / "prompts" / name).write_bytes(b"".join(lines[:PROMPTS]))
        counts.append(len(lines))
    trial = size(first, first + 1, [min(count, PROMPTS) for count in counts])
    whole = size(first, int(state("whole")), counts)
    write(folder / "trial.json", {"trial": asdict(trial), "whole": asdict(whole)})


# ---------------------------------------------------------------------------------------------- what was measured


def read_all(folder: Path, pattern: str) -> list[dict]:
    """The records of these files, of which some may have a list of skipped ones beside them."""
    paths = [path for path in sorted(folder.glob(pattern)) if not path.name.endswith(".skipped.jsonl")]
    return [record for path in paths for record in json_lines(path)]


def pair_tokens(data: list[dict]) -> list[int]:
    names = ("prompt_token_ids", "chosen_token_ids", "rejected_token_ids")
    return [sum(len(record[name]) for name in names) for record in data]


def judgements(rows: list[dict]) -> int:
    """Ordered pairs of different texts: what a judge is asked."""
    counts = [len({sample["text"] for sample in row["samples"]}) for row in rows]
    return sum(count * (count - 1) for count in counts)


class Measured:
    """What the stages of the trial have written.

    Attributes:
        times: {stage: its record in times.jsonl}
        worked: {stage: seconds of its work after its start}
        speeds: {stage: what it did in a second of its work}
        stages: {stage: Stage}, the validations of training apart
        updates: the records of metrics.jsonl, and how many validations there were
        train, test: the pairs
    """

    def __init__(self, iteration: Path, trial: Size):
        self.times = {row["stage"]: row for row in json_lines(iteration / "logs/times.jsonl")}
        logs = {name: (iteration / f"logs/{name}.log").read_text("utf-8", "replace") for name in self.times}
        self.worked = {name: sum(seconds for _, seconds in worked(log)) for name, log in logs.items()}
        self.train, self.test = (json_lines(iteration / f"data/{name}.jsonl") for name in ("train", "test"))
        metrics = json_lines(iteration / "ckpt/metrics.jsonl")
        self.updates = [step for step in metrics if "loss" in step]
        self.validations = len(metrics) - len(self.updates)
        samples = read_all(iteration, "*.samples.jsonl")
        # How much was done by the stages that share an engine.
        answers = int(trial.evaluation)
        responses = int(current()["NUM_SAMPLES"]) * len(samples) + answers
        sampled = {"sampling": responses, "start_responses": answers, "responses": answers}
        judged = {
            "scoring": judgements(read_all(iteration, "*.scores.jsonl")),
            "evaluation": judgements(read_all(iteration, "eval/vs_*.jsonl")),
            "matrix": judgements(read_all(iteration.parent, "matrix/cells/*.jsonl")),
        }
        self.stages = {name: Stage(row["seconds"]) for name, row in self.times.items()}
        for done in (sampled, judged):
            done = {name: count for name, count in done.items() if name in self.times}
            one = each([(count, self.worked[name]) for name, count in done.items()])
            self.stages |= {name: Stage(self.times[name]["seconds"], count * one) for name, count in done.items()}
        self.stages["logprobs"] = logprobs_stage(self.times["logprobs"]["seconds"], logs["logprobs"])
        lengths, batch = [pair_tokens(data) for data in (self.train, self.test)], int(current()["GLOBAL_BATCH_SIZE"])
        self.stages |= training_stages(self.times["training"]["seconds"], metrics, *lengths, batch)
        self.worked["training"] = sum(self.stages[name].work for name in ("training", "validation"))
        tokens = {
            "sampling": sum(len(sample["token_ids"]) for row in samples for sample in row["samples"]),
            "logprobs": trial.models * sum(map(sum, lengths)),
            "start_logprobs": sum(lengths[1]),
        }
        self.speeds = {}
        for unit, done in (("responses", sampled), ("judgements", judged), ("tokens", tokens)):
            for name in done:
                if self.worked.get(name):
                    self.speeds[name] = f"{done[name] / self.worked[name]:,.0f} {unit}/s"
        speeds = [step["tokens_per_s"] for step in self.updates[1:] or self.updates]
        self.speeds["training"] = f"{sum(speeds) / len(speeds):,.0f} tokens/s"

    def peak(self, field: str) -> tuple[int, str]:
        """(MiB, the stage that took it); (0, "") where it was not measured."""
        return max(((row[field], name) for name, row in self.times.items() if field in row), default=(0, ""))


def record_bytes(iteration: Path, trial: Size, whole: Size) -> float:
    """Of all records of the whole run, by those of the trial's iteration."""
    grows = {"train": whole.train / trial.train, "test": whole.test / trial.test}
    growth = lambda path: grows.get(path.name.partition(".")[0], whole.evaluation / trial.evaluation)
    files = [path for folder in ("", "data", "eval") for path in (iteration / folder).glob("*.jsonl")]
    return whole.iterations * sum(path.stat().st_size * growth(path) for path in files)


# ---------------------------------------------------------------------------------------------- what is printed


def table(cells: list[tuple[str, ...]]) -> list[str]:
    """Lines with columns of equal width, the first and the last one to the left."""
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = []
    for first, *middle, last in cells:
        inner = [cell.rjust(width) for cell, width in zip(middle, widths[1:-1])]
        lines.append("    " + "  ".join([first.ljust(widths[0]), *inner, last]).rstrip())
    return lines


def mib(count: float) -> str:
    return amount(count * 2**20) if count else "-"


def stage_table(found: Measured) -> list[str]:
    cells = [("stage", "seconds", "its start", "GPU memory", "host memory", "speed after the start")]
    for name, row in found.times.items():
        start = max(0.0, row["seconds"] - found.worked[name])
        peaks = mib(row.get("gpu_mib", 0)), mib(row.get("host_mib", 0))
        cells.append((name, f"{row['seconds']:.1f}", f"{start:.1f}", *peaks, found.speeds.get(name, "-")))
    return table(cells)


def first_figures(found: Measured, trial: Size) -> list[checks.Check]:
    values, first, figures = current(), found.updates[0], rows().get(int(state("i")), {})
    trainer, soft, limit = state("TRAINER"), values["SOFT_LABELS"] == "true", int(values["MAX_NEW_TOKENS"])
    etas = [1.0 if eta == "-" else float(eta) for eta in values["ETA"].split(",")]
    eta = etas[min(int(state("i")) // int(values["SPLITS"]), len(etas) - 1)]
    share = None if figures.get("dropped") is None else 1 - figures["dropped"]
    return [
        checks.first_loss(first["loss"], trainer, eta, soft, same=trial.models == 1),
        checks.normalised_loss(first["normalised_loss"], trainer, eta),
        checks.margin(first.get("margin")),
        checks.label_mass(figures.get("label_mass")),
        checks.position_bias(figures.get("order_gap")),
        checks.clearness([record["win_prob"] for record in found.train]),
        checks.response_tokens(figures.get("sample_tokens"), limit),
        checks.truncated(figures.get("truncated"), limit),
        checks.kept(share, values["PAIR_RULE"]),
        checks.skipped(figures.get("skipped"), trial.train + trial.test + trial.evaluation),
    ]


def whole_run(found: Measured, iteration: Path, trial: Size, whole: Size) -> tuple[list[str], float]:
    """(lines on time, memory and disk of the whole run, bytes on the disk at most)."""
    values, pairs = current(), (len(found.train), len(found.test))
    batch, epochs, every = (int(values[name]) for name in ("GLOBAL_BATCH_SIZE", "NUM_EPOCHS", "EVAL_STEPS"))
    ratio = validations_ratio(epochs, pairs[0] * whole.train / trial.train, batch, every, found.validations)
    seconds = forecast(found.stages, trial, whole, int(values["NUM_SAMPLES"]), pairs, ratio)
    seconds["together"] = tuple(map(sum, zip(*seconds.values())))
    cells = [("stage", "starts", "work", "together")]
    cells += [(name, *map(duration, both), duration(sum(both))) for name, both in seconds.items()]
    peaks = [
        f"{mib(count)} {where} (in {name})"
        for (count, name), where in ((found.peak("gpu_mib"), "on a GPU"), (found.peak("host_mib"), "of the host"))
        if count
    ]
    checkpoint = sum(path.stat().st_size for path in (iteration / "ckpt/model").iterdir())
    written = record_bytes(iteration, trial, whole)
    left = range(int(state("first")), int(state("first")) + whole.iterations)
    needed = (kept_checkpoints(left) + 1) * checkpoint + resume_size(checkpoint) + written
    return [
        *table(cells),
        f"    memory: {', '.join(peaks)}; the longest pair had {max(pair_tokens(found.train)):,} tokens",
        *(f"    {line}" for line in disk_lines(left, checkpoint, f"about {amount(written)}")),
    ], needed


def report() -> None:
    folder, iteration = experiment(), Path(state("iter"))
    sizes = json.loads((folder / "trial.json").read_text(encoding="utf-8"))
    trial, whole = Size(**sizes["trial"]), Size(**sizes["whole"])
    found = Measured(iteration, trial)
    figures = first_figures(found, trial)
    lines, needed = whole_run(found, iteration, trial, whole)
    training, host = found.times["training"], os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    wrong = [check.wrong for check in figures] + [
        checks.training_memory(training.get("gpu_mib"), training.get("gpu_total_mib")),
        checks.host_memory(found.peak("host_mib")[0] * 2**20, host),
        checks.disk(needed, shutil.disk_usage(folder).free),
    ]
    counts = f"{whole.train:,.0f} train, {whole.test:,.0f} test and {whole.evaluation:,.0f} evaluation prompts"
    parts = {
        "what each stage took": stage_table(found),
        "the first figures, and what is normal": table([(c.name, c.found, c.normal) for c in figures]),
        "what looks wrong": [f"    {sentence}" for sentence in wrong if sentence] or ["    nothing"],
        f"the whole run, as far as this tells: {whole.iterations} x {counts}": lines,
    }
    for title, part in parts.items():
        print(f"\n=== {title}", *part, sep="\n")


if __name__ == "__main__":
    run({"begin": begin, "report": report}[sys.argv[1]])
