"""What a whole run will take, from one small iteration of it: the arithmetic of trial.py.

A stage takes a start, which does not grow, and work, which does: sampling with the number of responses, judging with
that of judgements, log-probabilities and training with that of pairs. The logs and metrics.jsonl say how long the
stages worked; what only their first work took, the warm-up of libraries, counts as a part of the start. Resume points,
the report and comal.sh's own seconds between two stages are not in it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

WORK = re.compile(r"\b(\d+) (?:records|pairs) in (\d+\.\d+) s\b")  # of workers/scheduler.py and get_logprobs.py
LOADING = re.compile(r"\bloaded in (\d+\.\d+) s\b")


@dataclass
class Size:
    """How much a run has to do."""

    iterations: int
    train: float  # prompts of an iteration
    test: float
    evaluation: float
    models: int  # that log-probabilities load, in all iterations
    from_start: int  # rounds at whose end the KL from the initial policy is measured
    cells: int  # of the matrix


@dataclass
class Stage:
    """What a stage of the trial took, in seconds: its start, the loading of models in it, and the work that grows."""

    seconds: float
    work: float = 0.0
    loading: float = 0.0

    @property
    def start(self) -> float:
        return max(0.0, self.seconds - self.work - self.loading)


def worked(log: str) -> list[tuple[int, float]]:
    """(records, seconds) of each time that the stage of this log has worked, after its start."""
    return [(int(count), float(seconds)) for count, seconds in WORK.findall(log)]


def each(points: list[tuple[float, float]]) -> float:
    """Seconds that one more response or judgement takes, from (how many, seconds of work) of the stages of an engine.

    Neither is time proportional to number: the first ones wait for the engine's warm-up, and few of them do not fill
    it. So this is the slope of the straight line through the points (least squares); not below 0, nor above what the
    largest stage took for each.
    """
    mean_x, mean_y = (sum(column) / len(points) for column in zip(*points))
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in points) / spread if spread else float("inf")
    count, seconds = max(points)
    return max(0.0, min(slope, seconds / count))


def logprobs_stage(seconds: float, log: str) -> Stage:
    """Log-probabilities: a pair takes what it took in the last of the data sets, as the first one warms up."""
    parts = worked(log)
    count, last = parts[-1]
    work = sum(count for count, _ in parts) * last / count
    return Stage(seconds, work, sum(map(float, LOADING.findall(log))))


def training_stages(
    seconds: float, metrics: list[dict], train: list[int], test: list[int], batch: int
) -> dict[str, Stage]:
    """Training, and its validations as a stage of their own without a start.

    The first update counts as much as the others take for as many pairs: what it took longer is the warm-up of
    libraries, and counts as a part of the start.

    Args:
        seconds: of the stage
        metrics: the records of metrics.jsonl
        train, test: tokens of each pair
        batch: pairs of an update
    """
    updates = [step["tokens_per_s"] for step in metrics if "loss" in step]
    speeds = [step["validation_tokens_per_s"] for step in metrics if "validation_loss" in step]
    per_epoch = -(-len(train) // batch)
    pairs = [min(batch, len(train) - i % per_epoch * batch) for i in range(len(updates))]
    mean = sum(train) / len(train)
    measured = list(zip(pairs, updates))[1:] or list(zip(pairs, updates))
    each = sum(count * mean / speed for count, speed in measured) / sum(count for count, _ in measured)
    validating = sum(sum(test) / speed for speed in speeds)
    return {
        "training": Stage(seconds - validating, each * sum(pairs)),
        "validation": Stage(validating, validating),
    }


def references(
    first: int, iterations: int, policy: str, reference: str, initial: str, interval: int, splits: int
) -> tuple[int, int]:
    """(models that log-probabilities load in all iterations, rounds that end with another reference than the initial
    policy): the loop's two pointers, moved as comal.sh moves them."""
    models = away = 0
    for i in range(first, iterations):
        models += 1 if policy == reference else 2
        policy = f"the policy of iteration {i}"
        away += (i + 1) % splits == 0 and reference != initial
        if interval and (i + 1) % interval == 0:
            reference = policy
    return models, away


def forecast(
    stages: dict[str, Stage], trial: Size, whole: Size, samples: int, pairs: tuple[int, int], validations: float
) -> dict[str, tuple[float, float]]:
    """{stage: (seconds of its starts, seconds of its work)} of the whole run.

    Args:
        samples: responses to a prompt
        pairs: that the trial has made of its train and test prompts; the whole run makes them of as large a share
        validations: of an iteration of the whole run, for one of the trial
    """
    n, answers = whole.iterations, whole.evaluation / trial.evaluation
    responses = lambda size: samples * (size.train + size.test) + size.evaluation
    train, test = pairs[0] * whole.train / trial.train, pairs[1] * whole.test / trial.test  # pairs of an iteration
    models = whole.models / trial.models
    # How often the stage starts, how much more it loads, and how much more it works.
    plan = {
        "start_responses": (1, 0, answers),
        "sampling": (n, 0, n * responses(whole) / responses(trial)),
        "scoring": (n, 0, n * (whole.train + whole.test) / (trial.train + trial.test)),
        "pairs": (n, 0, 0),
        "logprobs": (n, models, models * (train + test) / sum(pairs)),
        "training": (n, 0, n * whole.train / trial.train),
        "validation": (0, 0, n * validations * whole.test / trial.test),
        "responses": (1, 0, answers),
        "evaluation": (1, 0, n * answers),  # of all policies: in the trial at the end, in the run beside the scoring
        "matrix": (1, 0, whole.cells * answers),
    }
    seconds = {
        name: (starts * stages[name].start + loads * stages[name].loading, works * stages[name].work)
        for name, (starts, loads, works) in plan.items()
        if name in stages
    }
    if whole.from_start:  # log-probabilities of the test pairs under one more model
        one, rounds = stages["logprobs"], whole.from_start
        work = one.work * test / sum(pairs) / trial.models
        seconds["start_logprobs"] = rounds * (one.start + one.loading / trial.models), rounds * work
    return seconds


def validations_ratio(epochs: int, pairs: float, batch: int, every: int, in_trial: int) -> float:
    """Validations of an iteration of the whole run, at each epoch's end and every so many updates, for one of the
    trial."""
    updates = epochs * -(-pairs // batch)
    return (epochs + updates // every) / in_trial if in_trial else 0.0
