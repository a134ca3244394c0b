"""The values that the templates of the report's two pages need, from experiments as experiment.py reads them."""

import re
from collections.abc import Iterable
from pathlib import Path

from analysis.contents import COLUMNS, SECTIONS
from analysis.matrix import MEASURES, draw_matrix, picture_size
from analysis.plots import GREY, OTHER_STAGE, STAGE_COLOURS, as_text, draw_lines, draw_times, known, stage_names


def index_html(experiments: list) -> str:
    """The report's page."""
    return render(
        "index.html.j2",
        title="COMAL: " + ", ".join(experiment["name"] for experiment in experiments),
        experiments=experiments,
        progress=progress,
        headline=headline,
        sections=sections,
        any_moved=any(row["reference_moved"] for experiment in experiments for row in experiment["iterations"]),
        matrices=[matrix(experiment) for experiment in experiments if experiment["matrix"]],
        table=iterations_table(experiments),
        settings=settings_rows(experiments),
    )


def responses_html(experiments: list, responses: Iterable) -> str:
    """The page of responses, of which `experiment.read_responses` has read some for each experiment."""
    return render("responses.html.j2", title="COMAL: responses", experiments=list(zip(experiments, responses)))


def render(template: str, **values) -> str:
    """A page from a file in templates/; text is escaped, what is markup (a plot) is not."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).with_name("templates")),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["as_text"] = as_text
    return environment.get_template(template).render(values)


def interval(bounds, scale=1):
    return f"{as_text(bounds[0], scale=scale)} to {as_text(bounds[1], scale=scale)}" if bounds else ""


# ---------------------------------------------------------------------------------------------- the top


def progress(experiment: dict) -> str:
    """One sentence about how far the experiment is."""
    found, rows = experiment["state"], experiment["iterations"]
    of = f" of {found['total']}" if found["total"] is not None else ""
    have = "iteration has" if (found["total"] or found["finished"]) == 1 else "iterations have"
    text = f"{found['finished']}{of} {have} finished"
    if rows and not rows[-1]["finished"]:
        text += f", and iteration {rows[-1]['iteration']} has begun"
    return f"{text}; the last file was written at {found['last_written'][:16].replace('T', ' ')} UTC."


def headline(experiment: dict) -> list:
    """[(label, figure, note)] of the last evaluated iteration, which there is."""
    last, start = experiment["state"]["last_evaluated"], experiment["start"]
    rows = {row["iteration"]: row for row in experiment["iterations"]}
    row = rows[last]
    cards = [
        (
            f"win rate against the {policy}",
            as_text(row[f"win_rate_{name}"], scale=100) + " %",
            f"95 % interval: {interval(row[f'win_rate_{name}_interval'], 100)}",
        )
        for name, policy in (("start", "initial policy"), ("previous", "previous iteration"))
        if row[f"win_rate_{name}"] is not None
    ]
    if row["duality_gap"] is not None:
        note = "2 (max P − ½), 0 at a Nash policy"
        if start["duality_gap"] is not None:
            note += f"; initial policy: {as_text(start['duality_gap'], 3)}"
        cards.append(("duality gap", as_text(row["duality_gap"], 3), note))
    # A checkpoint's KL is measured on what is sampled from it, one iteration later.
    after = rows.get(last + 1, {}).get("kl_start")
    kl, of = (after, "of this checkpoint") if after is not None else (row["kl_start"], "of the checkpoint before")
    if kl is not None:
        cards.append(("KL from the initial policy", as_text(kl, 2), f"nats per response, {of}"))
    if row["length_change"] is not None:
        sign = "+" if row["length_change"] > 0 else ""
        note = f"{as_text(row['response_tokens'])} tokens; initial policy: {as_text(row['start_tokens'])}"
        cards.append(("mean response length", f"{sign}{as_text(row['length_change'], scale=100)} %", note))
    return cards


# ---------------------------------------------------------------------------------------------- plots


# A picture is (title, legend, SVG, caption) and perhaps its greatest width in pixels, as the template's macro `figure`
# takes it; a legend is a list of (kind of mark, colour, label).


def names_legend(experiments, shown):
    """The names of those that are shown, where there are several experiments."""
    return [("dot", experiment["colour"], experiment["name"]) for experiment in shown if len(experiments) > 1]


def line_legend(plot, experiments):
    """Names where there are several experiments, and what the lines are, as far as there is data."""
    shown = [experiment for experiment in experiments if any(known(line, experiment) for line in plot.lines)]
    legend = names_legend(experiments, shown)
    colour = experiments[0]["colour"] if len(experiments) == 1 else GREY
    for line in plot.lines:
        if any(known(line, experiment) for experiment in shown):
            legend.append((line.style, colour, line.label))
    if any(experiment["start"].get(plot.start) is not None for experiment in shown):
        legend.append(("dotted", colour, "the initial policy"))
    return legend


def sections(experiments: list) -> list:
    """[(title, pictures, messages)]: each plot without data is named in a message."""
    found = []
    for title, plots in SECTIONS.items():
        pictures, missing = times(experiments) if title == "Time" else ([], [])
        for plot in plots:
            values = [row[line.field] for line in plot.lines for each in experiments for row in known(line, each)]
            if any(values) or (values and not plot.hide_zeros):
                svg = draw_lines(plot, experiments)
                pictures.append((plot.title, line_legend(plot, experiments), svg, plot.caption))
            else:
                missing.append(f"{plot.title}: {plot.missing}")
        found.append((title, pictures, missing))
    return found


def times(experiments: list) -> tuple:
    """([the bars of the time by stage], [a message when there are none])."""
    names = stage_names(experiments)
    if not names:
        return [], ["Time by stage: No stage has ended yet (logs/times.jsonl)."]
    shown = [experiment for experiment in experiments if any(row["seconds"] for row in experiment["iterations"])]
    legend = names_legend(experiments, shown)
    legend += [("block", STAGE_COLOURS.get(name, OTHER_STAGE), name.replace("_", " ")) for name in names]
    caption = "Minutes of each stage, one bar for each iteration. The times of a stage that ran more than once add up."
    if len(shown) > 1:
        caption += " The cap of a bar has its experiment's colour."
    return [("Time by stage", legend, draw_times(shown), caption)], []


def matrix(experiment: dict) -> tuple:
    """The picture of the newest matrix of an experiment, and what it says about the last checkpoint."""
    result = experiment["matrix"]
    names, last = result["names"], result["worst_case"][-1]
    mixture = ", ".join(
        f"{name} {as_text(share, 2)}" for name, share in zip(names, result["nash_mixture"]) if share > 0.005
    )
    caption = (
        f"The {MEASURES[result['measure']]} of the row against the column in %, on {result['num_prompts']} prompts in "
        f"both orders. The worst result of {names[-1]} is {as_text(last['win'], 1, 100)} % against "
        f"{names[last['against']]} (95 % interval of its worst over all opponents: {interval(last['interval'], 100)}). "
        f"A Nash mixture of these players: {mixture}."
    )
    width = round(100 * picture_size(names))  # pixels: its letters are as large as those of the other plots
    return experiment["name"], [], draw_matrix(result), caption, width


# ---------------------------------------------------------------------------------------------- tables


def iterations_table(experiments: list) -> dict:
    """{columns, rows: [{iteration, moved, round_ends, cells}]}: all main figures, one cell for each experiment."""
    found = [{row["iteration"]: row for row in experiment["iterations"]} for experiment in experiments]
    columns, bests = [], []  # of each column the best figure of each experiment
    for column in COLUMNS:
        values = [[row[column.field] for row in rows.values() if row[column.field] is not None] for rows in found]
        if any(values):
            columns.append(column)
            bests.append([column.best(own) if column.best and own else None for own in values])
    table = []
    for iteration in sorted(set().union(*found)):
        here = [rows.get(iteration) for rows in found]
        table.append(
            {
                "iteration": iteration,
                "moved": [each["colour"] for row, each in zip(here, experiments) if row and row["reference_moved"]],
                "round_ends": any(row["round_ends"] for row in here if row),
                "cells": [
                    cell(column, row, best)
                    for column, own_bests in zip(columns, bests)
                    for row, best in zip(here, own_bests)
                ],
            }
        )
    return {"columns": columns, "rows": table}


def cell(column, row, best):
    """(figure, its interval, whether it is the best) of an iteration; empty where the experiment has no such one."""
    if row is None:
        return "", "", False
    value = row[column.field]
    if column.field == "weights":
        return "kept" if value else "–", "", False
    text, bounds = as_text(value, column.decimals, column.scale), row[column.band] if column.band else None
    return text, interval(bounds, column.scale), best is not None and value == best


def settings_rows(experiments: list) -> list:
    """[(name, texts, whether they differ)]: run.json, one value for each experiment; of a hash the first digits."""
    rows = []
    for name in dict.fromkeys(name for experiment in experiments for name in experiment["settings"]):
        values = [experiment["settings"].get(name, "–") for experiment in experiments]
        texts = [value[:12] + "…" if re.fullmatch("[0-9a-f]{64}", value) else value for value in values]
        rows.append((name, texts, len(set(values)) > 1))
    return rows
