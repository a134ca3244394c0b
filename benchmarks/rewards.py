"""Scoring K responses a prompt with a reward model: judges/reward.py (vLLM's pooling) against transformers, same
model.

    python benchmarks/rewards.py --prompts FILE [--hidden 512] [--layers 8] [--count 32] [--num_samples 5]

The plain way is transformers with padded batches of 8 responses, in the order of the file. Goal: as fast or faster; the
same rewards.
"""

import os
import tempfile
import time

from common import in_its_own_process, random_model, read_prompt_texts, record

from judges.base import JudgeConfig
from judges.reward import RewardJudge
from utils import run
from workers.worker import run_here


def make_reward_model(source, hidden, layers, folder):
    """A sequence classifier with one output in place of `random_model`'s language model."""
    from transformers import AutoConfig, AutoModelForSequenceClassification

    random_model(source, hidden, layers, folder)
    config = AutoConfig.from_pretrained(folder, num_labels=1, pad_token_id=0)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)


def with_vllm(queue, config, records):
    judge = RewardJudge(config)
    warm_up, *records = records
    run_here(judge, [(0, warm_up)])
    began = time.perf_counter()
    found = run_here(judge, [(0, one) for one in records])
    queue.put((time.perf_counter() - began, [reward for one in found for reward in one["rewards"]], 0))


def with_transformers(queue, config, records, batch=8):
    import torch
    from transformers import AutoModelForSequenceClassification

    from data_utils import encode_chat, load_tokenizer

    device = "cuda" if os.environ.get("CUDA_VISIBLE_DEVICES") else "cpu"
    model = (
        AutoModelForSequenceClassification.from_pretrained(
            config.judge, dtype=torch.bfloat16 if device == "cuda" else torch.float32
        )
        .to(device)
        .eval()
    )
    tokenizer = load_tokenizer(config.judge)

    def rewards(records):
        chats = [
            encode_chat(
                tokenizer,
                [{"role": "user", "content": one["prompt"]}, {"role": "assistant", "content": sample["text"]}],
                add_generation_prompt=False,
            )
            for one in records
            for sample in one["samples"]
        ]
        found = []
        for first in range(0, len(chats), batch):
            part = chats[first : first + batch]
            length = max(map(len, part))
            ids = torch.tensor([row + [0] * (length - len(row)) for row in part], device=device)
            mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in part], device=device)
            with torch.no_grad():
                hidden = model.model(input_ids=ids, attention_mask=mask).last_hidden_state
                ends = hidden[torch.arange(len(part)), mask.sum(1) - 1]
                found += model.score(ends)[:, 0].float().tolist()
        return found, sum(map(len, chats))

    warm_up, *records = records
    rewards([warm_up])
    began = time.perf_counter()
    found, tokens = rewards(records)
    queue.put((time.perf_counter() - began, found, tokens))


def main(
    prompts: str,
    source: str = "exps/demo-models/judge",
    hidden: int = 512,
    layers: int = 8,
    count: int = 32,
    num_samples: int = 5,
    longest: int = 600,
    gpus: str = "auto",
):
    """Measure and append to RESULTS.md."""
    texts = [text[:longest] for text in read_prompt_texts(prompts)]
    records = [
        {
            "prompt_id": str(i),
            "prompt": texts[i],
            "samples": [{"text": texts[count + 1 + i * num_samples + k]} for k in range(num_samples)],
        }
        for i in range(count + 1)
    ]
    with tempfile.TemporaryDirectory() as folder:
        make_reward_model(source, hidden, layers, folder)
        config = JudgeConfig(judge=folder, judge_type="reward", max_prompt_tokens=2048, gpus=gpus)
        os.environ.update(config.environments()[0])
        plain, tokens = (found := in_its_own_process(with_transformers, config, records))[:2], found[2]
        ours = in_its_own_process(with_vllm, config, records)[:2]
    difference = max(abs(one - other) for one, other in zip(plain[1], ours[1]))
    record(
        f"Rewards of {count * num_samples} responses, {tokens:,} tokens, a random model of {layers} layers of {hidden}",
        [
            "| way | seconds | responses/s |",
            "|---|---|---|",
            *(
                f"| {name} | {taken:.2f} | {count * num_samples / taken:.1f} |"
                for name, (taken, _) in (("transformers, batches of 8", plain), ("ours, vLLM's pooling", ours))
            ),
            "",
            f"x{plain[0] / ours[0]:.2f}; largest difference of a reward {difference:.1e}.",
        ],
        packages=("torch", "transformers", "vllm"),
    )


if __name__ == "__main__":
    run(main)
