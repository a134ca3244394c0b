"""The length-controlled win rate of AlpacaEval 2: how often would the responses win if they were as long as the
baseline's?

Judges prefer longer answers. The judge's preference is therefore explained by a logistic regression, one for each set
of responses, and read where the difference in length is 0:

    P(response to x beats baseline's) = sigmoid(phi tanh(d_x / s) + psi gamma_x + theta)
    length-controlled win rate        = mean over x of sigmoid(psi gamma_x + theta)

d_x is the number of characters of the baseline's output minus that of the response, s the standard deviation of d over
the prompts, gamma_x the difficulty of the instruction, which AlpacaEval estimated once from its whole leaderboard.
Source: Dubois et al. 2024, arXiv 2404.04475, section 3, and metrics/glm_winrate.py of the package alpaca-eval 0.6.6,
whose output 1 is the baseline and whose preferences lie in [1, 2] (our probability + 1). It names three models:

    length_controlled_minimal   without psi gamma_x
    length_controlled_noreg     with it
    length_controlled_v1        with it and with comparisons of two gamed baselines (AlpacaEval's baseline, told to be
                                verbose and to be concise) with the baseline. They join the fit with a tenth of a
                                prompt's weight each and without theta, and so hold phi and psi, which they share with
                                the responses, near the baseline's own. The leaderboard shows this one.

An L1 penalty on all coefficients, theta included, is chosen by 5-fold cross-validation over the comparisons. Where
there are few prompts it may be so strong that it draws the result towards 1/2. Where length alone decides, always 0 or
1, phi and theta grow without limit together and the result says little: look at its interval.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypedDict

import numpy as np

from analysis.bootstrap import interval
from utils import StageError, check_input, derive_seed, first_line, log

NUM_FOLDS = 5
GAMED_WEIGHT = 0.2 / 2  # the package's regularisation, 0.2, shared by its two gamed baselines
SOLVER = {"solver": "liblinear", "fit_intercept": False, "random_state": 123}  # the package's; theta is a column


class Gamed(TypedDict):
    """G comparisons of gamed baselines with the baseline: arrays (G,)."""

    preference: np.ndarray  # P(the gamed output beats the baseline's)
    std_delta_len: np.ndarray  # d / s of the gamed outputs
    difficulty: np.ndarray


def length_controlled_win_rate(
    preferences: Sequence[float],
    lengths: Sequence[int],
    baseline_lengths: Sequence[int],
    difficulty: Sequence[float] | None = None,
    gamed: Gamed | None = None,
    seed: int = 0,
    num_bootstrap: int = 1_000,
) -> dict[str, Any]:
    """The length-controlled win rate of responses to N prompts; the module's docstring has the formula.

    Args:
        preferences: (N,) P(response beats the baseline's), in [0, 1]; a tie is 1/2
        lengths: (N,) characters of the responses
        baseline_lengths: (N,) characters of the baseline's
        difficulty: (N,) of the instructions, from `read_difficulty`
        gamed: likewise; needs `difficulty`
        seed: of the bootstrap
        num_bootstrap: how often the prompts are drawn again

    Returns:
        length_controlled_win_rate: in [0, 1], where the package says per cent
        length_controlled_interval: 95 % percentile bootstrap interval over prompts, with the chosen penalty kept
        length_controlled_standard_error: the package's, of the mean of the N predictions. It leaves out the error of
            the coefficients, so the interval is wider; without difficulties all predictions are equal, and it is null
        length_controlled_with_difficulty: bool
        length_controlled_model: the package's name of the model
        The first three are null, with a warning, where there is nothing to estimate: for fewer than 5 prompts, and
        where every response is longer (or shorter) than the baseline's by the same number of characters.

    Raises ValueError for arguments of different shapes, preferences outside [0, 1], and `gamed` without `difficulty`.
    """
    rows = [preferences, lengths, baseline_lengths] + ([] if difficulty is None else [difficulty])
    table = np.array(rows, dtype=float)  # (3 or 4, N)
    preference, length, baseline_length, *gamma = table
    if not np.isfinite(table).all() or (preference < 0).any() or (preference > 1).any():
        raise ValueError("preferences should be in [0, 1], lengths and difficulties finite numbers")
    if gamed is not None and difficulty is None:
        raise ValueError("gamed baselines need the difficulties of the instructions")
    kind = "minimal" if difficulty is None else "noreg" if gamed is None else "v1"
    delta = baseline_length - length
    equal = len(delta) > 0 and np.ptp(delta) == 0
    figures = dict(win_rate=None, interval=None, standard_error=None)
    if len(delta) < NUM_FOLDS:
        log.warning("there is no length-controlled win rate: it needs %d prompts", NUM_FOLDS)
    elif equal and delta[0] != 0:
        log.warning("there is no length-controlled win rate: all differences in length are equal")
    else:
        scaled = delta if equal else delta / delta.std(ddof=1)
        design = np.column_stack([np.tanh(scaled), *gamma, np.ones(len(delta))])  # (N, 2 or 3)
        fit = _Fit(design, preference, gamed)
        predicted = fit.at_equal_length(np.ones(len(delta)))  # (N,)
        if (predicted == 0.5).all():
            log.warning(
                "the regression's penalty left nothing but a length-controlled win rate of 1/2; more prompts may say "
                "more"
            )
        figures["win_rate"] = float(predicted.mean())
        figures["interval"] = _bootstrap(fit, len(delta), seed, num_bootstrap)
        if gamma:
            figures["standard_error"] = float(predicted.std(ddof=1) / np.sqrt(len(delta)))
    figures |= {"with_difficulty": difficulty is not None, "model": f"length_controlled_{kind}"}
    return {f"length_controlled_{name}": value for name, value in figures.items()}


class _Fit:
    """The regression of N preferences on a design (N, K): length first, theta's column of ones last."""

    def __init__(self, design, preference, gamed):
        from sklearn.linear_model import LogisticRegressionCV
        from sklearn.model_selection import GroupKFold

        self.equal_length = design.copy()  # the same prompts without a difference in length
        self.equal_length[:, 0] = 0
        self.gamed_weights = np.full(0 if gamed is None else len(gamed["preference"]), GAMED_WEIGHT)
        if gamed is not None:
            theirs = [np.tanh(gamed["std_delta_len"]), gamed["difficulty"], 0 * self.gamed_weights]  # without theta
            design = np.r_[np.column_stack(theirs), design]
            preference = np.r_[gamed["preference"], preference]
        # A preference p is two examples, won with weight p and lost with weight 1 - p. Their order matters in the last
        # digits: liblinear visits them in random order and stops a little before the minimum.
        self.features, self.labels = np.r_[design, design], np.repeat([1, 0], len(design))
        self.shares = np.r_[preference, 1 - preference]
        folds = GroupKFold(NUM_FOLDS).split(self.features, groups=np.tile(np.arange(len(design)), 2))
        chosen = LogisticRegressionCV(
            cv=list(folds), scoring=_score, l1_ratios=(1,), use_legacy_attributes=False, **SOLVER
        ).fit(self.features, self.labels, sample_weight=self.weights(np.ones(len(self.equal_length))))
        self.inverse_penalty = chosen.C_

    def weights(self, prompts):
        """Of all examples (2 (G + N),), from those of the prompts (N,)."""
        return self.shares * np.tile(np.r_[self.gamed_weights, prompts], 2)

    def at_equal_length(self, prompts):
        """Probabilities (N,) at difference 0, fitted with weights (N,) of the prompts."""
        from sklearn.linear_model import LogisticRegression

        model = LogisticRegression(C=self.inverse_penalty, l1_ratio=1, **SOLVER)
        model.fit(self.features, self.labels, sample_weight=self.weights(prompts))
        return model.predict_proba(self.equal_length)[:, 1]


def _score(model, features, labels, sample_weight):
    """Log-likelihood of a fold over its size: not over its weight, as scikit-learn's own score is."""
    probs = model.predict_proba(features)[np.arange(len(labels)), labels]
    return (sample_weight * np.log(np.clip(probs, 1e-15, 1))).sum() / len(labels)


def _bootstrap(fit, size, seed, num_bootstrap):
    counts = np.random.default_rng(derive_seed("length_control", seed)).multinomial(
        size, np.full(size, 1 / size), size=num_bootstrap
    )  # (num_bootstrap, N): how often each prompt is drawn
    means = [np.average(fit.at_equal_length(count), weights=count) for count in counts]
    return interval(means).tolist()


def read_difficulty(path: str | Path, prompt_ids: Sequence[str]) -> tuple[np.ndarray, Gamed | None]:
    """Difficulties (N,) of AlpacaEval's instructions, and the gamed baselines' comparisons where the file has them.

    The Hub's data set tatsu-lab/alpaca_eval has both files: instruction_difficulty.csv (index, instruction_difficulty)
    and df_gamed.csv (besides these preference and std_delta_len). Index n is prompt_id `alpaca_eval-<n>`.

    Raises StageError for a file that is neither, and for prompts that it has no difficulty for.
    """
    check_input(path)
    try:  # what is no number becomes NaN
        table = np.genfromtxt(path, delimiter=",", names=True, comments=None, encoding="utf-8-sig", ndmin=1)
    except ValueError as error:
        raise StageError(f"{path}: not a table of numbers with commas ({first_line(error)})") from None
    names = table.dtype.names or ()
    if "instruction_difficulty" not in names:
        raise StageError(f"{path}: the column instruction_difficulty is missing; found {', '.join(names) or 'none'}")
    indices = table["index" if "index" in names else names[0]]
    found = {f"alpaca_eval-{n:.0f}": gamma for n, gamma in zip(indices, table["instruction_difficulty"])}
    missing = [prompt_id for prompt_id in prompt_ids if not np.isfinite(found.get(prompt_id, np.nan))]
    if missing:
        raise StageError(
            f"{path} has no difficulty for {len(missing)} prompts, first {', '.join(missing[:10])}; it is for "
            "AlpacaEval's instructions, alpaca_eval-0 to alpaca_eval-804"
        )
    difficulty = np.array([found[prompt_id] for prompt_id in prompt_ids])
    if not {"preference", "std_delta_len"} <= set(names):
        return difficulty, None
    columns = np.array([table[name] for name in ("preference", "std_delta_len", "instruction_difficulty")])
    columns = columns[:, np.isfinite(columns).all(axis=0)]  # the judge left some comparisons out
    return difficulty, dict(zip(Gamed.__annotations__, columns))
