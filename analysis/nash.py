"""Symmetric two-player games given by a preference matrix: `P[i][j]` = P(i beats j), `P[i][j] + P[j][i] = 1`, 1/2 on
the diagonal. Players are responses, or whole policies that were compared with each other (the empirical game).
"""

import numpy as np


def nash_mixture(preference):
    """A mixture that wins at least half the time against every player, (K,), by linear programming.

    maximise v over mixtures x, such that sum_i x_i P[i][j] >= v for every j. The game is symmetric, so v is 1/2. Where
    several mixtures do, this is one of them.

    Args:
        preference: (K, K)
    """
    from scipy.optimize import linprog

    preference = np.asarray(preference, dtype=float)
    size = len(preference)
    found = linprog(
        c=np.r_[np.zeros(size), -1],  # the variables: x_0 ... x_{K-1}, v
        A_ub=np.c_[-preference.T, np.ones(size)],
        b_ub=np.zeros(size),
        A_eq=[np.r_[np.ones(size), 0]],
        b_eq=[1],
        bounds=[(0, 1)] * size + [(None, None)],
    )
    mixture = np.clip(found.x[:size], 0, None)
    return mixture / mixture.sum()


def worst_case(preference):
    """For each player (opponent that it does worst against, probability of beating that one): its worst case."""
    preference = np.array(preference, dtype=float)
    np.fill_diagonal(preference, np.inf)
    worst = preference.argmin(axis=1)
    return [(int(j), float(row[j])) for j, row in zip(worst, preference)]


def duality_gap(mixture, preference):
    """`2 (max_y P(y beats mixture) - 1/2)`: what the best reply wins above one half, doubled; 0 at Nash, at most 1.

    Args:
        mixture: (K,) probabilities
        preference: (K, K)
    """
    return float(2 * (np.asarray(preference, dtype=float) @ np.asarray(mixture, dtype=float)).max() - 1)
