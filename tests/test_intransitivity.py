"""intransitivity.py on matrices whose answer is known by hand, and the command.

python -m pytest tests/test_intransitivity.py
"""

import itertools
import json

import numpy as np
import pytest

from analysis.intransitivity import cycle_strengths, distinct, log_odds, measure
from analysis.intransitivity import main as intransitivity
from utils import StageError

ROCK_PAPER_SCISSORS = np.array([[0.5, 0.9, 0.1], [0.1, 0.5, 0.9], [0.9, 0.1, 0.5]])


def bradley_terry(*scores):
    scores = np.array(scores)
    return 1 / (1 + np.exp(scores - scores[:, None]))


def random_tournament(size, seed):
    skew = np.triu(np.random.default_rng(seed).uniform(-0.5, 0.5, (size, size)), 1)
    return 0.5 + skew - skew.T


def record(probs, prompt_id="p", order_gap=0.0, texts=None):
    size = len(probs)
    return {
        "prompt_id": prompt_id,
        "prompt": "?",
        "prompt_token_ids": [1],
        "order_gap": order_gap,
        "samples": [{"text": text, "token_ids": [1]} for text in texts or map(str, range(size))],
        "win_probs": [[None if i == j else float(probs[i][j]) for j in range(size)] for i in range(size)],
    }


def test_bradley_terry_has_no_cycle_and_no_cyclic_part():
    figures, strengths, odds = measure([record(bradley_terry(0, 1, 3, -2), str(n)) for n in range(3)], 0.0)
    assert (figures["num_prompts"], figures["num_triples"], len(strengths), len(odds)) == (3, 12, 12, 18)
    assert figures["cyclic_triples"] == 0 and strengths.max() < 0.5
    assert figures["cyclic_part"] == pytest.approx(0, abs=1e-25)
    assert figures["cyclic_part_interval"] == pytest.approx([0, 0], abs=1e-25)


def test_rock_paper_scissors_is_nothing_but_a_cycle():
    figures, strengths, odds = measure([record(ROCK_PAPER_SCISSORS)], 0.39)
    assert (figures["cyclic_triples"], figures["cyclic_triples_with_margin"], figures["cyclic_part"]) == (1, 1, 1)
    assert strengths == pytest.approx([0.9])
    assert odds[:, 1] == pytest.approx(0, abs=1e-12)
    assert measure([record(ROCK_PAPER_SCISSORS)], 0.41)[0]["cyclic_triples_with_margin"] == 0


def test_a_cycle_beside_a_loser_of_all():
    """Four responses: rock, paper, scissors and one that loses to each with odds 9:1. One of four triples is a cycle.
    By hand, in units of log 9: the rest is the cycle, three pairs of 1; the whole has three more pairs of 1. Half is
    cyclic."""
    probs = np.full((4, 4), 0.5)
    probs[:3, :3], probs[:3, 3], probs[3, :3] = ROCK_PAPER_SCISSORS, 0.9, 0.1
    figures = measure([record(probs)], 0.1)[0]
    assert (figures["cyclic_triples"], figures["cyclic_part"]) == (0.25, pytest.approx(0.5))


def test_strengths_by_brute_force():
    probs = random_tournament(6, 0)
    expected = [
        max(min(probs[a, b], probs[b, c], probs[c, a]) for a, b, c in itertools.permutations(triple))
        for triple in itertools.combinations(range(6), 3)
    ]
    assert cycle_strengths(probs) == pytest.approx(expected)


def test_scores_are_the_least_squares_ones():
    judged, fitted = log_odds(random_tournament(5, 1))
    design = np.array([np.eye(5)[i] - np.eye(5)[j] for i, j in itertools.combinations(range(5), 2)])
    assert fitted == pytest.approx(design @ np.linalg.lstsq(design, judged, rcond=None)[0])


def test_coin_tosses_are_cyclic_in_a_quarter_of_triples():
    figures = measure([record(random_tournament(5, seed), str(seed)) for seed in range(400)], 0.0)[0]
    assert figures["cyclic_triples"] == pytest.approx(0.25, abs=0.02)
    low, high = figures["cyclic_triples_interval"]
    assert low < 0.25 < high and high - low < 0.05


def test_shares_are_over_all_prompts_together():
    figures = measure([record(ROCK_PAPER_SCISSORS, "a", 0.2), record(bradley_terry(0, 1, 2, 3), "b", 0.4)], 0.1)[0]
    assert figures["cyclic_triples"] == pytest.approx(1 / 5)
    assert figures["order_gap"] == pytest.approx(0.3)
    assert figures["cyclic_triples_interval"] == [0, 1]


def test_equal_texts_are_one_response():
    probs = np.full((4, 4), 0.5)
    probs[:3, :3] = ROCK_PAPER_SCISSORS
    probs[3], probs[:, 3] = probs[0], probs[:, 0]
    assert distinct(record(probs, texts=["rock", "paper", "scissors", "rock"])) == pytest.approx(ROCK_PAPER_SCISSORS)


def test_certain_judgements_stay_finite():
    assert measure([record(np.array([[0.5, 1, 1], [0, 0.5, 1], [0, 0, 0.5]]))], 0.1)[0]["cyclic_part"] < 0.2


def test_too_few_responses_are_left_out_and_counted():
    pair = record(bradley_terry(0, 1), "pair")
    assert measure([pair, record(ROCK_PAPER_SCISSORS)], 0.1)[0]["num_left_out"] == 1
    with pytest.raises(StageError, match="three different responses"):
        measure([pair], 0.1)
    with pytest.raises(StageError, match="1/2 to all"):
        measure([record(np.full((3, 3), 0.5))], 0.1)


def test_scores_of_other_origin_are_refused():
    with pytest.raises(StageError, match="prompt_id p: order_gap should be a number, got None; scoring.py writes it"):
        measure([record(ROCK_PAPER_SCISSORS, order_gap=None)], 0.1)


def test_command(jsonl, tmp_path, capsys):
    path = jsonl("a.scores.jsonl", record(ROCK_PAPER_SCISSORS, "a"), record(ROCK_PAPER_SCISSORS, "b"))
    intransitivity(str(path))
    found = json.loads((path.parent / "a.scores.intransitivity.json").read_text())
    assert found["cyclic_triples_interval"] == [1, 1] and found["input"] == [str(path)]
    assert "is intransitive" in capsys.readouterr().out
    assert "100.0 % are cycles" in (path.parent / "a.scores.intransitivity.svg").read_text()
    path = jsonl("b.jsonl", record(bradley_terry(0, 1, 2)))
    intransitivity(str(path), str(tmp_path / "out.json"))
    assert "shows no cycle" in capsys.readouterr().out
    first = (tmp_path / "out.svg").read_bytes()
    intransitivity(str(path), str(tmp_path / "out.json"))
    assert (tmp_path / "out.svg").read_bytes() == first
    for flags, message in (({"margin": 0.5}, "--margin"), ({"output": "x.txt"}, "end in .json")):
        with pytest.raises(StageError, match=message):
            intransitivity(str(path), **flags)
