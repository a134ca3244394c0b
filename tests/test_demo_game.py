"""data/demo/game.py: its game, its table, and the comparison of methods, from runs whose figures are made up here.

python -m pytest tests/test_demo_game.py
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import compare as methods
import game
import pytest
from game import PREFERENCE, START

from analysis.nash import duality_gap

ROOT = Path(__file__).resolve().parents[1]


# ---- the game ----


def test_preference_of_the_game_is_zero_sum():
    for i in range(3):
        for j in range(3):
            assert PREFERENCE[i][j] + PREFERENCE[j][i] == pytest.approx(1)


@pytest.mark.parametrize(
    "policy, gap",
    [
        (
            (4 / 11, 3 / 11, 4 / 11),
            0,
        ),  # against it each answer wins 1/2, e.g. the sea: (0.9 * 4 + 0.5 * 3 + 0.1 * 4)/11
        ((1, 0, 0), 0.8),  # the best reply is the sea, which wins 0.9: 2 * 0.4
        ((0, 0, 1), 0.6),  # the mountains, 0.8: 2 * 0.3
        (START, 0.56),  # the sea: 0.9 * 0.8 + 0.5 * 0.1 + 0.1 * 0.1 = 0.78: 2 * 0.28
    ],
)
def test_duality_gap_values(policy, gap):
    assert duality_gap(policy, PREFERENCE) == pytest.approx(gap, abs=1e-12)


# ---- the table ----


def test_the_demos_table_keeps_rows_of_checkpoints_whose_weights_are_gone(tmp_path, monkeypatch):
    measured = []

    def describe(checkpoint, tokenizer=""):
        measured.append(Path(checkpoint).parent.name if Path(checkpoint).name == "ckpt" else "start")
        return {"distribution": [1, 0, 0], "other": 0, "duality_gap": 0.8}

    monkeypatch.setattr(game, "describe", describe)
    for i in range(2):
        (tmp_path / f"iter{i}/ckpt/model").mkdir(parents=True)
        (tmp_path / f"iter{i}/ckpt/DONE").touch()
        os.utime(tmp_path / f"iter{i}/ckpt/DONE", (1000 * i,) * 2)
        game.table(str(tmp_path), "models/policy")
        os.utime(tmp_path / "game.json", (1000 * i + 500,) * 2)
    assert measured == ["start", "iter0", "iter1"]
    (tmp_path / "iter0/ckpt/model").rmdir()
    (tmp_path / "iter1/eval").mkdir()
    (tmp_path / "iter1/eval/vs_start.json").write_text('{"mean_win_prob": 0.75}')  # now, later than the table
    game.table(str(tmp_path), "models/policy")
    assert measured == ["start", "iter0", "iter1"]  # nothing anew
    rows = json.loads((tmp_path / "game.json").read_text())
    assert [row["iteration"] for row in rows] == ["start", 0, 1] and rows[2]["win_prob"] == [0.75, None]


# ---- methods compared ----


def make_run(folder, method, seed, gaps, others=0.01, policy=(0.4, 0.3, 0.3), **settings):
    folder.mkdir(parents=True)
    settings = {"METHOD": method, "SEED": str(seed), "UPDATE_INTERVAL": "3", "ITERATIONS": "8"} | settings
    (folder / "run.json").write_text(json.dumps(settings))
    rows = [
        {"iteration": iteration, "duality_gap": gap, "other": others, "distribution": policy}
        for iteration, gap in zip(["start", *range(len(gaps))], [0.5, *gaps])
    ]
    (folder / "game.json").write_text(json.dumps(rows))
    return str(folder)


def compare(*arguments):
    return subprocess.run([sys.executable, ROOT / "data/demo/compare.py", *arguments], capture_output=True, text=True)


def test_comparison_averages_the_last_six_iterations(tmp_path):
    runs = [
        make_run(tmp_path / "a", "comal", 0, [0.9, 0.9, 0, 0, 0, 0.1, 0.2, 0.3], METHOD_TITLE="COMAL"),
        make_run(tmp_path / "b", "comal", 1, [0.9] * 2 + [0.2] * 6, others=0.07, METHOD_TITLE="COMAL"),
        make_run(tmp_path / "c", "iter-ipo", 0, [0.9] * 2 + [0.4] * 6, METHOD_TITLE="Iter-IPO"),
    ]
    done = compare(*runs, "--output", str(tmp_path / "out.svg"))
    assert done.returncode == 0, done.stderr
    assert "iterations 3 to 8 (the initial policy's: 0.500)" in done.stdout
    rows = [line.split() for line in done.stdout.splitlines() if line.startswith(("COMAL", "Iter-IPO"))]
    assert rows == [["COMAL", "0.100", "0.200", "0.070"], ["Iter-IPO", "0.400", "-", "0.010"]]
    assert {(run["method"], run["seed"]) for run in json.loads((tmp_path / "out.json").read_text())} == {
        ("comal", 0),
        ("comal", 1),
        ("iter-ipo", 0),
    }
    picture = (tmp_path / "out.svg").read_text()
    assert "Iter-IPO" in picture and "duality gap" in picture and "INPO" not in picture


def test_comparison_reads_runs_that_do_not_tell_their_iterations_and_title(tmp_path):
    path = Path(make_run(tmp_path / "a", "comal", 0, [0.1] * 8))
    settings = {"METHOD": "comal", "SEED": "0", "UPDATE_INTERVAL": "3", "ROUNDS": "2", "SPLITS": "4"}
    (path / "run.json").write_text(json.dumps(settings))
    found = methods.read_run(path)
    assert (found["title"], len(found["policies"]), found["moves"]) == ("comal", 9, [3, 6])


def test_comparison_refuses_what_is_not_finished(tmp_path):
    run = make_run(tmp_path / "a", "comal", 0, [0.1] * 7)
    for arguments, message in (
        ([run, "--output", "x.svg"], "game.json lacks iterations"),
        ([str(tmp_path), "--output", "x.svg"], "no finished run of the demo"),
        ([run, "--output", "x.png"], "--output should end in .svg"),
    ):
        done = compare(*arguments)
        assert done.returncode == 1 and message in done.stderr
