"""Log-probabilities and training steps: the project's path against the plain one, on the same pairs in the same
process, on the CPU. gpu.sh measures the same on a GPU.

    python benchmarks/model.py [--prompts FILE] [--shape 44M] [--precision bf16] [--count 24]

The plain way is what one writes first: chosen and rejected in rows of their own, padded; the logits of all positions in
float32, log-softmax, gather. Log-probabilities in batches of 4 pairs, training one pair a step.

Goals, bf16: log-probabilities 2.5 times as fast with 1/20 of the extra memory; a training step (optimiser included) 1.9
times as fast with 1/3. In float32 log-probabilities within 1e-3 nats, gradients within 1e-5.
"""

import contextlib
import statistics

import torch
from common import (
    PeakMemory,
    as_rows,
    batches,
    forward_flops,
    make_model,
    make_pairs,
    matrix_rate,
    record,
    seconds,
    table,
)

from training import logps
from training.logps import install_head, response_logps
from training.models import micro_batches
from utils import run


def plain_logps(model, pairs, device="cpu"):
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


def our_logps(model, pairs):
    """The same."""
    return response_logps(model, as_rows(pairs), torch.device("cpu"))


def loss_of(logps):
    chosen, rejected = logps.chunk(2)
    return ((chosen - rejected - 2.5) ** 2).mean()


def compare_logps(model, pairs, context, repeats, tokens):
    """(seconds, extra MiB) of the plain way and of ours, and the largest difference in nats."""

    def run(way, groups):
        with torch.no_grad(), context():
            return torch.cat([way(model, group).reshape(2, -1) for group in groups], dim=1)

    order = micro_batches(range(len(pairs)), [sum(map(len, pair)) for pair in pairs], tokens)
    plain = lambda: run(plain_logps, batches(pairs, 4))
    ours = lambda: run(our_logps, [[pairs[i] for i in group] for group in order])
    difference = (plain()[:, [i for group in order for i in group]] - ours()).abs().max().item()
    return *measure(plain, ours, repeats), difference


def compare_training(model, pairs, context, repeats):
    """The same of training steps of one pair each, and the largest relative difference of a gradient.

    The optimiser's state is there before; the gradients count as extra memory."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)

    def gradients(way):
        optimizer.zero_grad()
        with context():
            loss_of(way(model, pairs[:1])).backward()
        return [parameter.grad.double() for parameter in model.parameters()]

    def run(way):
        for pair in pairs:
            with context():
                loss = loss_of(way(model, [pair]))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    difference = max(
        ((plain - ours).norm() / plain.norm()).item()
        for plain, ours in zip(gradients(plain_logps), gradients(our_logps))
        if plain.norm() > 0
    )
    optimizer.step()
    optimizer.zero_grad()
    return *measure(lambda: run(plain_logps), lambda: run(our_logps), repeats), difference


def measure(plain, ours, repeats):
    """(median seconds, extra MiB) of the plain way, and of ours."""
    times, peaks = [], []
    for way in (plain, ours):  # the first time warms up and tells the memory
        with PeakMemory("cpu") as peak:
            way()
        peaks.append(peak.mib)
    for _ in range(repeats):  # in turn
        times.append([seconds(way, "cpu") for way in (plain, ours)])
    return zip(map(statistics.median, zip(*times)), peaks)


def main(
    prompts: str = "",
    shape: str = "44M",
    precision: str = "bf16",
    count: int = 24,
    repeats: int = 3,
    micro_batch_tokens: int = 0,
    rows: int = 0,
    tile: int = 0,
):
    """Measure and append to RESULTS.md.

    Args:
        prompts: a file whose prompts' lengths are taken; without it they are drawn as UltraFeedback's are distributed
        precision: bf16 or float32
        count: of pairs
        micro_batch_tokens: of our log-probabilities, as the stage's flag
        rows: positions of a block at the output layer; 0: the program's own
        tile: vocabulary entries of a block; likewise
    """
    blocks = {name: value for name, value in (("rows", rows), ("tile", tile)) if value}
    logps.CPU = logps.CPU._replace(**blocks)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    context = (lambda: torch.autocast("cpu", torch.bfloat16)) if precision == "bf16" else contextlib.nullcontext
    model = install_head(make_model(shape))
    pairs = make_pairs(prompts, count, vocabulary=min(model.config.vocab_size, 151_000))
    rate = matrix_rate("cpu", dtype)
    floor = forward_flops(model.config, as_rows(pairs)) / rate
    lines = table(
        "stage | plain | ours | faster | plain's extra MiB | ours | less | floor | of it reached | difference",
        row(
            "log-probabilities",
            *compare_logps(model.eval(), pairs, context, repeats, micro_batch_tokens),
            floor,
            "nats",
        ),
        row("training step", *compare_training(model.train(), pairs, context, repeats), 3 * floor, "relative"),
    )
    described = describe(pairs) + f" Matrix product ({precision}): {rate / 1e12:.2f} TFLOP/s."
    title = f"Log-probabilities and training, Qwen2 {shape}, {precision}"
    record(title, [described, "", *lines], packages=("torch", "transformers"))


def describe(pairs):
    prompts, responses = [len(pair[0]) for pair in pairs], [len(response) for pair in pairs for response in pair[1:]]
    return (
        f"{len(pairs)} pairs: {sum(prompts) + sum(responses):,} tokens with each prompt once, {sum(responses):,} of "
        f"responses; prompts' median {statistics.median(prompts):.0f}, responses' {statistics.median(responses):.0f}."
    )


def row(name, plain, ours, difference, floor, unit):
    """Of the table; plain, ours: (seconds, extra MiB); floor: seconds of the matrix products alone."""
    (plain, plain_mib), (ours, our_mib) = plain, ours
    return (
        f"{name} | {plain:.2f} s | {ours:.2f} s | x{plain / ours:.2f} | {plain_mib:,.0f} | {our_mib:,.0f} | "
        f"1/{plain_mib / max(our_mib, 1):.1f} | {floor:.2f} s | {100 * floor / ours:.0f} % | {difference:.1e} {unit}"
    )


if __name__ == "__main__":
    run(main)
