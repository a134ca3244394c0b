"""Files through a judge, or through the members of a panel, one after the other."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from judges.base import JudgeConfig
from records import Record, SkippedPrompt, read, writer
from utils import fingerprint, log
from workers.journal import Skipped, list_skipped, listing_of
from workers.pool import map_files

Job = tuple[Callable[[], Iterator[dict]], Path]  # records with `prompt` and `samples`, output path


def judge_files(jobs: list[Job], config: JudgeConfig, description: str) -> None:
    """Judge files of records with `prompt` and `samples`; a panel's judges after each other, each with one start.

    Args:
        jobs: [(function that returns an iterator of records, output path)]
        config: JudgeConfig
        description: of the progress bar

    Raises StageError as `map_files` does.
    """
    members = config.members()
    if len(members) == 1:
        made_by = config.fingerprint()
        map_files([(*job, made_by) for job in jobs], partial(config.kind, config), config, description)
        config.kind.report([path for _, path in jobs])
        return
    digests = [fingerprint(records()) for records, _ in jobs]
    settings = [member.fingerprint() for member in members]
    parts = [
        [Path(f"{path}.{fingerprint([digest, own])}.partial") for own in settings]
        for (_, path), digest in zip(jobs, digests)
    ]
    for number, member in enumerate(members):
        left = [(records, own[number]) for (records, _), own in zip(jobs, parts) if not own[number].exists()]
        if left:
            log.info("judge %d of %d: %s", number + 1, len(members), member.judge)
            judge_files(left, member, description)
    for (records, path), own in zip(jobs, parts):
        combine(records(), path, own, members, config.weights())
    for own in parts:  # only when all outputs are in place
        for part in own:
            part.unlink()
            listing_of(part).unlink(missing_ok=True)


def combine(
    records: Iterator[dict], path: Path, parts: list[Path], members: list[JudgeConfig], weights: list[float]
) -> None:
    """Write a panel's output from those of its members; a record that one of them skipped is skipped."""
    found, count = [read(part, Record) for part in parts], 0
    heads = [next(part, None) for part in found]
    reasons = [
        {record["prompt_id"]: record["skipped"] for record in read(listing, SkippedPrompt)} if listing.exists() else {}
        for listing in map(listing_of, parts)
    ]
    skipped = []
    with writer(path, Record) as write:
        for record in records:
            judged = [head is not None and head["prompt_id"] == record["prompt_id"] for head in heads]
            own = [head for head, is_own in zip(heads, judged) if head and is_own]
            heads = [next(part, None) if is_own else head for part, head, is_own in zip(found, heads, judged)]
            if all(judged):
                write(record | panel(record, own, members, weights))
                count += 1
            else:
                member = judged.index(False)
                reason = reasons[member].get(record["prompt_id"], "not judged")
                skipped.append(Skipped(record["prompt_id"], f"{members[member].judge}: {reason}"))
    if not count:
        path.unlink()
    list_skipped(path, skipped, count + len(skipped))


def panel(record: dict, judged: list[dict], members: list[JudgeConfig], weights: list[float]) -> dict:
    """The fields of a panel: weighted means of its members' records `judged`, and `panel`, what each of them found."""
    values = lambda name: [one[name] for one in judged]
    at = lambda i, j: [row[i][j] for row in values("win_probs")]
    count = len(record["samples"])
    return {
        "win_probs": [[mean(at(i, j), weights, centre=0.5) for j in range(count)] for i in range(count)],
        "order_gap": mean(values("order_gap"), weights),
        "label_mass": mean(values("label_mass"), weights),
        "panel": [
            {"judge": member.judge, "weight": weight}
            | {name: value for name, value in one.items() if name not in record}
            for member, weight, one in zip(members, weights, judged)
        ],
    }


def mean(values: list[float | None], weights: list[float], centre: float = 0.0) -> float | None:
    """The weighted mean of numbers from 0 to 1, None where one of them is. Exact where all of them are the `centre`."""
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return None
    return min(1.0, max(0.0, centre + sum(weight * (value - centre) for weight, value in zip(weights, known))))
