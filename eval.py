"""Evaluate policies: responses to an evaluation set, and win rates between two sets of responses.

    python eval.py generate --model CKPT --output eval/responses.jsonl [--input prompts.jsonl]
    python eval.py compare --judge JUDGE --responses eval/responses.jsonl --baseline start/responses.jsonl \\
        --output eval/vs_start.jsonl
    python eval.py matrix --judge JUDGE --responses start.jsonl,a.jsonl,b.jsonl --output matrix.json

`generate` writes a samples file (see sampling.py) with one response a prompt; without --input the prompts are
AlpacaEval's 805 instructions.
`compare` writes one line a prompt,
    prompt_id, prompt
    samples        list of two {text, ...}: the response, the baseline's response
    win_probs      2 x 2 as in scoring.py; [0][1] = P(response beats baseline's)
    order_gap, label_mass
and beside it `<output>` with the ending .json, the summary: see `summarise`.
`matrix` compares all with all, several checkpoints or systems, and writes the game between them: see `play`.
"""

import itertools
import json
import os
import re
from functools import partial
from pathlib import Path

import numpy as np

from analysis import nash
from judges.base import JudgeConfig, judge_figures
from judges.panel import judge_files
from utils import (
    StageError,
    check_at_least,
    check_output_file,
    derive_seed,
    file_lists,
    fingerprint,
    first_line,
    jsonl_writer,
    log,
    read_jsonl,
    read_prompts,
    run,
    split_list,
    write_text,
)
from vllm_model import Sampler, SamplerConfig
from workers.pool import map_files

RESPONSE_FIELDS = {"prompt_id": str, "prompt": str, "samples": list}


# ---------------------------------------------------------------------------------------------- generate


def alpaca_eval(output: str):
    """Write AlpacaEval's 805 instructions as a prompt file.

    Args:
        output: prompt file
    """
    from huggingface_hub import hf_hub_download

    try:  # the Hub's plain JSON, no data set script
        source = hf_hub_download("tatsu-lab/alpaca_eval", "alpaca_eval.json", repo_type="dataset")
    except Exception as error:  # the Hub client raises a dozen kinds; all mean that there is no file
        raise StageError(
            f"AlpacaEval's instructions could not be fetched from the Hub ({first_line(error)}); "
            "give a prompt file with --input"
        ) from None
    with open(source, encoding="utf-8") as file:
        rows = json.load(file)
    with jsonl_writer(output) as write:
        for number, row in enumerate(rows):
            write({"prompt_id": f"alpaca_eval-{number}", "prompt": row["instruction"], "dataset": row["dataset"]})


def generate(output: str, input: str = "", temperature: float = 0.7, **sampler: SamplerConfig):
    """One response to every prompt of an evaluation set.

    Args:
        output: responses file
        input: prompt file; default: AlpacaEval's instructions, kept beside the output
        temperature: sampling temperature
    """
    check_at_least(0, temperature=temperature)
    check_output_file("output", output)
    if not input:
        input = str(Path(output).with_name("alpaca_eval.jsonl"))
        if not Path(input).exists():
            alpaca_eval(input)
    (source,), (target,) = file_lists(input=input, output=output)
    config = SamplerConfig(**sampler)
    make_work = partial(Sampler, config, num_samples=[1], temperature=[temperature])
    settings = config.fingerprint() | {"num_samples": 1, "temperature": temperature}
    map_files([(partial(read_prompts, source), target, settings)], make_work, config, "responses")


# ---------------------------------------------------------------------------------------------- compare


def read_responses(path):
    """Yield the records of a responses file, ours or another's; raises StageError for one without a response."""
    for record in read_jsonl(path, RESPONSE_FIELDS):
        sample = record["samples"][0] if record["samples"] else None
        if not (isinstance(sample, dict) and isinstance(sample.get("text"), str)):
            raise StageError(
                f"{path}: prompt_id {record['prompt_id']} has no response: samples[0] should be {{text, ...}}"
            )
        yield record


def join_responses(responses_path, baseline_path):
    """Yield {prompt_id, prompt, samples: [response, baseline's]} for two files of responses to the same prompts.

    Raises StageError when one of them answers a prompt that the other does not.
    """
    baseline = {record["prompt_id"]: record for record in read_responses(baseline_path)}
    missing = []
    for record in read_responses(responses_path):
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


def compare(responses: str, baseline: str, output: str, seed: int = 0, **judge: JudgeConfig):
    """Win rates of responses over baselines, judged in both orders, several comparisons with one start of the judge.

    Args:
        responses: responses file(s), comma-separated
        baseline: responses file(s) to beat, as many
        output: comparison file(s), as many; the summary goes beside each, ending in .json
        seed: of the bootstrap
    """
    ours, theirs, outputs = file_lists(responses=responses, baseline=baseline, output=output)
    judge_responses(list(zip(ours, theirs, outputs)), JudgeConfig(**judge), seed)


def judge_responses(files, config, seed):
    """Judge (responses, baseline, output) files with one start of the judge; write the outputs and their summaries."""
    judge_files(comparison_jobs(files), config, "comparing")
    write_summaries(files, seed)


def comparison_jobs(files):
    """Jobs of `judges.panel.judge_files` that judge (responses, baseline, output) files."""
    for _, _, path in files:
        if path.suffix == ".json":
            raise StageError(f"{path}: the summary goes to a file of that name; end it in .jsonl")
    return [(partial(join_responses, ours, theirs), target) for ours, theirs, target in files]


def write_summaries(files, seed=0):
    """Beside each output of (responses, baseline, output) files its summary, ending in .json."""
    for ours, theirs, path in files:
        summary = {"responses": str(ours), "baseline": str(theirs)} | summarise(list(read_jsonl(path)), seed)
        write_text(path.with_suffix(".json"), json.dumps(summary, indent=2) + "\n")
        low, high = summary["win_rate_interval"]
        log.info(
            "%s against %s: win rate %.1f %% [%.1f, %.1f], mean probability %.3f, %d prompts, %d ties",
            ours,
            theirs,
            100 * summary["win_rate"],
            100 * low,
            100 * high,
            summary["mean_win_prob"],
            summary["num_prompts"],
            summary["num_ties"],
        )


def summarise(comparisons, seed=0, num_bootstrap=10_000):
    """Figures of one comparison.

    A prompt is won when P(response beats baseline's), the mean of both orders, is above 1/2; a tie counts half.
    Intervals are 95 % percentile bootstrap intervals over prompts.

    Returns:
        num_prompts, num_ties, win_rate, win_rate_interval, mean_win_prob, mean_win_prob_interval, order_gap,
        label_mass, mean_tokens and mean_characters ([response, baseline's]).
    """
    probs = np.array([record["win_probs"][0][1] for record in comparisons])  # (N,)
    wins = (probs > 0.5) + 0.5 * (probs == 0.5)
    generator = np.random.default_rng(derive_seed("bootstrap", seed))
    draws = (generator.integers(len(probs), size=len(probs)) for _ in range(num_bootstrap))
    means = np.array([(wins[draw].mean(), probs[draw].mean()) for draw in draws])  # (num_bootstrap, 2)
    win_interval, prob_interval = np.percentile(means, [2.5, 97.5], axis=0).T.tolist()
    samples = list(zip(*(record["samples"] for record in comparisons)))
    return {
        "num_prompts": len(probs),
        "num_ties": int((probs == 0.5).sum()),
        "win_rate": float(wins.mean()),
        "win_rate_interval": win_interval,
        "mean_win_prob": float(probs.mean()),
        "mean_win_prob_interval": prob_interval,
        **judge_figures(comparisons),
        "mean_tokens": [
            sum(len(s["token_ids"]) for s in side) / len(side) if all("token_ids" in s for s in side) else None
            for side in samples
        ],  # responses from elsewhere may have none
        "mean_characters": [sum(len(s["text"]) for s in side) / len(side) for side in samples],
    }


# ---------------------------------------------------------------------------------------------- matrix

MEASURES = ("mean_win_prob", "win_rate")


def matrix(
    responses: str, output: str, names: str = "", measure: str = "mean_win_prob", seed: int = 0, **judge: JudgeConfig
):
    """All against all: every two sets of responses judged in both orders, and the game between them.

    Does the last one win at least half against every other? What has been judged before, between the same responses by
    the same judge, is not judged again.

    Args:
        responses: responses files to the same prompts, comma-separated, the last checkpoint last
        output: result, ending in .json; the heat map goes beside it (.svg), the judgements to cells/
        names: one a file, comma-separated; default: from the paths
        measure: mean_win_prob, the game's payoff, or win_rate, the share of prompts with a probability above 1/2, ties
            half
        seed: of the bootstrap
    """
    paths, target = file_lists(responses=responses)[0], Path(output)
    labels = split_list(names) or short_names(paths)
    if len(paths) < 2 or len(set(paths)) < len(paths):
        raise StageError(f"--responses should be two different files or more, comma-separated, got {responses}")
    if len(labels) != len(paths) or len(set(labels)) < len(labels):
        raise StageError(f"--names should be {len(paths)} different names, one a file, got {', '.join(labels)}")
    if measure not in MEASURES:
        raise StageError(f"--measure should be one of {', '.join(MEASURES)}, got {measure}")
    if target.suffix != ".json":
        raise StageError(f"--output should end in .json, got {output}")
    config = JudgeConfig(**judge)
    settings = [member.fingerprint() for member in config.members()] + config.weights()
    prints = [fingerprint(path) for path in paths]
    cells = {}  # (i, j), i before j: the file of i's responses against j's
    for i, j in itertools.combinations(range(len(paths)), 2):
        name = fingerprint([prints[i], prints[j], settings])
        cells[i, j] = target.parent / "cells" / f"{name}.jsonl"
    missing = {path: pair for pair, path in cells.items() if not path.with_suffix(".json").exists()}
    log.info("%d comparisons, %d of them judged before", len(cells), len(cells) - len(missing))
    if missing:
        judge_responses([(paths[i], paths[j], path) for path, (i, j) in missing.items()], config, seed)
    result = {
        "names": labels,
        "responses": list(map(str, paths)),
        "judge": config.judge,
        "measure": measure,
        **play(*win_probs_by_prompt(cells, len(paths)), measure, seed),
    }
    from analysis.plots import draw_matrix

    write_text(target.with_suffix(".svg"), draw_matrix(result, whole_file=True))
    write_text(target, json.dumps(result, indent=2) + "\n")
    print_matrix(result)


def short_names(paths):
    """What tells response files apart: exps/A/iter3/eval/responses.jsonl and exps/A/start/responses.jsonl -> iter3,
    start."""
    stems = [re.sub("(/eval)?/responses$", "", str(path.with_suffix(""))).split("/") for path in paths]
    common = len(os.path.commonprefix([stem[:-1] for stem in stems]))
    return ["/".join(stem[common:]) for stem in stems]


def win_probs_by_prompt(cells, count):
    """P(i beats j) prompt by prompt, (K, K, N) with 1/2 on the diagonal, over the N prompts that every cell has, and
    N's total number."""
    found = {
        pair: {record["prompt_id"]: record["win_probs"][0][1] for record in read_jsonl(path)}
        for pair, path in cells.items()
    }
    everywhere = [
        prompt_id for prompt_id in next(iter(found.values())) if all(prompt_id in probs for probs in found.values())
    ]
    if not everywhere:
        raise StageError("no prompt was judged in every comparison")
    total = len(set().union(*found.values()))
    probs = np.full((count, count, len(everywhere)), 0.5)
    for (i, j), own in found.items():
        probs[i, j] = [own[prompt_id] for prompt_id in everywhere]
        probs[j, i] = 1 - probs[i, j]
    return probs, total


def play(probs, total, measure="mean_win_prob", seed=0, num_bootstrap=2_000):
    """The empirical game of K players from their win probabilities a prompt.

    Intervals are 95 % percentile bootstrap intervals; the prompts are drawn for all pairs together.

    Args:
        probs: (K, K, N), P(i beats j) on each prompt
        total: prompts, those included that some comparison lacks

    Returns:
        num_prompts, num_left_out; win and win_interval (K x K, null on the diagonal); nash_mixture (K);
        worst_case (K): {against, win, interval}; last_duality_gap: 2 (max_j P(j beats the last) - 1/2) over the earlier
        ones, with last_duality_gap_interval: 0 or less where the last wins at least half against every other.
    """
    values = probs if measure == "mean_win_prob" else (probs > 0.5) + 0.5 * (probs == 0.5)  # (K, K, N)
    count, num_prompts = len(values), values.shape[2]
    win = values.mean(axis=2)  # (K, K)
    generator = np.random.default_rng(derive_seed("matrix", seed))
    draws = generator.multinomial(num_prompts, np.full(num_prompts, 1 / num_prompts), size=num_bootstrap) / num_prompts
    drawn = values @ draws.T  # (K, K, num_bootstrap)
    interval = lambda values: np.percentile(values, [2.5, 97.5], axis=-1)  # noqa: E731
    low, high = interval(drawn)
    others = np.where(np.eye(count, dtype=bool)[:, :, None], np.inf, drawn)
    worst_low, worst_high = interval(others.min(axis=1))  # (K,)
    off_diagonal = lambda entry: [[None if i == j else entry(i, j) for j in range(count)] for i in range(count)]
    worst = nash.worst_case(win)
    return {
        "num_prompts": num_prompts,
        "num_left_out": total - num_prompts,
        "win": off_diagonal(lambda i, j: float(win[i, j])),
        "win_interval": off_diagonal(lambda i, j: [float(low[i, j]), float(high[i, j])]),
        "nash_mixture": nash.nash_mixture(win).tolist(),
        "worst_case": [
            {"against": j, "win": value, "interval": [float(worst_low[i]), float(worst_high[i])]}
            for i, (j, value) in enumerate(worst)
        ],
        "last_duality_gap": 1 - 2 * worst[-1][1],
        "last_duality_gap_interval": [1 - 2 * float(worst_high[-1]), 1 - 2 * float(worst_low[-1])],
    }


def print_matrix(result):
    """The matrix in per cent, each player's worst case and share in the Nash mixture, and the answer for the last
    one."""
    names = result["names"]
    width = max(8, *map(len, names)) + 1
    print(
        f"\n{'row beats column':{width + 8}}"
        + "".join(f"{name:>{width}}" for name in names)
        + f"{'worst':>9}{'Nash':>8}   ({result['measure']}, %, {result['num_prompts']} prompts)"
    )
    for name, row, worst, share in zip(names, result["win"], result["worst_case"], result["nash_mixture"]):
        print(
            f"{name:{width + 8}}"
            + "".join(f"{'-' if p is None else f'{100 * p:.1f}':>{width}}" for p in row)
            + f"{100 * worst['win']:9.1f}{share:8.3f}"
        )
    last, (low, high) = result["worst_case"][-1], result["worst_case"][-1]["interval"]
    verdict = (
        "wins at least half against every other"
        if low >= 0.5
        else "won at least half against every other; one half lies in the interval"
        if last["win"] >= 0.5
        else "may win half against every other: one half lies in the interval"
        if high >= 0.5
        else "does not win half against every other"
    )
    print(
        f"\n{names[-1]} {verdict}. Its worst: {100 * last['win']:.1f} % against {names[last['against']]} "
        f"(95 % interval of the worst over all: {100 * low:.1f} to {100 * high:.1f})"
    )


if __name__ == "__main__":
    run(alpaca_eval, generate, compare, matrix)
