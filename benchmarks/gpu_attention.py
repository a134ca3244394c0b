"""Attention of a pair, [prompt][chosen][rejected], in every way that could be right: time and exactness of each. A
section of gpu.py.

The project's rows share the prompt, so that its tokens go through the model once; that takes a mask, and a mask rules
out FlashAttention. The other ways need no mask: each response in a row of its own behind the prompt, which then goes
through the whole model twice; or the parts of a shared row one by one, each with the keys that it sees.

Time is that of forward and backward of one layer, in bfloat16, with the copies that a way needs. Exactness is the
relative difference of the output, and of all gradients, from the same in float32 with the mask. The time of a whole
training pass is an estimate: attention's of all layers, and the other products at the matrix rate that was measured.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from common import attention_flops, forward_flops, make_config, seconds
from torch.nn.attention import SDPBackend, sdpa_kernel

from utils import first_line

RIGHT = 0.02  # the relative difference that bfloat16 may have; a key too many or too few makes it ten times as large
LENGTHS = {"1.5B": [(192, 300, 300), (4, 2046, 2046)], "tiny": [(8, 12, 9)]}  # prompt, chosen, rejected


@dataclass
class Way:
    """One way to compute attention.

    name: for the table
    attend: (query, key, value, mask, lengths) -> output, all (rows, heads, tokens, dimension)
    mask: which one it gets: "boolean", True where a query may look, or "additive", 0 there and elsewhere -inf
    shared: the prompt is computed once; otherwise it comes with rows of their own, see `apart`
    """

    name: str
    attend: Callable
    mask: str = "additive"
    shared: bool = True


def masked(backend=None):
    """torch's scaled_dot_product_attention with a mask, as transformers calls it: with a mask it repeats the keys."""

    def attend(query, key, value, mask, lengths):
        with sdpa_kernel(backend) if backend else nullcontext():
            return F.scaled_dot_product_attention(query, *repeated(query, key, value), attn_mask=mask)

    return attend


def repeated(query, *tensors):
    """Keys or values of fewer heads, one for each head of the query."""
    return [one.repeat_interleave(query.shape[1] // one.shape[1], dim=1) for one in tensors]


def flash(query, key, value, mask, lengths):
    """Causal, without a mask: for rows of their own."""
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return F.scaled_dot_product_attention(query, *repeated(query, key, value), is_causal=True)


def three_calls(query, key, value, mask, lengths):
    """FlashAttention on each part of a shared row: its queries are the last of the keys that it sees."""
    from torch.nn.attention.bias import causal_lower_right

    outputs = []
    key, value = repeated(query, key, value)
    for part, seen in zip(parts(lengths), keys_seen(lengths)):
        own = [torch.cat([one[:, :, piece] for piece in seen], dim=2) for one in (key, value)]
        bias = causal_lower_right(part.stop - part.start, own[0].shape[2])
        outputs.append(F.scaled_dot_product_attention(query[:, :, part], *own, attn_mask=bias))
    return torch.cat(outputs, dim=2)


def varlen(query, key, value, mask, lengths):
    """torch.nn.attention.varlen: one kernel for all parts, with the keys of the prompt gathered for each of them."""
    from torch.nn.attention.varlen import varlen_attn

    query_ends, key_ends = ends(lengths)
    flat = [one[0].transpose(0, 1) for one in (query, key, value)]  # (tokens, heads, dimension)
    gathered = [torch.cat([one[piece] for seen in keys_seen(lengths) for piece in seen]) for one in flat[1:]]
    longest = [max(b - a for a, b in zip(one, one[1:])) for one in (query_ends, key_ends)]
    starts = [torch.tensor(one, dtype=torch.int32, device=query.device) for one in (query_ends, key_ends)]
    output = varlen_attn(flat[0], *gathered, *starts, *longest, window_size=(-1, 0), enable_gqa=True)
    return output.transpose(0, 1)[None]


WAYS = [
    Way("masked, torch's choice (the project's way)", masked()),
    Way("masked, torch's choice, boolean mask", masked(), mask="boolean"),
    Way("masked, memory-efficient", masked(SDPBackend.EFFICIENT_ATTENTION)),
    Way("masked, cuDNN", masked(SDPBackend.CUDNN_ATTENTION)),
    Way("masked, plain matrix products", masked(SDPBackend.MATH)),
    Way("rows of their own, FlashAttention", flash, shared=False),
    Way("three calls, FlashAttention", three_calls),
    Way("varlen, gathered keys", varlen),
]


# ---------------------------------------------------------------------------------------------- layouts


def parts(lengths):
    """Where prompt, chosen and rejected stand in a shared row."""
    prompt, chosen, rejected = lengths
    return [slice(0, prompt), slice(prompt, prompt + chosen), slice(prompt + chosen, sum(lengths))]


def keys_seen(lengths):
    """Of each part the pieces of the row that its last query sees, in order."""
    prompt, chosen, rejected = parts(lengths)
    return [[prompt], [prompt, chosen], [prompt, rejected]]


def ends(lengths):
    """Where the sequences begin and end: of the queries, and of the gathered keys."""
    prompt, chosen, rejected = lengths
    query_ends = [0, prompt, prompt + chosen, prompt + chosen + rejected]
    key_ends = [0, prompt, 2 * prompt + chosen, 3 * prompt + chosen + rejected]
    return query_ends, key_ends


def apart(tensor, lengths):
    """(1, heads, tokens, dimension) of a shared row as two rows, each with the prompt before it, padded."""
    prompt, chosen, rejected = parts(lengths)
    rows = [torch.cat([tensor[0, :, prompt], tensor[0, :, part]], dim=1) for part in (chosen, rejected)]
    length = max(row.shape[1] for row in rows)
    return torch.stack([F.pad(row, (0, 0, 0, length - row.shape[1])) for row in rows])


def together(tensor, lengths):
    """`apart` undone: the prompt is taken from the first row."""
    prompt, chosen, rejected = lengths
    return torch.cat([tensor[0, :, : prompt + chosen], tensor[1, :, prompt : prompt + rejected]], dim=1)[None]


# ---------------------------------------------------------------------------------------------- measuring


def make_inputs(config, lengths, device, dtype, seed=0):
    """(query, key, value) and the gradient of the output, as they come out of a projection."""
    generator = torch.Generator(device).manual_seed(seed)
    heads, fewer = config.num_attention_heads, config.num_key_value_heads

    def states(count):
        shape = 1, sum(lengths), count, config.hidden_size // heads
        return torch.randn(shape, device=device, generator=generator).to(dtype).transpose(1, 2)

    return [states(heads), states(fewer), states(fewer)], states(heads)


def make_masks(lengths, device, dtype):
    """{kind: (1, 1, tokens, tokens) mask} of a shared row: which query (third index) sees which key."""
    boolean = torch.zeros(sum(lengths), sum(lengths), dtype=torch.bool, device=device)
    for part, seen in zip(parts(lengths), keys_seen(lengths)):
        for piece in seen:
            boolean[part, piece] = True
    boolean = boolean.tril()[None, None]
    additive = torch.zeros(boolean.shape, dtype=dtype, device=device).masked_fill(~boolean, -torch.inf)
    return {"boolean": boolean, "additive": additive}


def output_and_gradients(way, inputs, gradient, mask, lengths):
    """Of the shared row, whatever the way's own layout."""
    leaves = [one.detach().requires_grad_() for one in inputs]
    if way.shared:
        output = way.attend(*leaves, mask, lengths)
    else:
        output = together(way.attend(*(apart(one, lengths) for one in leaves), None, lengths), lengths)
    return [output.detach(), *torch.autograd.grad(output, leaves, gradient)]


def seconds_of(way, inputs, gradient, mask, lengths, repeats):
    """Of one forward and backward pass."""
    if not way.shared:
        inputs, gradient = [apart(one, lengths) for one in inputs], apart(gradient, lengths)
    leaves = [one.detach().requires_grad_() for one in inputs]

    def once():
        torch.autograd.grad(way.attend(*leaves, mask, lengths), leaves, gradient)

    for _ in range(2):  # warm up
        once()
    return seconds(lambda: [once() for _ in range(repeats)], inputs[0].device) / repeats


def relative(found, expected):
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


def measure(shape, device, rate):
    """Yields (lengths, way, seconds of a layer, difference of the output, of the gradients, seconds of a pass), or
    (lengths, way, why there is no figure).

    Args:
        rate: of matrix products in bfloat16, FLOP/s
    """
    config, device = make_config(shape), torch.device(device)
    for lengths in LENGTHS[shape]:
        inputs, gradient = make_inputs(config, lengths, device, torch.bfloat16)
        masks = make_masks(lengths, device, torch.bfloat16)
        exact = [one.float() for one in inputs], gradient.float(), masks["boolean"], lengths
        expected = output_and_gradients(Way("reference", masked(SDPBackend.MATH)), *exact)
        for way in WAYS:
            try:
                given = inputs, gradient, masks[way.mask], lengths
                found = output_and_gradients(way, *given)
                taken = seconds_of(way, *given, repeats=20 if device.type == "cuda" else 1)
            except Exception as error:  # this torch, or this card, does not have it
                yield lengths, way, f"{type(error).__name__}: {first_line(error)[:90]}"
                continue
            output, *gradients = [relative(one, other) for one, other in zip(found, expected)]
            yield lengths, way, taken, output, max(gradients), pass_seconds(config, way, lengths, taken, rate)


def pass_seconds(config, way, lengths, taken, rate):
    """Of a whole training pass, estimated from attention's in one layer."""
    prompt, *responses = ([0] * length for length in lengths)
    rows = [(prompt, responses)] if way.shared else [(prompt, [one]) for one in responses]
    rest = forward_flops(config, rows) - attention_flops(config, rows)
    return 3 * rest / rate + config.num_hidden_layers * taken
