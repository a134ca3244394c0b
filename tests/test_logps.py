"""logps.py against the plainest computation: logits of all positions, float64, log_softmax, gather.

python -m pytest tests/test_logps.py
"""

import pytest
import torch
from helpers.logps import by_hand, random_rows, tiny
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from training import logps
from training.logps import (
    MODEL_TYPES,
    ResponseHead,
    TokenLogps,
    Tuning,
    attention_mask,
    install_head,
    lay_out,
    response_logps,
)

SMALL = Tuning(rows=3, tile=5, keep=True, multiple=1)


def test_layout_of_two_pairs():
    batch = lay_out([([5, 6], [[7, 8], [9]]), ([1], [[2], [3]])])
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9], [1, 2, 3, 0, 0]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 2], [0, 1, 1, 0, 0]]
    assert batch["predictors"].tolist() == [1, 2, 1, 5, 5]
    assert batch["labels"].tolist() == [7, 8, 9, 2, 3]
    assert batch["owner"].tolist() == [0, 0, 2, 1, 3]
    assert batch["segments"].tolist() == [[0, 0, 1, 1, 2], [0, 1, 2, -1, -1]]
    mask = attention_mask(batch["segments"], torch.bfloat16)
    assert mask.shape == (2, 1, 5, 5) and mask.dtype == torch.bfloat16
    assert mask.exp()[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 1, 1, 0],
        [1, 1, 0, 0, 1],
    ]
    assert set(mask.unique().tolist()) == {0, -torch.inf}
    assert (mask == 0).any(-1).all()  # also padding looks at something


def test_layout_pads_to_a_multiple():
    rows = [([5, 6], [[7, 8], [9]]), ([1], [[2], [3]])]
    batch = lay_out(rows, 8)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9, 0, 0, 0], [1, 2, 3, 0, 0, 0, 0, 0]]
    assert batch["predictors"].tolist() == [1, 2, 1, 8, 8]
    assert lay_out([([1] * 4, [[2, 3], [4, 5]])], 8)["input_ids"].shape == (1, 8)


def test_layout_of_single_responses_needs_no_mask():
    batch = lay_out([([5, 6], [[7, 8]]), ([1], [[2]])])
    assert set(batch) == {"input_ids", "predictors", "labels", "owner"}
    assert batch["owner"].tolist() == [0, 0, 1]


@pytest.mark.parametrize("model_type", sorted(MODEL_TYPES))
@pytest.mark.parametrize("responses", [1, 2, 3])
def test_every_known_model_gives_what_the_plain_computation_gives(model_type, responses):
    model, rows = tiny(model_type), random_rows(4, responses)
    expected = by_hand(model, rows)
    assert isinstance(install_head(model).lm_head, ResponseHead)
    found = response_logps(model, rows)
    assert (found.double() - expected).abs().max() < 1e-5
    assert (response_logps(tiny(model_type), rows).double() - expected).abs().max() < 1e-5  # the plain way


@pytest.mark.parametrize("tied", [True, False])
def test_gradients_are_those_of_the_plain_computation(tied):
    rows, weights = random_rows(3), torch.randn(6, dtype=torch.float64)
    plain = tiny("qwen2", tie_word_embeddings=tied).double()
    (by_hand_with_gradient(plain, rows) * weights).sum().backward()
    model = install_head(tiny("qwen2", tie_word_embeddings=tied))
    (response_logps(model, rows) * weights.float()).sum().backward()
    expected = dict(plain.named_parameters())
    for name, parameter in model.named_parameters():
        difference = (parameter.grad.double() - expected[name].grad).norm() / expected[name].grad.norm()
        assert difference < 1e-5, name


def by_hand_with_gradient(model, rows):
    sequences = [(prompt, responses[side]) for side in range(2) for prompt, responses in rows]
    sums = []
    for prompt, response in sequences:
        logits = model(input_ids=torch.tensor([prompt + response]), use_cache=False).logits[0, len(prompt) - 1 : -1]
        sums.append(logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None]).sum())
    return torch.stack(sums)


@pytest.mark.parametrize("bias", [True, False])
def test_blocks_give_what_one_softmax_gives(bias):
    generator = torch.Generator().manual_seed(0)
    hidden, weight, shift = (
        torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
        for shape in ((7, 4), (13, 4), (13,))
    )
    labels = torch.tensor([0, 12, 4, 5, 5, 9, 1])
    arguments = hidden, weight, shift if bias else None, labels, torch.float64
    expected = (
        torch.nn.functional.linear(hidden, weight, shift if bias else None).log_softmax(-1).gather(1, labels[:, None])
    )
    for blocks in SMALL, logps.GPU:
        assert torch.allclose(TokenLogps.apply(*arguments, blocks), expected[:, 0], atol=1e-12)
        assert torch.autograd.gradcheck(
            lambda h, w, b: TokenLogps.apply(h, w, b if bias else None, *arguments[3:], blocks), (hidden, weight, shift)
        )


def test_kept_logits_and_those_computed_again_give_the_same_gradients():
    generator, gradients = torch.Generator().manual_seed(0), []
    values = [torch.randn(shape, generator=generator).bfloat16() for shape in ((7, 4), (13, 4), (13,))]
    for keep in (True, False):
        arguments = [value.clone().requires_grad_() for value in values]
        labels = torch.tensor([0, 12, 4, 5, 5, 9, 1])
        found = TokenLogps.apply(*arguments, labels, torch.bfloat16, SMALL._replace(keep=keep))
        assert any(saved.shape == (3, 5) for saved in found.grad_fn.saved_tensors) == keep
        (found * torch.arange(1, 8)).sum().backward()
        gradients.append([argument.grad for argument in arguments])
    assert all(map(torch.equal, *gradients))


def test_extreme_logits_stay_finite():
    hidden, weight = (
        torch.tensor([[300.0, 0.0], [0.0, -300.0]]),
        torch.tensor([[300.0, 0.0], [0.0, 300.0], [-1.0, -1.0]]),
    )
    found = TokenLogps.apply(hidden, weight, None, torch.tensor([0, 1]), torch.float32, SMALL)
    assert found.tolist() == [0.0, -90300.0]


def test_a_row_alone_does_not_depend_on_its_neighbours():
    model, rows = install_head(tiny("llama")), random_rows(3)
    together = response_logps(model, rows)
    alone = torch.stack([response_logps(model, [row]) for row in rows], dim=1).flatten()
    assert torch.allclose(together, alone, atol=1e-5)


@pytest.mark.parametrize(
    "model_type, changes",
    [
        ("mistral", {"sliding_window": 8}),
        ("gemma2", {"head_dim": 8}),
        ("granite", {"logits_scaling": 3.0}),
        ("gpt_neox", {}),
        ("cohere", {"logit_scale": 0.3}),
    ],
)
def test_other_models_take_the_plain_way(model_type, changes):
    model, rows = tiny(model_type, **changes), random_rows(3, shortest=6)
    expected = by_hand(model, rows)
    assert not isinstance(getattr(install_head(model), "lm_head", None), ResponseHead)
    assert (response_logps(model, rows).double() - expected).abs().max() < 1e-5


def test_generation_and_saving_see_an_ordinary_model(tmp_path):
    model = tiny("qwen2", tie_word_embeddings=True)
    ids = torch.tensor([[5, 6, 7]])
    expected = model(input_ids=ids).logits
    install_head(model)
    assert torch.equal(model(input_ids=ids).logits, expected)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.equal(loaded(input_ids=ids).logits, expected)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_no_matrix_of_positions_and_vocabulary_in_float32():
    """Under bfloat16 autocast, with gradient: one in bfloat16, none in float32; without gradient none at all."""
    model, rows = install_head(tiny("qwen2", vocab_size=4 * logps.CPU.tile)), random_rows(8, shortest=8)
    count = sum(len(response) for _, responses in rows for response in responses)

    class Largest(TorchDispatchMode):
        sizes = {}

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, (tuple, list)) else [result]:
                if torch.is_tensor(tensor) and tensor.ndim == 2 and tensor.shape[0] == count:
                    self.sizes[tensor.dtype] = max(self.sizes.get(tensor.dtype, 0), tensor.shape[1])
            return result

    with Largest() as largest, torch.autocast("cpu", torch.bfloat16):
        response_logps(model, rows).sum().backward()
    assert max(largest.sizes[torch.float32], largest.sizes[torch.bfloat16]) <= logps.CPU.tile


def test_an_empty_prompt_is_refused():
    with pytest.raises(ValueError, match="empty prompt"):
        response_logps(tiny("llama"), [([], [[3], [4]])])
