"""Training steps against TRL's DPOTrainer (loss_type="ipo", reference log-probabilities precomputed) on the same pairs.

    python benchmarks/against_trl.py --prompts FILE [--shape 44M] [--precision bf16] [--count 16]

TRL is installed beside the project's packages (pip install --no-deps --target exps/trl trl==1.16.0), in a folder of its
own that only its process sees. Both train the same model on the same token ids, one pair a step, AdamW, in processes of
their own; the time of the reference's log-probabilities and of the first step is left out of both. TRL is tried with
its default and, on a GPU, with padding-free batches; the fastest counts. Goal: 1.5 times TRL's speed.
"""

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from common import ROOT, make_model, make_pairs, record, seconds

from utils import run

TRL = "trl==1.16.0"
WAYS = {"ours": {}, "TRL": {}, "TRL-padding-free": {"padding_free": True}}


def step_times_of_trl(prompts, shape, precision, count, seed, **options):
    """Seconds of each step of DPOTrainer but the first; runs where TRL can be imported."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from torch.utils.data import SequentialSampler
    from transformers import PreTrainedTokenizerFast, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    class GivenIds(DPOTrainer):
        def _prepare_dataset(self, dataset, *args, **kwargs):
            return dataset  # token ids, as its collator wants them

        def _get_train_sampler(self, *args, **kwargs):
            return SequentialSampler(self.train_dataset)  # in our order

    class Clock(TrainerCallback):
        times = []

        def on_step_begin(self, *args, **kwargs):
            self.began = time.perf_counter()

        def on_step_end(self, *args, **kwargs):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.times.append(time.perf_counter() - self.began)

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, "a")), pad_token="a", eos_token="a"
    )
    data = Dataset.from_list(
        [{"prompt_ids": p, "chosen_ids": c, "rejected_ids": r} for p, c, r in make_pairs(prompts, count, seed)]
    )
    with tempfile.TemporaryDirectory() as folder:
        trainer = GivenIds(
            model=make_model(shape),
            processing_class=tokenizer,
            train_dataset=data,
            callbacks=[Clock()],
            args=DPOConfig(
                output_dir=folder,
                loss_type="ipo",
                beta=0.1,
                precompute_ref_log_probs=True,
                max_steps=count,
                per_device_train_batch_size=1,
                gradient_accumulation_steps=1,
                max_length=None,
                report_to=[],
                save_strategy="no",
                bf16=precision == "bf16",
                use_cpu=not torch.cuda.is_available(),
                gradient_checkpointing=False,
                optim="adamw_torch_fused",
                max_grad_norm=0.0,
                disable_tqdm=True,
                logging_strategy="no",
                seed=seed,
                **options,
            ),
        )
        trainer.train()
    print("times", json.dumps(Clock.times[1:]))


def our_step_times(prompts, shape, precision, count, seed):
    from losses import ipo_loss
    from training.logps import install_head, response_logps

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = install_head(make_model(shape).to(device))
    context = (lambda: torch.autocast(device, torch.bfloat16)) if precision == "bf16" else contextlib.nullcontext
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    zero = torch.zeros(1, device=device)

    def step(prompt, chosen, rejected):
        with context():
            logps = response_logps(model, [(prompt, [chosen, rejected])], device)
        ipo_loss(logps[:1], logps[1:], zero, zero, 0.1).mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    times = [seconds(lambda: step(*pair), device) for pair in make_pairs(prompts, count, seed)]
    print("times", json.dumps(times[1:]))


def main(prompts: str, shape: str = "44M", precision: str = "bf16", count: int = 16, seed: int = 0, run: str = ""):
    """Measure and append to RESULTS.md."""
    if run:
        return (our_step_times if run == "ours" else step_times_of_trl)(
            prompts, shape, precision, count, seed, **WAYS[run]
        )
    folder = ROOT / "exps" / "trl"
    if not (folder / "trl").exists():
        subprocess.run(
            [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder), TRL], check=True
        )
    ways = list(WAYS) if torch.cuda.is_available() else ["ours", "TRL"]  # padding-free wants FlashAttention
    found = {way: step_times(way, folder, prompts, shape, precision, count, seed) for way in ways}
    best = min(ways[1:], key=lambda way: sum(found[way]))
    record(
        f"Training steps against {TRL}, Qwen2 {shape}, {precision}",
        [
            f"| {count - 1} steps of one pair | seconds | median of a step |",
            "|---|---|---|",
            *(f"| {way} | {sum(found[way]):.2f} | {statistics.median(found[way]):.3f} |" for way in ways),
            "",
            f"x{sum(found[best]) / sum(found['ours']):.2f} against {best}.",
        ],
    )


def step_times(way, folder, prompts, shape, precision, count, seed):
    environment = os.environ | {"PYTHONPATH": "" if way == "ours" else str(folder), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [
            sys.executable,
            Path(__file__).resolve(),
            "--prompts",
            prompts,
            "--shape",
            shape,
            "--precision",
            precision,
            "--count",
            str(count),
            "--seed",
            str(seed),
            "--run",
            way,
        ],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("times"))[6:])


if __name__ == "__main__":
    run(main)
