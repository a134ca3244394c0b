"""How intransitive is a judge? Cycles among the responses that it has compared, and what no reward model explains.

    python -m analysis.intransitivity --input train.scores.jsonl

Three responses form a cycle where each beats the next with a probability above one half. A Bradley-Terry judge,
`P(i beats j) = sigmoid(s_i - s_j)`, has none. Its log-odds are differences of scores; how far others are from that is
measured by least squares: `logit P = (s_i - s_j) + rest`, where on complete comparisons the best scores are the row
means of the log-odds, and the rest is orthogonal to all differences of scores, a sum of cycles (HodgeRank: Jiang, Lim,
Yao, Ye 2011). |rest|^2 / |logit P|^2 is the cyclic part: 0 for Bradley-Terry, 1 for rock-paper-scissors.
"""

import itertools
import json
from pathlib import Path

import numpy as np

from analysis.bootstrap import interval, resampled_means
from analysis.plots import COLOURS, plot_style, svg_file
from records import Scores, read
from utils import StageError, file_lists, log, run, write_text

CLIP = 1e-6  # probabilities nearer to 0 or 1 are moved to here before their log-odds are taken


def distinct(record: dict) -> np.ndarray:
    """The win probabilities of a scores record's different texts, (K, K) with 1/2 on the diagonal."""
    texts = [sample["text"] for sample in record["samples"]]
    first = [texts.index(text) for text in dict.fromkeys(texts)]
    return np.array([[0.5 if i == j else record["win_probs"][i][j] for j in first] for i in first])


def cycle_strengths(probs: np.ndarray) -> np.ndarray:
    """For every three of K responses the probability with which the weakest step of their cycle is won, in the
    direction in which that is larger: above 1/2 they are a cycle.

    Args:
        probs: (K, K), [i][j] = P(i beats j)

    Returns:
        (K (K - 1) (K - 2) / 6,)
    """
    return np.array(
        [
            max(min(probs[i, j], probs[j, k], probs[k, i]), min(probs[j, i], probs[k, j], probs[i, k]))
            for i, j, k in itertools.combinations(range(len(probs)), 3)
        ]
    )


def log_odds(probs: np.ndarray) -> tuple:
    """(log-odds of every two of K responses, those of the Bradley-Terry model nearest to them), each (K (K - 1) /
    2,)."""
    clipped = np.clip(probs, CLIP, 1 - CLIP)
    odds = np.log(clipped / (1 - clipped))  # skew-symmetric
    scores = odds.mean(axis=1)
    pairs = np.triu_indices(len(probs), 1)
    return odds[pairs], (scores[:, None] - scores)[pairs]


def measure_prompt(record, probs, margin):
    """The figures of one prompt that are summed over prompts, its cycle strengths (T,) and its log-odds (N, 2)."""
    if type(record.get("order_gap")) not in (int, float):
        raise StageError(
            f"prompt_id {record['prompt_id']}: order_gap should be a number, got {record.get('order_gap')}; "
            "scoring.py writes it"
        )
    strengths, (judged, fitted) = cycle_strengths(probs), log_odds(probs)
    sums = {
        "prompts": 1,
        "order_gap": record["order_gap"],
        "triples": len(strengths),
        "cyclic": (strengths > 0.5).sum(),
        "cyclic_with_margin": (strengths > 0.5 + margin).sum(),
        "squares": (judged**2).sum(),
        "rest": ((judged - fitted) ** 2).sum(),
    }
    return sums, strengths, np.stack([judged, fitted], axis=1)


SHARES = {  # the name of a figure: the two sums over prompts whose ratio it is
    "cyclic_triples": ("cyclic", "triples"),
    "cyclic_triples_with_margin": ("cyclic_with_margin", "triples"),
    "cyclic_part": ("rest", "squares"),
    "order_gap": ("order_gap", "prompts"),
}


def measure(records, margin: float, seed: int = 0, num_bootstrap: int = 1_000) -> tuple:
    """The figures of a judge from the records of a scores file.

    Shares are of all triples, and of the sum of squared log-odds, over all prompts together; prompts with fewer than
    three different responses do not count. Intervals are 95 % bootstrap intervals over prompts.

    Args:
        records: scores records
        margin: with it, each step of a cycle is won with more than 1/2 + margin

    Returns:
        The figures that `main` writes, and what its picture shows: the cycle strength of every triple (T,), and a
        pair of log-odds (the judge's, Bradley-Terry's) for every two responses (N, 2).

    Raises StageError where there is nothing to measure.
    """
    measured, num_prompts = [], 0
    for record in records:
        num_prompts += 1
        probs = distinct(record)
        if len(probs) >= 3:
            measured.append(measure_prompt(record, probs, margin))
    if not measured:
        raise StageError(
            "no prompt has three different responses that were compared; sample more (sampling.py --num_samples)"
        )
    rows, strengths, odds = zip(*measured)
    columns = {name: np.array([row[name] for row in rows], dtype=float) for name in rows[0]}  # each (prompts,)
    if not columns["squares"].any():
        raise StageError("the judge gives 1/2 to all; it has no preference that could be cyclic")
    draws = dict(zip(columns, resampled_means([*columns.values()], "intransitivity", seed, num_bootstrap)))
    figures = {
        "num_prompts": len(rows),
        "num_left_out": num_prompts - len(rows),
        "num_triples": int(columns["triples"].sum()),
        "margin": margin,
    }
    for name, (part, whole) in SHARES.items():
        figures[name] = float(columns[part].sum() / columns[whole].sum())
        with np.errstate(invalid="ignore"):  # a draw of prompts without any preference has no cyclic part
            figures[f"{name}_interval"] = interval(draws[part] / draws[whole]).tolist()
    return figures, np.concatenate(strengths), np.concatenate(odds)


def draw(figures: dict, strengths: np.ndarray, odds: np.ndarray) -> str:
    """The SVG file: how strong the cycles of three are, and the judge's log-odds against Bradley-Terry's.

    Args:
        figures, strengths (T,), odds (N, 2): see `measure`
    """
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    with plot_style("intransitivity"):
        figure = Figure(figsize=(9, 3.6), layout="constrained")
        left, right = figure.subplots(1, 2)
        _, bins, bars = left.hist(strengths, bins=np.linspace(0, 1, 41), color=COLOURS[0])
        for edge, bar in zip(bins, bars):
            if edge >= 0.5 - 1e-9:  # a cycle
                bar.set_color(COLOURS[1])
        left.axvline(0.5 + figures["margin"], color="#5c6166", linewidth=1, linestyle=(0, (4, 2)))
        left.set(xlabel="probability of the weakest step of the cycle", ylabel="triples of responses", xlim=(0, 1))
        shares = [100 * figures[name] for name in ("cyclic_triples", "cyclic_triples_with_margin", "cyclic_part")]
        left.set_title("{:.1f} % are cycles (red), {:.1f} % beyond the margin".format(*shares[:2]), fontsize=9.5)

        odds = np.where(odds[:, 1:] < 0, -odds, odds)  # each pair in the direction that Bradley-Terry prefers
        limit = odds.max()
        look = dict(gridsize=40, mincnt=1, norm=LogNorm(), cmap="Blues", edgecolors="#8fb3c4", linewidths=0.3)
        found = right.hexbin(odds[:, 1], odds[:, 0], **look)
        right.plot([0, limit], [0, limit], color=COLOURS[1], linewidth=1)
        right.set(xlabel="log-odds of the nearest Bradley-Terry model", ylabel="the judge's log-odds")
        right.set_title(f"{shares[2]:.1f} % of the squares are not explained", fontsize=9.5)
        figure.colorbar(found, ax=right, label="pairs of responses")
        for axes in (left, right):
            axes.spines[["top", "right"]].set_visible(False)
        return svg_file(figure)


def main(input: str, output: str = "", margin: float = 0.1, seed: int = 0):
    """Is the judge intransitive? Cycles among the responses that it compared, and what no reward model explains.

    Written: num_prompts, num_left_out (fewer than three different responses), num_triples; each with its 95 % interval
    over prompts cyclic_triples, the share of triples in which each response beats the next, cyclic_triples_with_margin,
    cyclic_part, the share of the squared log-odds that no Bradley-Terry score explains, and order_gap, the position
    bias: how much the judge disagrees with itself when the two responses change places.

    Args:
        input: scores file(s) of scoring.py, comma-separated, with three samples a prompt or more
        output: result, ending in .json, and its picture beside it (.svg); default: the first input's path, ending in
            .intransitivity.json
        margin: with it, each step of a cycle is won with a probability above 1/2 + margin
        seed: of the bootstrap
    """
    paths = file_lists(input=input)[0]
    target = Path(output) if output else Path(paths[0]).with_suffix(".intransitivity.json")
    if target.suffix != ".json":
        raise StageError(f"--output should end in .json, got {output}")
    if not 0 <= margin < 0.5:
        raise StageError(f"--margin should be at least 0 and less than 0.5, got {margin}")
    records = itertools.chain.from_iterable(read(path, Scores) for path in paths)
    figures, strengths, odds = measure(records, margin, seed)
    write_text(target.with_suffix(".svg"), draw(figures, strengths, odds))
    write_text(target, json.dumps({"input": list(map(str, paths))} | figures, indent=2) + "\n")
    print_figures(figures)
    log.info("%s and its picture beside it (.svg): written", target)


def print_figures(figures: dict):
    """Print the figures with their intervals, and whether the judge is intransitive."""
    margin = f"{100 * (0.5 + figures['margin']):g} %"
    print(
        f"\n{figures['num_prompts']:,} prompts, {figures['num_triples']:,} triples of different responses "
        f"({figures['num_left_out']:,} prompts have fewer than three)\n"
    )
    for name, label, note in (
        ("cyclic_triples", "cyclic triples, %", "each beats the next; 25 % where a coin decides"),
        ("cyclic_triples_with_margin", "  with a margin, %", f"each beats the next with more than {margin}"),
        ("cyclic_part", "cyclic part of the log-odds, %", "what no Bradley-Terry score explains, of the squares"),
        ("order_gap", "position bias, %", "mean difference of P(first beats second) between the two orders"),
    ):
        low, high = figures[f"{name}_interval"]
        print(f"{label:32}{100 * figures[name]:7.2f}   [{100 * low:.2f}, {100 * high:.2f}]   {note}")
    if figures["cyclic_triples_with_margin_interval"][0] > 0:
        verdict = f"is intransitive: it has cycles in which each step is won with more than {margin}."
    else:
        verdict = f"shows no cycle in which each step is won with more than {margin}, or too few to tell."
    print(f"\nThe judge {verdict}")


if __name__ == "__main__":
    run(main)
