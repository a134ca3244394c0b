"""The pages of the report: what they show, and that they load nothing.

python -m pytest tests/test_report_pages.py
"""

import json

from helpers.reports import (  # noqa: F401
    MODEL,
    Page,
    experiment_fixture,
    make_experiment,
    read,
    summary_of,
    text_of,
    write_data_only,
    write_json,
    write_pages_without_plots,
    write_report,
)

from analysis import page, plots
from analysis.experiment import read_responses


def test_headline_shows_the_last_evaluated_iteration(experiment):
    (found,) = read([experiment])
    assert page.progress(found).startswith("2 of 3 iterations have finished")
    cards = page.headline(found)
    assert [value for _, value, _ in cards] == ["70.0 %", "55.0 %", "0.400", "2.50", "+20.0 %"]
    assert "60.0 to 80.0" in cards[0][2]
    assert "2 (max P − ½)" in cards[2][2]  # the gap's definition stands where it is first shown


def test_iterations_and_title_come_from_the_settings(experiment):
    settings = json.loads((experiment / "run.json").read_text())
    write_json(experiment / "run.json", settings | {"ITERATIONS": "2", "METHOD_TITLE": "A method"})
    found = read([experiment])
    assert found[0]["state"]["total"] == 2 and "method <b>A method</b>" in write_pages_without_plots(found)[0]
    write_json(experiment / "run.json", settings)  # of a version that did not write them
    found = read([experiment])
    assert found[0]["state"]["total"] == 3 and "method <b>comal</b>" in write_pages_without_plots(found)[0]


def test_pages_load_nothing_and_escape_text(experiment):
    index = write_report([experiment])
    for path in (index, index.with_name("responses.html")):
        source = path.read_text()
        page = Page(source)
        assert all(link.startswith("#") or link in ("index.html", "responses.html") for link in page.links)
        assert "http" not in source and "@import" not in source and "script" not in page.tags
        assert source.count("url(") == source.count("url(#")
    text = text_of(index.with_name("responses.html"))
    assert "<script>alert(1)</script>" in text and "<b>new</b> & more" in text
    assert "with 75 %" in text and "with 25 %" in text
    assert Page(index.read_text()).tags.count("svg") == 17  # all plots


def test_settings_are_escaped(experiment):
    write_json(experiment / "run.json", {"METHOD": "<i>x</i>", "MODEL": "<script>", "<u>": "y"})
    source, _ = write_pages_without_plots(read([experiment]))
    assert "&lt;script&gt;" in source and not any(tag in source for tag in ("<script>", "<i>x", "<u>"))


def test_responses_are_the_first_ones(experiment):
    (row,) = read_responses(*read([experiment]), num_prompts=1)
    assert (row["start"]["text"], row["previous"]["text"], row["current"]["text"]) == (
        "old",
        "before",
        "<b>new</b> & more",
    )
    assert (row["win_prob_start"], row["win_prob_previous"]) == (0.75, 0.25)


def test_two_experiments_are_laid_over_each_other(experiment, tmp_path):
    other = make_experiment(tmp_path / "exps" / "second")
    write_json(other / "run.json", {"METHOD": "inpo-small", "MODEL": MODEL, "SPLITS": "1"})
    index = write_report([experiment, other], tmp_path / "out")
    assert index == tmp_path / "out" / "index.html"
    assert [found["name"] for found in summary_of(index)] == ["first", "second"]
    source = index.read_text()
    figure = source[source.index("<h3>Win rate against the initial policy") :].partition("</figure>")[0]
    assert "first" in figure and "second" in figure
    assert all(figure.count(f"stroke: {colour}") >= 2 for colour in plots.COLOURS[:2])
    settings = source[source.index("<h2>Settings") :]
    rows = {name: differ for name, _, differ in page.settings_rows(summary_of(index))}
    assert rows["METHOD"] and not rows["MODEL"]
    assert settings.count('<tr class="differs">') == sum(rows.values())


def test_experiments_of_one_name_are_told_apart(experiment, tmp_path):
    found = write_data_only([experiment, make_experiment(tmp_path / "elsewhere" / "first")])
    assert [row["name"] for row in found] == [str(experiment), str(tmp_path / "elsewhere" / "first")]
