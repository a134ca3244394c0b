"""Models under accelerate, and the one training loop: `train(compute_loss, config, dataset_class)`.

What a stored log-probability and a trained one have in common is here: `start_accelerator`, `load_model`, and
`logps.response_logps`.
"""

import contextlib
import dataclasses
import json
import logging
import math
import os
import shutil
import subprocess
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch

from data_utils import check_weights, load_tokenizer, model_fingerprint, resolve_model
from training.logps import install_head, response_logps
from utils import (
    StageError,
    check_at_least,
    check_input,
    die_with_parent,
    dump_json,
    fingerprint,
    first_line,
    log,
    split_list,
    sync,
    write_text,
)
from workers.journal import check_fingerprint


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
        weight_decay: AdamW's
        max_grad_norm: clip the gradient's norm to this; 0 does not clip
        gradient_checkpointing: recompute activations, for less memory and a third more time
        shuffle: a new order every epoch; without it, the file's
        eval_steps: validate every so many updates, besides each epoch's end
        save_steps: a resume point every so many updates, 0: none; with --select best also where the validation
            loss is the lowest so far. A run that was stopped goes on behind the last one when started again
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
    weight_decay: float = 0.0
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

    def trackers(self):
        return [] if self.report_to == "none" else split_list(self.report_to)


# ---------------------------------------------------------------------------------------------- models


def start_accelerator(seed, **settings):
    """The Accelerator of this process, as `accelerate launch` or its absence says; seeds all generators.

    Under FSDP 2 parameters are computed with in bfloat16, but gradients are reduced and outputs returned in
    float32: accelerate's own policy would round both to bfloat16, which costs a log-probability two nats.
    """
    from accelerate import Accelerator
    from accelerate.utils import DistributedType, set_seed

    if "LOCAL_RANK" in os.environ:
        die_with_parent()  # the launcher
    accelerator = Accelerator(**settings)
    if accelerator.distributed_type == DistributedType.FSDP and accelerator.mixed_precision == "bf16":
        from torch.distributed.fsdp import MixedPrecisionPolicy

        accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16, reduce_dtype=torch.float32, output_dtype=torch.float32
        )
    if not accelerator.is_main_process:
        log.setLevel("WARNING")
    for name, level in (("accelerate", "WARNING"), ("accelerate.utils.other", "ERROR")):  # each file of a resume point
        logging.getLogger(name).setLevel(level)
    set_seed(seed)
    return accelerator


def load_model(name, from_config=False, gradient_checkpointing=False):
    """A causal language model with float32 weights; bfloat16 ones would not move at learning rates like 5e-7."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()  # of the single files; stages show their own
    directory = resolve_model(name)
    if not from_config:
        check_weights(directory)
    if os.environ.get("RANK", "0") == "0":
        log.info("loading %s", name)
    try:
        if from_config:
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory), dtype=torch.float32)
        else:
            model, loading = AutoModelForCausalLM.from_pretrained(
                directory, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True
            )
            if loading["mismatched_keys"]:
                raise ValueError("its weights do not have the shapes of its config.json")
            if loading["missing_keys"]:  # they would be random
                raise ValueError(f"its files lack weights, first {min(loading['missing_keys'])}")
    except Exception as error:  # each file format and each model has its own kinds
        raise StageError(f"model {directory} does not load: {first_line(error)}") from None
    if gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return install_head(model)


def vocabulary_size(name):
    """Number of tokens of a model, from its configuration alone."""
    from transformers import AutoConfig

    directory = resolve_model(name)
    try:
        return AutoConfig.from_pretrained(directory).get_text_config().vocab_size
    except Exception as error:  # each model has its own kinds
        raise StageError(f"model {directory} does not load: {first_line(error)}") from None


def on_device(batch, device):
    return {name: value.to(device) if torch.is_tensor(value) else value for name, value in batch.items()}


def micro_batches(indices, lengths, tokens):
    """Examples in groups for one forward pass each, the longest first, so that there is little padding and neighbours
    take the same time: as many as fit into `tokens` positions, padding included, but at least one."""
    groups = []
    for index in sorted(indices, key=lambda index: -lengths[index]):
        if groups and (len(groups[-1]) + 1) * lengths[groups[-1][0]] <= tokens:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups


def local_batches(batches, accelerator):
    """Deal micro-batches to the processes, the same number to each.

    Yields (list of indices, whether they count): a process without one left repeats the first without counting
    it, because all processes must take part in every collective operation.
    """
    for i in range(0, len(batches), accelerator.num_processes):
        mine = i + accelerator.process_index
        yield (batches[mine], True) if mine < len(batches) else (batches[0], False)


# ---------------------------------------------------------------------------------------------- files


def move_directory(source, target):
    """Rename a directory, for good, in place of what `target` was."""
    shutil.rmtree(target, ignore_errors=True)
    os.replace(source, target)
    sync(target.parent)


def publish(temporary, target):
    """Give a directory that was written its name, once all of it is on disk with the usual permissions (safetensors
    leaves its files to their owner alone)."""
    umask = os.umask(0)
    os.umask(umask)
    for path in [*temporary.rglob("*"), temporary]:
        if path.is_file():
            path.chmod(0o666 & ~umask)
        sync(path)
    move_directory(temporary, target)


# ---------------------------------------------------------------------------------------------- training

# Settings with which an unfinished run may go on although they differ. The contents of the four paths are compared
# instead, except the tokenizer's.
MAY_CHANGE = {
    "output",
    "micro_batch_tokens",
    "gradient_checkpointing",
    "save_steps",
    "start_tolerance",
    "report_to",
    "model",
    "tokenizer",
    "input",
    "validation",
}


def train(compute_loss, config, dataset_class, **method):
    """Train `config.model` and write a checkpoint directory; go on where an unfinished run has left a resume point.

    Args:
        compute_loss: (logps, batch) -> losses (N,). `logps` are the summed response log-probabilities of the
            batch's rows: (2N,) for pairs, chosen then rejected, (N,) for chats. Losses are averaged over the
            global batch with the data set's weights.
        config: TrainingConfig
        dataset_class: data_utils.PairDataset or ChatDataset
        method: the loss and its hyperparameters, to be recorded in training.json

    Raises StageError for bad data, a loss that is not finite (with the batch's prompt ids), stored
    log-probabilities that are not this model's, an unfinished run with other settings, or a full disk.
    """
    Trainer(compute_loss, config, dataset_class, method).run()


def check_output(config):
    """Raise StageError unless --output is new or what an unfinished run left: that will go on or be replaced."""
    output = Path(config.output)
    if (output / "DONE").exists():
        raise StageError(f"{output} is complete (it has a DONE marker); remove it or choose another --output")
    if output.exists() and any(output.iterdir()) and not (output / "metrics.jsonl").exists():
        raise StageError(f"{output} exists and is not a training run's; choose another --output")
    for path in filter(None, (resolve_model(config.model), config.tokenizer, config.input, config.validation)):
        path = Path(path).resolve()
        if output.resolve() in (path, *path.parents):
            raise StageError(f"--output {output} would replace {path}, which training reads; choose another --output")


class Trainer:
    """The state of one training run; `train` is its interface."""

    def __init__(self, compute_loss, config, dataset_class, method=None):
        self.compute_loss, self.config = compute_loss, config
        self.settings = (method or {}) | dataclasses.asdict(config)
        self.output = Path(config.output)
        check_output(config)
        check_input(config.input)
        if config.validation:
            check_input(config.validation)
        self.tokenizer = load_tokenizer(config.model, config.tokenizer)
        self.accelerator = start_accelerator(
            config.seed, log_with=config.trackers() or None, project_dir=self.output / "tensorboard"
        )
        self.made_with = self.what_the_result_depends_on()
        resumed = self.find_resume_point()
        vocab_size = vocabulary_size(config.model)
        load = lambda path: dataset_class(path, self.tokenizer, config.max_length, vocab_size)  # noqa: E731
        self.data, self.validation = load(config.input), load(config.validation) if config.validation else None
        model = load_model(config.model, config.from_config, config.gradient_checkpointing)
        # Tied weights are one parameter with two names in a state dict; the file should hold it once.
        self.tied = list(getattr(model, "_tied_weights_keys", None) or ()) if model.config.tie_word_embeddings else []
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=config.weight_decay, fused=True)
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        self.steps_per_epoch = math.ceil(len(self.data) / config.global_batch_size)
        self.total_steps = self.steps_per_epoch * config.num_epochs
        self.start_step = 0
        self.best = None  # {"step", "validation_loss"}
        self.first_loss = None  # of methods without stored log-probabilities
        self.accelerator.wait_for_everyone()  # all have seen what is there
        if resumed:
            self.resume(resumed)
        elif self.accelerator.is_main_process:
            self.output.mkdir(parents=True, exist_ok=True)
            for path in self.output.iterdir():  # what a run left that did not finish
                if path.is_dir():
                    shutil.rmtree(path)
                elif path.name != "metrics.jsonl":  # by which `check_output` knows the directory
                    path.unlink()
            self.metrics_file = open(self.output / "metrics.jsonl", "w", encoding="utf-8")
        if config.trackers():
            self.accelerator.init_trackers(
                "comal",
                init_kwargs={
                    "tensorboard": {"purge_step": self.start_step + 1},
                    "wandb": {"name": str(self.output), "config": self.settings},
                },
            )
        self.describe()

    def describe(self):
        """Print settings, batch arithmetic and versions; keep them in training.json."""
        import accelerate
        import transformers

        config, accelerator = self.config, self.accelerator
        commit = subprocess.run(
            ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=Path(__file__).parent
        ).stdout.strip()
        versions = {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "accelerate": accelerate.__version__,
            "commit": commit or "unknown",
        }
        log.info("settings: %s", ", ".join(f"{name} {value}" for name, value in self.settings.items()))
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
            write_text(self.output / "training.json", json.dumps(self.settings | versions, indent=2) + "\n")

    def what_the_result_depends_on(self):
        """Settings and fingerprints of all files, as JSON has them."""
        config = self.config
        made_with = {name: value for name, value in self.settings.items() if name not in MAY_CHANGE}
        made_with["precision"] = self.accelerator.mixed_precision
        made_with["launched"] = self.accelerator.distributed_type.value
        for name, path in (("input", config.input), ("validation", config.validation)):
            if path:
                made_with[f"contents of --{name}"] = fingerprint(Path(path))
        return made_with | {"contents of --model": model_fingerprint(resolve_model(config.model))}

    def resume_points(self):
        """{step: the file that is written last} of the complete resume points."""
        return {
            int(path.parent.name.removeprefix("resume-")): path for path in self.output.glob("resume-*/progress.json")
        }

    def find_resume_point(self):
        """What the newest resume point recorded, or None. Raises StageError where this run cannot go on there."""
        points = self.resume_points()
        if not points:
            return None
        progress = json.loads(points[max(points)].read_text())
        check_fingerprint(self.output, "an unfinished run", progress["made_with"], self.made_with)
        return progress

    def resume(self, progress):
        """Go back to a resume point, in the directory too."""
        self.start_step, self.best, self.first_loss = (progress[name] for name in ("step", "best", "first_loss"))
        if self.accelerator.is_main_process:
            if self.selects_best and self.best and not self.best_weights().exists():
                move_directory(self.output / "model", self.best_weights())  # it was about to finish
            self.tidy(self.start_step)
            end = 0
            with open(self.output / "metrics.jsonl", "r+b") as file:
                for line in file:
                    if not line.endswith(b"\n") or json.loads(line)["step"] > self.start_step:
                        break
                    end += len(line)
                file.truncate(end)
            self.metrics_file = open(self.output / "metrics.jsonl", "a", encoding="utf-8")
        self.accelerator.load_state(self.output / f"resume-{self.start_step}")
        log.info("resuming after step %d of %d", self.start_step, self.total_steps)

    @property
    def selects_best(self):
        return self.validation is not None and self.config.select == "best"

    def best_weights(self):
        return self.output / f"best-{self.best['step']}"

    def tidy(self, step=None):
        """Remove what is temporary, the resume points but that of `step`, and all weights that are not the best."""
        keep = {f"resume-{step}"} | ({self.best_weights().name} if self.best else set())
        for pattern in ("*.tmp", "resume-*", "best-*"):  # in this order: a resume point needs its best weights
            for path in self.output.glob(pattern):
                if path.is_file():
                    path.unlink()
                elif path.name not in keep:
                    (path / "progress.json").unlink(missing_ok=True)  # first: half a resume point is none
                    shutil.rmtree(path)

    def run(self):
        self.started = time.monotonic()
        for step in range(self.start_step, self.total_steps):
            epoch, position = divmod(step, self.steps_per_epoch)
            size = self.config.global_batch_size
            self.update(step, self.order(epoch)[position * size : (position + 1) * size])
            done = step + 1
            improved = False
            if self.validation and (position + 1 == self.steps_per_epoch or done % self.config.eval_steps == 0):
                improved = self.validate(done) and self.selects_best
            if improved:
                self.save(self.best_weights().name)
            if self.config.save_steps:
                # The best weights need a resume point that knows them.
                if done < self.total_steps and (improved or done % self.config.save_steps == 0):
                    self.save_resume_point(done)
            elif improved and self.accelerator.is_main_process:
                self.tidy()
        if not self.selects_best:
            self.save("model")
        if self.config.keep_last:
            self.save("last")
        if self.accelerator.is_main_process:
            self.metrics_file.close()
            if self.selects_best:
                move_directory(self.best_weights(), self.output / "model")
            summary = {"updates": self.total_steps} | ({"best": self.best} if self.validation else {})
            write_text(self.output / "DONE", dump_json(summary) + "\n")
            self.tidy()
            log.info("%s complete: %s", self.output, dump_json(summary))
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()

    def order(self, epoch):
        """The example indices of an epoch: a function of seed and epoch alone."""
        if not self.config.shuffle:
            return list(range(len(self.data)))
        generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + epoch)
        return torch.randperm(len(self.data), generator=generator).tolist()

    def learning_rate(self, step):
        """Linear from 0 to the peak during warm-up, then linear to 0."""
        warmup = math.ceil(self.config.warmup_ratio * self.total_steps)
        if step < warmup:
            return self.config.learning_rate * (step + 1) / warmup
        return self.config.learning_rate * (self.total_steps - step) / max(1, self.total_steps - warmup)

    def update(self, step, indices):
        """One optimiser step on a global batch."""
        self.model.train()
        began, rate = time.monotonic(), self.learning_rate(step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        metrics = self.run_batch(self.data, indices, backward=True)
        if not math.isfinite(metrics["loss"]):
            raise StageError(
                f"loss {metrics['loss']} at step {step + 1}; prompt ids of the batch: "
                + ", ".join(self.data.ids[i] for i in indices)
            )
        if step == 0:
            self.check_start(metrics)
        if self.config.max_grad_norm > 0:
            metrics["grad_norm"] = float(
                self.accelerator.clip_grad_norm_(self.model.parameters(), self.config.max_grad_norm)
            )
        self.optimizer.step()
        self.optimizer.zero_grad()
        now = time.monotonic()
        metrics["learning_rate"] = rate
        metrics["tokens_per_s"] = metrics.pop("tokens") / (now - began)
        remaining = (now - self.started) / (step + 1 - self.start_step) * (self.total_steps - step - 1)
        self.report(step + 1, metrics, remaining)

    def run_batch(self, dataset, indices, backward):
        """Mean loss and metrics over examples dealt to all processes; with gradients when `backward`."""
        weights = [dataset.weights[i] for i in indices]
        normaliser = sum(weights)
        if not normaliser > 0:
            raise StageError(f"{dataset.path}: all examples of a batch have weight 0")
        weight_of = dict(zip(indices, weights))
        sums = {}
        batches = micro_batches(indices, dataset.lengths, self.config.micro_batch_tokens)
        for mine, counts in local_batches(batches, self.accelerator):
            batch = on_device(dataset.collate([dataset[i] for i in mine]), self.accelerator.device)
            weight = torch.tensor([weight_of[i] * counts for i in mine], device=self.accelerator.device)
            with torch.set_grad_enabled(backward):
                logps = response_logps(self.model, batch["rows"], self.accelerator.device)
                losses = self.compute_loss(logps, batch)  # (N,)
                loss = (losses * weight).sum() / normaliser
            if backward:
                # Gradients are averaged over processes; the loss is a sum over them.
                self.accelerator.backward(loss * self.accelerator.num_processes)
            with torch.no_grad():
                tokens = sum(dataset.lengths[i] for i in mine)
                self.add_metrics(sums, logps, losses, weight, batch, tokens, counts)
        metrics = {}
        if "start_difference" in sums:
            metrics["start_difference"] = self.accelerator.gather(sums.pop("start_difference").reshape(1)).max().item()
        names = sorted(sums)  # the same on every process: they depend on the method alone
        totals = dict(zip(names, self.accelerator.reduce(torch.stack([sums[n] for n in names]), "sum").tolist()))
        metrics["tokens"] = totals.pop("tokens")
        metrics["loss"] = totals.pop("loss") / normaliser
        self.first_loss = self.first_loss or metrics["loss"]
        initial = totals.pop("untouched") / normaliser if "untouched" in totals else self.first_loss
        metrics["normalised_loss"] = metrics["loss"] / max(initial, 1e-12)  # 0 only if every soft label is 1/2
        count = totals.pop("count")
        return metrics | {name: total / count for name, total in totals.items()}

    def add_metrics(self, sums, logps, losses, weight, batch, tokens, counts):
        """Add one micro-batch's sums of losses and metrics. Margin and KL estimates are in nats a response."""
        values = {
            "loss": (losses * weight).sum(),
            "count": torch.tensor(float(len(losses)) * counts),
            "tokens": torch.tensor(float(tokens) * counts),
        }
        if "last_chosen_logps" in batch:
            last = torch.cat([batch["last_chosen_logps"], batch["last_rejected_logps"]])  # (2N,)
            ref = torch.cat([batch["ref_chosen_logps"], batch["ref_rejected_logps"]])
            chosen, rejected = (logps - last).chunk(2)
            values |= {
                "untouched": (self.compute_loss(last, batch) * weight).sum(),  # what the last policy's loss would be
                "margin": (chosen - rejected).sum() * counts,  # 0 before training
                "accuracy": (chosen > rejected).float().sum() * counts,
                # Responses were drawn from the last policy: this is an unbiased estimate of KL(last || policy) ...
                "kl_last": (last - logps).sum() / 2 * counts,
                # ... and this takes them for the policy's own: an estimate of KL(policy || reference).
                "kl_ref": (logps - ref).sum() / 2 * counts,
            }
            difference = (logps - last).abs().max()
            sums["start_difference"] = torch.maximum(sums.get("start_difference", difference), difference)
        for name, value in values.items():
            sums[name] = sums.get(name, 0) + value.to(logps.device).double()

    def check_start(self, metrics):
        """Before the first update the model must be the last policy of the data file."""
        if "start_difference" not in metrics:
            return
        off = metrics["start_difference"]
        default = 3.0 if self.accelerator.mixed_precision == "bf16" else 0.05
        tolerance = self.config.start_tolerance or default
        log.info(
            "untouched policy: stored log-probabilities are off by at most %.2e nats, "
            "the normalised loss differs from 1 by %.2e",
            off,
            abs(metrics["normalised_loss"] - 1),
        )
        if not off <= tolerance:
            raise StageError(
                f"{self.config.input}: the last policy's stored log-probabilities differ from those of "
                f"{self.config.model} by up to {off:.3g} nats (allowed: {tolerance}); was the file made "
                "with another model or precision? Run get_logprobs.py again, launched as training is"
            )

    def report(self, step, metrics, remaining):
        """One line on the terminal and one JSON line in metrics.jsonl."""
        if not self.accelerator.is_main_process:
            return
        metrics.pop("start_difference", None)
        self.write_metrics({"step": step} | metrics)
        width = len(str(self.total_steps))
        parts = [
            f"step {step:0{width}}/{self.total_steps}",
            f"loss {metrics['loss']:.4g}",
            f"rel {metrics['normalised_loss']:.4f}",
        ]
        if "margin" in metrics:
            parts += [
                f"margin {metrics['margin']:.3g}",
                f"acc {metrics['accuracy']:.2f}",
                f"kl_last {metrics['kl_last']:.3g}",
                f"kl_ref {metrics['kl_ref']:.3g}",
            ]
        minutes, seconds = divmod(int(remaining), 60)
        parts += [
            f"lr {metrics['learning_rate']:.1e}",
            f"tok/s {metrics['tokens_per_s']:,.0f}",
            f"left {minutes // 60}:{minutes % 60:02}:{seconds:02}",
        ]
        print(" | ".join(parts), flush=True)

    def write_metrics(self, record):
        try:
            self.metrics_file.write(dump_json(record) + "\n")
            self.metrics_file.flush()
            self.accelerator.log({name: value for name, value in record.items() if name != "step"}, step=record["step"])
        except OSError as error:
            kept = max(self.resume_points(), default=0)
            raise StageError(
                f"{self.output / 'metrics.jsonl'}: {error.strerror}; free some space and start again: "
                f"all up to update {kept} is kept"
            ) from None

    def validate(self, step):
        """Report the mean loss over the validation data; return whether it is the lowest so far."""
        self.model.eval()
        began = time.monotonic()
        metrics = self.run_batch(self.validation, list(range(len(self.validation))), backward=False)
        metrics.pop("start_difference", None)
        metrics["tokens_per_s"] = metrics.pop("tokens") / (time.monotonic() - began)
        if not math.isfinite(metrics["loss"]):
            raise StageError(f"validation loss {metrics['loss']} after step {step}")
        best = self.best is None or metrics["loss"] < self.best["validation_loss"]
        if self.accelerator.is_main_process:
            self.write_metrics({"step": step} | {f"validation_{k}": v for k, v in metrics.items()})
            print(
                f"validation after step {step}: loss {metrics['loss']:.4g} | rel {metrics['normalised_loss']:.4f}"
                + " | lowest so far" * best,
                flush=True,
            )
        if best:
            self.best = {"step": step, "validation_loss": metrics["loss"]}
        return best

    def save(self, name):
        """Write weights, config and tokenizer to output/name, complete or not at all."""
        state = self.accelerator.get_state_dict(self.model)
        with self.saving(name) as temporary:
            if self.accelerator.is_main_process:
                model = self.accelerator.unwrap_model(self.model)
                model.save_pretrained(temporary, state_dict={k: v for k, v in state.items() if k not in self.tied})
                self.tokenizer.save_pretrained(temporary)

    def save_resume_point(self, step):
        """Write all that is needed to go on behind `step` to output/resume-STEP, then remove what was needed before."""
        with self.saving(f"resume-{step}") as temporary:
            self.accelerator.save_state(temporary)
            if self.accelerator.is_main_process:
                sync(self.output / "metrics.jsonl")
                progress = {"step": step, "best": self.best, "first_loss": self.first_loss, "made_with": self.made_with}
                (temporary / "progress.json").write_text(dump_json(progress) + "\n", encoding="utf-8")
        if self.accelerator.is_main_process:
            self.tidy(step)

    @contextlib.contextmanager
    def saving(self, name):
        """A temporary directory that becomes output/name when all processes have ended the block.

        Raises StageError when it cannot be written, most likely for want of space.
        """
        from safetensors import SafetensorError
        from torch.distributed.checkpoint.api import CheckpointException

        temporary = self.output / f"{name.partition('-')[0]}.tmp"
        try:
            yield temporary
            self.accelerator.wait_for_everyone()
            if self.accelerator.is_main_process:
                publish(temporary, self.output / name)
        except (OSError, RuntimeError, SafetensorError, CheckpointException) as error:
            if isinstance(error, CheckpointException):
                error = next(iter(error.failures.values()))[0]
            reason = first_line(error)
            free = shutil.disk_usage(self.output).free / 2**20
            shutil.rmtree(temporary, ignore_errors=True)
            kept = max(self.resume_points(), default=0)
            raise StageError(
                f"{self.output / name} could not be saved: {reason} ({free:,.1f} MiB free there); free some "
                f"space and start again: all up to update {kept} is kept"
            ) from None
        self.accelerator.wait_for_everyone()
