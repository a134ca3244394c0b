"""Sample responses to prompts with vLLM: prompts -> samples.

    python sampling.py --model MODEL --input train.jsonl,test.jsonl --output train.samples.jsonl,test.samples.jsonl

Input, one JSON object a line: `prompt`, and `prompt_id` (made from the text when missing).
Output, in input order:
    prompt_id         str, the key, unique in the file
    prompt            str
    prompt_token_ids  list of int, the chat-encoded prompt
    samples           list of {text, token_ids (with the end token when one was sampled), finish_reason}

A prompt over --max_prompt_tokens is never cut: it is left out, counted, and listed in `<output>.skipped.jsonl`.
Exit code 0 means that every other prompt is in the output.
"""

import math
from functools import partial

from records import Prompt, read
from utils import SEED_SPACING, StageError, file_lists, run, split_list
from vllm_model import Sampler, SamplerConfig, check_top_p
from workers.pool import map_files


def per_file(name, value, kind, count):
    """A flag with one value for all files, or a comma-separated value a file."""
    try:
        values = [kind(part) for part in split_list(value)]
        if not all(map(math.isfinite, values)):
            raise ValueError
    except ValueError:
        raise StageError(f"--{name} takes numbers ({kind.__name__}), got {value!r}") from None
    if values and min(values) < (1 if kind is int else 0):
        raise StageError(f"--{name} should be at least {1 if kind is int else 0}, got {value}")
    if len(values) not in (1, count):
        raise StageError(f"--{name} has {len(values)} values for {count} input files; give one, or one each")
    return values * count if len(values) == 1 else values


def main(
    input: str,
    output: str,
    num_samples: str = "5",
    temperature: str = "0.8",
    top_p: str = "0.95",
    **sampler: SamplerConfig,
):
    """Sample responses to every prompt of one or several files with one start of the model.

    Args:
        input: prompt file(s), comma-separated
        output: samples file(s), as many
        num_samples: K, responses a prompt; one value, or one a file
        temperature: sampling temperature; one value, or one a file
        top_p: nucleus mass; one value, or one a file
    """
    inputs, outputs = file_lists(input=input, output=output)
    config = SamplerConfig(**sampler)
    counts = per_file("num_samples", num_samples, int, len(inputs))
    if max(counts) > SEED_SPACING:
        raise StageError(f"--num_samples should be at most {SEED_SPACING}, got {num_samples}")
    temperatures = per_file("temperature", temperature, float, len(inputs))
    masses = per_file("top_p", top_p, float, len(inputs))
    for mass in masses:
        check_top_p(mass)
    values = {"num_samples": counts, "temperature": temperatures, "top_p": masses}
    fingerprint = config.fingerprint()
    jobs = [
        (partial(read, path, Prompt), target, fingerprint | {name: each[job] for name, each in values.items()})
        for job, (path, target) in enumerate(zip(inputs, outputs))
    ]
    map_files(jobs, partial(Sampler, config, **values), config, "sampling")


if __name__ == "__main__":
    run(main)
