"""Tiny models of every known kind and rows for them, and what the plain computation gives."""

import copy

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from training.logps import MODEL_TYPES

SHAPE = dict(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=256,
    pad_token_id=0,
    bos_token_id=None,
    eos_token_id=1,
)


def tiny(model_type, **changes):
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **SHAPE | changes)
    if model_type in MODEL_TYPES and "sliding_window" not in changes:
        config.sliding_window = None
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms, which begin as constants, too
            parameter.add_(0.05 * torch.randn(parameter.shape))
    return model.eval()


def random_rows(count, responses=2, seed=0, shortest=1):
    generator = torch.Generator().manual_seed(seed)
    length = lambda: int(torch.randint(shortest, 12, (1,), generator=generator))
    ids = lambda: torch.randint(2, 97, (length(),), generator=generator).tolist()
    return [(ids(), [ids() for _ in range(responses)]) for _ in range(count)]


def by_hand(model, rows):
    """Each response alone behind its prompt, in float64."""
    model = copy.deepcopy(model).double()
    sums = []
    for side in range(len(rows[0][1])):
        for prompt, responses in rows:
            ids = torch.tensor([prompt + responses[side]])
            logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
            sums.append(logits.log_softmax(-1).gather(1, torch.tensor(responses[side])[:, None]).sum())
    return torch.stack(sums)
