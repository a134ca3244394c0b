"""The empirical game between several sets of responses: win probabilities of all against all, solution, and picture.

`eval.py matrix` judges the cells, writes what `play` finds, and the heat map beside it.
"""

import itertools
import os
import re
from pathlib import Path

import numpy as np

from analysis import nash
from analysis.bootstrap import interval, resampled_means
from analysis.comparisons import wins
from analysis.plots import as_text, plot_style, svg, svg_file
from records import Comparison, read
from utils import StageError, fingerprint

MEASURES = ("mean_win_prob", "win_rate")


def short_names(paths: list) -> list:
    """The parts of paths that tell response files apart: exps/A/iter3/eval/responses.jsonl and
    exps/A/start/responses.jsonl become iter3 and start."""
    stems = [re.sub("(/eval)?/responses$", "", str(path.with_suffix(""))).split("/") for path in paths]
    common = len(os.path.commonprefix([stem[:-1] for stem in stems]))  # which takes lists, too
    return ["/".join(stem[common:]) for stem in stems]


def cell_paths(paths: list, judged_by: list, folder: Path) -> dict:
    """{(i, j): the comparison file of i's responses against j's}, i before j, for `paths` of responses.

    A file is named by the responses in it and by what judged them, so that no comparison is judged twice.
    """
    prints = [fingerprint(path) for path in paths]
    return {
        (i, j): folder / f"{fingerprint([prints[i], prints[j], judged_by])}.jsonl"
        for i, j in itertools.combinations(range(len(paths)), 2)
    }


def win_probs_by_prompt(cells: dict, count: int) -> tuple:
    """(P(i beats j) prompt by prompt, (K, K, N), with 1/2 on the diagonal, over the N prompts that every cell has;
    the number of prompts that any cell has)."""
    found = {
        pair: {record["prompt_id"]: record["win_probs"][0][1] for record in read(path, Comparison)}
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


def play(probs, total: int, measure: str = "mean_win_prob", seed: int = 0, num_bootstrap: int = 2_000) -> dict:
    """The empirical game of K players from their win probabilities on each prompt.

    Intervals are 95 % bootstrap intervals; the prompts are drawn for all pairs together.

    Args:
        probs: (K, K, N), P(i beats j) on each prompt
        total: number of prompts, with those that some comparison lacks
        measure: one of MEASURES

    Returns:
        num_prompts, num_left_out; win and win_interval (K x K, null on the diagonal); nash_mixture (K);
        worst_case (K): {against, win, interval}; last_duality_gap, which is 2 (max_j P(j beats the last) - 1/2) over
        the earlier ones, and last_duality_gap_interval: 0 or less where the last wins at least half against each.
    """
    values = probs if measure == "mean_win_prob" else wins(probs)  # (K, K, N)
    count, num_prompts = len(values), values.shape[2]
    win = values.mean(axis=2)  # (K, K)
    drawn = resampled_means(values, "matrix", seed, num_bootstrap)  # (K, K, num_bootstrap)
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


def print_matrix(result: dict):
    """Print the matrix in per cent, each player's worst case and its share in the Nash mixture, and whether the last
    player wins at least half against every other."""
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


def picture_size(names: list) -> float:
    """The width of the heat map in inches."""
    return max(3.6, 1.2 + 0.6 * len(names) + 0.07 * max(map(len, names)))


def draw_matrix(result: dict, whole_file: bool = False) -> str:
    """The heat map as SVG: per cent that the row wins against the column, blue above one half, red below.

    With `whole_file` it is a file of its own, with a title; otherwise an element of the report's page.
    """
    from matplotlib.figure import Figure

    names, count = result["names"], len(result["names"])
    win = np.array([[0.5 if p is None else p for p in row] for row in result["win"]])
    span = max(0.05, abs(win - 0.5).max())
    size = picture_size(names)
    with plot_style("matrix"):
        figure = Figure(figsize=(size, size), layout="constrained")
        axes = figure.add_subplot()
        axes.pcolormesh(win, cmap="RdBu", vmin=0.5 - span, vmax=0.5 + span)
        axes.set_aspect("equal")
        axes.invert_yaxis()
        for i, row in enumerate(result["win"]):
            for j, p in enumerate(row):
                colour = "white" if p is not None and abs(p - 0.5) > 0.6 * span else "black"
                axes.text(j + 0.5, i + 0.5, as_text(p, 1, 100), ha="center", va="center", color=colour)
        centres = np.arange(count) + 0.5
        axes.set_xticks(centres, names, rotation=45, ha="right", rotation_mode="anchor")
        axes.set_yticks(centres, names)
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
        if whole_file:
            kind = "mean win probability" if result["measure"] == "mean_win_prob" else "win rate"
            axes.set_title(f"{kind}, %: row against column\n{result['num_prompts']} prompts, both orders", fontsize=9.5)
            return svg_file(figure)
        return svg(figure, "All against all")
