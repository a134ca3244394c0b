"""Sequence log-probabilities and the losses of COMAL, INPO, IPO, DPO and SFT: pure functions of tensors.

Every loss takes log-probabilities summed over response tokens (natural log), shape (B,), and returns the losses of
single pairs, (B,), without reduction. (TRL's IPO divides by the response length; these do not.) `chosen` is the
response w, `rejected` is l. TRL's `beta` is `eta` in `ipo_loss`, `beta` in `dpo_loss`.
"""

import torch
import torch.nn.functional as F


def sequence_logps(logits, labels, response_mask):
    """Summed log-probability of the response tokens of each sequence.

    Args:
        logits: (B, T, V), `logits[:, t]` predicts the token at position t + 1.
        labels: (B, T), the token ids of the sequences themselves (not shifted).
        response_mask: (B, T), True where a token belongs to the response. Position 0 has no prediction.

    Returns:
        (B,) float32, `sum_t log p(labels[t] | labels[<t])` over response tokens. Each token's term is computed
        in float32 and the terms are added in float64: sequential float32 sums of long responses lose 1e-3.
    """
    if not logits.shape[:2] == labels.shape == response_mask.shape:
        raise ValueError(
            f"shapes differ: logits {tuple(logits.shape)}, labels {tuple(labels.shape)}, "
            f"response_mask {tuple(response_mask.shape)}"
        )
    if response_mask[:, 0].any():
        raise ValueError("a response begins at position 0, where nothing predicts it")
    sums = []
    for row_logits, row_labels, row_mask in zip(logits[:, :-1], labels[:, 1:], response_mask[:, 1:].bool()):
        scores = row_logits[row_mask].float()  # (N, V): only response positions meet the softmax
        token_logps = -F.cross_entropy(scores, row_labels[row_mask], reduction="none")  # (N,)
        sums.append(token_logps.double().sum())
    return torch.stack(sums).float()


def mle_loss(response_logps, num_tokens):
    """Mean negative log-likelihood per response token, per sequence: `-log pi(y|x) / |y|`. All (B,)."""
    return -response_logps / num_tokens


def dpo_loss(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, beta, win_prob=None):
    """`-log sigmoid(beta * h)`, h the log-ratio margin against the reference (Rafailov et al. 2023, eq. 7).

    With `win_prob` p, `-p log sigmoid(beta h) - (1 - p) log sigmoid(-beta h)`: the mean over labels drawn with
    probability p (TRL's `label_smoothing` 1 - p), smallest at h = log(p/(1 - p))/beta instead of at infinity.
    """
    margin = beta * _margin(policy_chosen_logps, ref_chosen_logps, policy_rejected_logps, ref_rejected_logps)
    if win_prob is None:
        return -F.logsigmoid(margin)
    return -win_prob * F.logsigmoid(margin) - (1 - win_prob) * F.logsigmoid(-margin)


def ipo_loss(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, eta, win_prob=None):
    """`(h - 1/(2 eta))^2`, h the log-ratio margin against the reference (Azar et al. 2023, eq. 17).

    With `win_prob` p = P(chosen > rejected), (B,), the target is `(2p - 1)/(2 eta)`: the gradient that labels
    drawn with probability p give on average, without their noise.
    """
    margin = _margin(policy_chosen_logps, ref_chosen_logps, policy_rejected_logps, ref_rejected_logps)
    return (margin - preference_target(eta, win_prob)) ** 2


def inpo_loss(
    policy_chosen_logps,
    policy_rejected_logps,
    ref_chosen_logps,
    ref_rejected_logps,
    last_chosen_logps,
    last_rejected_logps,
    eta,
    tau_eta_ratio,
    win_prob=None,
):
    """The inner step of COMAL (Zhang et al. 2024, arXiv 2407.00617, eq. 9), `r = tau_eta_ratio`:

        h = [log pi(w) - r log pi_ref(w) - (1 - r) log pi_last(w)] - [the same for l]
        loss = (h - 1/(2 eta))^2

    `r = 1` is IPO against the reference; where reference and last policy are one, r does not matter.
    `win_prob` as in `ipo_loss`. `eta` is the regularisation coefficient of the released code, the inverse of the
    paper's step size.
    """
    r = tau_eta_ratio
    anchor_chosen = r * ref_chosen_logps + (1 - r) * last_chosen_logps
    anchor_rejected = r * ref_rejected_logps + (1 - r) * last_rejected_logps
    margin = _margin(policy_chosen_logps, anchor_chosen, policy_rejected_logps, anchor_rejected)
    return (margin - preference_target(eta, win_prob)) ** 2


def preference_target(eta, win_prob=None):
    """What the margin is regressed on: `1/(2 eta)`, or `(2p - 1)/(2 eta)` with soft labels p."""
    return 1 / (2 * eta) if win_prob is None else (2 * win_prob - 1) / (2 * eta)


def _margin(policy_chosen, anchor_chosen, policy_rejected, anchor_rejected):
    return (policy_chosen - anchor_chosen) - (policy_rejected - anchor_rejected)
