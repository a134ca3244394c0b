"""What a training run leaves in its output directory, and how an unfinished one goes on.

    model/             the weights that were selected, config and tokenizer, in Hugging Face format
    last/              the final ones beside the best, where --keep_last asks for them
    DONE               the last thing that is written: {"updates"} and, with validation data, {"best"}
    best-STEP/         until then the weights of the lowest validation loss so far
    resume-STEP/       and all that is needed to go on after that update; `progress.json` in it is written last

A directory is written as *.tmp and renamed when all of it is on disk, so whatever has its name is complete.

Resume points are written by elapsed time, as they take gigabytes and an update may take a second or a minute. SIGUSR1
asks for one after the update that is being made, and ends the run: so a scheduler's time limit costs no update. Clocks
differ and a signal may reach one process before another, so the processes agree after every update (`Checkpoints.due`).
"""

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate import Accelerator

from data_utils import model_fingerprint
from utils import StageError, dump_json, fingerprint, first_line, log, sync, write_text
from workers.journal import check_fingerprint

# Settings with which an unfinished run may go on although they differ. Instead of the paths, the contents of those that
# are read are compared, except the tokenizer's.
MAY_CHANGE = {
    "micro_batch_tokens",
    "sharding",
    "gradient_checkpointing",
    "save_minutes",
    "start_tolerance",
    "report_to",
}
PATHS = {"output", "model", "tokenizer", "input", "validation"}


def check_output(output: Path) -> None:
    """Raise StageError unless `output` is new or what an unfinished run left: that will go on or be replaced."""
    if (output / "DONE").exists():
        raise StageError(f"{output} is complete (it has a DONE marker); remove it or choose another --output")
    if output.exists() and any(output.iterdir()) and not (output / "metrics.jsonl").exists():
        raise StageError(f"{output} exists and is not a training run's; choose another --output")


def check_apart(output: Path, *paths: str) -> None:
    """Raise StageError where `output`, which may be replaced, is or holds one of the paths; empty ones are skipped."""
    for path in (Path(path).resolve() for path in paths if path):
        if output.resolve() in (path, *path.parents):
            raise StageError(f"--output {output} would replace {path}, which training reads; choose another --output")


# ---------------------------------------------------------------------------------------------- unfinished runs


@dataclasses.dataclass
class Progress:
    """How far a run has come.

    Attributes:
        step: updates done.
        best: {"step", "validation_loss"} of the lowest validation loss so far, or None.
        first_loss: of the first update; what normalises the loss of methods without stored log-probabilities.
    """

    step: int = 0
    best: dict | None = None
    first_loss: float | None = None


def run_fingerprint(settings: dict, model_dir: str, accelerator: Accelerator) -> dict:
    """{setting: value} of all that a run's result depends on, files by the fingerprints of their contents."""
    depends_on = {name: value for name, value in settings.items() if name not in MAY_CHANGE | PATHS}
    depends_on["precision"] = accelerator.mixed_precision
    depends_on["launched"] = accelerator.distributed_type.value
    for name in ("input", "validation"):
        if settings[name]:
            depends_on[f"contents of --{name}"] = fingerprint(Path(settings[name]))
    return depends_on | {"contents of --model": model_fingerprint(model_dir)}


def resume_points(output: Path) -> dict[int, Path]:
    """{step: its progress.json} of the complete resume points."""
    return {int(path.parent.name.removeprefix("resume-")): path for path in output.glob("resume-*/progress.json")}


def find_progress(output: Path, run: dict) -> Progress:
    """What the newest resume point recorded, or a new Progress. Raises StageError where `run`, the fingerprint of this
    run, is not that of the unfinished one."""
    points = resume_points(output)
    if not points:
        return Progress()
    recorded = json.loads(points[max(points)].read_text())
    check_fingerprint(output, "an unfinished run", recorded.pop("fingerprint", {}), run)
    return Progress(**recorded)


def note_changes(path: Path, now: dict) -> None:
    """Say what a run that goes on does otherwise than its training.json says, where only the order of sums depends on
    it."""
    then = now | json.loads(path.read_text(encoding="utf-8")) if path.exists() else now
    names = [name for name in ("processes", "micro_batch_tokens", "sharding") if then[name] != now[name]]
    if names:
        changes = ", ".join(f"{name} {then[name]} then, {now[name]} now" for name in names)
        log.warning("WARNING: %s; sums are rounded otherwise than in a run that was not stopped", changes)


def disk_error(output: Path, what: str) -> StageError:
    """The error for a file that could not be written, which says how to go on."""
    kept = max(resume_points(output), default=0)
    return StageError(f"{what}; free some space and start again: all up to update {kept} is kept")


# ---------------------------------------------------------------------------------------------- checkpoints


class Checkpoints:
    """The weights and resume points of one run.

    Args:
        config: TrainingConfig
        accelerator: that has prepared `model`
        model, tokenizer: what is saved
        fingerprint: of the run, see `run_fingerprint`
        progress: the training loop's own, which it keeps up to date
    """

    def __init__(
        self, config, accelerator: Accelerator, model: torch.nn.Module, tokenizer, fingerprint: dict, progress: Progress
    ):
        self.config, self.output, self.fingerprint, self.progress = config, Path(config.output), fingerprint, progress
        self.accelerator, self.model, self.tokenizer = accelerator, model, tokenizer
        self.selects_best = bool(config.validation) and config.select == "best"
        self.told_to_stop, self.saved_at = False, time.monotonic()

    def begin(self) -> None:
        """Bring the output directory, and where a run goes on also model and optimiser, to where the progress says."""
        self.accelerator.wait_for_everyone()  # all have seen what is there
        if self.accelerator.is_main_process:
            self.output.mkdir(parents=True, exist_ok=True)
            if self.progress.step:
                if self.selects_best and self.progress.best and not self.best_weights().exists():
                    move_directory(self.output / "model", self.best_weights())  # it was about to finish
                self.tidy(self.progress.step)
            else:
                for path in self.output.iterdir():  # what a run left that did not finish
                    if path.is_dir():
                        shutil.rmtree(path)
                    elif path.name != "metrics.jsonl":  # by which `check_output` knows the directory
                        path.unlink()
        if self.progress.step:
            self.accelerator.load_state(self.output / f"resume-{self.progress.step}")
        if self.config.save_minutes:
            signal.signal(signal.SIGUSR1, self.stop_soon)
        self.saved_at = time.monotonic()

    def stop_soon(self, number, frame) -> None:
        """On a signal: end after this update, with a resume point."""
        self.told_to_stop = True

    def due(self) -> tuple[bool, bool]:
        """Whether it is time for a resume point, by the first process's clock, and whether any process was told to
        stop: the same answer in all processes."""
        minutes = (time.monotonic() - self.saved_at) / 60
        on_time = self.accelerator.is_main_process and 0 < self.config.save_minutes <= minutes
        flags = torch.tensor([float(on_time), float(self.told_to_stop)], device=self.accelerator.device)
        on_time, told = (count > 0 for count in self.accelerator.reduce(flags, "sum").tolist())
        return on_time, told

    def keep(self, improved: bool, finished: bool) -> None:
        """Save what is due after an update, where the validation loss has `improved` to the lowest so far, and the run
        is `finished` or not. Raises StageError in all processes where one was told to stop and updates are left."""
        improved = improved and self.selects_best
        if improved:
            self.save(self.best_weights().name)
        on_time, told = self.due()
        if self.config.save_minutes:
            # The best weights need a resume point that knows them.
            if not finished and (improved or on_time or told):
                self.save_resume_point()
        elif improved and self.accelerator.is_main_process:
            self.tidy()
        if told and not finished:
            self.accelerator.wait_for_everyone()  # the launcher kills the others when one has ended
            raise StageError(
                f"told to stop (SIGUSR1): {self.output} has a resume point after update {self.progress.step}; the same "
                "command goes on there"
            )

    def finish(self) -> None:
        """Give the selected weights their name, write the DONE marker and remove what is temporary."""
        if not self.selects_best:
            self.save("model")
        if self.config.keep_last:
            self.save("last")
        if self.accelerator.is_main_process:
            if self.selects_best:
                move_directory(self.best_weights(), self.output / "model")
            summary = {"updates": self.progress.step} | ({"best": self.progress.best} if self.config.validation else {})
            write_text(self.output / "DONE", dump_json(summary) + "\n")
            self.tidy()
            log.info("%s complete: %s", self.output, dump_json(summary))
        self.accelerator.wait_for_everyone()

    def best_weights(self) -> Path:
        assert self.progress.best is not None
        return self.output / f"best-{self.progress.best['step']}"

    def tidy(self, step: int | None = None) -> None:
        """Remove what is temporary, the resume points but that of `step`, and all weights that are not the best."""
        keep = {f"resume-{step}"} | ({self.best_weights().name} if self.progress.best else set())
        for pattern in ("*.tmp", "resume-*", "best-*"):  # in this order: a resume point needs its best weights
            for path in self.output.glob(pattern):
                if path.is_file():
                    path.unlink()
                elif path.name not in keep:
                    (path / "progress.json").unlink(missing_ok=True)  # first: half a resume point is none
                    shutil.rmtree(path)

    def save(self, name: str) -> None:
        """Write weights, config and tokenizer to output/name, complete or not at all."""
        state = self.accelerator.get_state_dict(self.model)
        with self.saving(name) as temporary:
            if self.accelerator.is_main_process:
                model = self.accelerator.unwrap_model(self.model)
                # Tied weights are one parameter with two names in a state dict; the file should hold it once.
                tied = (getattr(model, "_tied_weights_keys", None) or ()) if model.config.tie_word_embeddings else ()
                model.save_pretrained(temporary, state_dict={k: v for k, v in state.items() if k not in tied})
                self.tokenizer.save_pretrained(temporary)

    def save_resume_point(self) -> None:
        """Write all that is needed to go on from here to output/resume-STEP, then remove what was needed before."""
        with self.saving(f"resume-{self.progress.step}") as temporary:
            self.accelerator.save_state(temporary)
            if self.accelerator.is_main_process:
                sync(self.output / "metrics.jsonl")
                recorded = dataclasses.asdict(self.progress) | {"fingerprint": self.fingerprint}
                (temporary / "progress.json").write_text(dump_json(recorded) + "\n", encoding="utf-8")
        if self.accelerator.is_main_process:
            self.tidy(self.progress.step)
        self.saved_at = time.monotonic()

    @contextlib.contextmanager
    def saving(self, name: str) -> Iterator[Path]:
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
            free = shutil.disk_usage(self.output).free / 2**20
            shutil.rmtree(temporary, ignore_errors=True)
            what = f"{self.output / name} could not be saved: {first_line(error)} ({free:,.1f} MiB free there)"
            raise disk_error(self.output, what) from None
        self.accelerator.wait_for_everyone()


def move_directory(source: Path, target: Path) -> None:
    """Rename a directory, for good, in place of what `target` was."""
    shutil.rmtree(target, ignore_errors=True)
    os.replace(source, target)
    sync(target.parent)


def publish(temporary: Path, target: Path) -> None:
    """Give a directory that was written its name, once all of it is on disk with the usual permissions (safetensors
    leaves its files to their owner alone)."""
    umask = os.umask(0)
    os.umask(umask)
    for path in [*temporary.rglob("*"), temporary]:
        if path.is_file():
            path.chmod(0o666 & ~umask)
        sync(path)
    move_directory(temporary, target)
