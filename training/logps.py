"""Exact log-probabilities of responses under a model, with as little work as the mathematics allows.

    rows = [(prompt ids, [response ids, ...]), ...]        lists of token ids; a pair is a prompt with two responses
    response_logps(model, rows)                            summed log-probabilities, float32

- A prompt and all of its responses make one row, [prompt][chosen][rejected]; a mask keeps the responses apart and
  their position ids begin anew, so the prompt is computed once.
- The output layer (`ResponseHead`) sees the positions that predict a response token, and no others. It goes through
  them block by block: a matrix of positions x vocabulary exists in bfloat16, for the gradient, where that is the
  precision of the matrix products, and never in float32: there the gradient computes the blocks again.
- Padding is on the right. A row that is alone in its batch has none.

`MODEL_TYPES` are the models for which this was verified: their logits are the output layer's product and nothing else,
and each layer attends to all positions that the mask allows. Others take the plain way, `plain_logps`.
"""

import torch
from torch import Tensor, nn

from losses import sequence_logps

MODEL_TYPES = {"gemma", "llama", "mistral", "olmo2", "phi3", "qwen2", "qwen3", "smollm3"}
ROWS, TILE = 512, 4096  # positions and vocabulary entries of a block

Rows = list[tuple[list[int], list[list[int]]]]  # [(prompt ids, [response ids, ...])]


def response_logps(model: nn.Module, rows: Rows, device: torch.device | None = None) -> Tensor:
    """Summed log-probability of each response, float32: the one forward path of training and of stored values.

    Args:
        model: of `models.load_model`, perhaps wrapped by accelerate.
        rows: [(prompt ids, [response ids, ...])], the same number R of responses in each row.
        device: of the input; default: the model's.

    Returns:
        (R * len(rows),): of the first responses of all rows, then of the second ones.

    Raises ValueError for an empty prompt, whose response nothing predicts.
    """
    if not all(prompt for prompt, _ in rows):
        raise ValueError("an empty prompt: nothing predicts the response's first token")
    device = device or next(model.parameters()).device
    head = getattr(getattr(model, "module", model), "lm_head", None)
    if not isinstance(head, ResponseHead):
        return plain_logps(model, rows, device)
    batch = lay_out(rows, device)
    predictors, labels, owner = (batch.pop(name) for name in ("predictors", "labels", "owner"))
    head.targets = predictors, labels
    try:
        token_logps = model(**batch, use_cache=False).logits.flatten()  # (N,)
    finally:
        head.targets = None
    return sum_by_owner(token_logps, owner, len(rows) * len(rows[0][1]))


def lay_out(rows: Rows, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Tensors of rows with their responses one after another.

    Two rows with the prompts [5, 6] and [1] and the responses [7, 8], [9] and [2], [3] become
        input_ids     [[5, 6, 7, 8, 9],     position_ids  [[0, 1, 2, 3, 2],
                       [1, 2, 3, 0, 0]]                    [0, 1, 1, 0, 0]]
        predictors    [1, 2, 1, 5, 5]       of each response token the place, in the flattened batch, that predicts it
        labels        [7, 8, 9, 2, 3]       the tokens
        owner         [0, 0, 2, 1, 3]       whose they are: the first responses of both rows, then the second ones
        attention_mask (B, 1, T, T)         True where a query (third index) may look at a key: in its own response and
                                            the prompt, not ahead; absent where each row has one response (causal)
    """
    length = max(len(prompt) + sum(map(len, responses)) for prompt, responses in rows)
    tokens, positions, segments, predictors, labels, owner = [], [], [], [], [], []
    for number, (prompt, responses) in enumerate(rows):
        row, place, segment = list(prompt), list(range(len(prompt))), [0] * len(prompt)
        for side, response in enumerate(responses):
            before = number * length + len(row)
            predictors += [number * length + len(prompt) - 1, *range(before, before + len(response) - 1)][
                : len(response)
            ]
            labels += response
            owner += [side * len(rows) + number] * len(response)
            row += response
            place += range(len(prompt), len(prompt) + len(response))
            segment += [side + 1] * len(response)
        padding = length - len(row)
        tokens.append(row + [0] * padding)
        positions.append(place + [0] * padding)
        segments.append(segment + [-1] * padding)
    batch = {"input_ids": tokens, "predictors": predictors, "labels": labels, "owner": owner}
    if max(len(responses) for _, responses in rows) == 1:
        return {name: torch.tensor(values, device=device) for name, values in batch.items()}
    batch |= {"position_ids": positions, "segments": segments}
    tensors = {name: torch.tensor(values, device=device) for name, values in batch.items()}
    query, key = tensors["segments"][:, :, None], tensors.pop("segments")[:, None, :]
    causal = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    return tensors | {"attention_mask": (((key == 0) | (key == query)) & causal)[:, None]}


def sum_by_owner(token_logps: Tensor, owner: Tensor, count: int) -> Tensor:
    """Sums in float64, as float32: sequential float32 sums of long responses lose 1e-3."""
    return (
        torch.zeros(count, dtype=torch.float64, device=token_logps.device)
        .index_add(0, owner, token_logps.double())
        .float()
    )


def plain_logps(model: nn.Module, rows: Rows, device: torch.device | str) -> Tensor:
    """`response_logps` the plain way, for any causal model: each response in a row of its own after its prompt, logits
    from the first response token of the batch on."""
    sequences = [(prompt, responses[side]) for side in range(len(rows[0][1])) for prompt, responses in rows]
    length = max(len(prompt) + len(response) for prompt, response in sequences)
    start = min(len(prompt) for prompt, _ in sequences) - 1  # predicts the first response token
    ids = torch.tensor(
        [[*prompt, *response] + [0] * (length - len(prompt) - len(response)) for prompt, response in sequences],
        device=device,
    )
    mask = torch.tensor(
        [
            [False] * len(prompt) + [True] * len(response) + [False] * (length - len(prompt) - len(response))
            for prompt, response in sequences
        ],
        device=device,
    )
    logits = model(input_ids=ids, use_cache=False, logits_to_keep=length - start).logits
    return sequence_logps(logits, ids[:, start:], mask[:, start:])


# ---------------------------------------------------------------------------------------------- the output layer


def install_head(model: nn.Module) -> nn.Module:
    """Give a model of MODEL_TYPES a ResponseHead in place of its output layer; leave others as they are."""
    config = model.config
    layers = getattr(config, "layer_types", None) or ["full_attention"]
    if (
        config.model_type in MODEL_TYPES
        and config._attn_implementation == "sdpa"
        and set(layers) == {"full_attention"}
        and not getattr(config, "sliding_window", None)
    ):
        head = ResponseHead(1, 1)
        head.in_features, head.out_features = model.lm_head.in_features, model.lm_head.out_features
        head.weight, head.bias = model.lm_head.weight, model.lm_head.bias
        model.lm_head = head
    return model


class ResponseHead(nn.Linear):
    """An output layer that returns log-probabilities of given tokens instead of logits, while `targets` are set: pairs
    of a place in the flattened batch and a token, two (N,) tensors. Then (B, T, H) hidden states give (1, N)
    float32."""

    targets: tuple[Tensor, Tensor] | None = None

    def forward(self, hidden):
        if self.targets is None:
            return super().forward(hidden)
        predictors, labels = self.targets
        hidden, device = hidden.flatten(0, 1)[predictors], hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        keep = torch.is_grad_enabled() and (hidden.requires_grad or self.weight.requires_grad) and dtype.itemsize < 4
        return TokenLogps.apply(hidden, self.weight, self.bias, labels, dtype, keep)[None]


class TokenLogps(torch.autograd.Function):
    """log softmax(hidden @ weight.T + bias)[n, labels[n]] of each row n, (N,) float32.

    The products are in `dtype`; the normaliser `log sum_v exp(logit_v)` is accumulated over blocks in float32. To
    `keep` the logits, in `dtype`, spares the gradient to compute them again: d logp_n / d logit_nv = [v = label_n] -
    softmax_nv.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, dtype, keep):
        inputs, table = hidden.detach().to(dtype), weight.detach().to(dtype)
        exact_dtype = torch.promote_types(dtype, torch.float32)
        count, size = len(inputs), len(table)
        found, normaliser = inputs.new_zeros(count, dtype=exact_dtype), inputs.new_zeros(count, dtype=exact_dtype)
        blocks = []
        scratch = torch.empty(min(ROWS, count) * min(TILE, size), dtype=exact_dtype, device=inputs.device)
        product = None if keep else torch.empty_like(scratch, dtype=dtype)
        for rows in slices(count, ROWS):
            own, own_labels = inputs[rows], labels[rows]
            largest = inputs.new_full((len(own),), -torch.inf, dtype=exact_dtype)
            total = torch.zeros_like(largest)
            for columns in slices(size, TILE):
                shape = len(own), min(columns.stop, size) - columns.start
                logits = torch.empty(shape, dtype=dtype, device=inputs.device) if keep else view(product, shape)
                torch.mm(own, table[columns].T, out=logits)
                if bias is not None:
                    logits += bias.detach()[columns].to(dtype)
                if keep:
                    blocks.append(logits)
                place, inside = within(own_labels, columns, shape)
                found[rows] = torch.where(inside, logits.gather(1, place[:, None])[:, 0].to(exact_dtype), found[rows])
                exact = view(scratch, shape).copy_(logits)
                now = torch.maximum(largest, exact.amax(1))
                total = total * (largest - now).exp() + exact.sub_(now[:, None]).exp_().sum(1)
                largest = now
            found[rows] = found[rows] - largest - total.log()  # in this order: what is large cancels first
            normaliser[rows] = largest + total.log()
        ctx.hidden_dtype = hidden.dtype
        ctx.save_for_backward(inputs, weight, bias, labels, normaliser, *blocks)
        return found

    @staticmethod
    def backward(ctx, grad):
        inputs, weight, bias, labels, normaliser, *blocks = ctx.saved_tensors
        dtype, (count, size) = inputs.dtype, (len(inputs), len(weight))
        table, blocks = weight.detach().to(dtype), iter(blocks)
        exact_dtype = normaliser.dtype
        scratch = torch.empty(min(ROWS, count) * min(TILE, size), dtype=exact_dtype, device=inputs.device)
        grad_hidden = torch.zeros(inputs.shape, dtype=exact_dtype, device=inputs.device)
        grad_weight = torch.zeros_like(weight, dtype=exact_dtype) if ctx.needs_input_grad[1] else None
        grad_bias = torch.zeros_like(bias, dtype=exact_dtype) if bias is not None else None
        for rows in slices(count, ROWS):
            own_labels = labels[rows]
            for columns in slices(size, TILE):
                # - d logp / d logits, times the gradient that came in
                shape = len(own_labels), min(columns.stop, size) - columns.start
                slope = view(scratch, shape)
                if (block := next(blocks, None)) is not None:
                    slope.copy_(block)
                else:
                    torch.mm(inputs[rows], table[columns].T, out=slope)
                    if bias is not None:
                        slope += bias.detach()[columns]
                slope.sub_(normaliser[rows][:, None]).exp_()
                place, inside = within(own_labels, columns, shape)
                slope.scatter_add_(1, place[:, None], -inside[:, None].to(exact_dtype))
                slope = slope.mul_(grad[rows][:, None]).to(dtype)
                grad_hidden[rows] -= slope @ table[columns]
                if grad_weight is not None:
                    grad_weight[columns] -= slope.T @ inputs[rows]
                if grad_bias is not None:
                    grad_bias[columns] -= slope.sum(0)
        return grad_hidden.to(ctx.hidden_dtype), grad_weight, grad_bias, None, None, None


def slices(length, step):
    return [slice(start, start + step) for start in range(0, length, step)]


def within(labels, columns, shape):
    """(place of each label among the columns of a block, whether it is there at all); nothing waits for the device."""
    place = labels - columns.start
    return place.clamp(0, shape[1] - 1), (place >= 0) & (place < shape[1])


def view(buffer, shape):
    """The beginning of a flat buffer as a matrix."""
    return buffer[: shape[0] * shape[1]].view(shape)
