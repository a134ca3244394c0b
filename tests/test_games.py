"""The algorithm on exact games: tabular softmax policies, every pair enumerated, losses.py in float64.

    python -m pytest tests/test_games.py        (-s shows the gaps)

No sampling: the loss of an inner iteration is its expectation over pairs drawn from the last policy, minimised by
Newton's method with the derivatives of losses.py. What comes out is compared with solutions found in other ways: by
hand, by linear programming, by a root of the regularised game's fixed-point equation.
"""

import itertools
from collections import Counter

import numpy as np
import pytest
import torch
from scipy.optimize import root

from analysis.nash import duality_gap, nash_mixture
from data_processing import PAIR_RULES
from losses import dpo_loss, inpo_loss, ipo_loss

ETA, R, MOVES = 1 / 3, 1 / 3, 6  # the reference moves every 6 inner iterations


def random_game(size, seed):
    skew = np.random.default_rng(seed).uniform(-0.5, 0.5, (size, size))
    return 0.5 + (skew - skew.T) / 2


def with_dominated(game):
    """The game and one more response, which loses to all others with probability 0.95."""
    size = len(game)
    larger = np.full((size + 1, size + 1), 0.5)
    larger[:size, :size] = game
    larger[:size, size], larger[size, :size] = 0.95, 0.05
    return larger


PAPER = np.array([[0.5, 0.1, 0.8], [0.9, 0.5, 0.1], [0.2, 0.9, 0.5]])
CONDORCET = np.array([[0.5, 0.6, 0.7], [0.4, 0.5, 0.9], [0.3, 0.1, 0.5]])  # the first beats each of the others
GAMES = {"paper": PAPER, "dominated": with_dominated(PAPER), "condorcet": CONDORCET, "random": random_game(5, 4)}
START = {
    "paper": [0.8, 0.1, 0.1],
    "dominated": [0.1, 0.1, 0.1, 0.7],
    "condorcet": [0.05, 0.05, 0.9],
    "random": [0.6, 0.1, 0.1, 0.1, 0.1],
}


def expected_loss(loss, policy, last, game, anchors, soft=True):
    """Mean of `loss` over ordered pairs of different responses, drawn independently from the last policy.

    Policies are log-probabilities (K,); `anchors` are those that the loss takes after the policy's own. With soft
    labels the pair (i, j) counts as it is, with win_prob; without, as i preferred to j with probability P[i][j], or the
    other way.
    """
    size = len(policy)
    i, j = (torch.tensor(index) for index in zip(*((a, b) for a in range(size) for b in range(size) if a != b)))
    logps = [values[index] for values in (policy, *anchors) for index in (i, j)]
    win_prob = torch.tensor(game)[i, j]
    weight = (last[i] + last[j]).exp() * (0.5 if soft else win_prob)
    return (weight * (loss(*logps, win_prob=win_prob) if soft else loss(*logps))).sum()


def minimise(objective, start, steps=50):
    """The log-policy (K,) that minimises a convex objective of it, by Newton's method; of a quadratic one in one step.

    The Hessian is scaled to ones on its diagonal: a response with probability 1e-12 counts as little in it.
    """
    theta = start.clone()
    for _ in range(steps):
        gradient = torch.autograd.functional.jacobian(lambda x: objective(x.log_softmax(0)), theta)
        hessian = torch.autograd.functional.hessian(lambda x: objective(x.log_softmax(0)), theta)
        scale = hessian.diagonal().clamp_min(1e-300).rsqrt()
        step = (
            scale
            * torch.linalg.lstsq(
                scale[:, None] * hessian * scale, (scale * gradient)[:, None], driver="gelsd"
            ).solution[:, 0]
        )
        theta = theta - step
        if step.abs().max() < 1e-13 * max(1, theta.abs().max()):
            break
    return theta.log_softmax(0)


def play(method, name, iterations):
    """The duality gap of the start and after each iteration, and the last log-policy."""
    game = GAMES[name]
    last = reference = torch.tensor(START[name], dtype=torch.float64).log()
    gaps = [duality_gap(last.exp(), game)]
    for iteration in range(iterations):
        if method in ("comal", "inpo"):
            policy = minimise(
                lambda logps: expected_loss(
                    lambda *args, win_prob: inpo_loss(*args, ETA, R, win_prob), logps, last, game, (reference, last)
                ),
                last,
            )
        elif method == "iter-ipo":
            policy = minimise(
                lambda logps: expected_loss(
                    lambda *args, win_prob: ipo_loss(*args, ETA, win_prob), logps, last, game, (last,)
                ),
                last,
            )
        else:
            policy = minimise(
                lambda logps: expected_loss(lambda *args: dpo_loss(*args, 1.0), logps, last, game, (last,), soft=False),
                last,
            )
        last = policy
        gaps.append(duality_gap(last.exp(), game))
        if method == "comal" and (iteration + 1) % MOVES == 0:
            reference = last
    return gaps, last


@pytest.mark.parametrize("name, iterations", [("paper", 96), ("dominated", 96), ("condorcet", 204), ("random", 300)])
def test_comal_reaches_the_nash_policy(name, iterations, capsys):
    gaps, last = play("comal", name, iterations)
    with capsys.disabled():
        print(
            f" [{name}: gap {gaps[0]:.2f} at the start, {gaps[12]:.1e} after 12, {gaps[48]:.1e} after 48, "
            f"{gaps[-1]:.1e} after {iterations}] ",
            end="",
        )
    assert gaps[-1] < 1e-10
    assert last.exp().numpy() == pytest.approx(nash_mixture(GAMES[name]), abs=1e-6)


def regularised_nash(game, reference, tau):
    """The solution of `pi = softmax(log pi_ref + P(. > pi)/tau)`, the game with tau KL(pi || pi_ref), by a root
    finder."""

    def residual(theta):
        policy = np.exp(theta - theta.max())
        policy /= policy.sum()
        target = reference + game @ policy / tau
        return theta - (target - target.mean())

    start = reference - reference.mean()
    found = root(residual, start, tol=1e-13)
    assert found.success
    policy = np.exp(found.x - found.x.max())
    return policy / policy.sum()


@pytest.mark.parametrize("name", ["paper", "random", "condorcet"])
def test_inpo_with_a_fixed_reference_stops_at_the_regularised_nash_policy(name):
    gaps, last = play("inpo", name, 200)
    expected = regularised_nash(GAMES[name], np.log(START[name]), R * ETA)
    assert last.exp().numpy() == pytest.approx(expected, abs=1e-9)
    assert gaps[-1] == pytest.approx(duality_gap(expected, GAMES[name]), abs=1e-9) and gaps[-1] > 0.01


@pytest.mark.parametrize("method", ["iter-ipo", "iter-dpo"])
def test_iterated_baselines_circle(method, capsys):
    gaps, _ = play(method, "paper", 120)
    with capsys.disabled():
        print(
            f" [{method}: smallest gap {min(gaps):.2f}, last ten {min(gaps[-10:]):.2f} to {max(gaps[-10:]):.2f}] ",
            end="",
        )
    assert min(gaps) > 0.2


def test_soft_labels_give_the_gradient_of_hard_labels_on_average():
    game, last = PAPER, torch.tensor(START["paper"], dtype=torch.float64).log()
    policy = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64).log()

    def gradient(soft):
        def objective(logps):
            loss = lambda *args, win_prob=None: ipo_loss(*args, ETA, win_prob)
            return expected_loss(loss, logps, last, game, (last,), soft)

        return torch.autograd.functional.jacobian(lambda x: objective(x.log_softmax(0)), policy)

    assert torch.allclose(gradient(soft=True), gradient(soft=False), atol=1e-12)


# ---- Which pair rules are unbiased ----

SHARP = np.array([[0.5, 0.05, 0.6], [0.95, 0.5, 0.05], [0.4, 0.95, 0.5]])  # Nash (.45, .10, .45), far from uniform
K = 5


def rule_pairs(rule, game):
    """(responses of K samples (S, K), chosen (S,), rejected (S,), share (S,)) for all sequences of K samples and what
    the rule of data_processing.py makes of each; of `random` every pair that it may draw, ties included. Sequences of
    the same responses are as probable as each other, so those of one pair are one row."""
    shares = Counter()
    for sequence in itertools.product(range(len(game)), repeat=K):
        record = {
            "samples": [{"text": str(answer)} for answer in sequence],
            "win_probs": [
                [None if i == j else game[a][b] for j, b in enumerate(sequence)] for i, a in enumerate(sequence)
            ],
        }
        if rule == "random":
            pairs = [
                (i, j) if game[sequence[i]][sequence[j]] >= 0.5 else (j, i)
                for i, j in itertools.combinations(range(K), 2)
            ]
        else:
            pairs = [PAIR_RULES[rule](record, [True] * K, None) or (0, 0)]
        for i, j in pairs:
            if sequence[i] != sequence[j]:
                shares[tuple(sorted(sequence)), sequence[i], sequence[j]] += 1 / len(pairs)
    return [torch.tensor(column) for column in zip(*((*row, share) for row, share in shares.items()))]


def rule_limit(rule, soft, game, rounds=150):
    """The policy that COMAL with a pair rule ends at: eta 1, the reference moves every 12 iterations, until it stays
    within 1e-4; exact expectations."""
    sequences, chosen, rejected, share = rule_pairs(rule, game)
    win_prob = torch.tensor(game)[chosen, rejected] if soft else None
    last = reference = torch.tensor([0.8, 0.1, 0.1], dtype=torch.float64).log()
    for iteration in range(12 * rounds):
        weight = last[sequences].sum(1).exp() * share
        last = minimise(
            lambda logps: (
                weight
                * inpo_loss(
                    logps[chosen],
                    logps[rejected],
                    reference[chosen],
                    reference[rejected],
                    last[chosen],
                    last[rejected],
                    1.0,
                    R,
                    win_prob,
                )
            ).sum(),
            last,
            steps=1,
        )
        if (iteration + 1) % 12 == 0:
            moved, reference = (last.exp() - reference.exp()).abs().max(), last
            if moved < 1e-4:
                break
    return last.exp().numpy()


@pytest.mark.parametrize(
    "rule, soft, paper_gap, sharp_gap",
    [
        ("random", True, 0, 0),
        ("random", False, 0.067, 0.234),
        ("best_worst", False, 0.067, 0.052),
        ("top_two", False, 0.067, 0.223),
        ("top_two", True, 0.039, 0.573),
        ("best_worst", True, 0.006, 0.056),
    ],
)
def test_pair_rules_and_the_gap_that_they_end_at(rule, soft, paper_gap, sharp_gap, capsys):
    """The table in docs/recipes.md: only random pairs with soft labels keep the Nash policy."""
    limits = [rule_limit(rule, soft, game) for game in (PAPER, SHARP)]
    gaps = [duality_gap(limit, game) for limit, game in zip(limits, (PAPER, SHARP))]
    with capsys.disabled():
        print(
            f" [{rule}, {'soft' if soft else 'hard'}: {limits[0].round(3)} gap {gaps[0]:.3f}, {limits[1].round(3)} gap "
            f"{gaps[1]:.3f}] ",
            end="",
        )
    assert gaps == pytest.approx([paper_gap, sharp_gap], abs=0.002)
