"""Engines on one GPU: tokens a second of sampling, judgements a second, and the starts of both. A section
of gpu.py.

Policy and judge are the same random model with a tokenizer made on the spot; a random policy hardly ever ends, so that
all samples have the greatest length. A start is the time from a new process to the first record. Compiled code is
cached in a folder of this run's own: the first start finds it empty. On a CPU nothing is compiled, and one start is
measured.
"""

import tempfile
import time
from pathlib import Path

import torch
from common import ROOT, child_environment, in_its_own_process, make_model, write_chat_tokenizer

from judges import generative
from judges.base import JudgeConfig
from judges.generative import GenerativeJudge
from vllm_model import Sampler, SamplerConfig
from workers.worker import run_here

SIZES = {"1.5B": (256, 5, 256), "tiny": (4, 2, 8)}  # prompts, responses to each, their tokens


def make_model_folder(folder, shape, device):
    """Writes a random model, in bfloat16 on a GPU, with a chat tokenizer; returns prompts of about 150 tokens."""
    template = Path(ROOT, "prompts/offsetbias.txt").read_text(encoding="utf-8")
    write_chat_tokenizer(folder, [template, "Output (a) Output (b)"])
    from game import phrasings

    texts = [text for group in phrasings() for text in group]
    make_model(shape, device, torch.bfloat16 if device == "cuda" else torch.float32).save_pretrained(folder)
    return [" ".join(texts[(i + j) % len(texts)] for j in range(12)) for i in range(len(texts))]


def started(queue, kind, config, records, num_samples, began):
    """(seconds of the start, seconds of the records, their results)."""
    if kind == "sampling":
        work = Sampler(config, [num_samples], [1.0], [1.0])
    else:
        generative.MIN_LABEL_MASS = 0  # of random weights
        work = GenerativeJudge(config)
    warm_up, *records = records
    run_here(work, [(0, warm_up)])
    start, began = time.time() - began, time.perf_counter()
    results = run_here(work, [(0, one) for one in records])
    queue.put((start, time.perf_counter() - began, results))


def measure(shape, device):
    """Yields (what, figure)."""
    count, num_samples, tokens = SIZES[shape]
    gpus, starts = ("auto", ["first start", "second start"]) if device == "cuda" else ("none", ["start"])
    with tempfile.TemporaryDirectory() as folder:
        prompts = make_model_folder(folder, shape, device)
        records = [{"prompt_id": str(i), "prompt": prompts[i % len(prompts)]} for i in range(count + 1)]
        sampler = SamplerConfig(model=folder, gpus=gpus, max_prompt_tokens=1024, max_new_tokens=tokens)
        judge = JudgeConfig(judge=folder, gpus=gpus, max_prompt_tokens=4096)
        environment = {"VLLM_CACHE_ROOT": f"{folder}/cache"} | sampler.environments()[0]
        for kind, config in (("sampling", sampler), ("judging", judge)):
            for which in starts:
                given = records if which == starts[-1] else records[:2]
                with child_environment(**environment):
                    start, taken, results = in_its_own_process(started, kind, config, given, num_samples, time.time())
                yield f"{kind}, {which}", f"{start:.1f} s"
            if kind == "sampling":
                made = sum(len(sample["token_ids"]) for one in results for sample in one["samples"])
                yield f"sampling, {count} prompts x {num_samples}", f"{made / taken:,.0f} tokens/s"
                records = [one | {"prompt_id": str(i)} for i, one in enumerate(responses(results, prompts))]
            else:
                made = len(results) * num_samples * (num_samples - 1)
                yield f"judging, {len(results)} prompts", f"{made / taken:,.1f} judgements/s"


def responses(results, prompts):
    """The records with texts in place of what a random policy says, which no tokenizer could read."""
    for i, one in enumerate(results):
        texts = [prompts[(i + k + 1) % len(prompts)] for k in range(len(one["samples"]))]
        yield one | {"samples": [sample | {"text": text} for sample, text in zip(one["samples"], texts)]}
