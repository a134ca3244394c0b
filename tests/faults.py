"""A fault campaign: the demo loop with processes killed at random moments, against the same loop undisturbed.

    bash tests/faults.sh [--kills 40] [--iterations 3] [--seed 0]

Prints one line a kill (moment, stage, victim, signal, how the loop ended, processes left behind), and at last the files
that differ. Exit code 0 means: no process was left behind, and every file is the same but for timings.
"""

import argparse
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

ROOT = Path(__file__).resolve().parents[1]
SIGNALS = [signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT]
# What may differ: when and how fast it was, what it was called, what was printed.
TIMINGS = re.compile(rb'"(validation_)?tokens_per_s": [-+.e\d]+|"started": "[^"]*"')
LEFT_OUT = ("logs", ".lock")


def start(name, iterations, log, mark):
    settings = {"RECIPE": "demo", "NAME": name, "ROUNDS": "1", "SPLITS": str(iterations), "EVAL_EVERY": str(iterations),
                "SAVE_STEPS": "10", "PYTHON": sys.executable, "FAULTS_MARK": mark}
    return subprocess.Popen(["bash", "comal.sh"], cwd=ROOT, env=os.environ | settings, stdout=log,
                            stderr=subprocess.STDOUT, start_new_session=True,
                            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))


def processes(mark):
    """{pid: command line} of the living processes that inherited the mark."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if f"FAULTS_MARK={mark}".encode() in (process / "environ").read_bytes().split(b"\0"):
                found[int(process.name)] = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
        except OSError:
            pass
    return {pid: command for pid, command in found.items() if command}


def describe(pid, command, loop):
    if pid == loop.pid:
        return "comal.sh"
    if "spawn_main" in command:
        return "worker"
    words = [word for word in command.split() if word.endswith((".py", ".sh"))]
    return Path(words[0]).name if words else command.split()[0]


def settle(mark, seconds=10):
    """The processes that are left after some seconds at most."""
    deadline = time.monotonic() + seconds
    while (left := processes(mark)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return left


def digests(folder):
    """{path: hash of its contents without timings and the experiment's name}."""
    name = str(folder.relative_to(ROOT)).encode()
    return {str(path.relative_to(folder)): hashlib.sha256(
                TIMINGS.sub(b"", path.read_bytes()).replace(name, b"").replace(folder.name.encode(), b"")).hexdigest()
            for path in sorted(folder.rglob("*"))
            if path.is_file() and not set(LEFT_OUT) & set(path.relative_to(folder).parts)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument("--iterations", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng, mark = random.Random(options.seed), uuid.uuid4().hex[:8]
    plain, faulty = (f"faults-{mark}-{name}" for name in ("plain", "killed"))
    logs = ROOT / "exps" / f"faults-{mark}.log"
    logs.parent.mkdir(exist_ok=True)
    orphans = 0
    with open(logs, "w+b") as log:
        began = time.monotonic()
        if start(plain, options.iterations, log, mark).wait():
            sys.exit(f"the undisturbed run failed; see {logs}")
        print(f"undisturbed: {time.monotonic() - began:.0f} s", flush=True)
        print(f"{'kill':>4} {'after':>7}  {'stage':34} {'victim':18} {'signal':8} {'outcome':9} left behind", flush=True)
        kills, offset, loop = 0, log.seek(0, os.SEEK_END), start(faulty, options.iterations, log, mark)
        while True:
            try:
                loop.wait(rng.uniform(1, 16) if kills < options.kills else None)
            except subprocess.TimeoutExpired:
                running, stages = processes(mark), []
                pid = rng.choice(sorted(running)) if running else loop.pid
                sent, victim = rng.choice(SIGNALS), describe(pid, running.get(pid, ""), loop)
                with open(logs, "rb") as printed:
                    printed.seek(offset)
                    stages = re.findall(rb"=== (.*?)  \(", printed.read())
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, sent)
                kills += 1
                with contextlib.suppress(subprocess.TimeoutExpired):
                    loop.wait(15)  # a worker's death does not end the loop
                left = settle(mark) if loop.poll() is not None else {}
                orphans += len(left)
                for other in left:
                    os.kill(other, signal.SIGKILL)
                outcome = "goes on" if loop.poll() is None else f"exit {loop.returncode}"
                print(f"{kills:4} {time.monotonic() - began:6.0f}s  {stages[-1].decode()[:34] if stages else 'start':34} "
                      f"{victim[:18]:18} {sent.name:8} {outcome:9} {', '.join(left.values())[:60] or '-'}", flush=True)
                if loop.poll() is None or loop.returncode == 0:
                    continue
                offset, loop = log.seek(0, os.SEEK_END), start(faulty, options.iterations, log, mark)
                continue
            if loop.returncode:
                sys.exit(f"the loop failed on its own with exit code {loop.returncode}; see {logs}")
            break
    expected, found = digests(ROOT / "exps" / plain), digests(ROOT / "exps" / faulty)
    different = sorted(path for path in expected.keys() | found.keys() if expected.get(path) != found.get(path))
    for path in different:
        state = "missing" if path not in found else "extra" if path not in expected else "differs"
        print(f"  {path}: {state}")
    print(f"{kills} kills; files compared: {len(expected)}, differing: {len(different)}; processes left behind: {orphans}")
    if different or orphans or kills < options.kills:
        sys.exit(f"kept for a look: exps/{plain}, exps/{faulty}, {logs.relative_to(ROOT)}")
    for name in (plain, faulty):
        shutil.rmtree(ROOT / "exps" / name)
    logs.unlink()


if __name__ == "__main__":
    main()
