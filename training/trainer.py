"""The one training loop: `train(compute_loss, config, dataset_class)`. What it saves is in checkpoints.py, what it
writes to metrics.jsonl in metrics.py, how it loads a model and deals examples to processes in models.py."""

import json
import math
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

import accelerate
import torch
from torch import Tensor

from data_utils import load_tokenizer, resolve_model, resolve_tokenizer
from training import models
from training.checkpoints import Checkpoints, check_apart, check_output, find_progress, note_changes, run_fingerprint
from training.logps import batch_logps, model_inputs, on_device
from training.memory import check_choices, plan
from training.metrics import Metrics, pair_sums, stored_logps, update_line
from training.start_check import check_start, furthest_off
from utils import StageError, check_at_least, check_input, log, split_list, write_text


@dataclass
class TrainingConfig:
    """Settings of the training loop (defaults: the released Qwen2-1.5B recipe).

    Args:
        model: checkpoint directory or Hub id where training starts
        input: training data
        output: checkpoint directory: model/, metrics.jsonl, DONE
        validation: data whose mean loss is reported and selects the checkpoint
        select: which weights go to model/: best (the lowest validation loss) or last
        tokenizer: directory or Hub id; default: the model's
        from_config: start from random weights of --model's config.json instead of its weights
        learning_rate: peak of a linear schedule that ends at 0
        warmup_ratio: share of the steps in which the learning rate rises
        num_epochs: passes over the data
        global_batch_size: examples an update, whatever the number of processes
        micro_batch_tokens: positions of a forward pass on one process, padding included; the rest is accumulated. At 0
            each example goes alone, as longer ones always do: no padding, and values that do not depend on neighbours.
            auto is what fits into the GPUs' memory, and 0 on a CPU
        sharding: what FSDP divides among the GPUs: full (parameters, gradients and the optimiser), or optimizer
            (parameters and gradients stay whole from the first pass of an update to the last, for less traffic);
            auto is optimizer where it fits into the GPUs' memory. On a CPU it is full
        max_length: prompt and response tokens; longer data is an error
        weight_decay: AdamW's; torch's default, as in the released scripts
        max_grad_norm: clip the gradient's norm to this; 0 does not clip
        gradient_checkpointing: recompute activations, for less memory and a third more time
        shuffle: a new order every epoch; without it, the file's
        eval_steps: validate every so many updates, besides each epoch's end
        save_minutes: a resume point every so many minutes of training, after the update that is then being made; 0:
            none. With --select best also where the validation loss is the lowest so far, and on SIGUSR1, which then
            ends the run. A run that was stopped goes on after the last one when started again
        keep_last: keep the final weights beside the best ones, in last/
        start_tolerance: nats by which the stored log-probability of a response under the last policy may differ from
            this model's before training; 0: by its length and the precision (see start_check.py)
        report_to: where each step's figures go besides metrics.jsonl: tensorboard (<output>/tensorboard), wandb (if
            installed), both comma-separated, or none
        seed: of the data order and of random weights
    """

    model: str
    input: str
    output: str
    validation: str = ""
    select: str = "best"
    tokenizer: str = ""
    from_config: bool = False
    learning_rate: float = 5e-7
    warmup_ratio: float = 0.1
    num_epochs: int = 3
    global_batch_size: int = 32
    micro_batch_tokens: str = "auto"
    sharding: str = "auto"
    max_length: int = 2048
    weight_decay: float = 0.01
    max_grad_norm: float = 0.0
    gradient_checkpointing: bool = False
    shuffle: bool = True
    eval_steps: int = 500
    save_minutes: float = 10.0
    keep_last: bool = False
    start_tolerance: float = 0.0
    report_to: str = "tensorboard"
    seed: int = 0

    def __post_init__(self):
        for name in ("learning_rate", "num_epochs", "global_batch_size", "max_length", "eval_steps"):
            if not getattr(self, name) > 0:
                raise StageError(f"--{name} should be greater than 0, got {getattr(self, name)}")
        not_negative = ("save_minutes", "weight_decay", "max_grad_norm", "start_tolerance")
        check_at_least(0, **{name: getattr(self, name) for name in not_negative})
        check_choices(self.micro_batch_tokens, self.sharding)
        if not 0 <= self.seed < 2**32:  # NumPy's
            raise StageError(f"--seed should be between 0 and {2**32 - 1}, got {self.seed}")
        if self.select not in ("best", "last"):
            raise StageError(f"--select should be best or last, got {self.select}")
        if not 0 <= self.warmup_ratio <= 1:
            raise StageError(f"--warmup_ratio should be between 0 and 1, got {self.warmup_ratio}")
        for tracker in self.trackers():
            if tracker not in ("tensorboard", "wandb"):
                raise StageError(f"--report_to should be none, tensorboard or wandb, got {tracker}")
            if find_spec(tracker) is None:
                raise StageError(f"--report_to {tracker}: it is not installed (pip install {tracker})")

    def trackers(self) -> list[str]:
        return [] if self.report_to == "none" else split_list(self.report_to)


# ---------------------------------------------------------------------------------------------- training


def train(
    compute_loss: Callable[[Tensor, dict], Tensor], config: TrainingConfig, dataset_class: type, **method
) -> None:
    """Train `config.model` and write a checkpoint directory; go on where an unfinished run has left a resume point.

    Args:
        compute_loss: (logps, batch) -> losses (N,). `logps` are the summed response log-probabilities of the
            batch's rows: (2N,) for pairs, chosen then rejected, (N,) for chats. Losses are averaged over the
            global batch with the data set's weights.
        dataset_class: training.datasets' PairDataset or ChatDataset
        method: the loss and its hyperparameters, to be recorded in training.json

    Raises StageError for bad data, a loss that is not finite (with the batch's prompt ids), stored
    log-probabilities that are not this model's, an unfinished run with other settings, a full disk, or SIGUSR1, once
    a resume point is written.
    """
    Trainer(compute_loss, config, dataset_class, method).run()


class Trainer:
    """One training run; `train` is its interface. What changes from update to update is `progress`, besides the model
    and the optimiser."""

    def __init__(self, compute_loss, config, dataset_class, method):
        self.compute_loss, self.config = compute_loss, config
        settings, output = method | asdict(config), Path(config.output)
        check_output(output)
        check_input(config.input)
        if config.validation:
            check_input(config.validation)
        model_dir = resolve_model(config.model)
        tokenizer_dir = resolve_tokenizer(config.tokenizer)
        check_apart(output, model_dir, tokenizer_dir, config.input, config.validation)
        tokenizer = load_tokenizer(model_dir, tokenizer_dir)
        self.accelerator = models.start_accelerator(
            config.seed, model_dir, log_with=config.trackers() or None, project_dir=output / "tensorboard"
        )
        fingerprint = run_fingerprint(settings, model_dir, self.accelerator)
        self.progress = find_progress(output, fingerprint)
        vocab_size = models.vocabulary_size(model_dir)
        load = lambda path: dataset_class(path, tokenizer, config.max_length, vocab_size)
        self.data, self.validation = load(config.input), load(config.validation) if config.validation else None
        model = models.load_model(model_dir, config.from_config, config.gradient_checkpointing)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=config.weight_decay, fused=True)
        longest = max([*self.data.lengths, *(self.validation.lengths if self.validation else [])])
        self.micro_batch_tokens, self.sharding = plan(
            model, self.accelerator, config.micro_batch_tokens, config.sharding, longest
        )
        settings |= {"micro_batch_tokens": self.micro_batch_tokens, "sharding": self.sharding}
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        if self.accelerator.is_fsdp2 and self.sharding == "optimizer":
            self.model.set_reshard_after_forward(False)  # parameters stay gathered until `one_pass` says otherwise
        self.steps_per_epoch = math.ceil(len(self.data) / config.global_batch_size)
        self.total_steps = self.steps_per_epoch * config.num_epochs
        self.checkpoints = Checkpoints(config, self.accelerator, self.model, tokenizer, fingerprint, self.progress)
        self.checkpoints.begin()
        if self.progress.step:
            log.info("resuming after step %d of %d", self.progress.step, self.total_steps)
        self.metrics = Metrics(output, self.accelerator, config.trackers(), settings, self.progress.step)
        self.describe(settings)

    def describe(self, settings):
        """Print settings, batch arithmetic and versions; keep them in training.json."""
        import transformers

        config, accelerator = self.config, self.accelerator
        command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
        commit = subprocess.run(command, capture_output=True, text=True).stdout.strip()
        versions = {module.__name__: module.__version__ for module in (torch, transformers, accelerate)}
        versions["commit"] = commit or "unknown"
        log.info("settings: %s", ", ".join(f"{name} {value}" for name, value in settings.items()))
        log.info("versions: %s", ", ".join(f"{name} {value}" for name, value in versions.items()))
        log.info(
            "global batch %d, dealt to %d processes, %s a forward pass; %d examples, %d updates; %s, %s",
            config.global_batch_size,
            accelerator.num_processes,
            f"{self.micro_batch_tokens} tokens" if self.micro_batch_tokens else "one example",
            len(self.data),
            self.total_steps,
            accelerator.distributed_type.value.replace("NO", "one process"),
            accelerator.mixed_precision.replace("no", "float32"),
        )
        settings = settings | {"processes": accelerator.num_processes}
        if accelerator.is_main_process:
            path = Path(config.output) / "training.json"
            note_changes(path, settings)
            write_text(path, json.dumps(settings | versions, indent=2) + "\n")

    def run(self):
        """Make all updates that are left and finish the checkpoint."""
        config, began, first_step = self.config, time.monotonic(), self.progress.step
        for step in range(first_step, self.total_steps):
            epoch, position = divmod(step, self.steps_per_epoch)
            first = position * config.global_batch_size
            order = data_order(config, len(self.data), epoch)
            metrics = self.update(step, order[first : first + config.global_batch_size])
            done = self.progress.step = step + 1
            seconds_left = (time.monotonic() - began) / (done - first_step) * (self.total_steps - done)
            self.metrics.write(done, metrics, update_line(done, self.total_steps, metrics, seconds_left))
            improved = False
            if self.validation and (position + 1 == self.steps_per_epoch or done % config.eval_steps == 0):
                improved = self.validate()
            self.checkpoints.keep(improved, finished=done == self.total_steps)
        self.checkpoints.finish()
        self.accelerator.end_training()

    def update(self, step, indices):
        """One optimiser step on a global batch; returns its metrics."""
        self.model.train()
        began, rate = time.monotonic(), learning_rate(self.config, step, self.total_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        metrics, off = self.run_batch(self.data, indices, backward=True)
        if not math.isfinite(metrics["loss"]):
            raise StageError(
                f"loss {metrics['loss']} at step {step + 1}; prompt ids of the batch: "
                + ", ".join(self.data.ids[i] for i in indices)
            )
        if off:
            check_start(self.config, off, metrics["normalised_loss"])
        if self.config.max_grad_norm > 0:
            norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.config.max_grad_norm)
            metrics["grad_norm"] = float(norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        metrics["learning_rate"] = rate
        metrics["tokens_per_s"] = sum(self.data.lengths[i] for i in indices) / (time.monotonic() - began)
        return metrics

    def validate(self):
        """Report the mean loss over the validation data; return whether it is the lowest so far."""
        self.model.eval()
        began, step, best = time.monotonic(), self.progress.step, self.progress.best
        metrics, _ = self.run_batch(self.validation, range(len(self.validation)), backward=False)
        metrics["tokens_per_s"] = sum(self.validation.lengths) / (time.monotonic() - began)
        if not math.isfinite(metrics["loss"]):
            raise StageError(f"validation loss {metrics['loss']} after step {step}")
        improved = best is None or metrics["loss"] < best["validation_loss"]
        if improved:
            self.progress.best = {"step": step, "validation_loss": metrics["loss"]}
        line = f"validation after step {step}: loss {metrics['loss']:.4g} | "
        line += f"normalised_loss {metrics['normalised_loss']:.4f}" + " | lowest so far" * improved
        self.metrics.write(step, {f"validation_{name}": value for name, value in metrics.items()}, line)
        return improved

    def run_batch(self, dataset, indices, backward):
        """Mean loss and metrics over examples dealt to all processes; with gradients when `backward`.

        Returns (metrics, before the first update also what `furthest_off` finds in all examples, where they have stored
        log-probabilities).
        """
        accelerator = self.accelerator
        weight_of = {i: dataset.weights[i] for i in indices}
        normaliser = sum(weight_of.values())
        if not normaliser > 0:
            raise StageError(f"{dataset.path}: all examples of a batch have weight 0")
        totals, off, untouched = {}, [], backward and self.progress.step == 0
        batches = models.micro_batches(indices, dataset.lengths, self.micro_batch_tokens, accelerator.num_processes)
        dealt = models.local_batches(batches, dataset.lengths, accelerator)
        for number, (mine, counts) in enumerate(dealt, 1):
            batch = dataset.collate([dataset[i] for i in mine])
            batch["weight"] = torch.tensor([weight_of[i] * counts for i in mine])
            batch = on_device(batch | model_inputs(self.model, batch["rows"], accelerator.device), accelerator.device)
            reduces = number == len(dealt)
            with models.one_pass(self.model, accelerator, self.sharding, reduces), torch.set_grad_enabled(backward):
                logps = batch_logps(self.model, batch)
                losses = self.compute_loss(logps, batch)  # (N,)
                loss = (losses * batch["weight"]).sum()
                if backward:
                    # Gradients are averaged over processes; the loss is a sum over them.
                    accelerator.backward(loss / normaliser * accelerator.num_processes)
            with torch.no_grad():
                sums = {"loss": loss}
                if "last_chosen_logps" in batch:
                    last, ref = stored_logps(batch)
                    initial = self.compute_loss(last, batch)  # the losses of the initial policy
                    sums["initial"] = (initial * batch["weight"]).sum()
                    sums |= {name: value * counts for name, value in pair_sums(logps, last, ref).items()}
                    if untouched:
                        off.append(furthest_off(self.config, logps - last, batch["rows"], accelerator))
                for name, value in sums.items():
                    totals[name] = totals.get(name, 0) + value.detach().double()
        names = sorted(totals)  # the same on every process: they depend on the method alone
        values = accelerator.reduce(torch.stack([totals[name] for name in names]), "sum").tolist()
        totals = dict(zip(names, values))
        loss = totals.pop("loss") / normaliser
        self.progress.first_loss = self.progress.first_loss or loss
        initial = totals.pop("initial") / normaliser if "initial" in totals else self.progress.first_loss
        metrics = {"loss": loss, "normalised_loss": loss / max(initial, 1e-12)}  # 0 only if every soft label is 1/2
        if off:
            off = max(accelerator.gather(torch.stack(off)).tolist())
        return metrics | {name: total / len(indices) for name, total in totals.items()}, off


def data_order(config: TrainingConfig, count: int, epoch: int) -> list[int]:
    """The example indices of an epoch: a function of seed and epoch alone."""
    if not config.shuffle:
        return list(range(count))
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + epoch)
    return torch.randperm(count, generator=generator).tolist()


def learning_rate(config: TrainingConfig, step: int, total_steps: int) -> float:
    """Linear from 0 to the peak during warm-up, then linear to 0."""
    warmup = math.ceil(config.warmup_ratio * total_steps)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    return config.learning_rate * (total_steps - step) / max(1, total_steps - warmup)
