"""Log-probabilities and training steps: the project's path against the plain one, on the same pairs in the same
process.

    python benchmarks/model.py [--prompts FILE] [--shape 44M] [--precision bf16] [--count 24]
    python benchmarks/model.py --shape 120M --count 1 --sequence 4096                one pair of 2 x 4,096

On a GPU, take gpu.sh, which measures this and more.

The plain way is what one writes first: chosen and rejected in rows of their own, padded; the logits of all positions in
float32, log-softmax, gather. Log-probabilities in batches of 4 pairs, training one pair a step.

Goals on a CPU, bf16: log-probabilities 2.5 times as fast with 1/20 of the extra memory; a training step (optimiser
included) 1.9 times as fast with 1/3. In float32 log-probabilities within 1e-3 nats, gradients within 1e-5.
"""

import contextlib
import math
import statistics

import torch
from common import PeakMemory, as_rows, forward_flops, make_model, make_pairs, matrix_rate, record, seconds

from training import logps
from training.logps import install_head, response_logps
from training.models import micro_batches
from utils import run


def plain_logps(model, pairs, device):
    """(2B,) summed log-probabilities, chosen first."""
    sequences = [(pair[0], pair[side]) for side in (1, 2) for pair in pairs]
    length = max(len(prompt) + len(response) for prompt, response in sequences)
    ids, responses, attention = [], [], []
    for prompt, response in sequences:
        padding = length - len(prompt) - len(response)
        ids.append(prompt + response + [0] * padding)
        responses.append([0] * len(prompt) + [1] * len(response) + [0] * padding)
        attention.append([1] * (length - padding) + [0] * padding)
    ids, responses, attention = (torch.tensor(rows, device=device) for rows in (ids, responses, attention))
    logits = model(input_ids=ids, attention_mask=attention, use_cache=False).logits.float()
    token_logps = logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
    return (token_logps * responses[:, 1:]).sum(1)


def our_logps(model, pairs, device):
    """The same."""
    return response_logps(model, as_rows(pairs), device)


def loss_of(logps):
    chosen, rejected = logps.chunk(2)
    return ((chosen - rejected - 2.5) ** 2).mean()


def batches(pairs, size):
    return [pairs[i : i + size] for i in range(0, len(pairs), size)]


def compare_logps(model, pairs, device, context, repeats, tokens):
    """(seconds, extra MiB) of the plain way and of ours, largest difference in nats."""

    def run(way, micro_batches):
        with torch.no_grad(), context():
            return torch.cat([way(model, batch, device).reshape(2, -1) for batch in micro_batches], dim=1)

    order = micro_batches(range(len(pairs)), [sum(map(len, pair)) for pair in pairs], tokens)
    ours_in_order = [pairs[i] for batch in order for i in batch]
    ways = {
        "plain": (plain_logps, batches(pairs, 4)),
        "ours": (our_logps, [[pairs[i] for i in batch] for batch in order]),
    }
    found = {name: run(*way) for name, way in ways.items()}
    place = [ours_in_order.index(pair) for pair in pairs]
    difference = (found["plain"] - found["ours"][:, place]).abs().max().item()
    return measure({name: (lambda way=way: run(*way)) for name, way in ways.items()}, device, repeats) | {
        "difference": difference
    }


def compare_training(model, pairs, device, context, repeats):
    """The same of training steps of one pair each, with the largest relative difference of a gradient.

    The optimiser's state is there before; the gradients count as extra memory."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)

    def gradients(way):
        optimizer.zero_grad()
        with context():
            loss_of(way(model, pairs[:1], device)).backward()
        return [parameter.grad.double() for parameter in model.parameters()]

    def run(way):
        for pair in pairs:
            with context():
                loss = loss_of(way(model, [pair], device))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    try:
        plain, ours = gradients(plain_logps), gradients(our_logps)
        difference = max(
            ((one - other).norm() / one.norm()).item() for one, other in zip(plain, ours) if one.norm() > 0
        )
        del plain, ours
    except torch.OutOfMemoryError:
        difference = math.nan
    gradients(our_logps)
    optimizer.step()
    optimizer.zero_grad()
    return measure({"plain": lambda: run(plain_logps), "ours": lambda: run(our_logps)}, device, repeats) | {
        "difference": difference
    }


def measure(ways, device, repeats):
    times, peaks = {name: [] for name in ways}, {}
    for name, way in ways.items():  # the first time warms up and tells the memory
        try:
            with PeakMemory(device) as peak:
                way()
        except torch.OutOfMemoryError:  # of a GPU
            peak.mib = math.inf
        peaks[name] = peak.mib
    for _ in range(repeats):  # in turn
        for name, way in ways.items():
            times[name].append(seconds(way, device) if peaks[name] < math.inf else math.nan)
    return {name: (statistics.median(times[name]), peaks[name]) for name in ways}


def main(
    prompts: str = "",
    shape: str = "44M",
    precision: str = "bf16",
    count: int = 24,
    repeats: int = 3,
    seed: int = 0,
    longest: int = 1024,
    sequence: int = 0,
    gradient_checkpointing: bool = False,
    micro_batch_tokens: int = 0,
    rows: int = 0,
    tile: int = 0,
):
    """Measure and append to RESULTS.md.

    Args:
        prompts: a file whose prompts' lengths are taken; without it they are drawn as UltraFeedback's are distributed
        sequence: tokens of each prompt with its response; 0: lengths as they occur
        micro_batch_tokens: of our log-probabilities, as the stage's flag
        rows: positions of a block at the output layer; 0: as many as suit the device
        tile: vocabulary entries of a block; likewise
    """
    blocks = {name: value for name, value in (("rows", rows), ("tile", tile)) if value}
    logps.CPU, logps.GPU = logps.CPU._replace(**blocks), logps.GPU._replace(**blocks)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    context = (lambda: torch.autocast(device, torch.bfloat16)) if precision == "bf16" else contextlib.nullcontext
    pairs = make_pairs(prompts, count, seed, longest, sequence)
    model = install_head(make_model(shape).to(device))
    if gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    rate = matrix_rate(device, dtype)
    floor = forward_flops(model.config, as_rows(pairs)) / rate
    lines = [
        describe(pairs) + f" Matrix product ({precision}): {rate / 1e12:.2f} TFLOP/s.",
        "",
        "| stage | plain | ours | faster | plain's extra MiB | ours | less | floor | of it reached | difference |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    found = compare_logps(model.eval(), pairs, device, context, repeats, micro_batch_tokens)
    lines.append(table_line("log-probabilities", found, floor, "nats"))
    found = compare_training(model.train(), pairs, device, context, repeats)
    lines.append(table_line("training step", found, 3 * floor, "relative"))
    checkpointing = ", gradient checkpointing" * gradient_checkpointing
    record(f"Log-probabilities and training, Qwen2 {shape}, {precision}{checkpointing}", lines)


def describe(pairs):
    tokens, responses = sum(len(p) + len(c) + len(r) for p, c, r in pairs), sum(len(c) + len(r) for _, c, r in pairs)
    return (
        f"{len(pairs)} pairs: {tokens:,} tokens with each prompt once, {responses:,} of responses; prompts' median "
        f"{statistics.median(len(p) for p, _, _ in pairs):.0f}, responses' "
        f"{statistics.median(len(r) for pair in pairs for r in pair[1:]):.0f}."
    )


def table_line(name, found, floor, unit):
    """Of what `measure` found; the floor is that of the matrix products, in seconds."""
    (plain, plain_mib), (ours, our_mib) = found["plain"], found["ours"]
    return (
        f"| {name} | {plain:.2f} s | {ours:.2f} s | x{plain / ours:.2f} | {plain_mib:,.0f} | {our_mib:,.0f} | "
        f"1/{plain_mib / max(our_mib, 1):.1f} | {floor:.2f} s | {100 * floor / ours:.0f} % | "
        f"{found['difference']:.1e} {unit} |"
    )


if __name__ == "__main__":
    run(main)
