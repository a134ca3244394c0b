"""The report: the figures of a small experiment made by hand, missing and torn files, several experiments, the pages.

python -m pytest tests/test_report.py
"""

import json
import math
import os
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest

from analysis import figures, page, plots, report
from analysis.contents import Line
from analysis.experiment import read_experiment, read_responses
from analysis.figures import Files, read_json, training_figures
from utils import StageError

MODEL = "models/start"


def write_json(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def write_jsonl(path, *records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def sample(text, num_tokens, finish_reason="stop"):
    return {"text": text, "token_ids": [0] * num_tokens, "finish_reason": finish_reason}


def score(prompt_id, order_gap, label_mass):
    return {"prompt_id": prompt_id, "order_gap": order_gap, "label_mass": label_mass}


def pair(prompt_id, last, ref):
    return {
        "prompt_id": prompt_id,
        "last_chosen_logp": last[0],
        "last_rejected_logp": last[1],
        "ref_chosen_logp": ref[0],
        "ref_rejected_logp": ref[1],
    }


def step(number, kl_last, margin=0.0):
    return {
        "step": number,
        "loss": 1.0,
        "normalised_loss": 1 - number / 20,
        "margin": margin,
        "accuracy": 0.5,
        "kl_last": kl_last,
        "tokens_per_s": 100.0 * number,
    }


def comparison(prompt_id, prompt, response, baseline, win_prob):
    return {
        "prompt_id": prompt_id,
        "prompt": prompt,
        "samples": [sample(response, 3), sample(baseline, 2)],
        "win_probs": [[None, win_prob], [1 - win_prob, None]],
        "order_gap": 0.1,
        "label_mass": 1.0,
    }


def comparison_summary(win_rate, tokens):
    return {
        "win_rate": win_rate,
        "win_rate_interval": [win_rate - 0.1, win_rate + 0.1],
        "mean_win_prob": 0.55,
        "mean_win_prob_interval": [0.5, 0.6],
        "mean_tokens": tokens,
    }


@pytest.fixture
def experiment(tmp_path):
    return make_experiment(tmp_path / "exps" / "first")


def make_experiment(path):
    """Two iterations, a round each; the reference moves after the first, the second is complete too."""
    write_json(
        path / "run.json",
        {"METHOD": "comal", "MODEL": MODEL, "JUDGE": "judge", "SPLITS": "1", "ROUNDS": "3", "ETA": "0.002", "FROM": ""},
    )
    for number in (0, 1):
        folder = path / f"iter{number}"
        write_jsonl(
            folder / "train.samples.jsonl",
            {"prompt_id": "a", "samples": [sample("x", 10), sample("y", 20, "length")]},
            {"prompt_id": "b", "samples": [sample("x", 30), sample("x", 30)]},
        )
        write_jsonl(folder / "test.samples.jsonl", {"prompt_id": "c", "samples": [sample("x", 5), sample("y", 1)]})
        write_jsonl(folder / "train.scores.jsonl", score("a", 0.2, 0.9), score("b", None, None))
        write_jsonl(folder / "test.scores.jsonl", score("c", 0.4, 1.0))
        write_jsonl(folder / "train.pairs.jsonl", {"prompt_id": "a"})
        write_jsonl(folder / "test.pairs.jsonl", {"prompt_id": "c"})
        write_jsonl(folder / "data" / "test.jsonl", pair("c", (-4.0, -8.0), (-5.0, -8.5)))
        write_jsonl(
            folder / "ckpt" / "metrics.jsonl",
            *(step(number, kl_last=number / 10) for number in range(1, 21)),
            {
                "step": 20,
                "validation_loss": 1.0,
                "validation_normalised_loss": 0.7,
                "validation_margin": 2.0,
                "validation_accuracy": 0.8,
            },
        )
        write_json(folder / "ckpt" / "DONE", {})
        write_jsonl(
            folder / "logs" / "times.jsonl",
            {"stage": "sampling", "seconds": 30},
            {"stage": "training", "seconds": 60},
            {"stage": "sampling", "seconds": 90},
        )
        write_json(folder / "eval" / "vs_start.json", comparison_summary(0.6 + number / 10, [12, 10]))
        write_json(folder / "eval" / "vs_previous.json", comparison_summary(0.55, [12, 11]))
        write_jsonl(
            folder / "eval" / "vs_start.jsonl",
            comparison("e1", "<script>alert(1)</script>", "<b>new</b> & more", "old", 0.75),
            comparison("e2", "second", "two", "one", 0.5),
        )
        write_jsonl(
            folder / "eval" / "vs_previous.jsonl",
            comparison("e1", "<script>alert(1)</script>", "<b>new</b> & more", "before", 0.25),
            comparison("e2", "second", "two", "one", 0.5),
        )
        write_json(folder / "next.json", {"policy": f"{path}/iter{number}/ckpt", "reference": f"{path}/iter0/ckpt"})
    write_jsonl(path / "iter1" / "train.scores.skipped.jsonl", {"prompt_id": "z", "skipped": "too long"})
    # Under the initial policy the pair's log-probabilities are -7 and -10: (-4 + 7 - 8 + 10)/2 = 2.5.
    write_jsonl(path / "iter1" / "eval" / "start_logps.jsonl", pair("c", (-7.0, -10.0), (0.0, 0.0)))
    write_json(
        path / "game.json",
        [
            {"iteration": "start", "duality_gap": 0.5, "other": 0.1},
            {"iteration": 0, "duality_gap": 0.3, "other": 0.2},
            {"iteration": 1, "duality_gap": 0.4, "other": 0.05},
        ],
    )
    return path


def write_report(experiments, output=""):
    """The path of the report's page."""
    report.main(list(map(str, experiments)), str(output))
    return Path(output or experiments[0] / "report") / "index.html"


def summary_of(index):
    return json.loads(index.with_name("summary.json").read_text())["experiments"]


# ---- figures ----


def test_summary_has_the_figures_computed_by_hand(experiment):
    (found,) = summary_of(write_report([experiment]))
    first, second = found["iterations"]
    # Six responses of 96 tokens in all, one of them truncated.
    assert (first["sample_tokens"], first["truncated"]) == (pytest.approx(96 / 6), pytest.approx(1 / 6))
    # Two of three prompts were judged (the third's responses are identical) and have a pair.
    assert first["order_gap"] == pytest.approx(0.3)
    assert first["label_mass"] == pytest.approx(0.95)
    assert first["dropped"] == pytest.approx(1 / 3)
    assert (first["skipped"], second["skipped"]) == (0, 1)
    # (-4 + 5 - 8 + 8.5)/2 = 0.75 from the reference, which is the initial policy only before it moves.
    assert [row["kl_reference"] for row in (first, second)] == [0.75, 0.75]
    assert [row["kl_start"] for row in (first, second)] == [0.75, 2.5]
    assert [row["reference_moved"] for row in (first, second)] == [True, False]
    # The last tenth of 20 steps are steps 19 and 20.
    assert first["kl_moved"] == pytest.approx(1.95)
    assert first["training_loss"] == pytest.approx(1 - 19.5 / 20)
    assert (first["validation_loss"], first["tokens_per_s"]) == (0.7, pytest.approx(1050))
    assert first["seconds"] == {"sampling": 120, "training": 60}
    assert first["minutes"] == 3
    assert second["win_rate_start"] == pytest.approx(0.7)
    assert second["win_rate_start_interval"] == pytest.approx([0.6, 0.8])
    assert (second["win_rate_previous"], second["mean_win_prob_previous"]) == (0.55, 0.55)
    assert (second["response_tokens"], second["length_change"]) == (12, pytest.approx(0.2))
    assert [row["duality_gap"] for row in (first, second)] == [0.3, 0.4]
    assert found["start"] == {"duality_gap": 0.5, "other": 0.1, "response_tokens": 10}
    assert found["validation"] == [
        {"iteration": 1.0, "normalised_loss": 0.7, "margin": 2.0, "accuracy": 0.8},
        {"iteration": 2.0, "normalised_loss": 0.7, "margin": 2.0, "accuracy": 0.8},
    ]
    assert found["steps"][9]["iteration"] == 0.5
    assert found["state"]["finished"] == 2 and found["state"]["total"] == 3 and found["state"]["last_evaluated"] == 1


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


def test_training_curve_is_thinned_to_means():
    # 80 steps in 40 points: the first is the mean of margins 1 and 2, at step 2.
    found = training_figures(step(number, 0.0, margin=float(number)) for number in range(1, 81))
    assert len(found["steps"]) == figures.STEP_POINTS == 40
    assert (found["steps"][0]["step"], found["steps"][0]["margin"]) == (2, 1.5)


def test_training_that_goes_on_fills_its_part_of_the_iteration(experiment):
    (experiment / "iter1" / "ckpt" / "DONE").unlink()
    write_jsonl(experiment / "iter1" / "ckpt" / "metrics.jsonl", *(step(number, 0.0) for number in range(1, 6)))
    (found,) = write_data_only([experiment])
    assert found["steps"][-1]["iteration"] == 1.25  # step 5 of the 20 that iteration 0 had


def test_fork_begins_after_its_origin(experiment):
    fork = make_experiment(experiment.parent / "fork")
    for number in (1, 0):
        (fork / f"iter{number}").rename(fork / f"iter{number + 1}")
    write_jsonl(fork / "iter0" / "eval" / "responses.jsonl", {"prompt_id": "e1"})
    settings = json.loads((fork / "run.json").read_text()) | {"FROM": "exps/first/iter0"}
    write_json(fork / "run.json", settings)
    (fork / "iter2" / "eval" / "start_logps.jsonl").unlink()
    (found,) = write_data_only([fork])
    assert [row["iteration"] for row in found["iterations"]] == [1, 2]
    assert found["iterations"][0]["kl_start"] is None  # its reference is the origin's iter0, not the initial policy


# ---- what is missing ----


def test_every_file_may_be_missing(experiment):
    paths = sorted(path for path in experiment.rglob("*") if path.is_file() and path.name != "run.json")
    assert len(paths) == 33
    for path in paths:
        kept = path.read_bytes()
        path.unlink()
        write_data_only([experiment])
        path.write_bytes(kept)
    for path in paths:
        path.unlink()
    index = write_report([experiment])
    text = text_of(index)
    assert "Duality gap: There is no game.json" in text
    assert "<svg" not in index.read_text().partition("Skipped records")[0]  # nothing is shown empty


def read(paths):
    """The experiments as they go into the pages."""
    kept = read_json(paths[0] / "report" / "cache.json")
    found = report.read_apart(paths, [Files(kept) for _ in paths])
    for experiment in found:
        experiment["colour"] = plots.COLOURS[0]
    return found


def write_data_only(paths):
    """All of a report but its plots, which take most of the time."""
    found = read(paths)
    write_pages_without_plots(found)
    return found


def write_pages_without_plots(experiments):
    """(the report's page, the page of responses)"""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page, "sections", lambda experiments: [])
        index = page.index_html(experiments)
    return index, page.responses_html(experiments, [read_responses(experiment, 40) for experiment in experiments])


def test_torn_last_line_of_metrics_is_left_out(experiment):
    path = experiment / "iter1" / "ckpt" / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    (found,) = write_data_only([experiment])
    assert found["iterations"][1]["kl_moved"] == pytest.approx(1.95)
    assert found["iterations"][1]["validation_loss"] is None
    assert found["unread"] == []  # that line is being written


@pytest.mark.parametrize(
    "name",
    [
        "run.json",
        "game.json",
        "iter0/next.json",
        "iter0/eval/vs_start.json",
        "iter0/train.samples.jsonl",
        "iter0/data/test.jsonl",
        "iter0/logs/times.jsonl",
        "iter0/eval/vs_start.jsonl",
    ],
)
@pytest.mark.parametrize("content", [b"", b'{"prompt_id": "a", "sam', b'{"prompt_id": "a"}\n', b"[3]\n"])
def test_damaged_files_are_tolerated(experiment, name, content):
    (experiment / name).write_bytes(content)
    (found,) = write_data_only([experiment])
    assert len(found["iterations"]) == 2
    cut_json = name.endswith(".json") and content in (b"", b'{"prompt_id": "a", "sam')
    if "samples" in name or cut_json:
        assert name in found["unread"][0]


def test_iteration_without_evaluation_is_passed_over(experiment):
    for path in (experiment / "iter1" / "eval").iterdir():
        path.unlink()
    (found,) = write_data_only([experiment])
    assert found["state"]["last_evaluated"] == 0


def test_no_line_goes_across_a_missing_iteration(experiment):
    shutil.move(experiment / "iter1", experiment / "iter3")
    (found,) = write_data_only([experiment])
    xs, ys, _ = plots.series(Line("", "win_rate_start"), found, 1)
    assert xs == [0, 2.5, 3]
    assert ys[0] == 0.6 and math.isnan(ys[1]) and ys[2] == 0.7


def test_experiment_that_has_just_begun(tmp_path):
    write_json(tmp_path / "new" / "run.json", {"METHOD": "comal"})
    assert "No iteration has begun" in text_of(write_report([tmp_path / "new"]))


def test_folder_that_is_no_experiment_is_refused(tmp_path):
    with pytest.raises(StageError, match="is no experiment"):
        write_report([tmp_path])
    assert not (tmp_path / "report").exists()


def test_several_experiments_need_an_output_folder(experiment):
    with pytest.raises(StageError, match="--output"):
        write_report([experiment, make_experiment(experiment.parent / "second")])
    with pytest.raises(StageError, match="twice"):
        write_report([experiment, experiment / "."], experiment.parent / "out")


# ---- pages ----


class Page(HTMLParser):
    """Collects the text, the links and what a page would load, and checks that elements are closed."""

    VOID = {"meta", "br", "path", "use", "rect"}

    def __init__(self, source):
        super().__init__()
        self.text, self.links, self.open, self.tags = [], [], [], []
        self.feed(source)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "href", "xlink:href", "data", "action")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def text_of(path):
    return " ".join("".join(Page(Path(path).read_text()).text).split())


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


# ---- the cache ----


def test_unchanged_files_are_not_read_again(experiment, monkeypatch):
    read = []
    whole_records = figures.whole_records

    def noted(path, damage):
        read.append(path)
        return whole_records(path, damage)

    monkeypatch.setattr(figures, "whole_records", noted)
    monkeypatch.setattr(report, "index_html", lambda experiments: "")  # drawing takes a second
    first = summary_of(write_report([experiment]))
    assert len(read) == 21  # nine for each iteration; the initial policy's and their pairs; one listing
    read.clear()
    assert summary_of(write_report([experiment])) == first
    assert read == []
    changed = experiment / "iter0" / "train.samples.jsonl"
    write_jsonl(changed, {"prompt_id": "a", "samples": [sample("x", 10)]})
    (found,) = summary_of(write_report([experiment]))
    assert read == [changed]
    assert found["iterations"][0]["sample_tokens"] == pytest.approx(16 / 3)


def test_same_size_and_another_time_is_a_change(experiment):
    path = experiment / "iter0" / "test.scores.jsonl"
    before = write_data_and_cache(experiment)
    path.write_text(path.read_text().replace("0.4", "0.8"))
    os.utime(path, ns=(0, 0))
    after = write_data_and_cache(experiment)
    assert (before, after) == (pytest.approx(0.3), pytest.approx(0.5))


def write_data_and_cache(experiment):
    cache = experiment / "report" / "cache.json"
    files = Files(read_json(cache))
    found = read_experiment(experiment, files)
    write_json(cache, files.used)
    return found["iterations"][0]["order_gap"]


@pytest.mark.parametrize("content", ["", "[]", '{"code": "x", "figures": {"a": 1}}', '{"figures": 3}'])
def test_damaged_cache_is_ignored(experiment, content):
    (experiment / "report").mkdir()
    (experiment / "report" / "cache.json").write_text(content)
    assert write_data_and_cache(experiment) == pytest.approx(0.3)
