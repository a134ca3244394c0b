"""data/demo/game.py: the comparison of methods, from runs whose figures are made up here.

python -m pytest tests/test_demo_game.py
"""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def make_run(folder, method, seed, gaps, others=0.01, policy=(0.4, 0.3, 0.3)):
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(
        json.dumps({"METHOD": method, "SEED": str(seed), "ROUNDS": "2", "SPLITS": "4", "UPDATE_INTERVAL": "3"})
    )
    rows = [
        {"iteration": iteration, "duality_gap": gap, "other": others, "distribution": policy}
        for iteration, gap in zip(["start", *range(len(gaps))], [0.5, *gaps])
    ]
    (folder / "game.json").write_text(json.dumps(rows))
    return str(folder)


def compare(*arguments):
    return subprocess.run(
        [sys.executable, ROOT / "data/demo/game.py", "compare", *arguments], capture_output=True, text=True
    )


def test_comparison_averages_the_last_six_iterations(tmp_path):
    runs = [
        make_run(tmp_path / "a", "comal", 0, [0.9, 0.9, 0, 0, 0, 0.1, 0.2, 0.3]),
        make_run(tmp_path / "b", "comal", 1, [0.9] * 2 + [0.2] * 6, others=0.07),
        make_run(tmp_path / "c", "iter-ipo", 0, [0.9] * 2 + [0.4] * 6),
    ]
    done = compare(*runs, "--output", str(tmp_path / "out.svg"))
    assert done.returncode == 0, done.stderr
    assert "iterations 3 to 8 (the start policy's: 0.500)" in done.stdout
    rows = [line.split() for line in done.stdout.splitlines() if line.startswith(("COMAL", "Iter-IPO"))]
    assert rows == [["COMAL", "0.100", "0.200", "0.070"], ["Iter-IPO", "0.400", "-", "0.010"]]
    assert {(run["method"], run["seed"]) for run in json.loads((tmp_path / "out.json").read_text())} == {
        ("comal", 0),
        ("comal", 1),
        ("iter-ipo", 0),
    }
    picture = (tmp_path / "out.svg").read_text()
    assert "Iter-IPO" in picture and "duality gap" in picture and "INPO" not in picture


def test_comparison_refuses_what_is_not_finished(tmp_path):
    run = make_run(tmp_path / "a", "comal", 0, [0.1] * 7)
    for arguments, message in (
        ([run, "--output", "x.svg"], "game.json lacks iterations"),
        ([str(tmp_path), "--output", "x.svg"], "no finished run of the demo"),
        ([run, "--output", "x.png"], "--output should end in .svg"),
    ):
        done = compare(*arguments)
        assert done.returncode == 1 and message in done.stderr
