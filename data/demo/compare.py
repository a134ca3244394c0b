"""Methods compared on the demo's game: the duality gap of the last iterations, and a picture of the way there.

python data/demo/compare.py exps/compare/comal-0 exps/compare/iter-ipo-0 --output compare.svg
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from game import NAMES  # noqa: E402

from utils import StageError, run, write_text  # noqa: E402

LAST_ITERATIONS = 6  # single iterations are noisy; their mean over the last ones is not


def read_run(experiment):
    """What comes of a run that comal.sh has finished, by name.

    `moves` are the policies that became the reference, where that did not happen after every iteration; of
    `duality_gaps` and `policies` there is one value for each policy, that of the initial one first.
    """
    try:
        settings = json.loads((experiment / "run.json").read_text())
        rows = json.loads((experiment / "game.json").read_text())
    except (OSError, ValueError) as error:
        raise StageError(f"{experiment}: no finished run of the demo ({error})") from None
    iterations = int(settings.get("ITERATIONS") or int(settings["ROUNDS"]) * int(settings["SPLITS"]))
    expected = ["start", *range(iterations)]
    if [row["iteration"] for row in rows] != expected:
        raise StageError(f"{experiment}: game.json lacks iterations; let comal.sh finish first")
    every, late = int(settings["UPDATE_INTERVAL"]), rows[-LAST_ITERATIONS:]
    return {
        "method": settings["METHOD"],
        "title": settings.get("METHOD_TITLE", settings["METHOD"]),
        "seed": int(settings["SEED"]),
        "mean_late_gap": sum(row["duality_gap"] for row in late) / LAST_ITERATIONS,
        "largest_late_other": max(row["other"] for row in late),
        "duality_gaps": [row["duality_gap"] for row in rows],
        "policies": [row["distribution"] for row in rows],
        "moves": list(range(every, len(rows) - 1, every)) if every > 1 else [],
    }


def main(experiments: list, output: str):
    """Print the mean duality gap of the last iterations, method by method and seed by seed, and draw the way there.

    Args:
        experiments: folders of finished runs, all of the same length
        output: picture, .svg; the figures go beside it (.json)
    """
    target = Path(output)
    if target.suffix != ".svg":
        raise StageError(f"--output should end in .svg, got {output}")
    runs = [read_run(Path(experiment)) for experiment in experiments]
    if len({len(run["policies"]) for run in runs}) != 1:
        raise StageError("the runs have different numbers of iterations")
    titles = {run["method"]: run["title"] for run in runs}  # in the order in which they are given
    seeds = sorted({run["seed"] for run in runs})
    last = len(runs[0]["policies"]) - 1
    print(
        f"\nMean duality gap of iterations {last - LAST_ITERATIONS + 1} to {last} (the initial policy's: "
        f"{runs[0]['duality_gaps'][0]:.3f}), and the largest mass on other responses in them.\n"
        "The duality gap is 2 (max_y P(y > policy) - 1/2): 0 at a Nash policy and at most 1.\n"
    )
    print(f"{'':24}" + "".join(f"{f'seed {seed}':>10}" for seed in seeds) + f"{'other':>10}")
    for method, title in titles.items():
        own = {run["seed"]: run for run in runs if run["method"] == method}
        gaps = "".join(f"{own[seed]['mean_late_gap']:10.3f}" if seed in own else f"{'-':>10}" for seed in seeds)
        print(f"{title:24}{gaps}{max(run['largest_late_other'] for run in own.values()):10.3f}")
    names = ("method", "seed", "mean_late_gap", "largest_late_other", "duality_gaps")
    figures = [{name: run[name] for name in names} for run in runs]
    write_text(target.with_suffix(".json"), json.dumps(figures, indent=1) + "\n")
    write_text(target, draw(runs, titles))


def draw(runs, titles):
    """The SVG file: the gap by iteration, mean over seeds with their range as a band and triangles where a method's
    reference moves; beside it one simplex for each method, {method: title}."""
    from matplotlib.figure import Figure

    from analysis.plots import COLOURS, plot_style, svg_file

    with plot_style("compare"):
        figure = Figure(figsize=(10, 4.4), layout="constrained")
        wide, narrow = figure.subfigures(1, 2, width_ratios=[1.15, 1])
        axes = wide.add_subplot()
        places = list(narrow.subplots(2, 2).flat)
        for place in places:
            place.set_axis_off()
        for (method, title), colour, simplex in zip(titles.items(), COLOURS, places):
            own = [run for run in runs if run["method"] == method]
            draw_gaps(axes, own, title, colour)
            draw_simplex(simplex, own, title, colour)
        axes.axhline(0, color="#b9b6ae", linewidth=0.8)
        ticks = range(0, len(runs[0]["policies"]), 3)
        axes.set(xlabel="iteration", ylabel="duality gap", xlim=(0, None), ylim=(-0.02, None), xticks=ticks)
        axes.grid(axis="y", color="#e8e6e1", linewidth=0.7)
        axes.spines[["top", "right"]].set_visible(False)
        wide.legend(loc="outside upper center", ncols=4, frameon=False, handlelength=1.2, columnspacing=1.2)
        narrow.supxlabel(
            "square: initial policy, star: Nash policy; thin lines: the other seeds", fontsize=8.5, color="#5c6166"
        )
        return svg_file(figure)


def draw_gaps(axes, runs, title, colour):
    """The duality gap of one method by iteration."""
    import numpy as np

    gaps = np.array([each["duality_gaps"] for each in runs])  # (seeds, policies)
    axes.plot(gaps.mean(axis=0), color=colour, label=title, linewidth=1.8)
    axes.fill_between(range(gaps.shape[1]), gaps.min(axis=0), gaps.max(axis=0), color=colour, alpha=0.15, linewidth=0)
    on_axis = dict(clip_on=False, zorder=5, transform=axes.get_xaxis_transform())
    for move in sorted({move for each in runs for move in each["moves"]}):
        axes.plot(move, 0, "^", color=colour, markersize=5.5, **on_axis)


def draw_simplex(axes, runs, title, colour):
    """The answer distributions of one method's policies, those of the first seed in bold."""
    import numpy as np

    corners = np.array([[0, 0], [1, 0], [0.5, 3**0.5 / 2]])  # all mountains, all sea, all city
    nash = np.array([4, 3, 4]) / 11 @ corners
    axes.fill(*corners.T, facecolor="#f7f6f2", edgecolor="#b9b6ae")
    for number, each in enumerate(runs):
        path = np.array(each["policies"]) @ corners
        width, alpha, size = (1.3, 1, 2.6) if number == 0 else (0.7, 0.45, 1.4)
        axes.plot(*path.T, color=colour, marker="o", linewidth=width, alpha=alpha, markersize=size)
    axes.plot(*path[0], "s", color="black", markersize=4)
    axes.plot(*nash, "*", color="black", markersize=9, zorder=5)
    axes.set_title(title, fontsize=9.5, color=colour)
    axes.set_aspect("equal")
    axes.set(xlim=(-0.17, 1.12), ylim=(-0.14, 0.98))
    for name, (x, y), shift in zip(NAMES, corners, (-0.1, -0.1, 0.05)):
        axes.text(x, y + shift, name, ha="center", fontsize=8, color="#5c6166")


if __name__ == "__main__":
    run(main)
