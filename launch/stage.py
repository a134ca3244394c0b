"""Run one stage for comal.sh: its output goes to a log, one live line to the terminal, and no process outlives it.

    python3 launch/stage.py --name sampling --where "iteration 0 of 12" --log exps/x/iter0/logs/sampling.log \\
        --times exps/x/iter0/logs/times.jsonl --journal exps/x/logs/comal.log --gpus auto --parent $$ -- COMMAND...

The log is appended to: each run begins with a line that has the time and the command. After a success the seconds and
the most memory that it took (peaks.py) go to the file --times. At a failure the end of the log is shown, and the exit
code is 1. --show leaves what the command prints to the caller and --quiet shows nothing; then the exit code is the
command's, or 128 + N where signal N ended it. 128 + N is also the exit code where signal N ended this process.

No process of a stage outlives it, in whatever way it ends:
- The stage ends, by itself or killed, and leaves processes in whatever group or session: they become children of this
  process, which has asked the kernel for that (PR_SET_CHILD_SUBREAPER), and are killed here.
- comal.sh is stopped, or killed with SIGKILL: this process receives SIGTERM, from comal.sh or from the kernel
  (PR_SET_PDEATHSIG), and ends the stage.
- This process is killed with SIGKILL: the kernel kills the stage itself (PR_SET_PDEATHSIG). Its workers, and the
  processes of their engines, end by their own means (workers/), as they do when a stage is run by hand and killed.

SIGUSR1 asks for an end without hurry: it is passed on to the processes of the stage that handle it, which are those of
training (training/checkpoints.py), and they end when a resume point is written. A stage that has none is ended as by
SIGTERM. All processes of a stage begin with SIGUSR1 ignored, since SLURM sends it to every process of a job.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from peaks import Peaks, descendants, parents

SET_PDEATHSIG, SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h
STOPPING_SECONDS = 10  # for a stage to end on SIGTERM, before SIGKILL
TRACKER_SECONDS = 5  # for Python's resource trackers, which remove shared memory and end by themselves
TAIL = 15  # lines of the log that are shown at a failure
# tqdm's bars, with and without a total, and the lines of training's steps.
PROGRESS = re.compile(
    r"^[^|\[]*\d+%\|[^\[]*\[[^\]]*\]|^[^\[]*\d+\w* \[\d[\d:]+, [^\]]*\]|^step \d+/\d+ \|.*|^validation after step .*"
)

received: list[int] = []  # signals


def prctl(option: int, value: int) -> None:
    """Ask the kernel for something that concerns this process; elsewhere than on Linux nothing happens."""
    with contextlib.suppress(OSError, AttributeError):
        LIBC.prctl(option, value)


LIBC = ctypes.CDLL(None)


class Screen:
    """One line of the terminal, or of a file: then it has neither carriage returns nor progress."""

    def __init__(self, name: str, silent: bool):
        self.name, self.silent, self.began = name, silent, time.monotonic()
        self.live, self.shown = sys.stdout.isatty() and not silent, ""
        self.write(f"    {name:16}")

    def write(self, text: str) -> None:
        if not self.silent:
            with contextlib.suppress(OSError):  # nobody reads it any more
                os.write(1, text.encode())

    def update(self, progress: str) -> None:
        if self.live:
            seconds = int(time.monotonic() - self.began)
            line = f"    {self.name:16}{clock(seconds):>7}  {progress}"[: shutil.get_terminal_size().columns - 1]
            if line != self.shown:
                self.write(f"\r{line}\x1b[K")
            self.shown = line

    def end(self, result: str) -> str:
        """Complete the line; returns it."""
        line = f"    {self.name:16}{result:>7}"
        self.write(f"\r{line}\x1b[K\n" if self.live else f"{result:>7}\n")
        return line


def clock(seconds: int) -> str:
    hours, rest = divmod(seconds, 3600)
    return (f"{hours}:" if hours else "") + f"{rest // 60:0{2 if hours else 1}}:{rest % 60:02}"


class Log:
    """A stage's log from the place on where this run began."""

    def __init__(self, path: Path, command: list[str]):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.progress = path, ""
        self.file = open(path, "ab")
        started = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        self.file.write(f"=== {started} {shlex.join(command)}\n".encode())
        self.file.flush()
        self.offset = self.file.tell()

    def read(self, offset: int) -> str:
        with open(self.path, "rb") as file:
            file.seek(offset)
            return file.read().decode("utf-8", "replace")

    def newest_progress(self) -> str:
        """The last progress bar or step of training in it."""
        size = self.path.stat().st_size
        for part in re.split("[\r\n]+", self.read(max(self.offset, size - 4096)))[::-1]:
            if match := PROGRESS.match(part):
                self.progress = match[0].strip()
                break
        return self.progress

    def last_lines(self) -> list[str]:
        """The end of what was printed, without progress."""
        size = self.path.stat().st_size
        lines = [line.split("\r")[-1] for line in self.read(max(self.offset, size - 65536)).split("\n")]
        lines = [PROGRESS.sub("", line).rstrip() for line in lines]
        return [line for line in lines if line][-TAIL:]


# ---------------------------------------------------------------------------------------------- processes


def start(command: list[str], log: Log, show: bool) -> subprocess.Popen:
    """Start the command in a session of its own, with its output in the log."""

    def in_child() -> None:
        prctl(SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it was killed before the kernel was asked
            os._exit(1)
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # bash has it ignored in what it starts with &
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)

    parent = os.getpid()
    seconds = "1" if sys.stdout.isatty() else "30"
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=None if show else log.file,
        stderr=None if show else log.file,
        start_new_session=True,
        preexec_fn=in_child,
        env={"TQDM_MININTERVAL": seconds, **os.environ},
    )


def children() -> list[int]:
    """The living children of this process, those that it inherited included; dead ones are reaped."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    return [pid for pid, parent in parents().items() if parent == os.getpid()]


def ask_to_finish() -> bool:
    """SIGUSR1 to the processes of the stage that handle it; returns whether there are any."""
    asked = False
    for pid in descendants(os.getpid()):
        with contextlib.suppress(OSError), open(f"/proc/{pid}/status", encoding="utf-8") as file:
            handled = int(file.read().partition("SigCgt:")[2].split()[0], 16)  # a bit a signal, the first for signal 1
            if handled >> (signal.SIGUSR1 - 1) & 1:
                os.kill(pid, signal.SIGUSR1)
                asked = True
    return asked


def is_tracker(pid: int) -> bool:
    with contextlib.suppress(OSError), open(f"/proc/{pid}/cmdline", "rb") as file:
        return b"resource_tracker" in file.read()
    return False


def end_all() -> None:
    """Kill what the stage has left. The children of what dies here become children of this process in their turn."""
    patience = time.monotonic() + TRACKER_SECONDS
    while left := children():
        for pid in left:
            if time.monotonic() > patience or not is_tracker(pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)


def watch(child: subprocess.Popen, log: Log, screen: Screen, peaks: Peaks) -> int:
    """Wait for the stage, showing how far it is, or for a signal, which ends it; returns the exit code."""
    asked = None  # when it was asked to end
    while True:
        try:
            code = child.wait(0.2)
            break
        except subprocess.TimeoutExpired:
            screen.update(log.newest_progress() if screen.live else "")
            peaks.look()
        if received and asked is None and not (received[-1] == signal.SIGUSR1 and ask_to_finish()):
            asked = time.monotonic()
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGTERM)
        if asked and time.monotonic() > asked + STOPPING_SECONDS:
            child.kill()
    if received:
        return 128 + received[0]
    return code if code >= 0 else 128 - code


# ---------------------------------------------------------------------------------------------- the command line


def read_arguments() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--name", default="")
    parser.add_argument("--where", default="")
    parser.add_argument("--log", default="/dev/null", type=Path)
    parser.add_argument("--times", default="/dev/null", type=Path)
    parser.add_argument("--journal", type=Path)
    parser.add_argument("--gpus", default="none", help="whose memory is noted")
    parser.add_argument("--parent", required=True, type=int)
    parser.add_argument("--show", action="store_true")
    parser.add_argument("--quiet", action="store_true")
    split = sys.argv.index("--")
    return parser.parse_args(sys.argv[1:split]), sys.argv[split + 1 :]


def main() -> int:
    options, command = read_arguments()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, lambda number, frame: received.append(number))
    prctl(SET_CHILD_SUBREAPER, 1)
    prctl(SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != options.parent:
        return 1
    log, began = Log(options.log, command), time.monotonic()
    screen, peaks = Screen(options.name, options.quiet or options.show), Peaks(options.gpus)
    try:
        code = watch(start(command, log, options.show), log, screen, peaks)
    except OSError as error:
        log.file.write(f"{error}\n".encode())
        log.file.flush()
        code = 127
    finally:
        end_all()
    if screen.silent:
        return code
    seconds = time.monotonic() - began
    lines = [screen.end(clock(round(seconds)) if code == 0 else "stopped" if received else "failed")]
    if code == 0:
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        record = {"stage": options.name, "seconds": round(seconds, 1), "ended": now} | peaks.figures()
        append(options.times, [json.dumps(record)])
    elif not received:
        lines += failure(options, code, log)
        code = 1
    if options.journal:
        append(options.journal, lines)
    return code


def failure(options: argparse.Namespace, code: int, log: Log) -> list[str]:
    """Say where it failed, with the end of the log and what to do; returns what the journal keeps of it."""
    where = f"{options.where}, stage {options.name}"
    message = f"comal.sh: {where} failed with exit code {code}. Its log, {log.path}, ends:"
    hint = (
        "Nothing was run after it. Once the cause is mended, the same command goes on here; where a setting has to "
        "change, take another NAME."
    )
    shown = [f"    | {line}" for line in log.last_lines()]
    with contextlib.suppress(OSError):
        os.write(2, "\n".join([message, *shown, hint, ""]).encode())
    return [message]


def append(path: Path, lines: list[str]) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    sys.exit(main())
