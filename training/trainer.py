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
from training.checkpoints import Checkpoints, check_apart, check_output, find_progress, run_fingerprint
from training.logps import batch_logps, model_inputs, on_device
from training.metrics import Metrics, pair_sums, stored_logps, update_line
from training.models import load_model, local_batches, micro_batches, start_accelerator, vocabulary_size
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
            each example goes alone, as longer ones always do: no padding, and values that do not depend on neighbours
        max_length: prompt and response tokens; longer data is an error
        weight_decay: AdamW's; torch's default, as in the released scripts
        max_grad_norm: clip the gradient's norm to this; 0 does not clip
        gradient_checkpointing: recompute activations, for less memory and a third more time
        shuffle: a new order every epoch; without it, the file's
        eval_steps: validate every so many updates, besides each epoch's end
        save_steps: a resume point every so many updates, 0: none; with --select best also where the validation
            loss is the lowest so far. A run that was stopped goes on after the last one when started again
        keep_last: keep the final weights beside the best ones, in last/
        start_tolerance: nats by which the stored log-probabilities of the last policy may differ from this
            model's before training; 0 chooses 0.05 in float32 and 3 in bfloat16
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
    micro_batch_tokens: int = 0
    max_length: int = 2048
    weight_decay: float = 0.01
    max_grad_norm: float = 0.0
    gradient_checkpointing: bool = False
    shuffle: bool = True
    eval_steps: int = 500
    save_steps: int = 200
    keep_last: bool = False
    start_tolerance: float = 0.0
    report_to: str = "tensorboard"
    seed: int = 0

    def __post_init__(self):
        for name in ("learning_rate", "num_epochs", "global_batch_size", "max_length", "eval_steps"):
            if not getattr(self, name) > 0:
                raise StageError(f"--{name} should be greater than 0, got {getattr(self, name)}")
        check_at_least(
            0,
            micro_batch_tokens=self.micro_batch_tokens,
            save_steps=self.save_steps,
            weight_decay=self.weight_decay,
            max_grad_norm=self.max_grad_norm,
            start_tolerance=self.start_tolerance,
        )
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
        config: TrainingConfig
        dataset_class: training.datasets' PairDataset or ChatDataset
        method: the loss and its hyperparameters, to be recorded in training.json

    Raises StageError for bad data, a loss that is not finite (with the batch's prompt ids), stored
    log-probabilities that are not this model's, an unfinished run with other settings, or a full disk.
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
        tokenizer_dir = config.tokenizer and resolve_tokenizer(model_dir, config.tokenizer)
        check_apart(output, model_dir, tokenizer_dir, config.input, config.validation)
        tokenizer = load_tokenizer(model_dir, tokenizer_dir)
        self.accelerator = start_accelerator(
            config.seed, log_with=config.trackers() or None, project_dir=output / "tensorboard"
        )
        fingerprint = run_fingerprint(settings, model_dir, self.accelerator)
        self.progress = find_progress(output, fingerprint)
        vocab_size = vocabulary_size(model_dir)
        load = lambda path: dataset_class(path, tokenizer, config.max_length, vocab_size)
        self.data, self.validation = load(config.input), load(config.validation) if config.validation else None
        model = load_model(model_dir, config.from_config, config.gradient_checkpointing)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=config.weight_decay, fused=True)
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
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
        commit = subprocess.run(
            ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=Path(__file__).parent
        ).stdout.strip()
        versions = {module.__name__: module.__version__ for module in (torch, transformers, accelerate)}
        versions["commit"] = commit or "unknown"
        log.info("settings: %s", ", ".join(f"{name} {value}" for name, value in settings.items()))
        log.info("versions: %s", ", ".join(f"{name} {value}" for name, value in versions.items()))
        log.info(
            "global batch %d, dealt to %d processes, %s a forward pass; %d examples, %d updates; %s, %s",
            config.global_batch_size,
            accelerator.num_processes,
            f"{config.micro_batch_tokens} tokens" if config.micro_batch_tokens else "one example",
            len(self.data),
            self.total_steps,
            accelerator.distributed_type.value.replace("NO", "one process"),
            accelerator.mixed_precision.replace("no", "float32"),
        )
        if accelerator.is_main_process:
            write_text(Path(config.output) / "training.json", json.dumps(settings | versions, indent=2) + "\n")

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
        self.metrics.close()
        self.checkpoints.finish()
        self.accelerator.end_training()

    def update(self, step, indices):
        """One optimiser step on a global batch; returns its metrics."""
        self.model.train()
        began, rate = time.monotonic(), learning_rate(self.config, step, self.total_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        metrics, difference = self.run_batch(self.data, indices, backward=True)
        if not math.isfinite(metrics["loss"]):
            raise StageError(
                f"loss {metrics['loss']} at step {step + 1}; prompt ids of the batch: "
                + ", ".join(self.data.ids[i] for i in indices)
            )
        if step == 0 and difference is not None:
            check_start(self.config, difference, metrics["normalised_loss"], self.accelerator.mixed_precision)
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

        Returns (metrics, largest difference in nats of a log-probability from that of the last policy, where stored).
        """
        device = self.accelerator.device
        weight_of = {i: dataset.weights[i] for i in indices}
        normaliser = sum(weight_of.values())
        if not normaliser > 0:
            raise StageError(f"{dataset.path}: all examples of a batch have weight 0")
        totals, difference = {}, None
        batches = micro_batches(indices, dataset.lengths, self.config.micro_batch_tokens)
        for mine, counts in local_batches(batches, self.accelerator):
            batch = dataset.collate([dataset[i] for i in mine])
            batch["weight"] = torch.tensor([weight_of[i] * counts for i in mine])
            batch = on_device(batch | model_inputs(self.model, batch["rows"], device), device)
            with torch.set_grad_enabled(backward):
                logps = batch_logps(self.model, batch)
                losses = self.compute_loss(logps, batch)  # (N,)
                loss = (losses * batch["weight"]).sum()
            if backward:
                # Gradients are averaged over processes; the loss is a sum over them.
                self.accelerator.backward(loss / normaliser * self.accelerator.num_processes)
            with torch.no_grad():
                sums = {"loss": loss}
                if "last_chosen_logps" in batch:
                    last, ref = stored_logps(batch)
                    initial = self.compute_loss(last, batch)  # the losses of the initial policy
                    sums["initial"] = (initial * batch["weight"]).sum()
                    sums |= {name: value * counts for name, value in pair_sums(logps, last, ref).items()}
                    off = (logps - last).abs().max()
                    difference = off if difference is None else torch.maximum(difference, off)
                for name, value in sums.items():
                    totals[name] = totals.get(name, 0) + value.detach().double()
        names = sorted(totals)  # the same on every process: they depend on the method alone
        values = self.accelerator.reduce(torch.stack([totals[name] for name in names]), "sum").tolist()
        totals = dict(zip(names, values))
        loss = totals.pop("loss") / normaliser
        self.progress.first_loss = self.progress.first_loss or loss
        initial = totals.pop("initial") / normaliser if "initial" in totals else self.progress.first_loss
        metrics = {"loss": loss, "normalised_loss": loss / max(initial, 1e-12)}  # 0 only if every soft label is 1/2
        if difference is not None:
            difference = self.accelerator.gather(difference.reshape(1)).max().item()
        return metrics | {name: total / len(indices) for name, total in totals.items()}, difference


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


def check_start(config: TrainingConfig, difference: float, normalised_loss: float, precision: str) -> None:
    """Before the first update the model must be the last policy of the data file: raise StageError otherwise.

    Args:
        difference: largest one, in nats, of the model's log-probabilities from the stored ones.
        normalised_loss: of the first batch.
        precision: accelerate's mixed_precision.
    """
    log.info(
        "untouched policy: stored log-probabilities are off by at most %.2e nats, "
        "the normalised loss differs from 1 by %.2e",
        difference,
        abs(normalised_loss - 1),
    )
    tolerance = config.start_tolerance or (3.0 if precision == "bf16" else 0.05)
    if not difference <= tolerance:
        raise StageError(
            f"{config.input}: the last policy's stored log-probabilities differ from those of {config.model} by up to "
            f"{difference:.3g} nats (allowed: {tolerance}); was the file made with another model or precision? Run "
            "get_logprobs.py again, launched as training is"
        )
