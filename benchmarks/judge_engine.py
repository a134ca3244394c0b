"""What the engine of a judge does: how fine its probabilities are, and what encoding beside it saves.

    python benchmarks/judge_engine.py margins --prompts FILE [--judge exps/demo-models/judge]
    python benchmarks/judge_engine.py encoding --prompts FILE [--hidden 64] [--layers 1] [--rounds 3] [--device_ms 1]

`margins` judges in bfloat16 with the output layer in bfloat16, in bfloat16 with it in float32, as the project does, and
in float32, and counts the different margins (log P(first label) - log P(second label), to 1e-4); then the same with the
scores of a reward model with random weights.
`encoding` judges chunks of prompts, two of which are in flight, as in a worker: once encoded before the engine
steps, once beside it, in turn. With --device_ms the engine is replaced by a wait of so many milliseconds a
prompt, in which the processor is free, as while a GPU works: this says what can be saved there, and not what it takes.
The instructions and the responses are texts of the file.
"""

import os
import tempfile
import time
from collections import deque
from types import SimpleNamespace

from common import in_its_own_process, random_model, record
from judging import make_records
from rewards import make_reward_model

from judges import generative
from judges.base import JudgeConfig
from judges.generative import GenerativeJudge
from judges.reward import RewardJudge
from utils import run
from workers.scheduler import IN_FLIGHT
from workers.worker import Worker, run_here

ROUNDED = '{"hf_overrides": {"head_dtype": "model"}}'  # the output layer in the dtype of the model
WAYS = {
    "bfloat16": ("bfloat16", ROUNDED),
    "bfloat16, output layer float32": ("bfloat16", ""),
    "float32": ("float32", ""),
}


def judged_margins(queue, config, records):
    judge, found = GenerativeJudge(config), []
    read = judge.read_labels

    def keep(output):
        first, second = (output.outputs[0].logprobs[0][label].logprob for label in judge.label_ids)
        found.append(first - second)
        return read(output)

    judge.read_labels = keep
    run_here(judge, [(0, one) for one in records])
    queue.put(found)


def rewards(queue, config, records):
    queue.put(
        [reward for one in run_here(RewardJudge(config), [(0, one) for one in records]) for reward in one["rewards"]]
    )


def margins(
    prompts: str, judge: str = "exps/demo-models/judge", count: int = 15, num_samples: int = 5, gpus: str = "auto"
):
    """Count the different margins and rewards; append to RESULTS.md."""
    records = make_records(prompts, count, num_samples)
    many = make_records(prompts, 4 * count, num_samples)
    lines = ["| | judgements | different margins | rewards | different rewards |", "|---|---|---|---|---|"]
    with tempfile.TemporaryDirectory() as folder:
        make_reward_model(judge, 256, 2, folder)
        for name, (dtype, engine_args) in WAYS.items():
            settings = {"dtype": dtype, "engine_args": engine_args, "gpus": gpus, "max_prompt_tokens": 2048}
            config = JudgeConfig(judge=judge, **settings)
            os.environ.update(config.environments()[0])
            margin = in_its_own_process(judged_margins, config, records)
            reward = in_its_own_process(rewards, JudgeConfig(judge=folder, judge_type="reward", **settings), many)
            different = (len({round(value, 4) for value in values}) for values in (margin, reward))
            lines.append(f"| {name} | {len(margin)} | {next(different)} | {len(reward)} | {next(different)} |")
    record("Different margins and rewards by the dtype of the output layer", lines, packages=("torch", "vllm"))


def drive(worker, chunks):
    """Chunks through a worker, IN_FLIGHT of them at once."""
    for number, chunk in enumerate(chunks):
        while len(worker.left) == IN_FLIGHT:
            worker.step()
        worker.begin(number, {position: (0, one) for position, one in enumerate(chunk)})
        worker.step()
    while worker.left:
        worker.step()


class Device:
    """Stands in for an engine on a GPU: answers 16 prompts a step after a wait."""

    def __init__(self, milliseconds):
        self.milliseconds, self.count, self.waiting = milliseconds, 0, deque()

    def enqueue(self, requests):
        names = [str(self.count + number) for number in range(len(requests))]
        self.count += len(requests)
        self.waiting += zip(names, (params for _, params in requests))
        return names

    def step(self):
        batch = [self.waiting.popleft() for _ in range(min(16, len(self.waiting)))]
        time.sleep(len(batch) * self.milliseconds / 1000)
        logprob = SimpleNamespace(logprob=-1.0)
        answers = ((name, dict.fromkeys(params.logprob_token_ids, logprob)) for name, params in batch)
        return [SimpleNamespace(request_id=name, outputs=[SimpleNamespace(logprobs=[one])]) for name, one in answers]


def both_ways(queue, config, warm_up, chunks, rounds, device_ms):
    """[(seconds with encoding before the step, beside it)], and the seconds that encoding alone takes."""
    generative.MIN_LABEL_MASS = 0  # of random weights
    if device_ms:
        generative.Engine = lambda *_: Device(device_ms)
    judge, times = GenerativeJudge(config), []
    run_here(judge, [(0, warm_up)])
    began = time.perf_counter()
    for one in (one for chunk in chunks for one in chunk):
        judge.requests(0, one)
    alone = time.perf_counter() - began
    for _ in range(rounds):
        pair = []
        for beside in (False, True):
            judge.beside = beside
            if not device_ms:
                judge.engine.llm.llm_engine.reset_prefix_cache()
            began = time.perf_counter()
            drive(Worker(judge), chunks)
            pair.append(time.perf_counter() - began)
        times.append(pair)
    queue.put((times, alone))


def encoding(
    prompts: str,
    judge: str = "exps/demo-models/judge",
    hidden: int = 0,
    layers: int = 2,
    chunks: int = 6,
    chunk_size: int = 4,
    num_samples: int = 5,
    rounds: int = 3,
    device_ms: float = 0,
    gpus: str = "auto",
):
    """Measure and append to RESULTS.md."""
    warm_up, *records = make_records(prompts, 1 + chunks * chunk_size, num_samples)
    parts = [records[first : first + chunk_size] for first in range(0, len(records), chunk_size)]
    with tempfile.TemporaryDirectory() as folder:
        name = random_model(judge, hidden, layers, folder) if hidden else judge
        config = JudgeConfig(judge=name, gpus=gpus, max_prompt_tokens=4096)
        os.environ.update(config.environments()[0])
        times, alone = in_its_own_process(both_ways, config, warm_up, parts, rounds, device_ms)
    inline, beside = (sorted(each)[len(times) // 2] for each in zip(*times))
    judgements = len(records) * num_samples * (num_samples - 1)
    record(
        f"Encoding beside the engine, {judgements} judgements in {chunks} chunks"
        + f", a wait of {device_ms:g} ms a prompt in place of the engine" * bool(device_ms),
        [
            "| encoding | seconds, each round | median |",
            "|---|---|---|",
            f"| before the step | {', '.join(f'{one:.2f}' for one, _ in times)} | {inline:.2f} |",
            f"| beside it | {', '.join(f'{one:.2f}' for _, one in times)} | {beside:.2f} |",
            "",
            f"x{inline / beside:.2f}; encoding alone takes {alone:.2f} s, {1000 * alone / judgements:.2f} ms a judging prompt.",
        ],
        packages=("torch", "vllm"),
    )


if __name__ == "__main__":
    run(margins, encoding)
