"""The length-controlled win rate: the package's numbers, and what must hold whatever the numbers are.

python -m pytest tests/test_length_control.py

One test compares with the package itself and is skipped where it is not installed. It needs its own environment:
python -m venv /tmp/alpaca && /tmp/alpaca/bin/pip install alpaca-eval==0.6.6 scikit-learn==1.9.1 msgspec filelock pytest
/tmp/alpaca/bin/python -m pytest tests/test_length_control.py
"""

import numpy as np
import pytest

from analysis.length_control import length_controlled_win_rate, read_difficulty
from utils import StageError

# What alpaca-eval 0.6.6 (with scikit-learn 1.9.1, numpy 2.3.5) gives for `comparisons` and `gamed_csv`, in per cent:
# {model: (length_controlled_winrate, lc_standard_error)}
PACKAGE = {
    "length_controlled_minimal": (39.88282088257198, 0.0),
    "length_controlled_noreg": (40.12096772105802, 1.0198404415980895),
    "length_controlled_v1": (40.454951007862874, 0.9308510849685344),
}


@pytest.fixture
def comparisons():
    """200 comparisons by a judge that prefers longer answers; the responses are the longer ones, and worse.

    The seed is one with which another number of folds or another score of a fold gives another result.
    """
    random = np.random.default_rng(29)
    lengths, baseline_lengths = np.exp(random.normal([[6.6], [6.3]], 0.5, (2, 200))).astype(int)
    difficulty = random.normal(size=200).round(4)
    delta = (lengths - baseline_lengths) / np.std(lengths - baseline_lengths)
    logit = 1.2 * np.tanh(delta) - 0.7 * difficulty - 0.4 + 0.8 * random.normal(size=200)
    return {
        "preferences": (1 / (1 + np.exp(-logit))).round(4),
        "lengths": lengths,
        "baseline_lengths": baseline_lengths,
        "difficulty": difficulty,
    }


@pytest.fixture
def gamed_csv(tmp_path, comparisons):
    """A file like AlpacaEval's df_gamed.csv: a verbose and a concise baseline, one preference missing."""
    random, lines = np.random.default_rng(17), ["index,model,preference,std_delta_len,instruction_difficulty,"]
    lines[0] += "not_gamed_baseline"
    for model, shift in (("baseline_verbose", -1.0), ("baseline_concise", 1.0)):  # d is the baseline's minus theirs
        for index, difficulty in enumerate(comparisons["difficulty"]):
            delta = shift + 0.5 * random.normal()
            preference = 1 / (1 + np.exp(0.9 * np.tanh(delta) + 0.3 * difficulty + random.normal()))
            text = "" if (model, index) == ("baseline_concise", 7) else f"{preference:.4f}"
            lines.append(f"{index},{model},{text},{delta:.4f},{difficulty},False")
    path = tmp_path / "df_gamed.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


def prompt_ids(count=200):
    return [f"alpaca_eval-{number}" for number in range(count)]


def by_model(comparisons, gamed_csv):
    """The result of each of the three models."""
    difficulty, gamed = read_difficulty(gamed_csv, prompt_ids())
    assert difficulty.tolist() == comparisons["difficulty"].tolist() and len(gamed["preference"]) == 399
    without = {name: values for name, values in comparisons.items() if name != "difficulty"}
    results = [
        length_controlled_win_rate(**case, num_bootstrap=20)
        for case in (without, comparisons, comparisons | {"gamed": gamed})
    ]
    return {result["length_controlled_model"]: result for result in results}


def check_equal(results, package):
    """Ours against the package's {model: (per cent, standard error)}."""
    assert list(results) == list(package)
    for model, (win_rate, error) in package.items():
        ours = results[model]
        assert ours["length_controlled_win_rate"] == pytest.approx(win_rate / 100, abs=1e-6)
        if ours["length_controlled_with_difficulty"]:
            assert ours["length_controlled_standard_error"] == pytest.approx(error / 100, abs=1e-6)
        else:
            assert ours["length_controlled_standard_error"] is None and error == pytest.approx(0, abs=1e-9)


def test_result_equals_what_the_package_gave(comparisons, gamed_csv):
    results = by_model(comparisons, gamed_csv)
    check_equal(results, PACKAGE)
    assert [result["length_controlled_with_difficulty"] for result in results.values()] == [False, True, True]


def test_result_equals_the_package(comparisons, gamed_csv, monkeypatch):
    pytest.importorskip("alpaca_eval")
    import pandas
    import sklearn
    from alpaca_eval.metrics import glm_winrate

    ours = by_model(comparisons, gamed_csv)
    monkeypatch.setattr(glm_winrate, "hf_hub_download", lambda **_: str(gamed_csv))
    annotations = pandas.DataFrame(
        {
            "preference": 1 + comparisons["preferences"],
            "output_1": ["x" * length for length in comparisons["baseline_lengths"]],
            "output_2": ["x" * length for length in comparisons["lengths"]],
            "generator_1": "baseline",
            "generator_2": "ours",
            "annotator": "judge",
        }
    )
    package = {}
    for model in ours:
        with sklearn.config_context():  # the package changes scikit-learn's settings
            found = glm_winrate.get_length_controlled_winrate(annotations.copy(), model, save_weights_dir=None)
        package[model] = float(found["length_controlled_winrate"]), float(found["lc_standard_error"])
        assert found["win_rate"] == pytest.approx(100 * comparisons["preferences"].mean())
    check_equal(ours, package)


def test_control_lowers_the_win_rate_of_longer_responses(comparisons):
    del comparisons["difficulty"]
    found = length_controlled_win_rate(**comparisons, num_bootstrap=200)
    low, high = found["length_controlled_interval"]
    assert low < found["length_controlled_win_rate"] < high < comparisons["preferences"].mean() - 0.02


@pytest.mark.parametrize("with_difficulty", [False, True])
def test_equal_lengths_give_the_plain_mean(with_difficulty):
    random = np.random.default_rng(0)
    preferences, same = random.beta(2, 1, 400), random.integers(10, 2000, 400)
    difficulty = random.normal(size=400) if with_difficulty else None
    found = length_controlled_win_rate(preferences, same, same, difficulty, num_bootstrap=200)
    assert found["length_controlled_win_rate"] == pytest.approx(preferences.mean(), abs=0.01)
    low, high = found["length_controlled_interval"]  # about as wide as that of a mean
    assert (high - low) / 3.92 == pytest.approx(preferences.std() / 20, rel=0.3)


@pytest.mark.parametrize("judge, tolerance", [("gradual", 0.01), ("three in four", 0.05)])
def test_judge_that_only_sees_length_gives_one_half(judge, tolerance):
    random = np.random.default_rng(1)
    lengths, baseline_lengths = random.integers(100, 2000, 400), random.integers(100, 1000, 400)
    longer_by = lengths - baseline_lengths
    gradual = 1 / (1 + np.exp(-3 * np.tanh(longer_by / longer_by.std())))
    preferences = gradual if judge == "gradual" else 0.5 + 0.25 * np.sign(longer_by)  # not the model's own curve
    found = length_controlled_win_rate(preferences, lengths, baseline_lengths, num_bootstrap=20)
    assert preferences.mean() > 0.6 and found["length_controlled_win_rate"] == pytest.approx(0.5, abs=tolerance)


def test_interval_is_wide_where_length_decides_every_comparison():
    random = np.random.default_rng(1)
    lengths, baseline_lengths = random.integers(100, 2000, 400), random.integers(100, 1000, 400)
    preferences = 0.5 + 0.5 * np.sign(lengths - baseline_lengths)
    found = length_controlled_win_rate(preferences, lengths, baseline_lengths, num_bootstrap=200)
    low, high = found["length_controlled_interval"]
    assert low < 0.2 and high > 0.6  # the mean of 400 comparisons has an interval of 0.08


def test_exchanged_sides_add_up_to_one(comparisons):
    del comparisons["difficulty"]
    exchanged = {
        "preferences": 1 - comparisons["preferences"],
        "lengths": comparisons["baseline_lengths"],
        "baseline_lengths": comparisons["lengths"],
    }
    both = [length_controlled_win_rate(**case, num_bootstrap=1) for case in (comparisons, exchanged)]
    assert sum(found["length_controlled_win_rate"] for found in both) == pytest.approx(1, abs=1e-4)


def test_penalty_that_leaves_nothing_is_said(caplog):
    random = np.random.default_rng(0)
    lengths, baseline_lengths = random.integers(10, 200, (2, 10))
    for preferences, said in ((0.45 + 0.1 * random.random(10), True), (np.full(10, 0.9), False)):
        caplog.clear()
        found = length_controlled_win_rate(preferences, lengths, baseline_lengths, num_bootstrap=1)
        assert (found["length_controlled_win_rate"] == 0.5) == said == ("left nothing" in caplog.text)


def test_all_won_is_a_number_near_one():
    lengths = np.arange(100, 120)
    found = length_controlled_win_rate(np.ones(20), lengths, lengths[::-1], num_bootstrap=20)
    assert 0.9 < found["length_controlled_win_rate"] <= 1


@pytest.mark.parametrize(
    "count, longer_by, reason", [(4, 0, "needs 5 prompts"), (0, 0, "needs 5 prompts"), (50, 3, "in length are equal")]
)
def test_nothing_to_estimate_is_null_and_said(caplog, count, longer_by, reason):
    lengths = np.arange(count) + 10
    found = length_controlled_win_rate(np.full(count, 0.7), lengths + longer_by, lengths)
    assert found["length_controlled_win_rate"] is found["length_controlled_interval"] is None
    assert found["length_controlled_model"] == "length_controlled_minimal"
    assert reason in caplog.text


@pytest.mark.parametrize(
    "case",
    [
        {"preferences": [0.5] * 4 + [1.5]},
        {"preferences": [0.5] * 4 + [None]},
        {"lengths": [1, 2, 3]},
        {"gamed": {}},
    ],
)
def test_wrong_arguments_are_refused(case):
    right = {"preferences": [0.5] * 5, "lengths": [1, 2, 3, 4, 5], "baseline_lengths": [5] * 5}
    with pytest.raises(ValueError):
        length_controlled_win_rate(**right | case)


def test_read_difficulty_of_difficulties_alone(tmp_path):
    path = tmp_path / "instruction_difficulty.csv"
    path.write_text("index,instruction_difficulty\n0,-0.5\n2,1.25\n1,3\n")
    difficulty, gamed = read_difficulty(path, ["alpaca_eval-2", "alpaca_eval-0"])
    assert difficulty.tolist() == [1.25, -0.5] and gamed is None
    path.write_text(",instruction_difficulty\n0,-0.5\n2,1.25\n1,3\n")  # as pandas writes an index without a name
    assert read_difficulty(path, ["alpaca_eval-1"])[0].tolist() == [3]


@pytest.mark.parametrize(
    "text, message",
    [
        ("index,instruction_difficulty\n0,1\n1,\n", "no difficulty for 2 prompts, first alpaca_eval-1, mine"),
        ("index,difficulty\n0,1\n", "instruction_difficulty is missing; found index, difficulty"),
        ("index,instruction_difficulty\n0,1,2,3\n", "not a table"),
        ("", "is empty"),
    ],
)
def test_read_difficulty_says_what_is_wrong(tmp_path, text, message):
    path = tmp_path / "difficulty.csv"
    path.write_text(text)
    with pytest.raises(StageError, match=message):
        read_difficulty(path, ["alpaca_eval-0", "alpaca_eval-1", "mine"])
