"""The project's whole trainer against TRL's DPOTrainer (loss_type="ipo"), on the same pairs of the same model.

    pip install --no-deps --target exps/trl trl==1.16.0
    PYTHONPATH=exps/trl python benchmarks/against_trl.py [--shape 44M] [--precision bf16] [--updates 5] [--batch 1]

Ours is `ipo.py` as comal.sh runs it; TRL's reference log-probabilities are computed before. Each way has a process of
its own and starts from random weights. The time is that from the end of the first update to the end of the last: data,
passes, optimiser and metrics are in it; loading, the first update and the checkpoint are not. TRL is tried with a pair
a pass and with all pairs of an update, on a GPU also without padding; its fastest way counts. Goal: 1.5 times TRL's
speed.
"""

import json
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

import torch
from common import ROOT, child_environment, make_config, make_model, make_pairs, record, table, write_chat_tokenizer

from utils import StageError, run

WAYS = {  # of TRL: whether all pairs of an update are one pass, and its own options
    "TRL, a pair a pass": (False, {}),
    "TRL, an update a pass": (True, {}),
    "TRL, an update a pass, padding-free": (True, {"padding_free": True}),  # wants FlashAttention
}


def installed():
    return find_spec("trl") is not None


def note(ends):
    """Add the time at which an update ends, a GPU's work included."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    ends.append(time.perf_counter())


# ---------------------------------------------------------------------------------------------- ours


def time_ours(shape, pairs, batch, folder):
    """Seconds of all updates but the first of `ipo.py`."""
    import ipo
    from training.trainer import Trainer

    ends, update = [], Trainer.update

    def timed(self, step, indices):
        metrics = update(self, step, indices)
        note(ends)
        return metrics

    Trainer.update = timed
    make_config(shape).save_pretrained(folder)
    write_chat_tokenizer(folder)
    with open(f"{folder}/data.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps(data_record(str(i), *pair)) + "\n" for i, pair in enumerate(pairs))
    ipo.main(
        model=folder,
        from_config=True,
        input=f"{folder}/data.jsonl",
        output=f"{folder}/ckpt",
        select="last",
        num_epochs=1,
        global_batch_size=batch,
        save_minutes=0,
        shuffle=False,
        start_tolerance=1e9,  # the stored log-probabilities are no model's
        report_to="none",
        eta=0.1,
    )
    return ends[-1] - ends[0]


def data_record(name, prompt, chosen, rejected):
    """A line of a data file (records.Data)."""
    logps = {f"{model}_{side}_logp": 0.0 for model in ("last", "ref") for side in ("chosen", "rejected")}
    ids = {"prompt_token_ids": prompt, "chosen_token_ids": chosen, "rejected_token_ids": rejected}
    return {"prompt_id": name, "win_prob": 1.0} | ids | logps


# ---------------------------------------------------------------------------------------------- TRL's


def time_trl(shape, pairs, batch, device, folder, precision, whole_update, options):
    """Seconds of all updates but the first of TRL's trainer."""
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

    class Callback(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            note(ends)

    ends = []

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, "a")), pad_token="a", eos_token="a"
    )
    trainer = GivenIds(
        model=make_model(shape, device=device),
        processing_class=tokenizer,
        train_dataset=Dataset.from_list([{"prompt_ids": p, "chosen_ids": c, "rejected_ids": r} for p, c, r in pairs]),
        callbacks=[Callback()],
        args=DPOConfig(
            output_dir=folder,
            loss_type="ipo",
            beta=0.1,
            precompute_ref_log_probs=True,
            max_steps=len(pairs) // batch,
            per_device_train_batch_size=batch if whole_update else 1,
            gradient_accumulation_steps=1 if whole_update else batch,
            max_length=None,
            report_to=[],
            save_strategy="no",
            bf16=precision == "bf16",
            use_cpu=device == "cpu",
            gradient_checkpointing=False,
            optim="adamw_torch_fused",
            max_grad_norm=0.0,
            disable_tqdm=True,
            logging_strategy="no",
            seed=0,
            **options,
        ),
    )
    trainer.train()
    return ends[-1] - ends[0]


# ---------------------------------------------------------------------------------------------- both


def measure(shape, precision, updates, batch, device):
    """{way: (tokens, seconds)} of all updates but the first; None in place of seconds where a way failed.

    Raises StageError where TRL is not installed."""
    if not installed():
        raise StageError("TRL is not installed; see benchmarks/against_trl.py for the command")
    tokens = sum(len(part) for pair in some_pairs(shape, updates, batch)[batch:] for part in pair)
    possible = [way for way, (whole, _) in WAYS.items() if batch > 1 or not whole]
    ways = ["ours", *(way for way in possible if device == "cuda" or not WAYS[way][1])]
    arguments = {"shape": shape, "precision": precision, "updates": updates, "batch": batch, "device": device}
    return {way: (tokens, in_a_process(way, arguments)) for way in ways}


def some_pairs(shape, updates, batch):
    longest = 24 if shape == "tiny" else 1024
    return make_pairs("", updates * batch, longest, vocabulary=min(make_config(shape).vocab_size, 151_000))


def in_a_process(way, arguments):
    """Seconds, or None where it failed. Ours is launched as comal.sh does."""
    command, more = [sys.executable], {}
    if way == "ours" and arguments["device"] == "cuda":
        launcher = "-m accelerate.commands.launch --config_file fsdp_config.yaml --num_processes 1 --mixed_precision"
        command += [*launcher.split(), "no" if arguments["precision"] == "float32" else "bf16"]
    if way == "ours" and arguments["precision"] == "bf16":
        more = {"ACCELERATE_MIXED_PRECISION": "bf16"}
    command += [str(Path(__file__).resolve()), "--run", way]
    command += [f"--{name}={value}" for name, value in arguments.items()]
    with child_environment(HF_HUB_OFFLINE="1", **more):
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    found = [line for line in done.stdout.splitlines() if line.startswith("seconds ")]
    return float(found[0].split()[1]) if found else None


def main(
    shape: str = "44M", precision: str = "bf16", updates: int = 5, batch: int = 1, device: str = "cpu", run: str = ""
):
    """Measure and append to RESULTS.md.

    Args:
        precision: bf16 or float32
        updates: of each way; the first is not timed
        batch: pairs an update
        device: cpu or cuda
        run: (the script's own) one way, in this process
    """
    if run:
        pairs = some_pairs(shape, updates, batch)
        with tempfile.TemporaryDirectory() as folder:
            if run == "ours":
                taken = time_ours(shape, pairs, batch, folder)
            else:
                taken = time_trl(shape, pairs, batch, device, folder, precision, *WAYS[run])
        print("seconds", taken)
        return
    found = measure(shape, precision, updates, batch, device)
    rows = [
        f"{way} | {taken:.2f} | {tokens / taken:,.0f}" if taken else f"{way} | failed |"
        for way, (tokens, taken) in found.items()
    ]
    tokens, ours = found.pop("ours")
    fastest, way = min((taken, way) for way, (_, taken) in found.items() if taken)
    lines = [
        f"{updates - 1} updates of {batch} pairs: {tokens:,} tokens with each prompt once.",
        "",
        *table("way | seconds | tokens/s", *rows),
        "",
        f"x{fastest / ours:.2f} against {way}." if ours else "Ours failed.",
    ]
    packages = ("torch", "transformers", "accelerate", "trl")
    record(f"The trainer against TRL's, Qwen2 {shape}, {precision}", lines, packages)


if __name__ == "__main__":
    run(main)
