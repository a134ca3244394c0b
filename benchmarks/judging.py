"""Judging K responses a prompt, all against all in both orders: judges/generative.py against the plain way, same
engine.

    python benchmarks/judging.py --prompts FILE [--judge exps/demo-models/judge] [--count 16] [--num_samples 5]
    python benchmarks/judging.py --prompts FILE --hidden 512 --layers 8     a larger judge with random weights: time only

The plain way asks the judge as one would by hand: every ordered pair is a request of its own for up to 16 tokens,
without a prefix cache; the label is looked for in the answer, and its probability read there. The instructions are the
file's, the "responses" other texts of the file: what is measured is the work, not the judge.

Goals: uncached prompt tokens within 15 % of the floor (each distinct prefix once), one decoded token a judgement, twice
the judgements a second on a CPU and three times on a GPU, probabilities within 1e-3 where both read the same position.
"""

import math
import os
import tempfile
import time

from common import in_its_own_process, random_model, read_prompt_texts, record

from judges import generative
from judges.base import JudgeConfig, sigmoid
from judges.generative import GenerativeJudge
from utils import run
from workers.worker import run_here

LABELS = "Output (a)", "Output (b)"


def make_records(prompts, count, num_samples, longest=600):
    texts = [text[:longest] for text in read_prompt_texts(prompts)]
    others = texts[count:]
    return [
        {
            "prompt_id": str(i),
            "prompt": texts[i],
            "samples": [{"text": others[i * num_samples + k], "token_ids": [0]} for k in range(num_samples)],
        }
        for i in range(count)
    ]


def one_way(queue, way, config, records):
    """In a process of its own: (seconds, {(prompt, first, second): P(first)}, prompt tokens, uncached ones, decoded
    ones)."""
    from vllm import SamplingParams

    generative.MIN_LABEL_MASS = 0  # of random weights
    if way == "plain":
        import vllm

        make = vllm.LLM
        vllm.LLM = lambda **settings: make(**settings | {"enable_prefix_caching": False})
    judge = GenerativeJudge(config)
    counts, step = [0, 0, 0], judge.engine.step
    prompts = []

    def counting():
        outputs = step()
        for output in outputs:
            prompts.append(output.prompt_token_ids)
            counts[0] += len(output.prompt_token_ids)
            counts[1] += len(output.prompt_token_ids) - (output.num_cached_tokens or 0)
            counts[2] += len(output.outputs[0].token_ids)
        return outputs

    judge.engine.step = counting
    by_hand = SamplingParams(max_tokens=16, temperature=0, logprobs=20, detokenize=False)
    warm_up, *records = records
    if way == "ours":
        run_here(judge, [(0, warm_up)])
        forget(counts, prompts)
        began = time.perf_counter()
        results = run_here(judge, [(0, one) for one in records])
        taken = time.perf_counter() - began
        found = {
            (one["prompt"], a["text"], b["text"]): one["win_probs"][i][j]
            for one in results
            for i, a in enumerate(one["samples"])
            for j, b in enumerate(one["samples"])
            if i != j
        }
    else:
        ask(judge, all_orders([warm_up]), by_hand)
        forget(counts, prompts)
        began = time.perf_counter()
        found = ask(judge, all_orders(records), by_hand)
        taken = time.perf_counter() - began
        found = {
            key: 0.5 + (p - found[key[0], key[2], key[1]]) / 2
            for key, p in found.items()
            if p is not None and found[key[0], key[2], key[1]] is not None
        }
    queue.put((taken, found, *counts, distinct_prefixes(prompts)))


def all_orders(records):
    return [
        (one["prompt"], a["text"], b["text"])
        for one in records
        for a in one["samples"]
        for b in one["samples"]
        if a is not b
    ]


def forget(counts, prompts):
    counts[:] = 0, 0, 0
    prompts.clear()


def ask(judge, orders, params):
    """{order: P(first label)} from answers of up to 16 tokens, None where no label begins the answer."""
    found, before = {}, len(judge.label_prefix)
    first, second = judge.label_ids
    prompts = [judge.encode(*order)[: -before or None] for order in orders]
    names, outputs = judge.engine.enqueue([(prompt, params) for prompt in prompts]), {}
    while len(outputs) < len(names):
        outputs |= {output.request_id: output for output in judge.engine.step()}
    for order, name in zip(orders, names):
        answer = outputs[name].outputs[0]
        if list(answer.token_ids[:before]) != judge.label_prefix or len(answer.token_ids) <= before:
            found[order] = None
            continue
        logprobs = answer.logprobs[before]
        at = [logprobs[token].logprob if token in logprobs else -math.inf for token in (first, second)]
        found[order] = sigmoid(at[0] - at[1]) if max(at) > -math.inf else None
    return found


def distinct_prefixes(prompts):
    """Tokens that a perfect prefix cache would compute: the nodes of the prompts' trie."""
    total, last = 0, []
    for prompt in sorted(prompts):
        same = next((i for i, (a, b) in enumerate(zip(prompt, last)) if a != b), min(len(prompt), len(last)))
        total, last = total + len(prompt) - same, prompt
    return total


def main(
    prompts: str,
    judge: str = "exps/demo-models/judge",
    hidden: int = 0,
    layers: int = 8,
    count: int = 16,
    num_samples: int = 5,
    gpus: str = "auto",
):
    """Measure and append to RESULTS.md."""
    with tempfile.TemporaryDirectory() as folder:
        measure(
            prompts,
            random_model(judge, hidden, layers, folder) if hidden else judge,
            count,
            num_samples,
            gpus,
            f", a random judge of {layers} layers of {hidden}" if hidden else "",
        )


def measure(prompts, judge, count, num_samples, gpus, which):
    config = JudgeConfig(judge=judge, gpus=gpus)
    os.environ.update(config.environments()[0])
    records = make_records(prompts, count + 1, num_samples)
    found = {way: in_its_own_process(one_way, way, config, records) for way in ("plain", "ours")}
    judgements = count * num_samples * (num_samples - 1)
    (plain, asked, *_), (ours, read, _, uncached, _, floor) = found["plain"], found["ours"]
    difference = max((abs(asked[key] - read[key]) for key in asked), default=math.nan)
    record(
        f"Judging, {judgements} judgements of {num_samples} responses to {count} prompts{which}",
        [
            "| way | judgements/s | prompt tokens | uncached | decoded a judgement |",
            "|---|---|---|---|---|",
            *(
                f"| {way} | {judgements / found[way][0]:.1f} | {found[way][2]:,} | {found[way][3]:,} | "
                f"{found[way][4] / judgements:.1f} |"
                for way in ("plain", "ours")
            ),
            "",
            f"x{plain / ours:.2f}; floor of uncached tokens (each distinct prefix once) {floor:,}: {uncached / floor:.2f} times "
            f"that; largest difference of a win probability {difference:.1e}, over {len(asked)} pairs whose answer was a label.",
        ],
        packages=("torch", "vllm"),
    )


if __name__ == "__main__":
    run(main)
