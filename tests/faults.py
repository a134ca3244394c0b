"""A fault campaign: the demo loop with processes killed at random moments, against the same loop undisturbed.

    bash tests/faults.sh [--kills 40] [--iterations 3] [--seed 0]

Prints one line a kill (moment, stage, victim, signal, how the loop ended, processes and shared memory left behind),
then their counts by stage, victim and signal, and at last the files that differ. Where a loop is done before all kills
happened, another one begins. Exit code 0 means: nothing was left behind, and every file is the same but for timings.
"""

import argparse
import collections
import contextlib
import hashlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

from helpers.loop import ROOT, processes, settle, start

SIGNALS = [signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT]
# What may differ: when and how fast it was, what it was called, what was printed, and the commit: there may have been
# one in between.
TIMINGS = re.compile(rb'"(validation_)?tokens_per_s": [-+.e\d]+|"(started|commit)": "[^"]*"')
LEFT_OUT = ("logs", ".lock", "tensorboard", "report")


def unmapped_segments():
    """Names of the shared-memory segments that no living process has mapped."""
    mapped = set()  # inodes
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            mapped |= {line.split()[4] for line in (process / "maps").read_text().splitlines() if "/dev/shm/" in line}
    with os.scandir("/dev/shm") as entries:
        return {entry.name for entry in entries if str(entry.inode()) not in mapped}


def describe(pid, command, loop):
    """What a process is, in a word."""
    if pid == loop.pid:
        return "comal.sh"
    if "launch/stage.py" in command:
        return "stage.py"
    if "spawn_main" in command:
        return "worker"
    if "resource_tracker" in command:
        return "resource tracker"
    scripts = [word for word in command.split() if word.endswith(".py")]
    return Path(scripts[0]).name if scripts else command.split()[0]


def disturb(log_path, mark, kills, rng, longest=16, **settings):
    """Run a loop to its end, killing one of its processes every 1 to `longest` seconds until there were `kills` of
    them.

    It is started again wherever it ends. Yields {stage, victim, signal, outcome, left: command lines of processes and
    names of shared-memory segments left behind} a kill. Raises RuntimeError when the loop fails although nothing was
    killed.
    """
    segments = unmapped_segments()
    with open(log_path, "ab") as log:
        while True:
            offset, loop = log.seek(0, os.SEEK_END), start(log, mark, **settings)
            disturbed = False
            while loop.poll() is None:
                try:
                    loop.wait(rng.uniform(1, longest) if kills else None)
                    break
                except subprocess.TimeoutExpired:
                    kills -= 1
                    disturbed = True
                    yield _kill_one(loop, mark, rng, log_path, offset, segments)
            if loop.returncode == 0:
                return
            if not disturbed:
                raise RuntimeError(f"the loop failed on its own with exit code {loop.returncode}; see {log_path}")


def _kill_one(loop, mark, rng, log_path, offset, segments):
    running, kinds = processes(mark), collections.defaultdict(list)
    for pid, command in running.items():
        kinds[describe(pid, command, loop)].append(pid)
    victim = rng.choice(sorted(kinds) or ["comal.sh"])
    sent = rng.choice(SIGNALS)
    with open(log_path, "rb") as printed:
        printed.seek(offset)
        stages = re.findall(rb"^    (\w+) {2,}", printed.read(), re.MULTILINE)
    with contextlib.suppress(ProcessLookupError):
        os.kill(rng.choice(kinds.get(victim) or [loop.pid]), sent)
    with contextlib.suppress(subprocess.TimeoutExpired):
        loop.wait(15)  # a worker's death does not end the loop
    ended = loop.poll() is not None
    left = settle(mark) if ended else {}
    for pid in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    leaked = unmapped_segments() - segments if ended else set()
    if leaked:  # those of other processes go in a moment
        time.sleep(3)
        leaked &= unmapped_segments()
    return {
        "stage": stages[-1].decode() if stages else "start",
        "victim": victim,
        "signal": sent.name,
        "outcome": f"exit {loop.returncode}" if ended else "goes on",
        "left": [*left.values(), *leaked],
    }


def differing(plain, killed):
    """["path: what"] of the files of an experiment that are not those of the undisturbed one, timings aside."""
    expected, found = _digests(plain), _digests(killed)
    state = lambda path: "missing" if path not in found else "extra" if path not in expected else "differs"
    return [
        f"{path}: {state(path)}"
        for path in sorted(expected.keys() | found.keys())
        if expected.get(path) != found.get(path)
    ]


def _digests(folder):
    """{path: hash of its contents without timings and the experiment's name}."""
    name = str(folder.relative_to(ROOT)).encode()
    return {
        str(path.relative_to(folder)): hashlib.sha256(
            TIMINGS.sub(b"", path.read_bytes()).replace(name, b"")
        ).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not set(LEFT_OUT) & set(path.relative_to(folder).parts)
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument("--iterations", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng, mark = random.Random(options.seed), uuid.uuid4().hex[:8]
    settings = {
        "ROUNDS": "1",
        "SPLITS": str(options.iterations),
        "EVAL_EVERY": str(options.iterations),
        "SAVE_MINUTES": "0.05",
    }
    folder, log = ROOT / "exps" / f"faults-{mark}", ROOT / "exps" / f"faults-{mark}.log"
    plain = folder / "plain"
    folder.mkdir(parents=True)
    began = time.monotonic()
    with open(log, "ab") as file:
        if start(file, mark, NAME=f"{folder.name}/plain", **settings).wait():
            sys.exit(f"the undisturbed run failed; see {log}")
    print(f"undisturbed: {time.monotonic() - began:.0f} s", flush=True)
    print(f"{'kill':>4} {'after':>7}  {'stage':12} {'victim':18} {'signal':8} {'outcome':9} left behind", flush=True)
    kills, different, loops = [], [], 0
    while len(kills) < options.kills:
        loops += 1
        name = f"killed{loops}"
        for kill in disturb(log, mark, options.kills - len(kills), rng, NAME=f"{folder.name}/{name}", **settings):
            kills.append(kill)
            print(
                f"{len(kills):4} {time.monotonic() - began:6.0f}s  {kill['stage'][:12]:12} {kill['victim'][:18]:18} "
                f"{kill['signal']:8} {kill['outcome']:9} {', '.join(kill['left'])[:60] or '-'}",
                flush=True,
            )
        different += [f"{name}/{line}" for line in differing(plain, folder / name)]
    for what in ("stage", "victim", "signal"):
        counts = collections.Counter(kill[what] for kill in kills)
        print(f"by {what}: " + ", ".join(f"{value} {count}" for value, count in counts.most_common()))
    for line in different:
        print(f"  {line}")
    orphans = sum(len(kill["left"]) for kill in kills)
    print(
        f"{len(kills)} kills in {loops} loops; files compared: {loops * len(_digests(plain))}, "
        f"differing: {len(different)}; left behind: {orphans}"
    )
    if different or orphans:
        sys.exit(f"kept for a look: {folder.relative_to(ROOT)}, {log.relative_to(ROOT)}")
    shutil.rmtree(folder)
    log.unlink()


if __name__ == "__main__":
    main()
