"""The values that the templates of the report's two pages need, from experiments as experiment.py reads them."""

import re
from collections.abc import Iterable
from pathlib import Path

from analysis.contents import COLUMNS, SECTIONS
from analysis.matrix import draw_matrix, picture_size
from analysis.plots import (
    GREY,
    OTHER_STAGE,
    STAGE_COLOURS,
    as_text,
    draw_lines,
    draw_times,
    has_data,
    series,
    stage_names,
)


def index_html(experiments: list) -> str:
    """The report's page."""
    begun = any(experiment["iterations"] for experiment in experiments)
    return render(
        "index.html.j2",
        title="COMAL: " + ", ".join(experiment["name"] for experiment in experiments),
        experiments=list(map(top, experiments)),
        several=len(experiments) > 1,
        any_moved=any(row["reference_moved"] for experiment in experiments for row in experiment["iterations"]),
        sections=sections(experiments) if begun else [],
        matrices=[matrix(experiment) for experiment in experiments if experiment["matrix"]],
        table=iterations_table(experiments),
        settings=settings_rows(experiments),
    )


def responses_html(experiments: list, responses: Iterable) -> str:
    """The page of responses, of which `experiment.read_responses` has read some for each experiment."""
    return render("responses.html.j2", title="COMAL: responses", experiments=list(map(columns, experiments, responses)))


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


def top(experiment: dict) -> dict:
    """What was run, how far it is, and the headline figures."""
    settings = experiment["settings"]
    facts = [
        ("method", settings.get("METHOD_TITLE") or settings.get("METHOD")),
        *((name, settings.get(key)) for name, key in (("model", "MODEL"), ("judge", "JUDGE"), ("fork of", "FROM"))),
    ]
    return {
        "name": experiment["name"],
        "colour": experiment["colour"],
        "facts": [(name, value) for name, value in facts if value],
        "progress": progress(experiment),
        "last_evaluated": experiment["state"]["last_evaluated"],
        "cards": headline(experiment),
        "unread": experiment["unread"],
    }


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
    """[(label, figure, note)] of the last evaluated iteration."""
    last, start = experiment["state"]["last_evaluated"], experiment["start"]
    if last is None:
        return []
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


def picture(title, legend, svg, caption, width=None):
    """A plot with what stands around it, for the template."""
    return {"title": title, "legend": legend, "svg": svg, "caption": caption, "width": width}


def entry(kind, colour, label):
    """One entry of a legend."""
    return {"kind": kind, "colour": colour, "label": label}


def names_legend(experiments):
    """The names of the experiments, where there are several."""
    return [entry("dot", experiment["colour"], experiment["name"]) for experiment in experiments]


def line_legend(plot, experiments, shown):
    """Names where there are several experiments, and what the lines are; `shown` are those that have data."""
    entries = names_legend(shown) if len(experiments) > 1 else []
    colour = experiments[0]["colour"] if len(experiments) == 1 else GREY
    for line in plot.lines:
        if any(series(line, experiment, 1)[0] for experiment in shown):
            entries.append(entry(line.style, colour, line.label))
    if plot.start and any(experiment["start"].get(plot.start) is not None for experiment in shown):
        entries.append(entry("dotted", colour, "the initial policy"))
    return entries


def sections(experiments: list) -> list:
    """[{title, plots, missing}]: plots without data are named in one line each."""
    found = []
    for title, plots in SECTIONS.items():
        pictures, missing = times(experiments) if title == "Time" else ([], [])
        for plot in plots:
            shown = [experiment for experiment in experiments if has_data(plot, [experiment])]
            if not shown:
                missing.append(f"{plot.title}: {plot.missing}")
            elif plot.lines[0].field == "skipped" and not any(row["skipped"] for e in shown for row in e["iterations"]):
                missing.append(f"{plot.title}: No record has been skipped so far.")
            else:
                legend = line_legend(plot, experiments, shown)
                pictures.append(picture(plot.title, legend, draw_lines(plot, experiments), plot.caption))
        found.append({"title": title, "plots": pictures, "missing": missing})
    return found


def times(experiments: list) -> tuple:
    """([the bars of the time by stage], [a line when there are none])."""
    names = stage_names(experiments)
    if not names:
        return [], ["Time by stage: No stage has ended yet (logs/times.jsonl)."]
    shown = [experiment for experiment in experiments if any(row["seconds"] for row in experiment["iterations"])]
    legend = names_legend(shown) if len(experiments) > 1 else []
    legend += [entry("block", STAGE_COLOURS.get(name, OTHER_STAGE), name.replace("_", " ")) for name in names]
    caption = "Minutes of each stage, one bar for each iteration. The times of a stage that ran more than once add up."
    if len(shown) > 1:
        caption += " The cap of a bar has its experiment's colour."
    return [picture("Time by stage", legend, draw_times(shown), caption)], []


def matrix(experiment: dict) -> dict:
    """The newest matrix of an experiment and what it says about the last checkpoint."""
    result = experiment["matrix"]
    names, last = result["names"], result["worst_case"][-1]
    mixture = ", ".join(
        f"{name} {as_text(share, 2)}" for name, share in zip(names, result["nash_mixture"]) if share > 0.005
    )
    kind = "mean win probability" if result["measure"] == "mean_win_prob" else "win rate"
    caption = (
        f"The {kind} of the row against the column in %, on {result['num_prompts']} prompts in both orders. The worst "
        f"result of {names[-1]} is {as_text(last['win'], 1, 100)} % against {names[last['against']]} (95 % interval of "
        f"its worst over all opponents: {interval(last['interval'], 100)}). A Nash mixture of these players: {mixture}."
    )
    width = round(100 * picture_size(names))  # pixels: its letters are as large as those of the other plots
    return picture(experiment["name"], [], draw_matrix(result), caption, width)


# ---------------------------------------------------------------------------------------------- tables


def iterations_table(experiments: list) -> dict:
    """{columns, rows: [{iteration, moved, round_ends, cells}]}: all main figures, one cell for each experiment."""
    found = [{row["iteration"]: row for row in experiment["iterations"]} for experiment in experiments]
    columns = [
        column for column in COLUMNS if any(row[column.field] is not None for rows in found for row in rows.values())
    ]
    bests = {
        (column.field, place): column.best(known)
        for column in columns
        if column.best
        for place, rows in enumerate(found)
        if (known := [row[column.field] for row in rows.values() if row[column.field] is not None])
    }
    table = []
    for iteration in sorted(set().union(*found)):
        here = [rows.get(iteration) for rows in found]
        known = [(row, experiment["colour"]) for row, experiment in zip(here, experiments) if row]
        table.append(
            {
                "iteration": iteration,
                "moved": [colour for row, colour in known if row["reference_moved"]],
                "round_ends": any(row["round_ends"] for row, _ in known),
                "cells": [
                    cell(column, row, bests.get((column.field, place)))
                    for column in columns
                    for place, row in enumerate(here)
                ],
            }
        )
    return {"columns": columns, "rows": table}


def cell(column, row, best):
    """A figure of an iteration; an empty cell where the experiment has no such iteration."""
    if row is None:
        return {"text": "", "interval": "", "best": False}
    value = row[column.field]
    if column.field == "weights":
        return {"text": "kept" if value else "–", "interval": "", "best": False}
    text, bounds = as_text(value, column.decimals, column.scale), row[column.band] if column.band else None
    return {"text": text, "interval": interval(bounds, column.scale), "best": best is not None and value == best}


def settings_rows(experiments: list) -> list:
    """[{name, texts, differs}]: run.json, one value for each experiment."""
    rows = []
    for name in dict.fromkeys(name for experiment in experiments for name in experiment["settings"]):
        values = [experiment["settings"].get(name, "–") for experiment in experiments]
        rows.append({"name": name, "texts": list(map(shorter, values)), "differs": len(set(values)) > 1})
    return rows


def shorter(value):
    """A hash by its first digits, everything else whole."""
    return value[:12] + "…" if re.fullmatch("[0-9a-f]{64}", value) else value


# ---------------------------------------------------------------------------------------------- responses


def columns(experiment, responses):
    """An experiment's name, colour and rows: {prompt, answers: [(title, answer or None, win probability or None)]},
    where the win probability is that of the current answer over this one."""
    last = experiment["state"]["last_evaluated"]
    before = f"previous iteration ({last - 1})" if last else "previous iteration (the initial policy)"
    rows = [
        {
            "prompt": row["prompt"],
            "answers": [
                ("initial policy", row.get("start"), row.get("win_prob_start")),
                (before, row.get("previous"), row.get("win_prob_previous")),
                (f"iteration {last} (current)", row["current"], None),
            ],
        }
        for row in responses
    ]
    return {"name": experiment["name"], "colour": experiment["colour"], "rows": rows}
