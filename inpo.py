"""Train with the INPO loss, the inner step of COMAL: data -> checkpoint.

    accelerate launch --config_file fsdp_config.yaml inpo.py --model POLICY --input data/train.jsonl \\
        --validation data/test.jsonl --output ckpt

    h = [log pi(w) - r log pi_ref(w) - (1 - r) log pi_last(w)] - [the same for l],   loss = (h - 1/(2 eta))^2

COMAL moves the reference every UPDATE_INTERVAL iterations, INPO never does; both are the same loss on different
`ref_*` columns.

Assumes: --model is the last policy, the one that the responses were sampled from and that `last_*` belongs to; training
stops where its log-probabilities are not the stored ones. get_logprobs.py was launched as this is, in the same
precision. Input: see records.py.
"""

from losses import inpo_loss
from training.datasets import PairDataset
from training.trainer import TrainingConfig, train
from utils import StageError, run


def main(eta: float = 0.002, tau_eta_ratio: float = 1 / 3, soft_labels: bool = False, **training: TrainingConfig):
    """Train one INPO iteration.

    Args:
        eta: regularisation coefficient; the margin is regressed on 1/(2 eta)
        tau_eta_ratio: r, the weight of the reference against the last policy
        soft_labels: regress on (2 win_prob - 1)/(2 eta) instead
    """
    if not eta > 0:
        raise StageError(f"--eta should be greater than 0, got {eta}")
    if not 0 <= tau_eta_ratio <= 1:
        raise StageError(f"--tau_eta_ratio should be between 0 and 1, got {tau_eta_ratio}")

    def compute_loss(logps, batch):
        chosen, rejected = logps.chunk(2)
        reference = batch["ref_chosen_logps"], batch["ref_rejected_logps"]
        last = batch["last_chosen_logps"], batch["last_rejected_logps"]
        win_prob = batch["win_prob"] if soft_labels else None
        return inpo_loss(chosen, rejected, *reference, *last, eta, tau_eta_ratio, win_prob)

    method = {"loss": "inpo", "eta": eta, "tau_eta_ratio": tau_eta_ratio, "soft_labels": soft_labels}
    train(compute_loss, TrainingConfig(**training), PairDataset, **method)


if __name__ == "__main__":
    run(main)
