"""Comparisons of two sets of responses to the same prompts: the judge's jobs, and the summary of what it found.

eval.py and scoring.py share this.

A comparison file (records.Comparison) has one line for each prompt.
Beside it stands a file of the same name that ends in .json, the summary: see `summarise`.
"""

import codecs
import json
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

import numpy as np

from analysis.bootstrap import interval, resampled_means
from analysis.figures import read_json
from analysis.length_control import length_controlled_win_rate, read_difficulty
from analysis.outside import align, read_outputs
from records import Comparison, Responses, read
from utils import StageError, fingerprint, log, write_text


def holds_outputs(path: Path) -> bool:
    """Whether a file is a JSON list, as model outputs are, and not JSONL, whose lines are objects."""
    with open(path, "rb") as file:
        return file.read(1000).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"[")


def join_responses(responses_path: Path, baseline_path: Path) -> Iterator[dict]:
    """Yield {prompt_id, prompt, samples: [response, baseline's]} for two files of responses to the same prompts.

    The baseline may also be a JSON list of model outputs (analysis/outside.py), also to more prompts than ours.
    Raises StageError when one of two files of responses answers a prompt that the other does not.
    """
    if holds_outputs(baseline_path):
        records = align(read(responses_path, Responses), read_outputs(baseline_path), baseline_path)
    else:
        records = read(baseline_path, Responses)
    baseline = {record["prompt_id"]: record for record in records}
    missing = []
    for record in read(responses_path, Responses):
        other = baseline.pop(record["prompt_id"], None)
        if other is None:
            missing.append(record["prompt_id"])
        elif record["prompt"] != other["prompt"]:
            raise StageError(
                f"{responses_path} and {baseline_path} have different prompts under prompt_id {record['prompt_id']}"
            )
        else:
            yield {
                "prompt_id": record["prompt_id"],
                "prompt": record["prompt"],
                "samples": [record["samples"][0], other["samples"][0]],
            }
    for path, ids in ((baseline_path, missing), (responses_path, list(baseline))):
        if ids:
            raise StageError(
                f"{path} has no response to {len(ids)} prompts of the other file, first " + ", ".join(ids[:10])
            )


def comparison_jobs(files: list) -> list:
    """Jobs of `judges.judge_files` that judge (responses, baseline, output) files.

    Raises StageError for an output that its own summary would replace.
    """
    for _, _, path in files:
        if path.suffix == ".json":
            raise StageError(f"{path}: the summary goes to a file of that name; end it in .jsonl")
    return [(partial(join_responses, ours, theirs), target) for ours, theirs, target in files]


def comparison_fingerprint(ours: Path, theirs: Path, path: Path, judged_by: list) -> str:
    """Tells a comparison file, the responses that it compares and what judged them from all others."""
    return fingerprint([fingerprint(path), fingerprint(join_responses(ours, theirs)), judged_by])


def judged_before(ours: Path, theirs: Path, path: Path, judged_by: list) -> bool:
    """Whether a comparison file exists and, as its summary says, was made of these responses by this judge."""
    made_as = read_json(path.with_suffix(".json")).get("fingerprint")
    return path.exists() and made_as == comparison_fingerprint(ours, theirs, path, judged_by)


def write_summaries(
    files: list,
    judged_by: list,
    seed: int = 0,
    names: list | None = None,
    length_controlled: bool = False,
    difficulty: str = "",
):
    """Write and log the summary of each of (responses, baseline, output) files, beside the output.

    The log has the `names` of (responses, baseline); without them those of the files. `judged_by` is what the
    judgements depend on besides the responses (JudgeConfig.judged_by), for `judged_before`.
    With a file of difficulties, with `length_controlled`, and where the baseline is model outputs, the summary has the
    length-controlled win rate (analysis/length_control.py), too.
    """
    names = names or [(ours, theirs) for ours, theirs, _ in files]
    for (ours, theirs, path), sides in zip(files, names):
        comparisons = list(read(path, Comparison))
        summary = {"responses": str(ours), "baseline": str(theirs)} | summarise(comparisons, seed)
        if length_controlled or difficulty or holds_outputs(theirs):
            summary |= length_control(comparisons, difficulty, seed)
        summary["fingerprint"] = comparison_fingerprint(ours, theirs, path, judged_by)
        write_text(path.with_suffix(".json"), json.dumps(summary, indent=2) + "\n")
        log.info(
            "%s against %s: win rate %.1f %% [%.1f, %.1f], mean probability %.3f, %d prompts, %d ties",
            *sides,
            *(100 * value for value in (summary["win_rate"], *summary["win_rate_interval"])),
            summary["mean_win_prob"],
            summary["num_prompts"],
            summary["num_ties"],
        )
        if summary.get("length_controlled_win_rate") is not None:
            log.info(
                "  length-controlled win rate %.1f %% [%.1f, %.1f], %s the difficulties of the instructions (%s)",
                100 * summary["length_controlled_win_rate"],
                *(100 * value for value in summary["length_controlled_interval"]),
                "with" if summary["length_controlled_with_difficulty"] else "without",
                summary["length_controlled_model"],
            )


def length_control(comparisons: list, difficulty: str, seed: int) -> dict:
    """The figures of `length_controlled_win_rate` for the records of a comparison file."""
    gamma, gamed = None, None
    if difficulty:
        gamma, gamed = read_difficulty(difficulty, [record["prompt_id"] for record in comparisons])
    probs = [record["win_probs"][0][1] for record in comparisons]
    lengths = [[len(record["samples"][side]["text"]) for record in comparisons] for side in (0, 1)]
    return length_controlled_win_rate(probs, *lengths, gamma, gamed, seed)


def wins(win_probs: np.ndarray) -> np.ndarray:
    """1 where a prompt is won, which is a probability above 1/2, and 1/2 for a tie, which is exactly 1/2; else 0."""
    return (win_probs > 0.5) + 0.5 * (win_probs == 0.5)


def judge_figures(records: Iterable[dict]) -> dict:
    """Means of `order_gap` and `label_mass` over judged records, None where all their responses are identical."""
    judged = [(record["order_gap"], record["label_mass"]) for record in records if record["label_mass"] is not None]
    gap, mass = (sum(values) / len(values) for values in zip(*judged)) if judged else (None, None)
    return {"order_gap": gap, "label_mass": mass}


def summarise(comparisons: list, seed: int = 0, num_bootstrap: int = 10_000) -> dict:
    """Figures of one comparison, with 95 % bootstrap intervals over prompts; `wins` says what a win is.

    Returns:
        num_prompts, num_ties, win_rate, win_rate_interval, mean_win_prob, mean_win_prob_interval, order_gap,
        label_mass, mean_tokens and mean_characters ([response, baseline's]).
    """
    probs = np.array([record["win_probs"][0][1] for record in comparisons])  # (N,)
    won = wins(probs)
    low, high = interval(resampled_means([won, probs], "bootstrap", seed, num_bootstrap, by_prompt=True)).tolist()
    sides = list(zip(*(record["samples"] for record in comparisons)))
    return {
        "num_prompts": len(probs),
        "num_ties": int((won == 0.5).sum()),
        "win_rate": float(won.mean()),
        "win_rate_interval": [low[0], high[0]],
        "mean_win_prob": float(probs.mean()),
        "mean_win_prob_interval": [low[1], high[1]],
        **judge_figures(comparisons),
        "mean_tokens": [
            sum(len(s["token_ids"]) for s in side) / len(side) if all("token_ids" in s for s in side) else None
            for side in sides
        ],  # responses of other systems may have no token ids
        "mean_characters": [sum(len(s["text"]) for s in side) / len(side) for side in sides],
    }
