"""eval.py and what it leans on in analysis/: joining responses, win rates with their intervals, the matrix.

python -m pytest tests/test_eval.py
"""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from helpers.work import LengthJudge

import eval
from analysis.comparisons import join_responses, summarise, wins
from analysis.length_control import length_controlled_win_rate, read_difficulty
from analysis.matrix import play, short_names
from judges import base as judges
from records import Record, read
from utils import StageError


def comparison(prob, gap=0.0, tokens=(1, 1), texts=("a", "b")):
    return {
        "prompt_id": "x",
        "win_probs": [[None, prob], [1 - prob, None]],
        "order_gap": gap,
        "label_mass": None if gap is None else 0.9,
        "samples": [{"text": text, "token_ids": [0] * count} for text, count in zip(texts, tokens)],
    }


# ---- summarise ----


def test_summarise_all_wins():
    found = summarise([comparison(0.9)] * 4, num_bootstrap=50)
    assert (found["num_prompts"], found["num_ties"], found["win_rate"]) == (4, 0, 1.0)
    assert found["win_rate_interval"] == [1.0, 1.0]
    assert found["mean_win_prob"] == pytest.approx(0.9)
    assert found["mean_win_prob_interval"] == pytest.approx([0.9, 0.9])


def test_summarise_counts_a_tie_as_half():
    # Won, lost, tied, tied: (1 + 0 + 1/2 + 1/2)/4 = 1/2; (0.9 + 0.3 + 0.5 + 0.5)/4 = 0.55
    found = summarise([comparison(p) for p in (0.9, 0.3, 0.5, 0.5)], num_bootstrap=50)
    assert (found["num_ties"], found["win_rate"]) == (2, 0.5)
    assert found["mean_win_prob"] == pytest.approx(0.55)


def test_summarise_means_of_lengths_and_gaps():
    found = summarise(
        [
            comparison(0.5, gap=None, tokens=(2, 10), texts=("aa", "")),
            comparison(0.7, gap=0.2, tokens=(4, 20), texts=("a", "bbb")),
        ],
        num_bootstrap=2,
    )
    assert found["mean_tokens"] == [3, 15]
    assert found["mean_characters"] == [1.5, 1.5]
    assert found["order_gap"] == pytest.approx(0.2)  # identical responses have none
    assert found["label_mass"] == pytest.approx(0.9)
    assert summarise([comparison(0.5, gap=None)], num_bootstrap=2)["order_gap"] is None


def test_summarise_interval_is_that_of_a_binomial_proportion():
    # 200 prompts, 60 % won: the standard error is sqrt(0.6 * 0.4/200) = 0.0346, 1.96 of them 0.068. 2,000 draws.
    found = summarise([comparison(0.8)] * 120 + [comparison(0.2)] * 80, num_bootstrap=2000)
    low, high = found["win_rate_interval"]
    assert low < found["win_rate"] < high
    assert (low, high) == pytest.approx((0.6 - 0.068, 0.6 + 0.068), abs=0.01)
    # The probabilities are 0.8 and 0.2 instead of 1 and 0, so their interval is 0.6 times as wide.
    prob_low, prob_high = found["mean_win_prob_interval"]
    assert prob_low < found["mean_win_prob"] < prob_high
    assert prob_high - prob_low == pytest.approx(0.6 * (high - low))


def test_summarise_interval_depends_on_the_seed_alone():
    comparisons = [comparison(i / 30) for i in range(30)]
    first, again, other = (summarise(comparisons, seed=seed, num_bootstrap=100) for seed in (1, 1, 2))
    assert first == again
    assert first["mean_win_prob_interval"] != other["mean_win_prob_interval"]


def test_summarise_is_json():
    assert json.loads(json.dumps(summarise([comparison(0.5)], num_bootstrap=2), allow_nan=False))["num_prompts"] == 1


def test_only_exactly_one_half_is_a_tie():
    probs = np.array([0.0, np.nextafter(0.5, 0), 0.5, np.nextafter(0.5, 1), 1.0])
    assert wins(probs).tolist() == [0, 0, 0.5, 1, 1]


# ---- join_responses and compare ----


def response(prompt_id, text, prompt="x"):
    return {"prompt_id": prompt_id, "prompt": prompt, "samples": [{"text": text, "token_ids": [1] * len(text)}]}


def test_join_responses_joins_on_the_id_and_not_on_the_line(jsonl):
    ours = jsonl("ours", response("a", "a1"), response("b", "b1", "y"))
    theirs = jsonl("theirs", response("b", "b2", "y"), response("a", "a2"))
    joined = [
        (record["prompt_id"], record["prompt"], [sample["text"] for sample in record["samples"]])
        for record in join_responses(ours, theirs)
    ]
    assert joined == [("a", "x", ["a1", "a2"]), ("b", "y", ["b1", "b2"])]


def test_join_responses_names_what_is_missing(jsonl):
    few, many = jsonl("few", response("p0", "x")), jsonl("many", *(response(f"p{i}", "x") for i in range(13)))
    # The first ten of the twelve, whichever side lacks them.
    message = "few has no response to 12 prompts of the other file, first p1, p2, p3, p4, p5, p6, p7, p8, p9, p10$"
    for paths in ((few, many), (many, few)):
        with pytest.raises(StageError, match=message):
            list(join_responses(*paths))


@pytest.mark.parametrize(
    "records, message",
    [
        ([response("a", "x", prompt="another")], "have different prompts under prompt_id a"),
        ([response("a", "x"), response("a", "y")], "theirs, line 2: prompt_id a: the id occurs a second time"),
        ([{"prompt_id": "a", "prompt": "x"}], "theirs, line 1: prompt_id a: field samples is missing"),
        ([response("a", "x") | {"samples": []}], "a"),
        ([], "theirs: no records"),
    ],
)
def test_join_responses_refuses(jsonl, records, message):
    with pytest.raises(StageError, match=message):
        list(join_responses(jsonl("ours", response("a", "x")), jsonl("theirs", *records)))


few_resamples = partial(length_controlled_win_rate, num_bootstrap=20)  # a thousand take seconds


def compare(some_model, tmp_path, monkeypatch, ours, theirs, output, **flags):
    monkeypatch.setattr("analysis.comparisons.length_controlled_win_rate", few_resamples)
    monkeypatch.setitem(judges.JUDGE_TYPES, "generative", "helpers.work:LengthJudge")
    (tmp_path / "t.txt").write_text("{input} {output_1} {output_2}")
    eval.compare(
        str(ours), str(theirs), str(output), judge=some_model, template=str(tmp_path / "t.txt"), gpus="none", **flags
    )


def test_compare_writes_comparisons_and_their_summary(some_model, jsonl, tmp_path, monkeypatch):
    ours = jsonl("ours.jsonl", response("a", "long"), response("b", "no"), response("c", "same"))
    theirs = jsonl("theirs.jsonl", response("c", "same"), response("b", "yes"), response("a", "x"))
    compare(some_model, tmp_path, monkeypatch, ours, theirs, tmp_path / "vs.jsonl")
    assert [record["win_probs"][0][1] for record in read(tmp_path / "vs.jsonl", Record)] == [0.75, 0.25, 0.5]
    summary = json.loads((tmp_path / "vs.json").read_text())
    assert (summary["responses"], summary["baseline"]) == (str(ours), str(theirs))
    figures = {name: summary[name] for name in ("num_prompts", "num_ties", "win_rate", "mean_win_prob")}
    assert figures == {"num_prompts": 3, "num_ties": 1, "win_rate": 0.5, "mean_win_prob": 0.5}
    assert summary["mean_tokens"] == [pytest.approx(10 / 3), pytest.approx(8 / 3)]


def test_compare_judges_only_what_was_not_judged_before(some_model, jsonl, tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    monkeypatch.setattr(LengthJudge, "settings", ("labels",))
    ours = jsonl("ours.jsonl", response("a", "long"), response("b", "no"))
    theirs = jsonl("theirs.jsonl", response("b", "yes"), response("a", "x"))
    path = tmp_path / "vs.jsonl"

    def judged_before(**flags):
        caplog.clear()
        compare(some_model, tmp_path, monkeypatch, ours, theirs, path, **flags)
        return "judged before: 1" in caplog.text

    assert not judged_before()
    first = json.loads(path.with_suffix(".json").read_text())
    assert judged_before(length_controlled=True)
    second = json.loads(path.with_suffix(".json").read_text())
    assert "length_controlled_win_rate" in second and first.items() <= second.items()
    assert not judged_before(labels="A,B")  # another judge
    jsonl("theirs.jsonl", response("b", "yes"), response("a", "other"))
    assert not judged_before(labels="A,B")  # other responses
    path.write_text(path.read_text().replace("0.75", "0.7").replace("0.25", "0.3"))
    assert not judged_before(labels="A,B")  # another file
    assert "0.75" in path.read_text() and judged_before(labels="A,B")


def test_compare_takes_responses_without_token_ids(some_model, jsonl, tmp_path, monkeypatch):
    """As the docstring of eval.py says: lengths are then told in characters."""
    ours, theirs = (
        jsonl(name, {"prompt_id": "a", "prompt": "where?", "samples": [{"text": name}]}) for name in ("sea", "city")
    )
    compare(some_model, tmp_path, monkeypatch, ours, theirs, tmp_path / "vs.jsonl")
    summary = json.loads((tmp_path / "vs.json").read_text())
    assert (summary["num_prompts"], summary["mean_characters"]) == (1, [3, 4])


def test_compare_refuses_an_output_that_its_summary_would_replace(some_model, jsonl, tmp_path, monkeypatch):
    ours, theirs = jsonl("ours.jsonl", response("a", "x")), jsonl("theirs.jsonl", response("a", "yy"))
    with pytest.raises(StageError, match="vs.json"):
        compare(some_model, tmp_path, monkeypatch, ours, theirs, tmp_path / "vs.json")


def alpaca_eval_files(jsonl, tmp_path):
    """Responses to eight of AlpacaEval's instructions, the reference outputs to nine in another order, difficulties."""
    ours = jsonl("ours.jsonl", *(response(f"alpaca_eval-{n}", "x" * (n + 1), f"Instruction {n}") for n in range(8)))
    outputs = [{"instruction": f"Instruction {n}", "output": "y" * 4, "generator": "gpt4"} for n in range(8, -1, -1)]
    (tmp_path / "outputs.json").write_text(json.dumps(outputs))
    rows = [f"{n},{gamma}" for n, gamma in enumerate([0.5, -1.2, 0.3, 1.4, -0.2, 0.8, -0.7, 0.1])]
    (tmp_path / "difficulty.csv").write_text("\n".join(["index,instruction_difficulty", *rows]))
    return ours, tmp_path / "outputs.json", str(tmp_path / "difficulty.csv")


@pytest.mark.parametrize("with_difficulty", [False, True])
def test_compare_with_model_outputs(some_model, jsonl, tmp_path, monkeypatch, caplog, with_difficulty):
    caplog.set_level("INFO")
    ours, theirs, difficulty = alpaca_eval_files(jsonl, tmp_path)
    flags = {"difficulty": difficulty} if with_difficulty else {}
    compare(some_model, tmp_path, monkeypatch, ours, theirs, tmp_path / "vs.jsonl", **flags)
    found = list(read(tmp_path / "vs.jsonl", Record))
    assert [(record["prompt_id"], record["samples"][1]["text"]) for record in found] == [
        (f"alpaca_eval-{n}", "yyyy") for n in range(8)
    ]
    summary = json.loads((tmp_path / "vs.json").read_text())
    assert summary["baseline"] == str(theirs) and summary["num_prompts"] == 8
    assert summary["win_rate"] == 4.5 / 8 and summary["mean_tokens"][1] is None
    gamma = read_difficulty(difficulty, [f"alpaca_eval-{n}" for n in range(8)])[0] if with_difficulty else None
    probs = [0.25] * 3 + [0.5] + [0.75] * 4  # the judge prefers the longer one
    expected = few_resamples(probs, range(1, 9), [4] * 8, gamma)
    assert [record["win_probs"][0][1] for record in found] == probs
    assert {name: summary[name] for name in expected} == expected
    kind = "with the difficulties of the instructions (length_controlled_noreg)"
    assert (kind if with_difficulty else kind.replace("with", "without", 1).replace("noreg", "minimal")) in caplog.text


def test_compare_length_controlled_against_responses_when_asked(some_model, jsonl, tmp_path, monkeypatch):
    ours, _, _ = alpaca_eval_files(jsonl, tmp_path)
    theirs = jsonl("theirs.jsonl", *(response(f"alpaca_eval-{n}", "y" * 5, f"Instruction {n}") for n in range(8)))
    for asked in (False, True):
        compare(some_model, tmp_path, monkeypatch, ours, theirs, tmp_path / f"{asked}.jsonl", length_controlled=asked)
        assert ("length_controlled_win_rate" in json.loads((tmp_path / f"{asked}.json").read_text())) is asked


def test_compare_checks_the_difficulties_before_it_judges(some_model, jsonl, tmp_path, monkeypatch):
    ours, theirs, difficulty = alpaca_eval_files(jsonl, tmp_path)
    jsonl("ours.jsonl", response("another", "x", "Instruction 0"))
    with pytest.raises(StageError, match="has no difficulty for 1 prompts, first another"):
        compare(some_model, tmp_path, monkeypatch, ours, theirs, tmp_path / "vs.jsonl", difficulty=difficulty)
    assert not list(tmp_path.glob("vs*"))


# ---- matrix ----


@pytest.mark.parametrize(
    "paths, names",
    [
        (["exps/A/start/responses.jsonl", "exps/A/iter3/eval/responses.jsonl"], ["start", "iter3"]),
        (["exps/A/iter3/eval/responses.jsonl", "exps/B/iter3/eval/responses.jsonl"], ["A/iter3", "B/iter3"]),
        (["x.jsonl", "y.jsonl"], ["x", "y"]),
    ],
)
def test_short_names_tell_paths_apart(paths, names):
    assert short_names([Path(path) for path in paths]) == names


def test_play_by_hand():
    # Four prompts; the cycle 0 > 1 > 2 > 0 won by 3/4, 3/4 and 1/2 + 1/8 = 5/8.
    probs = np.full((3, 3, 4), 0.5)
    for i, j, values in ((0, 1, [1, 1, 0.5, 0.5]), (1, 2, [0.75] * 4), (2, 0, [1, 0.5, 0.5, 0.5])):
        probs[i, j], probs[j, i] = values, 1 - np.array(values)
    found = play(probs, 5, num_bootstrap=500)
    assert (found["num_prompts"], found["num_left_out"]) == (4, 1)
    assert found["win"] == [[None, 0.75, 0.375], [0.25, None, 0.75], [0.625, 0.25, None]]
    assert (
        found["win_interval"][1][2] == [0.75, 0.75]
        and found["win_interval"][0][1][0] < 0.75 < found["win_interval"][0][1][1]
    )
    assert [(worst["against"], worst["win"]) for worst in found["worst_case"]] == [(2, 0.375), (0, 0.25), (1, 0.25)]
    # Margins a = 1/4 (0 over 1), b = 1/4 (1 over 2), c = 1/8 (2 over 0): the mixture is (b, c, a)/(a + b + c).
    assert found["nash_mixture"] == pytest.approx([0.4, 0.2, 0.4])
    assert found["last_duality_gap"] == 0.5 and found["last_duality_gap_interval"] == [0.5, 0.5]
    counted = play(probs, 4, "win_rate", num_bootstrap=10)
    assert counted["win"] == [[None, 0.75, 0.375], [0.25, None, 1], [0.625, 0, None]]
    assert play(probs, 4, seed=1, num_bootstrap=9) == play(probs, 4, seed=1, num_bootstrap=9)


def test_matrix_judges_only_what_is_missing(some_model, jsonl, tmp_path, monkeypatch, capsys, caplog):
    monkeypatch.setitem(judges.JUDGE_TYPES, "generative", "helpers.work:LengthJudge")
    (tmp_path / "t.txt").write_text("{input} {output_1} {output_2}")
    files = [
        str(jsonl(f"{name}.jsonl", *(response(p, p * length, prompt) for p, prompt in (("p", "x"), ("q", prompt)))))
        for name, length, prompt in (("short", 1, "y"), ("middle", 2, "y"), ("long", 3, "y"))
    ]
    again = dict(judge=some_model, template=str(tmp_path / "t.txt"), gpus="none")
    with caplog.at_level("INFO"):
        eval.matrix(str(tmp_path / "m/two.json"), ",".join(files[:2]), **again)
        before = {path: path.stat().st_mtime_ns for path in (tmp_path / "m/cells").iterdir()}
        eval.matrix(str(tmp_path / "m/three.json"), ",".join(files), **again)
    assert "comparisons: 1, judged before: 0" in caplog.text
    assert "comparisons: 3, judged before: 1" in caplog.text
    assert {path: path.stat().st_mtime_ns for path in before} == before and len(before) == 2
    found = json.loads((tmp_path / "m/three.json").read_text())
    assert found["names"] == ["short", "middle", "long"]
    assert found["win"] == [[None, 0.25, 0.25], [0.75, None, 0.25], [0.75, 0.75, None]]
    assert found["nash_mixture"] == pytest.approx([0, 0, 1])
    assert "long wins at least half against every other. Its worst: 75.0 %" in capsys.readouterr().out
    assert (tmp_path / "m/three.svg").read_text().startswith("<?xml")
    jsonl("long.jsonl", response("p", "p", "x"), response("q", "q", "y"))  # other responses: judged anew
    eval.matrix(str(tmp_path / "m/three.json"), ",".join(files), **again)
    assert json.loads((tmp_path / "m/three.json").read_text())["win"][2] == [0.5, 0.25, None]


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"names": "a"}, "--names should be 2 different"),
        ({"names": "a,a"}, "--names should be 2 different"),
        ({"measure": "wins"}, "--measure should be"),
        ({"output": "m"}, "--output should end in .json"),
    ],
)
def test_matrix_refuses(some_model, jsonl, flags, message):
    files = ",".join(str(jsonl(name, response("p", "p"))) for name in ("x.jsonl", "y.jsonl"))
    with pytest.raises(StageError, match=message):
        eval.matrix(**{"responses": files, "output": "m.json", "judge": some_model, "gpus": "none"} | flags)
