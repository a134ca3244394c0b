"""By how much a response's log-probability depends on what shares its forward pass: what training's check before the
first update has to allow (training/start_check.py).

    python benchmarks/rounding.py --model DIRECTORY --prompts FILE

The responses are pieces of the prompts' text, 16 to 1,500 tokens long, two a prompt. Each pair goes alone through a
forward pass as training has it, with both responses in one row; then with two neighbours, padded to the longest; then
each response in a row of its own. The table has the differences in nats over the root of the response's tokens.
"""

import torch
from common import read_prompt_texts, record, table

from data_utils import load_tokenizer
from training.logps import response_logps
from training.models import load_model
from utils import run

LENGTHS = [25] * 4 + [50] * 4 + [100] * 4 + [200] * 2 + [800, 1500]  # of a pair's first response; its second has 2/3


def make_rows(model, prompts):
    """[(prompt ids, [first response ids, second response ids])] of consecutive tokens of the text."""
    ids = iter(load_tokenizer(model, "")(" ".join(read_prompt_texts(prompts)[:400]))["input_ids"])
    take = lambda count: [next(ids) for _ in range(count)]
    return [(take(40), [take(length), take(length * 2 // 3)]) for length in LENGTHS]


def log_probabilities(model, groups):
    """(responses,): of each row's first and second response, row by row."""
    found = [response_logps(model, group).reshape(-1, len(group)).T.flatten() for group in groups]
    return torch.cat(found).double()


def main(model: str, prompts: str):
    """Measure on the CPU, in float32 and in bfloat16.

    Args:
        model: a trained model's directory
        prompts: JSONL file with a field `prompt`
    """
    rows, network = make_rows(model, prompts), load_model(model).eval()
    tokens = torch.tensor([float(len(response)) for _, responses in rows for response in responses])
    lines = []
    for precision in ("float32", "bfloat16"):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            alone = log_probabilities(network, [[row] for row in rows])
            others = {"three pairs": log_probabilities(network, [rows[i : i + 3] for i in range(0, len(rows), 3)])}
            single = [[(prompt, [response])] for prompt, responses in rows for response in responses]
            others["one response a row"] = log_probabilities(network, single)
        for name, found in others.items():
            for low, high in ((0, 100), (100, 2000)):
                chosen = (tokens > low) & (tokens <= high)
                off = (found - alone).abs()[chosen]
                scaled = off / tokens[chosen].sqrt()
                figures = f"{scaled.square().mean().sqrt():.2g} | {scaled.max():.2g} | {off.max():.2g}"
                lines.append(f"{precision} | {name} | {low + 1} to {high} | {len(off)} | {figures}")
    head = "precision | against a pair alone | tokens | responses | root mean square | largest | largest in nats"
    record("Rounding of log-probabilities", table(head, *lines), packages=("torch", "transformers"))


if __name__ == "__main__":
    run(main)
