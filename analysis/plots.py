"""Every plot of the project, as SVG: text stays text, and the same data gives the same file."""

import math
import re
from dataclasses import dataclass
from html import escape
from io import StringIO

COLOURS = ("#1f6f8b", "#c8553d", "#6a5d8f", "#78862f", "#b0892e", "#55606a")  # one an experiment
STAGE_COLOURS = {
    "sampling": "#5b8fa8",
    "scoring": "#93b7be",
    "pairs": "#d9c9a3",
    "logprobs": "#e2a76f",
    "start_logprobs": "#efcfae",
    "training": "#b5654a",
    "responses": "#8d86a9",
    "evaluation": "#b9b4cc",
    "matrix": "#d8d5e2",
}
OTHER_STAGE = "#9aa0a6"


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

    `scale` turns the figures into `unit`; `level` is a horizontal line; `start` the field of the start policy that is
    shown as one; `from_zero` lets the axis begin at 0; `steps` says that positions lie within iterations; `cut` lets
    the axis end a little above all but the highest 2 % of the values.
    """

    title: str
    unit: str
    lines: list
    caption: str
    missing: str
    scale: float = 1
    level: float = None
    start: str = ""
    from_zero: bool = False
    steps: bool = False
    cut: bool = False


STYLES = {
    "solid": {"linewidth": 1.8, "marker": "o", "markersize": 3.2},
    "thin": {"linewidth": 0.8},
    "dashed": {"linewidth": 1.4, "linestyle": (0, (4, 2)), "marker": "o", "markersize": 4, "markerfacecolor": "white"},
    "points": {
        "linestyle": "none",
        "marker": "o",
        "markersize": 4.2,
        "markeredgecolor": "white",
        "markeredgewidth": 0.7,
        "zorder": 4,
    },
}

NO_EVALUATION = "no iteration has been evaluated (eval/vs_*.json)"
NO_TRAINING = "no step of training yet (ckpt/metrics.jsonl)"
NO_GAME = "no game.json; only the demo's game can be computed exactly"
NO_SCORES = "nothing has been judged yet (*.scores.jsonl)"


def training_lines(field):
    return [Line("training", field, "thin", source="steps"), Line("validation", field, "points", source="validation")]


SECTIONS = {
    "Win rates": [
        Plot(
            "Win rate against the start policy",
            "%",
            [
                Line("win rate, with its 95 % interval", "win_rate_start", band="win_rate_start_interval"),
                Line("mean win probability", "mean_win_prob_start", "thin"),
            ],
            "The share of evaluation prompts whose answer the judge prefers to the start policy's, ties half. Above "
            "50 % beats the start; with cyclic preferences it may fall although the policy gets better.",
            NO_EVALUATION,
            scale=100,
            level=50,
        ),
        Plot(
            "Win rate against the previous iteration",
            "%",
            [
                Line("win rate, with its 95 % interval", "win_rate_previous", band="win_rate_previous_interval"),
                Line("mean win probability", "mean_win_prob_previous", "thin"),
            ],
            "An iteration that improves is above 50 %; near a Nash policy the win rate settles there, since nothing "
            "wins against that policy more often.",
            NO_EVALUATION,
            scale=100,
            level=50,
        ),
    ],
    "Distance to a Nash policy": [
        Plot(
            "Duality gap",
            "2 (max P − ½)",
            [Line("duality gap", "duality_gap")],
            "What the best reply wins above one half, doubled: 0 at a Nash policy, at most 1. A rise after the "
            "reference has moved is expected; compare the values just before the moves.",
            NO_GAME,
            start="duality_gap",
            from_zero=True,
        ),
        Plot(
            "Answers outside the game",
            "%",
            [Line("other", "other")],
            "The probability that the policy gives none of the game's three answers, which the gap leaves out; while "
            "it is small the gap describes the whole policy.",
            NO_GAME,
            scale=100,
            start="other",
            from_zero=True,
        ),
    ],
    "KL divergence": [
        Plot(
            "How far the policy is from reference and start",
            "nats a response",
            [Line("from the reference", "kl_reference"), Line("from the start policy", "kl_start", "dashed")],
            "Of the policy that iteration N samples from, the checkpoint before: mean log-ratio on the chosen and "
            "rejected responses of its pairs. Pairs are selected from the samples, so these are rough estimates, and "
            "may be negative. Where the reference moves, the distance from it falls back to 0.",
            "no log-probabilities of pairs yet (data/*.jsonl)",
        ),
        Plot(
            "How far each iteration moved",
            "nats a response",
            [Line("kl_last", "kl_moved")],
            "KL from the policy before to the trained one, in the last tenth of the steps. Estimated on the training "
            "pairs, which are selected, so it may be negative; a jump means an unusually large step.",
            NO_TRAINING,
        ),
    ],
    "Response length": [
        Plot(
            "Mean response length",
            "tokens",
            [Line("evaluation answers", "response_tokens"), Line("samples for training", "sample_tokens", "dashed")],
            "A steady rise can mean that length, not quality, is what the judge rewards. Samples come from the "
            "checkpoint before, evaluation answers from the one after training.",
            "no responses yet (*.samples.jsonl, eval/)",
            start="response_tokens",
        ),
        Plot(
            "Truncated samples",
            "%",
            [Line("ran into the length limit", "truncated")],
            "Share of sampled responses that ran into MAX_NEW_TOKENS and so have no end; a rise warns of rambling or "
            "repetition.",
            "no samples yet (*.samples.jsonl)",
            scale=100,
            from_zero=True,
        ),
    ],
    "Training": [
        Plot(
            "Normalised loss",
            "1: nothing learnt",
            training_lines("normalised_loss"),
            "The loss divided by the last policy's on the same pairs; each iteration begins near 1. Training far "
            "below validation is overfitting. Single steps may lie above the plot.",
            NO_TRAINING,
            level=1,
            steps=True,
            cut=True,
        ),
        Plot(
            "Margin",
            "nats",
            training_lines("margin"),
            "How much more the log-probability of the chosen response has risen than that of the rejected one since "
            "the last policy; each iteration begins at 0.",
            NO_TRAINING,
            level=0,
            steps=True,
        ),
        Plot(
            "Accuracy",
            "% of pairs",
            training_lines("accuracy"),
            "Share of pairs whose margin is positive. Below 50 % the pull back to the reference is stronger than the "
            "judge's labels.",
            NO_TRAINING,
            scale=100,
            level=50,
            steps=True,
        ),
    ],
    "Judge": [
        Plot(
            "Position disagreement",
            "probability",
            [Line("order gap", "order_gap")],
            "Mean difference between the judge's two answers when the responses change places; the closer to 0, the "
            "less it looks at the order.",
            NO_SCORES,
            from_zero=True,
        ),
        Plot(
            "Probability on the two labels",
            "probability",
            [Line("label mass", "label_mass")],
            "What the judge puts on its two labels together; far below 1 it is answering something else.",
            NO_SCORES,
            from_zero=True,
        ),
        Plot(
            "Prompts without a pair",
            "% of judged prompts",
            [Line("dropped", "dropped")],
            "Tie, identical, empty or too long: nothing to train on. A rise means that the policy's responses to a "
            "prompt become alike.",
            "no pairs yet (*.pairs.jsonl)",
            scale=100,
            from_zero=True,
        ),
        Plot(
            "Skipped records",
            "records",
            [Line("skipped", "skipped")],
            "Prompts over the model's or the judge's limit, and records that killed their workers; the files "
            "*.skipped.jsonl list them.",
            "no iteration yet",
            from_zero=True,
        ),
    ],
    "Time": [
        Plot(
            "Training speed",
            "tokens a second",
            [Line("median of the steps", "tokens_per_s")],
            "A fall without longer responses points at the machine: another job, or a slow disk.",
            NO_TRAINING,
            from_zero=True,
        )
    ],
}


def series(line, experiment, scale):
    """([x], [y], [(low, high)] or []) of the rows where the figure is known."""
    rows = [row for row in experiment[line.source] if row[line.field] is not None]
    bands = bool(line.band and all(row[line.band] for row in rows))
    points = []  # (x, y, band), and one without values where an iteration is missing: no line goes across
    for row in rows:
        if points and row["iteration"] - points[-1][0] > 1.001:
            points.append((row["iteration"] - 0.5, math.nan, [math.nan, math.nan]))
        points.append(
            (row["iteration"], scale * row[line.field], [scale * bound for bound in row[line.band]] if bands else None)
        )
    xs, ys, intervals = map(list, zip(*points)) if points else ([], [], [])
    return xs, ys, intervals if bands else []


def has_data(plot, experiments):
    return any(series(line, experiment, 1)[0] for line in plot.lines for experiment in experiments)


def new_axes(unit):
    """A figure and its axes in the page's style; call within `plot_style`."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(5.8, 2.9))
    figure.subplots_adjust(left=0.135, right=0.985, top=0.965, bottom=0.165)  # room for 100,000
    axes = figure.add_subplot()
    axes.set(xlabel="iteration", ylabel=unit)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=12))
    if unit == "records":
        axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    axes.grid(axis="y", color="#e8e6e1", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(y=0.12)
    return figure, axes


def plot_style(salt):
    """A context in which text stays text and the same data gives the same file."""
    import matplotlib

    grey = "#5c6166"
    return matplotlib.rc_context(
        {
            "svg.fonttype": "none",
            "svg.hashsalt": salt,
            "font.size": 9.5,
            "axes.edgecolor": "#b9b6ae",
            "axes.labelcolor": grey,
            "xtick.color": grey,
            "ytick.color": grey,
            "xtick.major.size": 3,
            "ytick.major.size": 0,
            "axes.formatter.useoffset": False,
        }
    )


def svg(figure, title):
    """A figure as an SVG element for the page, without what would be looked up elsewhere."""
    text = StringIO()
    figure.savefig(text, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    element = text.getvalue()
    element = element[element.index("<svg") :]
    element = re.sub(r' xmlns(:\w+)?="[^"]*"', "", element)
    element = re.sub(r"<metadata>.*?</metadata>", "", element, flags=re.DOTALL)
    element = re.sub(r'<g id="[^"]*"', "<g", element)
    element = re.sub(r' (width|height)="[\d.]+pt"', "", element, count=2)
    return element.replace("<svg", f'<svg role="img" aria-label="{escape(title)}"', 1)


def svg_file(figure):
    """A figure as a file of its own."""
    text = StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()


def draw_marks(axes, experiments, offset):
    """Faint lines at the ends of rounds, triangles on the axis where the reference moved."""
    rows = [(row, experiment["colour"]) for experiment in experiments for row in experiment["iterations"]]
    for place in sorted({row["iteration"] for row, _ in rows if row["round_ends"]}):
        axes.axvline(place + offset, color="#d4d1c9", linewidth=0.9, zorder=0)
    for row, colour in rows:
        if row["reference_moved"]:
            axes.plot(
                row["iteration"] + offset,
                0,
                "^",
                color=colour,
                markersize=5.5,
                clip_on=False,
                zorder=5,
                transform=axes.get_xaxis_transform(),
            )


def draw_lines(plot, experiments):
    """The SVG of a plot, all experiments laid over each other."""
    with plot_style(plot.title):
        figure, axes = new_axes(plot.unit)
        for experiment in experiments:
            colour = experiment["colour"]
            for line in plot.lines:
                xs, ys, bands = series(line, experiment, plot.scale)
                if len(bands) == 1:  # a band has no width there
                    axes.vlines(xs, *zip(*bands), color=colour, linewidth=1)
                elif bands:
                    axes.fill_between(xs, *zip(*bands), color=colour, alpha=0.14, linewidth=0)
                axes.plot(xs, ys, color=colour, **STYLES[line.style] | ({"marker": "o"} if len(xs) == 1 else {}))
            level = experiment["start"].get(plot.start)
            if level is not None:
                axes.axhline(plot.scale * level, color=colour, linewidth=1, linestyle=":")
        if plot.level is not None:
            axes.axhline(plot.level, color="#8a8f94", linewidth=0.9, zorder=1)
        numbers = [row["iteration"] for experiment in experiments for row in experiment["iterations"]]
        room = (0, 1) if plot.steps else (0.5, 0.5)
        axes.set_xlim(min(numbers) - room[0], max(numbers) + room[1])
        if plot.from_zero:
            axes.set_ylim(0, 1.12 * max(axes.dataLim.y1, 0) or 1)
        if plot.cut:
            values = sorted(
                y
                for e in experiments
                for line in plot.lines
                for y in series(line, e, plot.scale)[1]
                if not math.isnan(y)
            )
            top = 1.3 * max(plot.level, values[int(0.98 * (len(values) - 1))])
            if top < values[-1]:
                axes.set_ylim(values[0] - 0.05 * (top - values[0]), top)
        if axes.get_ylim()[1] >= 1000:
            axes.yaxis.set_major_formatter("{x:,.0f}")
        draw_marks(axes, experiments, 1 if plot.steps else 0.5)
        return svg(figure, plot.title)


def stage_names(experiments):
    """All stages that took time, the loop's own first and in its order."""
    found = {name for experiment in experiments for row in experiment["iterations"] for name in row["seconds"]}
    return [name for name in STAGE_COLOURS if name in found] + sorted(found - set(STAGE_COLOURS))


def draw_times(experiments):
    """The SVG of the stacked bars, one bar an iteration and experiment with a cap in the experiment's colour."""
    with plot_style("times"):
        figure, axes = new_axes("minutes")
        axes.xaxis.grid(False)
        width = 0.76 / len(experiments)
        numbers = [row["iteration"] for experiment in experiments for row in experiment["iterations"]]
        for place, experiment in enumerate(experiments):
            rows = experiment["iterations"]
            xs = [row["iteration"] + (place - (len(experiments) - 1) / 2) * width for row in rows]
            bottom = [0] * len(rows)
            for name in stage_names(experiments):
                heights = [row["seconds"].get(name, 0) / 60 for row in rows]
                axes.bar(xs, heights, 0.9 * width, bottom, color=STAGE_COLOURS.get(name, OTHER_STAGE))
                bottom = [low + height for low, height in zip(bottom, heights)]
            if len(experiments) > 1:
                caps = [(x, y) for x, y in zip(xs, bottom) if y]
                axes.hlines(
                    [y for _, y in caps],
                    [x - 0.45 * width for x, _ in caps],
                    [x + 0.45 * width for x, _ in caps],
                    color=experiment["colour"],
                    linewidth=2.5,
                )
        highest = max(sum(row["seconds"].values()) for e in experiments for row in e["iterations"]) / 60
        axes.set(xlim=(min(numbers) - 0.5, max(numbers) + 0.5), ylim=(0, 1.08 * highest or 1))
        draw_marks(axes, experiments, 0.5)
        return svg(figure, "Time by stage")


def draw_matrix(result, whole_file=False):
    """The SVG of `eval.py matrix`: per cent that the row wins against the column, blue above one half, red below."""
    import numpy as np
    from matplotlib.figure import Figure

    names, count = result["names"], len(result["names"])
    win = np.array([[0.5 if p is None else p for p in row] for row in result["win"]])
    span = max(0.05, abs(win - 0.5).max())
    size = max(3.6, 1.2 + 0.6 * count + 0.07 * max(map(len, names)))
    with plot_style("matrix"):
        figure = Figure(figsize=(size, size), layout="constrained")
        axes = figure.add_subplot()
        axes.pcolormesh(win, cmap="RdBu", vmin=0.5 - span, vmax=0.5 + span)
        axes.set_aspect("equal")
        axes.invert_yaxis()
        for i, row in enumerate(result["win"]):
            for j, p in enumerate(row):
                dark = p is not None and abs(p - 0.5) > 0.6 * span
                axes.text(
                    j + 0.5, i + 0.5, as_text(p, 1, 100), ha="center", va="center", color="white" if dark else "black"
                )
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


def draw_intransitivity(figures, strengths, odds):
    """The SVG file of `python -m analysis.intransitivity`: how strong the cycles of three are, and log-odds against
    Bradley-Terry's.

    Args:
        figures, strengths (T,), odds (N, 2): see `intransitivity.measure`
    """
    import numpy as np
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    odds = np.where(odds[:, 1:] < 0, -odds, odds)  # each pair in the direction that Bradley-Terry prefers
    with plot_style("intransitivity"):
        figure = Figure(figsize=(9, 3.6), layout="constrained")
        left, right = figure.subplots(1, 2)
        _, bins, bars = left.hist(strengths, bins=np.linspace(0, 1, 41), color=COLOURS[0])
        for edge, bar in zip(bins, bars):
            if edge >= 0.5 - 1e-9:
                bar.set_color(COLOURS[1])
        left.axvline(0.5 + figures["margin"], color="#5c6166", linewidth=1, linestyle=(0, (4, 2)))
        left.set(
            xlabel="probability of the weakest step of the cycle",
            ylabel="triples of responses",
            xlim=(0, 1),
            title=f"{100 * figures['cyclic_triples']:.1f} % are cycles (red), "
            f"{100 * figures['cyclic_triples_with_margin']:.1f} % beyond the margin",
        )
        limits = np.array([odds.min(), odds.max()])
        found = right.hexbin(
            odds[:, 1],
            odds[:, 0],
            gridsize=40,
            mincnt=1,
            norm=LogNorm(),
            cmap="Blues",
            edgecolors="#8fb3c4",
            linewidths=0.3,
        )
        right.plot([0, limits[1]], [0, limits[1]], color=COLOURS[1], linewidth=1)
        right.set(
            xlabel="log-odds of the nearest Bradley-Terry model",
            ylabel="the judge's log-odds",
            title=f"{100 * figures['cyclic_part']:.1f} % of the squares are not explained",
        )
        figure.colorbar(found, ax=right, label="pairs of responses")
        for axes in (left, right):
            axes.spines[["top", "right"]].set_visible(False)
            axes.title.set_fontsize(9.5)
        return svg_file(figure)


def as_text(value, decimals=1, scale=1):
    """A figure as text; a dash where it is not known."""
    if value is None:
        return "–"
    text = f"{scale * value:,.{decimals}f}"
    return (text[1:] if text.startswith("-") and not text.strip("-0.,") else text).replace("-", "−")
