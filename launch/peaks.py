"""The most memory that a stage takes, of this machine and of a GPU: stage.py looks now and then while the stage runs.

The host's memory is the sum over this process's descendants of what cannot be given back: anonymous and shared pages
(RssAnon and RssShmem of /proc/PID/status; a page that several processes share counts in each of them). Pages of files,
such as weights that are mapped, are the kernel's to drop, and do not count. These figures cost some milliseconds; PSS
(smaps_rollup) would cost a walk over all pages, much work where models fill a hundred gigabytes.

A GPU's memory is what nvidia-smi calls used, also by others; of the stage's GPUs the fullest one counts.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import time

HOST_SECONDS, GPU_SECONDS = 1, 2  # between two looks
SHARE = 50  # a look at the host's memory takes at most one part in so many of a core, however many processes there are


def parents() -> dict[int, int]:
    """{pid: pid of its parent} of all processes."""
    found = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError, ValueError, IndexError), open(f"/proc/{entry}/stat", "rb") as file:
                found[int(entry)] = int(file.read().rpartition(b")")[2].split()[1])
    return found


def descendants(pid: int) -> list[int]:
    children: dict[int, list[int]] = {}
    for child, parent in parents().items():
        children.setdefault(parent, []).append(child)
    found = list(children.get(pid, []))
    for child in found:  # the list grows on the way
        found += children.get(child, [])
    return found


def resident(pid: int) -> int:
    """KiB of anonymous and shared memory of a process; 0 when it has ended."""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/status", encoding="utf-8", errors="replace") as file:
        return sum(map(int, re.findall(r"^Rss(?:Anon|Shmem):\s+(\d+) kB$", file.read(), re.MULTILINE)))
    return 0


class Peaks:
    """The highest figures seen so far.

    Args:
        gpus: which ones are looked at, in comal.sh's words: auto (those of CUDA_VISIBLE_DEVICES, else all), none, or
            numbers as nvidia-smi shows them
    """

    def __init__(self, gpus: str):
        self.host, self.gpu, self.gpu_total, self.next_look, self.smi, self.unread = 0, 0, 0, 0.0, None, b""
        chosen = os.environ.get("CUDA_VISIBLE_DEVICES") if gpus == "auto" else gpus
        if chosen in ("", "none"):
            return
        command = ["nvidia-smi", *(["-i", chosen] if chosen else []), "-l", str(GPU_SECONDS)]
        command += ["--query-gpu=memory.used,memory.total", "--format=csv,noheader,nounits"]
        with contextlib.suppress(OSError):  # no driver, no GPU
            self.smi = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
            )
            os.set_blocking(self.smi.stdout.fileno(), False)

    def look(self) -> None:
        """Look, unless it is too early for that."""
        if time.monotonic() < self.next_look:
            return
        began = time.monotonic()
        self.host = max(self.host, sum(map(resident, descendants(os.getpid()))))
        self.next_look = began + max(HOST_SECONDS, SHARE * (time.monotonic() - began))
        self.read_smi()

    def read_smi(self) -> None:
        """Take the lines `used, total` (MiB) that nvidia-smi has printed since."""
        if not self.smi:
            return
        with contextlib.suppress(OSError):
            *lines, self.unread = (self.unread + (self.smi.stdout.read() or b"")).split(b"\n")
            for line in lines:
                if match := re.fullmatch(rb"\s*(\d+), *(\d+)\s*", line):
                    self.gpu, self.gpu_total = max((self.gpu, self.gpu_total), (int(match[1]), int(match[2])))

    def figures(self) -> dict[str, int]:
        """MiB: host_mib; and gpu_mib of gpu_total_mib, where there is a GPU."""
        self.read_smi()
        found = {"host_mib": round(self.host / 1024)}
        return found | ({"gpu_mib": self.gpu, "gpu_total_mib": self.gpu_total} if self.gpu_total else {})
