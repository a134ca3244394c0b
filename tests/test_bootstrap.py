"""analysis/bootstrap.py: the draws as they are defined, and the interval.

python -m pytest tests/test_bootstrap.py
"""

import numpy as np
import pytest

from analysis.bootstrap import interval, resampled_means
from utils import derive_seed

VALUES = np.array([[0.0, 1, 4, 9], [1, 0, 0, 1]])


def test_prompts_are_drawn_one_after_another_or_by_their_counts():
    generator = np.random.default_rng(derive_seed("x", 3))
    by_prompt = [VALUES[:, generator.integers(4, size=4)].mean(axis=1) for _ in range(20)]
    assert pytest.approx(np.array(by_prompt), abs=1e-14) == resampled_means(VALUES, "x", 3, 20, by_prompt=True).T
    generator = np.random.default_rng(derive_seed("x", 3))
    by_counts = [VALUES @ generator.multinomial(4, [0.25] * 4) / 4 for _ in range(20)]
    assert pytest.approx(np.array(by_counts), abs=1e-14) == resampled_means(VALUES, "x", 3, 20).T


@pytest.mark.parametrize("by_prompt", [True, False])
def test_means_are_spread_as_those_of_samples(by_prompt):
    # 100 coins of which 30 are heads: the standard error of their mean is sqrt(0.3 * 0.7 / 100) = 0.0458.
    draws = resampled_means(np.arange(100) < 30, "coins", 0, 4000, by_prompt)
    assert draws.shape == (4000,)
    assert (draws.mean(), draws.std()) == (pytest.approx(0.3, abs=0.003), pytest.approx(0.0458, abs=0.002))
    assert interval(draws) == pytest.approx([0.3 - 0.09, 0.3 + 0.09], abs=0.011)


def test_all_rows_are_drawn_together():
    draws = resampled_means([VALUES[0], 2 * VALUES[0]], "x", 0, 50)
    assert draws[1] == pytest.approx(2 * draws[0])


def test_interval_leaves_out_what_is_not_a_number():
    low, high = interval([[np.nan, *range(41)], [np.nan, *[7] * 41]])
    assert (low.tolist(), high.tolist()) == ([1, 7], [39, 7])
