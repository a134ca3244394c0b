"""Before the first update the model must be the last policy of the data file, whose log-probabilities are stored.

They agree up to rounding, which adds up over the tokens of a response like a random walk, so what is allowed grows with
the root of their number. In bfloat16 it is twice the largest difference over that root that `benchmarks/rounding.py`
found with a real model on a CPU, where another layout of the batch is the only difference: an update has more
responses, larger models have more layers that round, and a GPU has more kernels. In float32 it is some hundred times
the largest, for kernels that compute with TF32. Another model differs by far more; a policy that is a small step away
may not.
"""

import torch
from torch import Tensor

from utils import StageError, log

TOLERANCE = {"no": 0.002, "bf16": 0.2}  # by accelerate's mixed_precision: nats over the root of a response's tokens


def furthest_off(config, difference: Tensor, rows: list, accelerator) -> Tensor:
    """Of a micro-batch the response that is the furthest off for its length.

    Args:
        config: TrainingConfig.
        difference: (R * B,) of log-probabilities from the stored ones, in nats, as response_logps orders them.
        rows: the B rows with R responses each.

    Returns (3,): its |difference| over what is allowed, its |difference|, and its number of tokens. Allowed are
    --start_tolerance nats or, without it, TOLERANCE times the root of the number of tokens.
    """
    tokens = [len(row[1][side]) for side in range(len(rows[0][1])) for row in rows]
    tokens = torch.tensor(tokens, dtype=torch.float32, device=difference.device)
    allowed = TOLERANCE["no" if accelerator.mixed_precision == "no" else "bf16"] * tokens.sqrt()
    if config.start_tolerance:
        allowed = torch.full_like(tokens, config.start_tolerance)
    found = torch.stack([difference.abs() / allowed, difference.abs(), tokens], dim=1)  # (R * B, 3)
    return found.index_select(0, found[:, 0].argmax()[None])[0]  # an index would be read by the program


def check_start(config, off: list[float], normalised_loss: float) -> None:
    """Raise StageError where the model is not the last policy of the data file, by what `furthest_off` found in the
    first batch; the log has that batch's normalised loss beside it."""
    excess, nats, tokens = off
    log.info(
        "untouched policy: stored log-probabilities are off by up to %.2e nats (over %d tokens, where %.2g are "
        "allowed), the normalised loss differs from 1 by %.2e",
        nats,
        tokens,
        nats / excess if excess else 0,
        abs(normalised_loss - 1),
    )
    if not excess <= 1:
        raise StageError(
            f"{config.input}: the last policy's stored log-probabilities differ from those of {config.model} by up to "
            f"{nats:.3g} nats (over {tokens:.0f} tokens, allowed: {nats / excess:.2g}); was the file made with another "
            "model or precision? Run get_logprobs.py again, launched as training is"
        )
