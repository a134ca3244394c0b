"""What all plots have in common, and the plots of the report, as SVG: text stays text, and the same data gives the same
file."""

import math
import re
from io import StringIO

from markupsafe import Markup, escape

from analysis.contents import Line, Plot

COLOURS = ("#1f6f8b", "#c8553d", "#6a5d8f", "#78862f", "#b0892e", "#55606a")  # one for each experiment
STAGE_COLOURS = {
    "sampling": "#5b8fa8",
    "scoring": "#93b7be",
    "pairs": "#d9c9a3",
    "logprobs": "#e2a76f",
    "start_logprobs": "#efcfae",
    "training": "#b5654a",
    "start_responses": "#726a92",
    "responses": "#8d86a9",
    "evaluation": "#b9b4cc",
    "matrix": "#d8d5e2",
}
OTHER_STAGE = "#9aa0a6"
GREY = "#5c6166"  # of text beside plots
STYLES = {
    "solid": dict(linewidth=1.8, marker="o", markersize=3.2),
    "thin": dict(linewidth=0.8),
    "dashed": dict(linewidth=1.4, linestyle=(0, (4, 2)), marker="o", markersize=4, markerfacecolor="white"),
    "points": dict(
        linestyle="none", marker="o", markersize=4.2, markeredgecolor="white", markeredgewidth=0.7, zorder=4
    ),
}


def known(line: Line, experiment: dict) -> list:
    """The rows where a figure is known."""
    return [row for row in experiment[line.source] if row[line.field] is not None]


def series(line: Line, experiment: dict, scale: float) -> tuple:
    """([x], [y], [(low, high)] or []) of the rows where the figure is known."""
    rows = known(line, experiment)
    with_bands = bool(line.band) and all(row[line.band] for row in rows)
    xs, ys, bands = [], [], []
    for row in rows:
        if xs and row["iteration"] - xs[-1] > 1.001:  # an iteration is missing: no line goes across
            xs.append(row["iteration"] - 0.5)
            ys.append(math.nan)
            bands.append([math.nan, math.nan])
        xs.append(row["iteration"])
        ys.append(scale * row[line.field])
        bands.append([scale * bound for bound in row[line.band]] if with_bands else [])
    return xs, ys, bands if with_bands else []


def new_axes(unit: str) -> tuple:
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


def plot_style(salt: str):
    """A context in which text stays text and the same data gives the same file."""
    import matplotlib

    return matplotlib.rc_context(
        {
            "svg.fonttype": "none",
            "svg.hashsalt": salt,
            "font.size": 9.5,
            "axes.edgecolor": "#b9b6ae",
            "axes.labelcolor": GREY,
            "xtick.color": GREY,
            "ytick.color": GREY,
            "xtick.major.size": 3,
            "ytick.major.size": 0,
            "axes.formatter.useoffset": False,
        }
    )


def svg(figure, title: str) -> Markup:
    """A figure as an SVG element for the page, without what would be looked up elsewhere; it is markup, not text."""
    text = StringIO()
    figure.savefig(text, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    element = text.getvalue()
    element = element[element.index("<svg") :]
    element = re.sub(r' xmlns(:\w+)?="[^"]*"', "", element)
    element = re.sub(r"<metadata>.*?</metadata>", "", element, flags=re.DOTALL)
    element = re.sub(r'<g id="[^"]*"', "<g", element)
    element = re.sub(r' (width|height)="[\d.]+pt"', "", element, count=2)
    return Markup(element.replace("<svg", f'<svg role="img" aria-label="{escape(title)}"', 1))


def svg_file(figure) -> str:
    """A figure as a file of its own."""
    text = StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()


def draw_marks(axes, experiments, offset):
    """Faint lines at the ends of rounds, triangles on the axis where the reference moved."""
    rows = [(row, experiment["colour"]) for experiment in experiments for row in experiment["iterations"]]
    for place in sorted({row["iteration"] for row, _ in rows if row["round_ends"]}):
        axes.axvline(place + offset, color="#d4d1c9", linewidth=0.9, zorder=0)
    look = dict(markersize=5.5, clip_on=False, zorder=5, transform=axes.get_xaxis_transform())
    for row, colour in rows:
        if row["reference_moved"]:
            axes.plot(row["iteration"] + offset, 0, "^", color=colour, **look)


def draw_lines(plot: Plot, experiments: list) -> Markup:
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
            cut_axis(axes, plot, experiments)
        if axes.get_ylim()[1] >= 1000:
            axes.yaxis.set_major_formatter("{x:,.0f}")
        draw_marks(axes, experiments, 1 if plot.steps else 0.5)
        return svg(figure, plot.title)


def cut_axis(axes, plot, experiments):
    """Let the axis end a little above all but the highest 2 % of the values, where these are far above the others."""
    rows = [(row, line) for each in experiments for line in plot.lines for row in known(line, each)]
    values = sorted(plot.scale * row[line.field] for row, line in rows)
    top = 1.3 * max(plot.level, values[int(0.98 * (len(values) - 1))])
    if top < values[-1]:
        axes.set_ylim(values[0] - 0.05 * (top - values[0]), top)


def stage_names(experiments: list) -> list:
    """All stages that took time, the loop's own first and in its order."""
    found = {name for experiment in experiments for row in experiment["iterations"] for name in row["seconds"]}
    return [name for name in STAGE_COLOURS if name in found] + sorted(found - set(STAGE_COLOURS))


def draw_times(experiments: list) -> Markup:
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
                tops = [y for y in bottom if y]
                left = [x - 0.45 * width for x, y in zip(xs, bottom) if y]
                right = [x + 0.45 * width for x, y in zip(xs, bottom) if y]
                axes.hlines(tops, left, right, color=experiment["colour"], linewidth=2.5)
        highest = max(sum(row["seconds"].values()) for e in experiments for row in e["iterations"]) / 60
        axes.set(xlim=(min(numbers) - 0.5, max(numbers) + 0.5), ylim=(0, 1.08 * highest or 1))
        draw_marks(axes, experiments, 0.5)
        return svg(figure, "Time by stage")


def as_text(value: float | None, decimals: int = 1, scale: float = 1) -> str:
    """A figure as text; a dash where it is not known."""
    if value is None:
        return "–"
    text = f"{scale * value:,.{decimals}f}"
    return (text[1:] if text.startswith("-") and not text.strip("-0.,") else text).replace("-", "−")
