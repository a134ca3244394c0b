"""Train with the DPO loss: data -> checkpoint.

    accelerate launch --config_file fsdp_config.yaml dpo.py --model POLICY --input data/train.jsonl \\
        --validation data/test.jsonl --output ckpt

    h = [log pi(w) - log pi_ref(w)] - [the same for l],   loss = -log sigmoid(beta h)

DPO is one such step from the reference; iterative DPO takes the last policy as the reference in every iteration.

Assumes: --model is the last policy, the one that `last_*` belongs to; training stops where its log-probabilities are
not the stored ones. The loss itself uses `ref_*` alone. get_logprobs.py was launched as this is, in the same precision.
Input: see records.py.
"""

from losses import dpo_loss
from training.datasets import PairDataset
from training.trainer import TrainingConfig, train
from utils import StageError, run


def main(beta: float = 0.1, soft_labels: bool = False, **training: TrainingConfig):
    """Train one DPO step.

    Args:
        beta: regularisation coefficient
        soft_labels: take the judge's win_prob for the label's probability instead of certainty
    """
    if not beta > 0:
        raise StageError(f"--beta should be greater than 0, got {beta}")

    def compute_loss(logps, batch):
        chosen, rejected = logps.chunk(2)
        reference = batch["ref_chosen_logps"], batch["ref_rejected_logps"]
        return dpo_loss(chosen, rejected, *reference, beta, batch["win_prob"] if soft_labels else None)

    train(compute_loss, TrainingConfig(**training), PairDataset, loss="dpo", beta=beta, soft_labels=soft_labels)


if __name__ == "__main__":
    run(main)
