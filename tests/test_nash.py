"""The empirical game: Nash mixtures, worst cases, gaps.

python -m pytest tests/test_nash.py
"""

import numpy as np
import pytest

from analysis.nash import duality_gap, nash_mixture, worst_case

PAPER = [[0.5, 0.1, 0.8], [0.9, 0.5, 0.1], [0.2, 0.9, 0.5]]  # the paper's cycle; by hand: (4, 3, 4)/11


def test_nash_mixture_of_the_papers_cycle():
    assert nash_mixture(PAPER) == pytest.approx([4 / 11, 3 / 11, 4 / 11])


def test_nash_mixture_takes_the_one_that_beats_all_others():
    assert nash_mixture([[0.5, 0.4, 0.3], [0.6, 0.5, 0.51], [0.7, 0.49, 0.5]]) == pytest.approx([0, 1, 0])


def test_nash_mixture_leaves_out_what_is_dominated():
    game = np.full((4, 4), 0.5)
    game[:3, :3] = PAPER
    game[3, :3], game[:3, 3] = 0.05, 0.95
    assert nash_mixture(game) == pytest.approx([4 / 11, 3 / 11, 4 / 11, 0])


@pytest.mark.parametrize("seed", range(5))
def test_nash_mixture_wins_half_against_every_player(seed):
    skew = np.random.default_rng(seed).uniform(-0.5, 0.5, (7, 7))
    game = 0.5 + (skew - skew.T) / 2
    mixture = nash_mixture(game)
    assert mixture.sum() == pytest.approx(1) and mixture.min() >= 0
    assert (mixture @ game).min() >= 0.5 - 1e-9 and abs(duality_gap(mixture, game)) < 1e-9


def test_worst_case_leaves_out_oneself():
    assert worst_case(PAPER) == [(1, 0.1), (2, 0.1), (0, 0.2)]
    assert worst_case([[0.5, 0.8], [0.2, 0.5]]) == [(1, 0.8), (0, 0.2)]


def test_duality_gap_by_hand():
    assert duality_gap([1, 0, 0], PAPER) == pytest.approx(2 * (0.9 - 0.5))
    assert duality_gap([0.5, 0.5, 0], PAPER) == pytest.approx(2 * (0.7 - 0.5))  # the sea: (0.9 + 0.5) / 2
    assert duality_gap([4 / 11, 3 / 11, 4 / 11], PAPER) == pytest.approx(0)
