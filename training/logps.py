"""Exact log-probabilities of responses under a model, with as little work as the mathematics allows.

    rows = [(prompt ids, [response ids, ...]), ...]        lists of token ids; a pair is a prompt with two responses
    response_logps(model, rows)                            summed log-probabilities, float32

- A prompt and all of its responses make one row, [prompt][chosen][rejected]; a mask keeps the responses apart and
  their position ids begin anew, so the prompt is computed once.
- The output layer (`ResponseHead`) sees the positions that predict a response token, and no others. It goes through
  them block by block, so that no matrix of all positions x vocabulary exists in float32.
- Padding is on the right. A row that is alone in its batch has none, but on a GPU up to a multiple of 8.
- Everything of a batch goes to a GPU in one transfer, and no value is read back: the GPU never waits for the program.

`MODEL_TYPES` are the models for which this was verified: their logits are the output layer's product and nothing else,
and each layer attends to all positions that the mask allows. Others take the plain way, `plain_logps`, which does wait.
Rows with one response wait once a batch, as transformers looks whether their positions begin anew.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from losses import sequence_logps

MODEL_TYPES = {"gemma", "llama", "mistral", "olmo2", "phi3", "qwen2", "qwen3", "smollm3"}

Rows = list[tuple[list[int], list[list[int]]]]  # [(prompt ids, [response ids, ...])]


class Tuning(NamedTuple):
    """What is fast on a kind of device.

    Args:
        rows, tile: positions and vocabulary entries of a block at the output layer.
        keep: keep the logits for the gradient, where they are bfloat16, instead of computing them again.
        multiple: rows are padded to a multiple of so many tokens.
    """

    rows: int
    tile: int
    keep: bool
    multiple: int


CPU = Tuning(rows=512, tile=4096, keep=True, multiple=1)  # blocks that stay in the cache
GPU = Tuning(rows=1024, tile=2**31, keep=False, multiple=8)  # few kernels, as each has to be launched; little memory


def tuning(device: torch.device | str) -> Tuning:
    return CPU if torch.device(device).type == "cpu" else GPU


def response_logps(model: nn.Module, rows: Rows, device: torch.device | str | None = None) -> Tensor:
    """Summed log-probability of each response, float32: the one forward path of training and of stored values.

    Args:
        model: of `models.load_model`, perhaps wrapped by accelerate.
        rows: [(prompt ids, [response ids, ...])], the same number R of responses in each row.
        device: of the input; default: the model's.

    Returns:
        (R * len(rows),): of the first responses of all rows, then of the second ones.

    Raises ValueError for an empty prompt, whose response nothing predicts.
    """
    device = device or next(model.parameters()).device
    return batch_logps(model, on_device(model_inputs(model, rows, device), device))


def model_inputs(model: nn.Module, rows: Rows, device: torch.device | str) -> dict:
    """What `batch_logps` needs for rows on `device`, still on the CPU: `rows` themselves and tensors.

    Raises ValueError for an empty prompt.
    """
    if not all(prompt for prompt, _ in rows):
        raise ValueError("an empty prompt: nothing predicts the response's first token")
    tensors = lay_out(rows, tuning(device).multiple) if response_head(model) else lay_out_plainly(rows)
    return {"rows": rows} | tensors


def on_device(batch: dict, device: torch.device | str) -> dict:
    """A batch with its CPU tensors on `device`: packed, in one transfer that nothing waits for."""
    tensors = {name: value for name, value in batch.items() if torch.is_tensor(value)}
    names = sorted(tensors, key=lambda name: -tensors[name].itemsize)  # each begins at a multiple of its item's size
    packed = torch.cat([tensors[name].flatten().view(torch.uint8) for name in names])
    if torch.device(device).type != "cpu":
        packed = packed.pin_memory()
    parts = packed.to(device, non_blocking=True).split([tensors[name].nbytes for name in names])
    return batch | {name: part.view(tensors[name].dtype).view(tensors[name].shape) for name, part in zip(names, parts)}


def batch_logps(model: nn.Module, batch: dict) -> Tensor:
    """`response_logps` of a batch that has the `model_inputs` on the device, and perhaps other fields."""
    head = response_head(model)
    if head is None:
        return plain_logps(model, batch)
    inputs = {"input_ids": batch["input_ids"]}
    if "segments" in batch:
        inputs["position_ids"] = batch["position_ids"]
        inputs["attention_mask"] = attention_mask(batch["segments"], product_dtype(next(model.parameters())))
    head.targets = batch["predictors"], batch["labels"]
    try:
        token_logps = model(**inputs, use_cache=False).logits  # (N,)
    finally:
        head.targets = None
    return sum_by_owner(token_logps, batch["owner"], len(batch["rows"]) * len(batch["rows"][0][1]))


def lay_out(rows: Rows, multiple: int = 1) -> dict[str, Tensor]:
    """Tensors of rows with their responses one after another, padded to a multiple of so many tokens.

    Two rows with the prompts [5, 6] and [1] and the responses [7, 8], [9] and [2], [3] become
        input_ids     [[5, 6, 7, 8, 9],     position_ids  [[0, 1, 2, 3, 2],     segments  [[0, 0, 1, 1, 2],
                       [1, 2, 3, 0, 0]]                    [0, 1, 1, 0, 0]]                [0, 1, 2, -1, -1]]
        predictors    [1, 2, 1, 5, 5]       of each response token the place, in the flattened batch, that predicts it
        labels        [7, 8, 9, 2, 3]       the tokens
        owner         [0, 0, 2, 1, 3]       whose they are: the first responses of both rows, then the second ones
    Where each row has one response, the model's own positions and causal mask are right, and there are no position_ids
    and segments.
    """
    length = max(len(prompt) + sum(map(len, responses)) for prompt, responses in rows)
    length += -length % multiple
    tokens, positions, segments, predictors, labels, owner = [], [], [], [], [], []
    for number, (prompt, responses) in enumerate(rows):
        row, place, segment = list(prompt), list(range(len(prompt))), [0] * len(prompt)
        for side, response in enumerate(responses):
            columns = [len(prompt) - 1, *range(len(row), len(row) + len(response) - 1)]
            predictors += [number * length + column for column in columns[: len(response)]]
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
    if max(len(responses) for _, responses in rows) > 1:
        batch |= {"position_ids": positions, "segments": segments}
    return {name: torch.tensor(values) for name, values in batch.items()}


def attention_mask(segments: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, 1, T, T), added to attention's scores: 0 where a query (third index) may look at a key, in its own response
    and the prompt, not ahead; else -inf. In the scores' own dtype, so that all layers share it: from a mask of another
    one each layer would make its own."""
    query, key = segments[:, :, None], segments[:, None, :]
    allowed = ((key == 0) | (key == query)).tril()
    return torch.zeros(allowed.shape, dtype=dtype, device=segments.device).masked_fill_(~allowed, -torch.inf)[:, None]


def product_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype in which autocast, if it is on, multiplies this tensor."""
    device = tensor.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else tensor.dtype


def sum_by_owner(token_logps: Tensor, owner: Tensor, count: int) -> Tensor:
    """Sums in float64, as float32: sequential float32 sums of long responses lose 1e-3."""
    sums = torch.zeros(count, dtype=torch.float64, device=token_logps.device)
    return sums.index_add(0, owner, token_logps.double()).float()


def lay_out_plainly(rows: Rows) -> dict[str, Tensor]:
    """Tensors of rows with each response in a row of its own after its prompt, the first responses before the second
    ones: input_ids and response_mask, True where a token belongs to a response."""
    sequences = [(prompt, responses[side]) for side in range(len(rows[0][1])) for prompt, responses in rows]
    length = max(len(prompt) + len(response) for prompt, response in sequences)
    ids = [p + r + [0] * (length - len(p) - len(r)) for p, r in sequences]
    mask = [[len(p) <= place < len(p) + len(r) for place in range(length)] for p, r in sequences]
    return {"input_ids": torch.tensor(ids), "response_mask": torch.tensor(mask)}


def plain_logps(model: nn.Module, batch: dict) -> Tensor:
    """`batch_logps` the plain way, for any causal model: logits from the first response token of the batch on."""
    ids, mask = batch["input_ids"], batch["response_mask"]
    start = min(len(prompt) for prompt, _ in batch["rows"]) - 1  # predicts the first response token
    logits = model(input_ids=ids, use_cache=False, logits_to_keep=ids.shape[1] - start).logits
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


def response_head(model: nn.Module) -> "ResponseHead | None":
    head = getattr(getattr(model, "module", model), "lm_head", None)
    return head if isinstance(head, ResponseHead) else None


class ResponseHead(nn.Linear):
    """An output layer that returns log-probabilities of given tokens instead of logits, while `targets` are set: pairs
    of a place in the flattened batch and a token, two (N,) tensors. Then (B, T, H) hidden states give (N,) float32."""

    targets: tuple[Tensor, Tensor] | None = None

    def forward(self, hidden):
        if self.targets is None:
            return super().forward(hidden)
        predictors, labels = self.targets
        hidden, tuned = hidden.flatten(0, 1)[predictors], tuning(hidden.device)
        if not torch.is_grad_enabled():
            tuned = tuned._replace(keep=False)
        return TokenLogps.apply(hidden, self.weight, self.bias, labels, product_dtype(hidden), tuned)


class TokenLogps(torch.autograd.Function):
    """log softmax(hidden @ weight.T + bias)[n, labels[n]] of each row n, (N,) float32.

    The products are in `dtype`; the normaliser `log sum_v exp(logit_v)` is accumulated over blocks in float32. The
    gradient, d logp_n / d logit_nv = [v = label_n] - softmax_nv, computes the logits again, unless they were
    kept (see Tuning).
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, dtype, tuned):
        inputs, table = hidden.detach().to(dtype), weight.detach().to(dtype)
        exact_dtype = torch.promote_types(dtype, torch.float32)
        keep = tuned.keep and dtype != exact_dtype
        count, size = len(inputs), len(table)
        found, normaliser = inputs.new_zeros(count, dtype=exact_dtype), inputs.new_zeros(count, dtype=exact_dtype)
        blocks = []
        product, scratch = buffers(inputs, size, tuned, exact_dtype)
        for rows in slices(count, tuned.rows):
            own, own_labels = inputs[rows], labels[rows]
            largest = inputs.new_full((len(own),), -torch.inf, dtype=exact_dtype)
            total = torch.zeros_like(largest)
            for columns in slices(size, tuned.tile):
                shape = len(own), min(columns.stop, size) - columns.start
                logits = torch.empty(shape, dtype=dtype, device=inputs.device) if keep else view(product, shape)
                multiply(own, table, bias, columns, logits)
                if keep:
                    blocks.append(logits)
                place, inside = within(own_labels, columns, shape)
                found[rows] = torch.where(inside, logits.gather(1, place[:, None])[:, 0].to(exact_dtype), found[rows])
                exact = into(scratch, logits)
                now = torch.maximum(largest, exact.amax(1))
                total = total * (largest - now).exp() + exact.sub_(now[:, None]).exp_().sum(1)
                largest = now
            found[rows] = found[rows] - largest - total.log()  # in this order: what is large cancels first
            normaliser[rows] = largest + total.log()
        ctx.hidden_dtype, ctx.tuned = hidden.dtype, tuned
        ctx.save_for_backward(inputs, weight, bias, labels, normaliser, *blocks)
        return found

    @staticmethod
    def backward(ctx, grad):
        inputs, weight, bias, labels, normaliser, *blocks = ctx.saved_tensors
        dtype, exact_dtype, tuned, (count, size) = inputs.dtype, normaliser.dtype, ctx.tuned, (len(inputs), len(weight))
        table, blocks = weight.detach().to(dtype), iter(blocks)
        product, scratch = buffers(inputs, size, tuned, exact_dtype)
        grad_hidden = torch.zeros(inputs.shape, dtype=exact_dtype, device=inputs.device)
        grad_weight = torch.zeros_like(weight, dtype=exact_dtype) if ctx.needs_input_grad[1] else None
        grad_bias = torch.zeros_like(bias, dtype=exact_dtype) if bias is not None else None
        for rows in slices(count, tuned.rows):
            own, own_labels = inputs[rows], labels[rows]
            for columns in slices(size, tuned.tile):
                # - d logp / d logits, times the gradient that came in
                shape = len(own), min(columns.stop, size) - columns.start
                logits = next(blocks, None)
                if logits is None:
                    logits = multiply(own, table, bias, columns, view(product, shape))
                slope = into(scratch, logits).sub_(normaliser[rows][:, None]).exp_()
                place, inside = within(own_labels, columns, shape)
                slope.scatter_add_(1, place[:, None], -inside[:, None].to(exact_dtype))
                slope = into(product, slope.mul_(grad[rows][:, None]))
                grad_hidden[rows] -= slope @ table[columns]
                if grad_weight is not None:
                    grad_weight[columns] -= slope.T @ own
                if grad_bias is not None:
                    grad_bias[columns] -= slope.sum(0)
        return grad_hidden.to(ctx.hidden_dtype), grad_weight, grad_bias, None, None, None


def slices(length, step):
    return [slice(start, start + step) for start in range(0, length, step)]


def buffers(inputs, size, tuned, exact_dtype):
    """Flat memory for a block of logits as they are multiplied, and in float32; the same where that is one dtype."""
    length = min(tuned.rows, len(inputs)) * min(tuned.tile, size)
    scratch = torch.empty(length, dtype=exact_dtype, device=inputs.device)
    return scratch if inputs.dtype == exact_dtype else torch.empty_like(scratch, dtype=inputs.dtype), scratch


def multiply(inputs, table, bias, columns, logits):
    """The logits of a block, written into `logits`."""
    torch.mm(inputs, table[columns].T, out=logits)
    return logits if bias is None else logits.add_(bias.detach()[columns].to(logits.dtype))


def into(buffer, matrix):
    """The matrix in the dtype of a flat buffer: in it, where that is another dtype."""
    return matrix if matrix.dtype == buffer.dtype else view(buffer, matrix.shape).copy_(matrix)


def within(labels, columns, shape):
    """(place of each label among the columns of a block, whether it is there at all); nothing waits for the device."""
    place = labels - columns.start
    return place.clamp(0, shape[1] - 1), (place >= 0) & (place < shape[1])


def view(buffer, shape):
    """The beginning of a flat buffer as a matrix."""
    return buffer[: shape[0] * shape[1]].view(shape)
