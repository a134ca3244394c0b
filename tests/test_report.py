"""The report: the figures of a small experiment made by hand, missing and torn files, the cache.

python -m pytest tests/test_report.py
"""

import json
import math
import os
import shutil

import pytest
from helpers.reports import (  # noqa: F401
    experiment_fixture,
    make_experiment,
    sample,
    step,
    summary_of,
    text_of,
    write_data_only,
    write_json,
    write_jsonl,
    write_report,
)

from analysis import figures, plots, report
from analysis.contents import Line
from analysis.experiment import read_experiment
from analysis.figures import Files, read_json, training_figures
from utils import StageError

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
