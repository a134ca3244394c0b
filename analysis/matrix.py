"""The empirical game between several sets of responses: win probabilities of all against all, solution, and picture.

`eval.py matrix` judges the cells, writes what `play` finds, and the heat map beside it. Which checkpoint should I use?

    python -m analysis.matrix matrix.json
"""

import itertools
import os
import re
from pathlib import Path

import numpy as np

from analysis import nash
from analysis.bootstrap import interval, resampled_means
from analysis.comparisons import wins
from analysis.figures import read_json
from analysis.plots import as_text, plot_style, svg, svg_file
from records import Comparison, read
from utils import StageError, check_input, fingerprint, run

MEASURES = {"mean_win_prob": "mean win probability", "win_rate": "win rate"}


def short_names(paths: list) -> list:
    """The parts of names that tell response files or models apart: exps/A/iter3/eval/responses.jsonl and
    exps/A/start/responses.jsonl become iter3 and start, exps/A/iter3/ckpt becomes iter3."""
    stems = [
        re.sub(r"(((/eval)?/responses)?\.jsonl?|(/ckpt)?(/model)?/?)$", "", str(path)).split("/") for path in paths
    ]
    common = len(os.path.commonprefix([stem[:-1] for stem in stems]))  # which takes lists, too
    return ["/".join(stem[common:]) for stem in stems]


def cell_paths(paths: list, judged_by: list, folder: Path) -> dict:
    """{(i, j): the comparison file of i's responses against j's}, one for each two of `paths` of responses.

    A file is named by the responses in it and by what judged them, so that no comparison is judged twice. Which of the
    two comes first depends on their contents and not on their order in `paths`, so that (i, j) may be (1, 0).
    """
    prints = [fingerprint(path) for path in paths]
    pairs = itertools.combinations(sorted(range(len(paths)), key=lambda i: prints[i]), 2)
    return {(i, j): folder / f"{fingerprint([prints[i], prints[j], judged_by])}.jsonl" for i, j in pairs}


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
        the earlier ones, and last_duality_gap_interval: 0 or less where the last wins at least half against each;
        best: see `best_worst_case`.
    """
    values = probs if measure == "mean_win_prob" else wins(probs)  # (K, K, N)
    count, _, num_prompts = values.shape
    win = values.mean(axis=2)  # (K, K)
    drawn = resampled_means(values, "matrix", seed, num_bootstrap)  # (K, K, num_bootstrap)
    bounds = np.moveaxis(interval(drawn), 0, -1)  # (K, K, 2)
    worst_drawn = np.where(np.eye(count, dtype=bool)[:, :, None], np.inf, drawn).min(axis=1)  # (K, num_bootstrap)
    worst_bounds = interval(worst_drawn).T  # (K, 2)
    off_diagonal = lambda table: [[None if i == j else p for j, p in enumerate(row)] for i, row in enumerate(table)]
    worst = nash.worst_case(win)
    return {
        "num_prompts": num_prompts,
        "num_left_out": total - num_prompts,
        "win": off_diagonal(win.tolist()),
        "win_interval": off_diagonal(bounds.tolist()),
        "nash_mixture": nash.nash_mixture(win).tolist(),
        "worst_case": [
            {"against": j, "win": value, "interval": own} for (j, value), own in zip(worst, worst_bounds.tolist())
        ],
        "last_duality_gap": 1 - 2 * worst[-1][1],
        "last_duality_gap_interval": (1 - 2 * worst_bounds[-1, ::-1]).tolist(),
        "best": best_worst_case([value for _, value in worst], worst_drawn),
    }


def best_worst_case(worst: list[float], drawn: np.ndarray) -> dict:
    """The player with the best worst case, and by how much its worst case is better than those of the others.

    A player is not distinguishable from it when 0 lies in the interval of the difference of their two worst cases,
    which are computed from the same drawn prompts.

    Args:
        worst: (K,), what each player wins against its strongest opponent
        drawn: (K, num_bootstrap), the same for each sample of the prompts

    Returns:
        player: its number, the first one's of equals; lead and lead_interval (K, null for the player itself);
        not_distinguishable: numbers of other players
    """
    best = int(np.argmax(worst))
    bounds = interval(drawn[best] - drawn).T.tolist()  # (K, 2)
    return {
        "player": best,
        "lead": [None if i == best else worst[best] - value for i, value in enumerate(worst)],
        "lead_interval": [None if i == best else own for i, own in enumerate(bounds)],
        "not_distinguishable": [i for i, (low, _) in enumerate(bounds) if i != best and low <= 0],
    }


def print_matrix(result: dict):
    """Print the matrix in per cent, each player's worst case and its share in the Nash mixture, and whether the last
    player wins at least half against every other. Where names would make it wide, the columns have numbers."""
    names = result["names"]
    rows = columns = names
    width = max(8, *map(len, names)) + 1
    first = width + 8
    if width * len(names) > 120:
        columns = [str(number + 1) for number in range(len(names))]
        rows = [f"{number:>2} {name}" for number, name in zip(columns, names)]
        width, first = 6, max(18, *map(len, rows))
    print(
        f"\n{'row beats column':{first}}"
        + "".join(f"{column:>{width}}" for column in columns)
        + f"{'worst':>9}{'Nash':>8}   ({result['measure']}, %, {result['num_prompts']} prompts)"
    )
    for name, row, worst, share in zip(rows, result["win"], result["worst_case"], result["nash_mixture"]):
        print(
            f"{name:{first}}"
            + "".join(f"{'-' if p is None else f'{100 * p:.1f}':>{width}}" for p in row)
            + f"{100 * worst['win']:9.1f}{share:8.3f}"
        )
    last, (low, high) = result["worst_case"][-1], result["worst_case"][-1]["interval"]
    if low >= 0.5:
        verdict = "wins at least half against every other"
    elif last["win"] >= 0.5:
        verdict = "won at least half against every other; one half lies in the interval"
    elif high >= 0.5:
        verdict = "may win half against every other: one half lies in the interval"
    else:
        verdict = "does not win half against every other"
    print(
        f"\n{names[-1]} {verdict}. Its worst: {100 * last['win']:.1f} % against {names[last['against']]} "
        f"(95 % interval of the worst over all: {100 * low:.1f} to {100 * high:.1f})"
    )


def print_best(result: dict):
    """Print which player has the best worst case, and which others are not distinguishable from it."""
    names, best = result["names"], result["best"]
    worst = result["worst_case"][best["player"]]
    low, high = worst["interval"]
    print(
        f"\nBest worst case: {names[best['player']]} with {100 * worst['win']:.1f} % against {names[worst['against']]} "
        f"(95 % interval of the worst over all: {100 * low:.1f} to {100 * high:.1f})."
    )
    clear = [i for i in range(len(names)) if i not in (best["player"], *best["not_distinguishable"])]
    for title, players in (("Not distinguishable from it", best["not_distinguishable"]), ("Clearly below it", clear)):
        print(f"{title}: {'none' if not players else ''}".strip())
        for i in sorted(players, key=lambda i: best["lead"][i]):
            low, high = best["lead_interval"][i]
            print(
                f"    {names[i]}: {100 * result['worst_case'][i]['win']:.1f} %, lower by {100 * best['lead'][i]:.1f} "
                f"(95 % interval: {100 * low:.1f} to {100 * high:.1f})"
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
            title = (
                f"{MEASURES[result['measure']]}, %: row against column\n{result['num_prompts']} prompts, both orders"
            )
            axes.set_title(title, fontsize=9.5)
            return svg_file(figure)
        return svg(figure, "All against all")


def main(matrix: list):
    """Which checkpoint should I use? The one with the best worst case, and those that are not distinguishable from it.

    Args:
        matrix: what eval.py matrix wrote
    """
    if len(matrix) != 1:
        raise StageError(f"name one file that eval.py matrix wrote, got {len(matrix)}")
    check_input(matrix[0])
    result = read_json(Path(matrix[0]))
    if not {"names", "worst_case"} <= result.keys():
        raise StageError(f"{matrix[0]} is not a result of eval.py matrix")
    if "best" not in result:
        raise StageError(f"{matrix[0]} does not have the answer; run eval.py matrix again, which keeps the judgements")
    print_best(result)


if __name__ == "__main__":
    run(main)
