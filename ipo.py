"""Train with the IPO loss, on summed log-probabilities: data -> checkpoint.

    accelerate launch --config_file fsdp_config.yaml ipo.py --model POLICY --input data/train.jsonl \\
        --validation data/test.jsonl --output ckpt

    h = [log pi(w) - log pi_ref(w)] - [the same for l],   loss = (h - 1/(2 eta))^2

IPO is one such step from the reference; iterative IPO takes the last policy as the reference in every iteration.
(TRL's IPO divides the log-probabilities by the response length; this one, like the paper's, does not.)

Assumes: --model is the last policy, the one that `last_*` belongs to; training stops where its log-probabilities are
not the stored ones. The loss itself uses `ref_*` alone. get_logprobs.py was launched as this is, in the same precision.
Input: see records.py.
"""

from losses import ipo_loss
from training.datasets import PairDataset
from training.trainer import TrainingConfig, train
from utils import StageError, run


def main(eta: float = 0.002, soft_labels: bool = False, **training: TrainingConfig):
    """Train one IPO step.

    Args:
        eta: regularisation coefficient (TRL's `beta` for IPO); the margin is regressed on 1/(2 eta)
        soft_labels: regress on (2 win_prob - 1)/(2 eta) instead
    """
    if not eta > 0:
        raise StageError(f"--eta should be greater than 0, got {eta}")

    def compute_loss(logps, batch):
        chosen, rejected = logps.chunk(2)
        reference = batch["ref_chosen_logps"], batch["ref_rejected_logps"]
        return ipo_loss(chosen, rejected, *reference, eta, batch["win_prob"] if soft_labels else None)

    train(compute_loss, TrainingConfig(**training), PairDataset, loss="ipo", eta=eta, soft_labels=soft_labels)


if __name__ == "__main__":
    run(main)
