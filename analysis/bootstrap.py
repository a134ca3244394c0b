"""Bootstrap intervals over prompts: the 95 % percentile intervals of all figures that are written or printed."""

import numpy as np

from utils import derive_seed


def resampled_means(values, name: str, seed: int, num_draws: int, by_prompt: bool = False) -> np.ndarray:
    """The means over N prompts in each of `num_draws` samples of N prompts, drawn with replacement.

    A sample is drawn as the number of times that each prompt occurs in it (multinomial), or, with `by_prompt`, as one
    prompt after another. The distribution is the same, but the random numbers are not: a caller keeps to one way, so
    that its intervals can be reproduced.

    Args:
        values: (..., N), a column for each prompt; all rows are drawn together
        name: of the figures, part of the generator's seed
        seed: of the generator

    Returns:
        (..., num_draws)
    """
    values = np.asarray(values, dtype=float)
    size = values.shape[-1]
    generator = np.random.default_rng(derive_seed(name, seed))
    share = np.full(size, 1 / size)

    def counts():
        if by_prompt:
            return np.bincount(generator.integers(size, size=size), minlength=size)
        return generator.multinomial(size, share)

    return np.stack([values @ counts() / size for _ in range(num_draws)], axis=-1)


def interval(draws) -> np.ndarray:
    """The 95 % percentile interval of figures that were computed from resampled means; NaN is left out.

    Args:
        draws: (..., num_draws)

    Returns:
        (2, ...): the lower bounds and the upper bounds
    """
    return np.nanpercentile(draws, [2.5, 97.5], axis=-1)
