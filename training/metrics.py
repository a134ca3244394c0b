"""What is measured in training: metrics.jsonl, the trackers, and a line on the terminal.

metrics.jsonl has a line for each update, with its figures over the whole global batch:

    step, loss, learning_rate, tokens_per_s
    normalised_loss    the loss over that of the initial policy on the same batch, as the stored log-probabilities give
                       it; without those, over the run's first loss
    grad_norm          where gradients are clipped, before it
    margin             of pairs: how much further log pi(chosen) has risen than log pi(rejected) since the last policy,
                       in nats; TRL's `rewards/margins`, but for its factor beta, with the last policy as the reference
    accuracy           of pairs: how often the margin is positive, TRL's `rewards/accuracies`
    kl_last, kl_ref    of pairs: estimates of KL(last || policy) and KL(policy || reference), in nats a response

and one for each validation: `step`, and the same figures named `validation_loss` and so on.
"""

import json
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from training.checkpoints import disk_error
from utils import dump_json


def stored_logps(batch: dict) -> tuple[Tensor, Tensor]:
    """(2N,) log-probabilities of pairs under the last policy and the reference, chosen first."""
    return tuple(
        torch.cat([batch[f"{model}_{side}_logps"] for side in ("chosen", "rejected")]) for model in ("last", "ref")
    )


def pair_sums(logps: Tensor, last: Tensor, ref: Tensor) -> dict[str, Tensor]:
    """The metrics of pairs, summed over them, in nats; all arguments (2N,), chosen first."""
    chosen, rejected = (logps - last).chunk(2)
    return {
        "margin": (chosen - rejected).sum(),  # 0 before training
        "accuracy": (chosen > rejected).float().sum(),
        # Responses were drawn from the last policy: this is an unbiased estimate of KL(last || policy) ...
        "kl_last": (last - logps).sum() / 2,
        # ... and this takes them for the policy's own: an estimate of KL(policy || reference).
        "kl_ref": (logps - ref).sum() / 2,
    }


class Metrics:
    """metrics.jsonl, the trackers and the lines on the terminal, all by the first process.

    Args:
        step: of the resume point where the run goes on, or 0; what is noted of later ones is removed.
    """

    def __init__(self, output: Path, accelerator: Accelerator, trackers: list[str], settings: dict, step: int):
        self.path, self.accelerator = output / "metrics.jsonl", accelerator
        if accelerator.is_main_process:
            if step:
                self.cut(step)
            else:
                self.path.write_bytes(b"")
        if trackers:
            own = {"tensorboard": {"purge_step": step + 1}, "wandb": {"name": str(output), "config": settings}}
            accelerator.init_trackers("comal", init_kwargs=own)

    def cut(self, step: int) -> None:
        """Remove the lines after that of update `step`, also one that was being written."""
        end = 0
        with open(self.path, "r+b") as file:
            for line in file:
                if not line.endswith(b"\n") or json.loads(line)["step"] > step:
                    break
                end += len(line)
            file.truncate(end)

    def write(self, step: int, figures: dict, line: str) -> None:
        """Note the figures after update `step`, and print the line. Raises StageError when the disk is full."""
        if not self.accelerator.is_main_process:
            return
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(dump_json({"step": step} | figures) + "\n")
            self.accelerator.log(figures, step=step)
        except OSError as error:
            raise disk_error(self.path.parent, f"{self.path}: {error.strerror}") from None
        print(line, flush=True)


def update_line(step: int, total_steps: int, metrics: dict, seconds_left: float) -> str:
    """An update's figures for the terminal."""
    form = "loss {loss:.4g} | normalised_loss {normalised_loss:.4f}"
    if "margin" in metrics:
        form += " | margin {margin:.3g} | acc {accuracy:.2f} | kl_last {kl_last:.3g} | kl_ref {kl_ref:.3g}"
    form += " | lr {learning_rate:.1e} | tok/s {tokens_per_s:,.0f}"
    minutes, seconds = divmod(int(seconds_left), 60)
    left = f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"
    return f"step {step:0{len(str(total_steps))}}/{total_steps} | {form.format_map(metrics)} | left {left}"
