"""What the report's page shows, in its order: the plots with their captions, and the columns of the table."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass
class Line:
    """A series of a plot: a field of the rows in `source`, its style, and perhaps the field with its interval."""

    label: str
    field: str
    style: str = "solid"
    band: str = ""
    source: str = "iterations"


@dataclass
class Plot:
    """A plot: what it shows, how to read it, what is missing where it has no data.

    `scale` turns the figures into `unit`; `level` is a horizontal line; `start` is the field of the initial policy that
    is shown as one; `from_zero` lets the axis begin at 0; `steps` says that positions lie within iterations; `cut` lets
    the axis end a little above all but the highest 2 % of the values; `hide_zeros`: without data where all are 0.
    """

    title: str
    unit: str
    lines: list
    caption: str
    missing: str
    scale: float = 1
    level: float | None = None
    start: str = ""
    from_zero: bool = False
    steps: bool = False
    cut: bool = False
    hide_zeros: bool = False


NO_EVALUATION = "No iteration has been evaluated yet (eval/vs_*.json)."
NO_TRAINING = "No training step has been taken yet (ckpt/metrics.jsonl)."
NO_GAME = "There is no game.json; only the demo's game can be computed exactly."
NO_SCORES = "Nothing has been judged yet (*.scores.jsonl)."
NO_SAMPLES = "There are no samples yet (*.samples.jsonl)."


def win_rate(against: str, field: str, caption: str) -> Plot:
    """The plot of a win rate and the mean win probability against another policy."""
    lines = [
        Line("win rate, with its 95 % interval", f"win_rate_{field}", band=f"win_rate_{field}_interval"),
        Line("mean win probability", f"mean_win_prob_{field}", "thin"),
    ]
    return Plot(f"Win rate against the {against}", "%", lines, caption, NO_EVALUATION, scale=100, level=50)


def training_lines(field: str) -> list:
    """A field of training and validation."""
    return [Line("training", field, "thin", source="steps"), Line("validation", field, "points", source="validation")]


SECTIONS = {
    "Win rates": [
        win_rate(
            "initial policy",
            "start",
            "The share of evaluation prompts for which the judge prefers the policy's answer to the initial policy's; "
            "a tie counts half. Above 50 % the policy beats the initial one. With cyclic preferences this share may "
            "fall although the policy gets better.",
        ),
        win_rate(
            "previous iteration",
            "previous",
            "An iteration that improves the policy is above 50 %. Near a Nash policy the win rate settles at 50 %, "
            "since nothing wins against that policy more often.",
        ),
    ],
    "Distance to a Nash policy": [
        Plot(
            "Duality gap",
            "2 (max P − ½)",
            [Line("duality gap", "duality_gap")],
            "The duality gap is 2 (max P − ½), where max P is the probability with which the best reply beats the "
            "policy. It is 0 at a Nash policy and at most 1. It is expected to rise after the reference has moved, so "
            "compare the values just before the moves.",
            NO_GAME,
            start="duality_gap",
            from_zero=True,
        ),
        Plot(
            "Answers outside the game",
            "%",
            [Line("other answers", "other")],
            "The probability that the policy gives none of the game's three answers. The duality gap leaves these "
            "answers out; while their probability is small, the gap describes the whole policy.",
            NO_GAME,
            scale=100,
            start="other",
            from_zero=True,
        ),
    ],
    "KL divergence": [
        Plot(
            "KL from the reference and from the initial policy",
            "nats per response",
            [Line("from the reference", "kl_reference"), Line("from the initial policy", "kl_start", "dashed")],
            "The policy is the one that the iteration samples from, which is the checkpoint before it. The estimate is "
            "the mean log-ratio over the chosen and rejected responses of its pairs. Pairs are selected from the "
            "samples, so the estimate is rough and may be negative. Where the reference moves, the divergence from it "
            "falls back to 0.",
            "There are no log-probabilities of pairs yet (data/*.jsonl).",
        ),
        Plot(
            "How far each iteration moved",
            "nats per response",
            [Line("KL from the policy before the iteration", "kl_moved")],
            "The KL divergence between the policy before the iteration and the trained one, in the last tenth of the "
            "steps. It is estimated on the training pairs, which are selected, so it may be negative. A jump means an "
            "unusually large step.",
            NO_TRAINING,
        ),
    ],
    "Response length": [
        Plot(
            "Mean response length",
            "tokens",
            [Line("evaluation answers", "response_tokens"), Line("samples for training", "sample_tokens", "dashed")],
            "A steady rise can mean that the judge rewards length and not quality. The samples come from the "
            "checkpoint before the iteration, the evaluation answers from the one that it trained.",
            "There are no responses yet (*.samples.jsonl, eval/).",
            start="response_tokens",
        ),
        Plot(
            "Truncated samples",
            "%",
            [Line("samples that reached the length limit", "truncated")],
            "The share of sampled responses that reached MAX_NEW_TOKENS and therefore have no end. A rise is a sign of "
            "rambling or repetition.",
            NO_SAMPLES,
            scale=100,
            from_zero=True,
        ),
    ],
    "Training": [
        Plot(
            "Normalised loss",
            "1: nothing learnt",
            training_lines("normalised_loss"),
            "The loss divided by the loss of the last policy on the same pairs; each iteration begins near 1. If "
            "training is far below validation, the policy overfits. Single steps may lie above the plot.",
            NO_TRAINING,
            level=1,
            steps=True,
            cut=True,
        ),
        Plot(
            "Margin",
            "nats",
            training_lines("margin"),
            "How much more the log-probability of the chosen response has risen than that of the rejected one, "
            "compared with the last policy; each iteration begins at 0.",
            NO_TRAINING,
            level=0,
            steps=True,
        ),
        Plot(
            "Accuracy",
            "% of pairs",
            training_lines("accuracy"),
            "The share of pairs whose margin is positive. Below 50 % the pull back to the reference is stronger than "
            "the judge's labels.",
            NO_TRAINING,
            scale=100,
            level=50,
            steps=True,
        ),
    ],
    "Judge": [
        Plot(
            "Position bias",
            "probability",
            [Line("position bias", "order_gap")],
            "The mean difference between the judge's two answers when the responses change places. The closer it is to "
            "0, the less the judge looks at the order.",
            NO_SCORES,
            from_zero=True,
        ),
        Plot(
            "Probability on the two labels",
            "probability",
            [Line("label mass", "label_mass")],
            "The probability that the judge puts on its two labels together. If it is far below 1, the judge answers "
            "something else.",
            NO_SCORES,
            from_zero=True,
        ),
        Plot(
            "Prompts without a pair",
            "% of judged prompts",
            [Line("prompts without a pair", "dropped")],
            "The responses to these prompts are tied, identical, empty or too long, so there is nothing to train on. A "
            "rise means that the policy's responses to one prompt become alike.",
            "There are no pairs yet (*.pairs.jsonl).",
            scale=100,
            from_zero=True,
        ),
        Plot(
            "Skipped records",
            "records",
            [Line("skipped records", "skipped")],
            "Prompts that are longer than the model's or the judge's limit, and records that made their workers crash. "
            "The files *.skipped.jsonl list them.",
            "No record has been skipped so far.",
            from_zero=True,
            hide_zeros=True,
        ),
    ],
    "Time": [
        Plot(
            "Training speed",
            "tokens per second",
            [Line("median of the steps", "tokens_per_s")],
            "If the speed falls although responses do not get longer, look at the machine: another job, or a slow "
            "disk.",
            NO_TRAINING,
            from_zero=True,
        )
    ],
}


@dataclass
class Column:
    """A column of the table by iteration: heading, unit, the figure and its form; `best` marks the max or min."""

    title: str
    unit: str
    field: str
    decimals: int = 1
    scale: float = 1
    band: str = ""
    best: Callable | None = None


def win_columns(against, field, best=None):
    """Win rate and mean win probability against another policy, with their intervals."""
    return [
        Column(f"{title} against {against}", "%", f"{figure}_{field}", 1, 100, f"{figure}_{field}_interval", best)
        for title, figure in (("win rate", "win_rate"), ("mean probability", "mean_win_prob"))
    ]


COLUMNS = [
    *win_columns("initial", "start", max),
    *win_columns("previous", "previous"),
    Column("duality gap", "0 at Nash", "duality_gap", 3, best=min),
    Column("other answers", "%", "other", scale=100),
    Column("KL from reference", "nats per response", "kl_reference", 3),
    Column("KL from initial", "nats per response", "kl_start", 3),
    Column("KL of iteration", "nats per response", "kl_moved", 3),
    Column("evaluation length", "tokens", "response_tokens"),
    Column("sample length", "tokens", "sample_tokens"),
    Column("truncated", "%", "truncated", scale=100),
    Column("training loss", "normalised", "training_loss", 3),
    Column("validation loss", "normalised", "validation_loss", 3),
    Column("margin", "nats", "margin", 2),
    Column("accuracy", "%", "accuracy", scale=100),
    Column("position bias", "probability", "order_gap", 3),
    Column("label mass", "probability", "label_mass", 3),
    Column("no pair", "%", "dropped", scale=100),
    Column("skipped", "records", "skipped", 0),
    Column("training", "tokens/s", "tokens_per_s", 0),
    Column("time", "minutes", "minutes"),
    Column("checkpoint", "on disk", "weights"),
]
