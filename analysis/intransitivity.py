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

from utils import StageError, derive_seed, file_lists, log, read_scores, run, write_text

CLIP = 1e-6  # probabilities nearer to 0 or 1 are moved to here before their log-odds are taken


def distinct(record):
    """The win probabilities of a scores record's different texts, (K, K) with 1/2 on the diagonal."""
    texts = [sample["text"] for sample in record["samples"]]
    first = [texts.index(text) for text in dict.fromkeys(texts)]
    return np.array([[0.5 if i == j else record["win_probs"][i][j] for j in first] for i in first])


def cycle_strengths(probs):
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


def log_odds(probs):
    """(log-odds of every two of K responses, those of the Bradley-Terry model nearest to them), each (K (K - 1) /
    2,)."""
    clipped = np.clip(probs, CLIP, 1 - CLIP)
    odds = np.log(clipped / (1 - clipped))  # skew-symmetric
    scores = odds.mean(axis=1)
    pairs = np.triu_indices(len(probs), 1)
    return odds[pairs], (scores[:, None] - scores)[pairs]


def measure(records, margin, seed=0, num_bootstrap=1_000):
    """The figures of a judge from the records of a scores file.

    Shares are of all triples, and of the sum of squared log-odds, over all prompts together; prompts with fewer than
    three different responses do not count. Intervals are 95 % percentile bootstrap intervals over prompts.

    Args:
        records: scores records
        margin: with it, each step of a cycle is won with more than 1/2 + margin

    Returns:
        The figures that `main` writes, and what its picture shows: the cycle strength of every triple, and a
        pair of log-odds (the judge's, Bradley-Terry's) for every two responses.
    """
    rows, strengths, odds = [], [], []
    num_prompts = 0
    for record in records:
        num_prompts += 1
        probs = distinct(record)
        if len(probs) < 3:
            continue
        if type(record.get("order_gap")) not in (int, float):
            raise StageError(
                f"prompt_id {record['prompt_id']}: order_gap should be a number, got {record.get('order_gap')}; "
                "scoring.py writes it"
            )
        own, (judged, fitted) = cycle_strengths(probs), log_odds(probs)
        rows.append(
            [
                len(own),
                (own > 0.5).sum(),
                (own > 0.5 + margin).sum(),
                (judged**2).sum(),
                ((judged - fitted) ** 2).sum(),
                1,
                record["order_gap"],
            ]
        )
        strengths.append(own)
        odds.append(np.stack([judged, fitted], axis=1))
    if not rows:
        raise StageError(
            "no prompt has three different responses that were compared; sample more (sampling.py --num_samples)"
        )
    rows = np.array(
        rows, dtype=float
    )  # a prompt: triples, cyclic, with margin; squared log-odds, their rest; 1, order gap
    if not rows[:, 3].any():
        raise StageError("the judge gives 1/2 to all; it has no preference that could be cyclic")
    parts, wholes = [1, 2, 4, 6], [0, 0, 3, 5]
    generator = np.random.default_rng(derive_seed("intransitivity", seed))
    share = np.full(len(rows), 1 / len(rows))
    drawn = np.array([generator.multinomial(len(rows), share) @ rows for _ in range(num_bootstrap)])
    with np.errstate(invalid="ignore"):  # a draw of prompts without any preference
        low, high = np.nanpercentile(drawn[:, parts] / drawn[:, wholes], [2.5, 97.5], axis=0).tolist()
    values = rows.sum(axis=0)[parts] / rows.sum(axis=0)[wholes]
    figures = {
        "num_prompts": len(rows),
        "num_left_out": num_prompts - len(rows),
        "num_triples": int(rows[:, 0].sum()),
        "margin": margin,
    }
    for name, value, *bounds in zip(
        ("cyclic_triples", "cyclic_triples_with_margin", "cyclic_part", "order_gap"), values.tolist(), low, high
    ):
        figures |= {name: value, f"{name}_interval": bounds}
    return figures, np.concatenate(strengths), np.concatenate(odds)


def main(input: str, output: str = "", margin: float = 0.1, seed: int = 0):
    """Is the judge intransitive? Cycles among the responses that it compared, and what no reward model explains.

    Written: num_prompts, num_left_out (fewer than three different responses), num_triples; each with its 95 % interval
    over prompts cyclic_triples, the share of triples in which each response beats the next, cyclic_triples_with_margin,
    cyclic_part, the share of the squared log-odds that no Bradley-Terry score explains, and order_gap, how much the
    judge disagrees with itself when the two responses change places.

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
    records = itertools.chain.from_iterable(read_scores(path) for path in paths)
    figures, strengths, odds = measure(records, margin, seed)
    from analysis.plots import draw_intransitivity

    write_text(target.with_suffix(".svg"), draw_intransitivity(figures, strengths, odds))
    write_text(target, json.dumps({"input": list(map(str, paths))} | figures, indent=2) + "\n")
    print_figures(figures)
    log.info("%s and its picture beside it (.svg): written", target)


def print_figures(figures):
    margin = f"{100 * (0.5 + figures['margin']):g} %"
    print(
        f"\n{figures['num_prompts']:,} prompts, {figures['num_triples']:,} triples of different responses "
        f"({figures['num_left_out']:,} prompts have fewer than three)\n"
    )
    for name, label, note in (
        ("cyclic_triples", "cyclic triples, %", "each beats the next; 25 % where a coin decides"),
        ("cyclic_triples_with_margin", "  with a margin, %", f"each beats the next with more than {margin}"),
        ("cyclic_part", "cyclic part of the log-odds, %", "what no Bradley-Terry score explains, of the squares"),
        ("order_gap", "position disagreement, %", "between P(first beats second) in the two orders, the mean"),
    ):
        low, high = figures[f"{name}_interval"]
        print(f"{label:32}{100 * figures[name]:7.2f}   [{100 * low:.2f}, {100 * high:.2f}]   {note}")
    found = figures["cyclic_triples_with_margin_interval"][0] > 0
    print(
        "\nThe judge "
        + (
            f"is intransitive: it has cycles in which each step is won with more than {margin}."
            if found
            else f"shows no cycle in which each step is won with more than {margin}, or too few to tell."
        )
    )


if __name__ == "__main__":
    run(main)
