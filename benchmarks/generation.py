"""Sampling K responses a prompt: vllm_model.Sampler as a worker drives it, against batches with a barrier, same model.

    python benchmarks/generation.py --prompts FILE [--policy exps/demo-models/policy] [--count 64] [--num_samples 5]
    python benchmarks/generation.py --prompts FILE --hidden 512 --layers 8      a policy of that size with random weights

The plain way hands `LLM.generate` a batch of prompts, waits until its longest response has ended, and takes the next
batch; log-probabilities of the tokens are stored, as many samplers do. Ours keeps the engine full, two chunks at a
time, and stores tokens alone. A random policy of the demo's vocabulary ends with a probability of about 1/300 a token,
so that lengths vary as they do in practice.

Goal: the engine is full until the last chunk; the same samples.
"""

import os
import pickle
import tempfile
import time

from common import forward_flops, in_its_own_process, matrix_rate, random_model, read_prompt_texts, record

from utils import run
from vllm_model import Sampler, SamplerConfig
from workers.scheduler import IN_FLIGHT
from workers.worker import Worker, run_here


def one_way(queue, way, config, records, num_samples, batch):
    """(seconds, {(prompt_id, k): token ids}, engine steps)."""
    sampler = Sampler(config, [num_samples], [1.0], [0.95])
    engine, steps = sampler.engine.llm.llm_engine, [0]
    step = engine.step

    def counting():
        steps[0] += 1
        return step()

    engine.step = counting
    tasks = [(0, one) for one in records]
    go = {"plain": lambda: batches_with_a_barrier(sampler, tasks, batch), "ours": lambda: streaming(sampler, tasks)}[
        way
    ]
    run_here(sampler, tasks[:1])  # warm up
    steps[0], began = 0, time.perf_counter()
    found = go()
    queue.put((time.perf_counter() - began, found, steps[0]))


def batches_with_a_barrier(sampler, tasks, batch):
    found = {}
    for first in range(0, len(tasks), batch):
        requests = [request for task in tasks[first : first + batch] for request in sampler.requests(*task)]
        for _, own in requests:
            own.logprobs, own.detokenize = 1, True
        prompts, params = [{"prompt_token_ids": ids} for ids, _ in requests], [own for _, own in requests]
        outputs = sampler.engine.llm.generate(prompts, params, use_tqdm=False)
        for (_, one), output in zip(tasks[first:], outputs):
            found |= {(one["prompt_id"], answer.index): list(answer.token_ids) for answer in output.outputs}
    return found


def streaming(sampler, tasks):
    size, worker, found = sampler.config.chunk_size, Worker(sampler), {}
    chunks = [dict(enumerate(tasks[first : first + size])) for first in range(0, len(tasks), size)]
    while chunks or worker.left:
        while chunks and len(worker.left) < IN_FLIGHT:
            worker.begin(len(chunks), chunks.pop(0))
        for _, _, results in worker.step():
            for one in map(pickle.loads, results.values()):
                found |= {(one["prompt_id"], k): sample["token_ids"] for k, sample in enumerate(one["samples"])}
    return found


def main(
    prompts: str,
    policy: str = "exps/demo-models/policy",
    hidden: int = 256,
    layers: int = 4,
    count: int = 64,
    num_samples: int = 5,
    batch: int = 16,
    max_new_tokens: int = 512,
    gpus: str = "auto",
):
    """Measure and append to RESULTS.md."""
    texts = [text for text in read_prompt_texts(prompts) if len(text) < 600][:count]
    records = [{"prompt_id": str(i), "prompt": text} for i, text in enumerate(texts)]
    with tempfile.TemporaryDirectory() as folder:
        config = SamplerConfig(
            model=random_model(policy, hidden, layers, folder),
            gpus=gpus,
            max_prompt_tokens=1024,
            max_new_tokens=max_new_tokens,
        )
        os.environ.update(config.environments()[0])
        found = {
            way: in_its_own_process(one_way, way, config, records, num_samples, batch) for way in ("plain", "ours")
        }
        floor = floor_seconds(folder, records, found["ours"][1])
    tokens = {way: sum(map(len, samples.values())) for way, (_, samples, _) in found.items()}
    same = sum(found["plain"][1][key] == ids for key, ids in found["ours"][1].items())
    record(
        f"Sampling {num_samples} responses to {count} prompts, a random policy of {layers} layers of {hidden}",
        [
            "| way | seconds | tokens/s | engine steps | tokens a step |",
            "|---|---|---|---|---|",
            *(
                f"| {name} | {found[way][0]:.1f} | {tokens[way] / found[way][0]:,.0f} | {found[way][2]:,} | "
                f"{tokens[way] / found[way][2]:.0f} |"
                for way, name in (("plain", f"batches of {batch} prompts"), ("ours", "ours"))
            ),
            "",
            f"x{found['plain'][0] / found['ours'][0]:.2f}; {same} of {len(found['ours'][1])} samples are the same tokens; mean "
            f"length {tokens['ours'] / len(found['ours'][1]):.0f}. Floor, the matrix products alone at the measured rate: "
            f"{floor:.2f} s.",
        ],
        packages=("torch", "vllm"),
    )


def floor_seconds(folder, records, samples):
    """Seconds of the matrix products alone, each prompt read once."""
    import torch
    from transformers import AutoConfig, AutoTokenizer

    from data_utils import encode_prompt

    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = [
        (encode_prompt(tokenizer, one["prompt"]), [ids for key, ids in samples.items() if key[0] == one["prompt_id"]])
        for one in records
    ]
    on_gpu = bool(os.environ.get("CUDA_VISIBLE_DEVICES"))
    rate = matrix_rate("cuda" if on_gpu else "cpu", torch.bfloat16 if on_gpu else torch.float32)
    return forward_flops(AutoConfig.from_pretrained(folder), rows) / rate


if __name__ == "__main__":
    run(main)
