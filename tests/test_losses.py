"""losses.py against numbers derived by hand and the identities of the algorithm.

python -m pytest tests/test_losses.py
"""

import math

import pytest
import torch

from losses import dpo_loss, inpo_loss, ipo_loss, mle_loss, preference_target, sequence_logps

ETAS = [0.002, 0.1, 1.0]


@pytest.fixture
def logps():
    """{name: (5,) float64 summed log-probabilities} of everything that a loss may ask for."""
    generator = torch.Generator().manual_seed(0)
    names = [f"{model}_{side}_logps" for model in ("policy", "ref", "last") for side in ("chosen", "rejected")]
    return {name: -100 * torch.rand(5, generator=generator, dtype=torch.float64) for name in names}


def only(logps, *models):
    return {name: value for name, value in logps.items() if name.startswith(models)}


def swapped(logps):
    """The same pairs with the labels the other way round."""
    other = {"chosen": "rejected", "rejected": "chosen"}
    parts = {name: name.split("_") for name in logps}
    return {name: logps[f"{model}_{other[side]}_logps"] for name, (model, side, _) in parts.items()}


def policy_gradient(loss, logps, **settings):
    """Gradient of the summed loss by the policy's two log-probabilities: (2, B)."""
    leaves = {name: value.clone().requires_grad_() for name, value in only(logps, "policy").items()}
    total = loss(**(logps | leaves), **settings).sum()
    return torch.stack(torch.autograd.grad(total, [leaves["policy_chosen_logps"], leaves["policy_rejected_logps"]]))


def random_batch(batch=3, length=7, vocabulary=11, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    logits = 3 * torch.randn(batch, length, vocabulary, generator=generator, dtype=dtype)
    labels = torch.randint(vocabulary, (batch, length), generator=generator)
    # Responses of five, one and two tokens, the last two followed by padding.
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [0, 0, 0, 1, 0, 0, 0], [0, 1, 1, 0, 0, 0, 0]], dtype=torch.bool)
    return logits, labels, mask


def plain_logps(logits, labels, mask):
    token_logps = logits[:, :-1].log_softmax(-1).gather(-1, labels[:, 1:, None])[..., 0]  # (B, T - 1)
    return (token_logps * mask[:, 1:]).sum(-1)


# ---- sequence_logps ----


def test_sequence_logps_of_three_tokens():
    # Softmax of (log 1, log 3) is (1/4, 3/4), of (0, 0) it is (1/2, 1/2). The response is the tokens 1 and 0 at
    # positions 1 and 2, predicted at positions 0 and 1: log(3/4) + log(1/2) = log(3/8).
    logits = torch.tensor([[[0.0, math.log(3)], [0.0, 0.0], [9.0, -9.0]]])
    labels, mask = torch.tensor([[0, 1, 0]]), torch.tensor([[0, 1, 1]])
    torch.testing.assert_close(sequence_logps(logits, labels, mask), torch.tensor([math.log(3 / 8)]))


def test_sequence_logps_agrees_with_log_softmax_and_gather():
    logits, labels, mask = random_batch()
    torch.testing.assert_close(sequence_logps(logits, labels, mask), plain_logps(logits, labels, mask))


def test_sequence_logps_of_a_single_response_token():
    logits, labels, _ = random_batch(batch=1)
    mask = torch.zeros(1, 7, dtype=torch.bool)
    mask[0, 6] = True
    expected = logits[0, 5].log_softmax(-1)[labels[0, 6]]
    torch.testing.assert_close(sequence_logps(logits, labels, mask), expected[None])


def test_sequence_logps_ignores_what_is_outside_the_response():
    logits, labels, mask = random_batch()
    predicts = mask.roll(-1, dims=1)  # position t predicts token t + 1; the roll brings in position 0, which is False
    spoilt = logits.masked_fill(~predicts[..., None], math.nan)
    torch.testing.assert_close(
        sequence_logps(spoilt, labels.masked_fill(~mask, 0), mask), sequence_logps(logits, labels, mask)
    )


def test_sequence_logps_does_not_depend_on_the_other_rows():
    logits, labels, mask = random_batch()
    alone = torch.cat([sequence_logps(logits[i : i + 1], labels[i : i + 1], mask[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(sequence_logps(logits, labels, mask), alone, rtol=0, atol=0)


def test_sequence_logps_gradient_is_one_hot_minus_softmax():
    logits, labels, mask = random_batch()
    logits.requires_grad_()
    sequence_logps(logits, labels, mask).sum().backward()
    # d log softmax(z)[k] / dz = onehot(k) - softmax(z), at the positions that predict a response token.
    one_hot = torch.nn.functional.one_hot(labels.roll(-1, dims=1), 11)
    expected = (one_hot - logits.detach().softmax(-1)) * mask.roll(-1, dims=1)[..., None]
    torch.testing.assert_close(logits.grad, expected)


def test_sequence_logps_gradcheck():
    logits, labels, mask = random_batch(batch=2, dtype=torch.float64)
    # The terms are float32 whatever the logits are, so the differences are taken over a wide step.
    assert torch.autograd.gradcheck(
        lambda z: sequence_logps(z, labels[:2], mask[:2]).double(),
        logits.requires_grad_(),
        eps=1e-2,
        atol=2e-4,
        rtol=1e-3,
    )


def test_sequence_logps_of_a_long_response_is_exact_to_float32():
    generator = torch.Generator().manual_seed(2)
    logits = 3 * torch.randn(1, 8192, 16, generator=generator)
    labels = torch.randint(16, (1, 8192), generator=generator)
    mask = torch.arange(8192)[None] > 0
    exact = plain_logps(logits.double(), labels, mask).item()
    assert sequence_logps(logits, labels, mask).item() == pytest.approx(exact, rel=1e-7)


def test_sequence_logps_of_bfloat16_logits_is_computed_in_float32():
    logits, labels, mask = random_batch(dtype=torch.bfloat16)
    found = sequence_logps(logits, labels, mask)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, plain_logps(logits.float(), labels, mask))


@pytest.mark.parametrize(
    "change",
    [
        lambda logits, labels, mask: (logits[:, :-1], labels, mask),  # already shifted
        lambda logits, labels, mask: (logits, labels[:, 1:], mask),
        lambda logits, labels, mask: (logits, labels, mask[:1]),
    ],
)
def test_sequence_logps_refuses_different_shapes(change):
    with pytest.raises(ValueError, match="shapes differ"):
        sequence_logps(*change(*random_batch()))


def test_sequence_logps_refuses_a_response_that_nothing_predicts():
    logits, labels, mask = random_batch()
    mask[1, 0] = True
    with pytest.raises(ValueError, match="position 0"):
        sequence_logps(logits, labels, mask)


# ---- The losses, one number each ----


def test_mle_loss_is_the_mean_over_tokens():
    torch.testing.assert_close(mle_loss(torch.tensor([-6.0, -1.0]), torch.tensor([4.0, 1.0])), torch.tensor([1.5, 1.0]))


def test_dpo_loss_of_one_pair():
    # h = (-10 + 12) - (-11 + 11) = 2, beta h = 1: -log sigmoid(1) = log(1 + 1/e)
    loss = dpo_loss(*torch.tensor([[-10.0], [-11.0], [-12.0], [-11.0]]), beta=0.5)
    torch.testing.assert_close(loss, torch.tensor([math.log1p(math.exp(-1))]))
    # With p = sigmoid(1) this is where the loss is smallest: the entropy of p.
    p = 1 / (1 + math.exp(-1))
    soft = dpo_loss(*torch.tensor([[-10.0], [-11.0], [-12.0], [-11.0]]), beta=0.5, win_prob=torch.tensor([p]))
    torch.testing.assert_close(soft, torch.tensor([-p * math.log(p) - (1 - p) * math.log(1 - p)]))


def test_ipo_loss_of_one_pair():
    # h = 2 as above, 1/(2 eta) = 5: (2 - 5)^2 = 9; with p = 0.7 the target is 0.4 * 5 = 2: 0
    pair = torch.tensor([[-10.0], [-11.0], [-12.0], [-11.0]])
    torch.testing.assert_close(ipo_loss(*pair, eta=0.1), torch.tensor([9.0]))
    torch.testing.assert_close(ipo_loss(*pair, eta=0.1, win_prob=torch.tensor([0.7])), torch.tensor([0.0]))


def test_inpo_loss_of_one_pair():
    # Anchors at r = 1/4: w -11/4 - 3 * 10/4 = -10.25, l -11/4 - 3 * 13/4 = -12.5.
    # h = (-10 + 10.25) - (-12 + 12.5) = -0.25, 1/(2 eta) = 1: (-1.25)^2 = 1.5625
    policy, ref, last = torch.tensor([[[-10.0], [-12.0]], [[-11.0], [-11.0]], [[-10.0], [-13.0]]])  # (2, B) each
    torch.testing.assert_close(inpo_loss(*policy, *ref, *last, eta=0.5, tau_eta_ratio=0.25), torch.tensor([1.5625]))


@pytest.mark.parametrize(
    "eta, win_prob, target", [(0.002, None, 250), (0.002, 1.0, 250), (0.1, 0.5, 0), (0.1, 0.2, -3)]
)
def test_preference_target_values(eta, win_prob, target):
    assert preference_target(eta, win_prob) == pytest.approx(target)  # (2p - 1)/(2 eta)


# ---- Identities ----


def test_dpo_loss_at_zero_margin_is_log_2(logps):
    policy = only(logps, "policy")
    loss = dpo_loss(
        **policy,
        ref_chosen_logps=policy["policy_chosen_logps"] - 7,
        ref_rejected_logps=policy["policy_rejected_logps"] - 7,
        beta=0.1,
    )
    torch.testing.assert_close(loss, torch.full_like(loss, math.log(2)))


@pytest.mark.parametrize("eta", ETAS)
def test_inpo_loss_with_ratio_one_is_ipo_against_the_reference(logps, eta):
    ipo = ipo_loss(**only(logps, "policy", "ref"), eta=eta)
    torch.testing.assert_close(inpo_loss(**logps, eta=eta, tau_eta_ratio=1), ipo)


@pytest.mark.parametrize("eta", ETAS)
def test_inpo_loss_with_ratio_zero_is_ipo_against_the_last_policy(logps, eta):
    last = {name.replace("last", "ref"): value for name, value in only(logps, "last").items()}
    ipo = ipo_loss(**only(logps, "policy"), **last, eta=eta)
    torch.testing.assert_close(inpo_loss(**logps, eta=eta, tau_eta_ratio=0), ipo)


@pytest.mark.parametrize("ratio", [0, 1 / 3, 0.5])
def test_inpo_loss_does_not_depend_on_the_ratio_where_reference_is_last(logps, ratio):
    same = logps | {name.replace("ref", "last"): value for name, value in only(logps, "ref").items()}

    def loss(values, r):
        return inpo_loss(**values, eta=0.1, tau_eta_ratio=r)

    torch.testing.assert_close(loss(same, ratio), loss(same, 1))
    # The ratio does matter where they differ, or the line above would say nothing.
    assert not torch.allclose(loss(logps, ratio), loss(logps, 1))


@pytest.mark.parametrize("eta", ETAS)
def test_losses_of_an_untouched_policy_are_the_squared_target(logps, eta):
    untouched = {name: logps[f"policy_{name.split('_')[1]}_logps"] for name in logps}
    for loss in (
        inpo_loss(**untouched, eta=eta, tau_eta_ratio=1 / 3),
        ipo_loss(**only(untouched, "policy", "ref"), eta=eta),
    ):
        torch.testing.assert_close(loss, torch.full_like(loss, (1 / (2 * eta)) ** 2))  # 62,500 at eta 0.002


LOSSES = [
    (ipo_loss, ("policy", "ref"), {"eta": 0.1}),
    (inpo_loss, ("policy", "ref", "last"), {"eta": 0.1, "tau_eta_ratio": 1 / 3}),
    (dpo_loss, ("policy", "ref"), {"beta": 0.1}),
]


@pytest.mark.parametrize("loss, models, settings", LOSSES)
def test_soft_labels_give_the_mean_gradient_of_drawn_labels(logps, loss, models, settings):
    pairs = only(logps, *models)
    p = torch.tensor([0.0, 0.2, 0.5, 0.9, 1.0], dtype=torch.float64)
    as_labelled = policy_gradient(loss, pairs, **settings)
    # swapped() also exchanges the leaves, so the gradient by (chosen, rejected) comes back as (rejected, chosen).
    other_way = policy_gradient(loss, swapped(pairs), **settings).flip(0)
    soft = policy_gradient(loss, pairs, win_prob=p, **settings)
    torch.testing.assert_close(soft, p * as_labelled + (1 - p) * other_way)


@pytest.mark.parametrize("loss, models, settings", LOSSES)
def test_certain_soft_labels_are_hard_labels(logps, loss, models, settings):
    pairs, ones = only(logps, *models), torch.ones(5, dtype=torch.float64)
    torch.testing.assert_close(loss(**pairs, win_prob=ones, **settings), loss(**pairs, **settings))
    torch.testing.assert_close(loss(**pairs, win_prob=1 - ones, **settings), loss(**swapped(pairs), **settings))


@pytest.mark.parametrize("loss, models, settings", LOSSES)
def test_losses_stay_per_pair(logps, loss, models, settings):
    pairs = only(logps, *models)
    whole = loss(**pairs, **settings)
    assert whole.shape == (5,)
    for i in range(5):
        alone = {name: value[i : i + 1] for name, value in pairs.items()}
        torch.testing.assert_close(loss(**alone, **settings), whole[i : i + 1])
