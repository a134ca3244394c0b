"""What comal.sh keeps of an experiment and checks of it; each is a command, with comal.sh's state in the environment:

    check   write run.json, or compare it with the settings of now
    files   refuse models and prompts that do not exist
    fork    print where FROM goes on, as assignments: first, policy, reference
    note    write next.json of the iteration: what the next one starts from
    prune   delete the checkpoints that KEEP_CKPTS does not keep and nothing needs
    disk    refuse an iteration for which there is no room
    cost    print what the iterations that are left will take: disk and time

run.json holds the settings that results depend on, as text, and what follows from METHOD: TRAINER, METHOD_TITLE,
ITERATIONS, the resolved ETA and UPDATE_INTERVAL; `sha256 PATH` of the prompts and templates; versions and the commit.
Like settings.py it needs nothing but Python 3.9.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Collection
from pathlib import Path

from settings import FREE, RENAMED_VALUES, ROOT, SERVER, Refused, amount, current, defaults, run, say, settings

CODE = ["*.py", "comal.sh", "fsdp_config.yaml", "prompts/*", "data/demo/*"]
CODE += [f"{folder}/**/*" for folder in ("training", "judges", "workers", "analysis", "launch")]
PACKAGES = ("torch", "transformers", "vllm", "accelerate")
HUB_ID = r"[^./][^/]*/[^/]+"
EVALUATION = {"start_responses", "responses", "evaluation", "matrix"}  # stages before and after the loop
MIB = 2**20


def state(name: str) -> str:
    """A variable of comal.sh."""
    return os.environ.get(name, "")


def experiment() -> Path:
    return Path(state("exp"))


def write(path: Path, record: dict) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)


# ---------------------------------------------------------------------------------------------- run.json


def sha256(*paths: Path) -> str:
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def training_files() -> list[str]:
    """The train prompts: one file an iteration of a round."""
    values = current()
    splits = [""] if state("ONE_ITERATION") == "true" else [f"_{i}" for i in range(int(values["SPLITS"]))]
    return [f"{values['PROMPTS_DIR']}/train{split}.jsonl" for split in splits]


def input_files() -> list[str]:
    """The files that an experiment's results depend on."""
    values = current()
    others = [f"{values['PROMPTS_DIR']}/test.jsonl", values["EVAL_PROMPTS"], *values["TEMPLATE"].split(",")]
    return others + training_files()


def check_files() -> None:
    """Raises Refused for a model or a file that does not exist."""
    values = current()
    judges = [] if SERVER in values["JUDGE_TYPE"] else values["JUDGE"].split(",")
    models = [("MODEL", values["MODEL"]), ("REFERENCE", values["REFERENCE"]), *(("JUDGE", judge) for judge in judges)]
    for setting, name in models:
        if not (os.path.exists(name) or re.fullmatch(HUB_ID, name)):
            raise Refused(f"{name} ({setting}): no such directory, and no Hub id (owner/name)")
    folder, splits = values["PROMPTS_DIR"], values["SPLITS"]
    several = state("ONE_ITERATION") == "false" and folder == "data/prompts"
    if several and Path(folder, f"train_{splits}.jsonl").exists():
        raise Refused(f"{folder} holds more than SPLITS={splits} train splits; remove its files to have them made anew")
    for path in input_files():
        if not os.path.exists(path):
            raise Refused(f"{path} does not exist")


def pinned() -> dict[str, str]:
    """What an experiment may not change on its way: the settings that results depend on, and the files' contents."""
    values = {name: value for name, value in current().items() if name in settings().keys() - FREE}
    values |= {name: state(name) for name in ("ETA", "UPDATE_INTERVAL")}
    return values | {f"sha256 {path}": sha256(Path(path)) for path in input_files()}


def versions() -> dict[str, str]:
    """Fingerprint of the code, and the packages' versions."""
    code = sorted({path for pattern in CODE for path in ROOT.glob(pattern) if path.is_file() and path.suffix != ".pyc"})
    command = "import importlib.metadata as m\nfor d in m.distributions(): print(d.metadata['Name'], d.version)"
    listed = subprocess.run([state("PYTHON"), "-c", command], capture_output=True, text=True, check=True).stdout
    found = dict(line.split(None, 1) for line in listed.splitlines() if len(line.split()) > 1)
    # vLLM's build for the CPU has a name of its own.
    packages = {name: found.get(name) or found.get(f"{name}-cpu") or "" for name in PACKAGES}
    return {"code": sha256(*code)} | packages


def read_run(path: Path) -> dict[str, str]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        assert isinstance(found, dict)
    except (ValueError, AssertionError) as error:
        raise Refused(
            f"{path} is no valid JSON ({error}). Earlier versions did not escape quotes in JUDGE_FLAGS: "
            'write each quote inside a value as \\", or take another NAME'
        ) from None
    # What these settings were before they existed, where that is not their default.
    found = {"WEIGHT_DECAY": "0"} | ({"EVAL_TOP_P": found["TOP_P"]} if "TOP_P" in found else {}) | found
    for name, renamed in RENAMED_VALUES.items():
        if name in found:
            found[name] = ",".join(renamed.get(value, value) for value in found[name].split(","))
    return found


def check_run() -> None:
    """Write run.json; where samples exist already, compare with it. A setting that is not in it had its default.

    Raises Refused for other settings or files; warns of other code or packages.
    """
    path, now = experiment() / "run.json", pinned()
    method = {name: state(name) for name in ("TRAINER", "METHOD_TITLE", "ITERATIONS", "ROUNDS")}
    on_node_0 = state("NODE_RANK") == "0"
    begun = [*experiment().glob("iter*/*.samples.jsonl"), *experiment().glob("iter*/*.samples.jsonl.partial")]
    if not path.exists() or (on_node_0 and not begun):
        about = {"commit": commit(), "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
        write(path, now | versions() | method | about)
        return
    then = read_run(path)
    if changed := differences(now | defaults(current()) | then, now):
        raise Refused(
            f"{path.parent} was begun with other settings or files:\n{changed}\nGive the experiment another NAME, or "
            f"the settings it was begun with;\nor fork: bash comal.sh FROM={path.parent}/iterN NAME=another"
        )
    if changed := differences(then, versions()):
        say(f"WARNING: {path.parent} was begun with other code or packages, and goes on with these:\n{changed}")
    if on_node_0 and method.items() - then.items():  # more rounds may follow
        write(path, then | method)


def differences(then: dict[str, str], now: dict[str, str]) -> str:
    """A line for each value of `now` that was another one then."""
    changed = [name for name in now if then.get(name) != now[name]]
    return "\n".join(f"  {name}: {then.get(name)} then, {now[name]} now" for name in changed)


def commit() -> str:
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


# ---------------------------------------------------------------------------------------------- checkpoints


def weights(model: str) -> list[Path]:
    """The weight files of a directory, of a checkpoint of ours, or of a model that the Hub's cache holds."""
    cache = Path(os.environ.get("HF_HUB_CACHE") or Path(os.environ.get("HF_HOME", "~/.cache/huggingface"), "hub"))
    snapshots = sorted((cache.expanduser() / f"models--{model.replace('/', '--')}").glob("snapshots/*"))
    for folder in (Path(model), *snapshots[-1:]):
        for pattern in ("*.safetensors", "*.bin", "model/*.safetensors", "model/*.bin"):
            if found := sorted(folder.glob(pattern)):
                return found
    return []


def fork() -> None:
    """Raises Refused where FROM is no complete iteration of another experiment, or its weights are gone."""
    name, iterations = state("FROM"), int(state("ITERATIONS"))
    match = re.fullmatch(r"(.+)/iter([0-9]+)", name)
    if not match:
        raise Refused(f"FROM={name} should be an iteration's folder: exps/OTHER/iterN")
    first, folder = int(match[2]) + 1, Path(name)
    if Path(match[1]).resolve() == experiment().resolve():
        raise Refused(f"FROM={name} lies in {experiment()} itself; give the fork another NAME")
    if not folder.is_dir():
        raise Refused(f"FROM={name}: no such folder")
    if not (folder / "next.json").exists():
        raise Refused(
            f"FROM={name} has no next.json: that iteration is not complete; finish it, or take an earlier one"
        )
    if first >= iterations:
        raise Refused(
            f"FROM={name} goes on with iteration {first}, but there are {iterations} (numbered from 0); raise ROUNDS"
        )
    pointers = json.loads((folder / "next.json").read_text(encoding="utf-8"))
    done = (experiment() / f"iter{first}/ckpt/DONE").exists()
    for role in ("policy", "reference"):
        model = pointers[role]
        on_hub = not os.path.exists(model) and re.fullmatch(HUB_ID, model) and not model.startswith("exps/")
        if not (done or on_hub or weights(model)):
            raise Refused(
                f"FROM={name}: its {role} {model} has no weights any more (KEEP_CKPTS deletes them); take another "
                "iteration"
            )
    print(f"first={first} policy={shlex.quote(pointers['policy'])} reference={shlex.quote(pointers['reference'])}")


def note() -> None:
    write(Path(state("iter"), "next.json"), {"policy": state("policy"), "reference": state("reference")})


def prune() -> None:
    """Of the iterations before this one: the reference stays, and with KEEP_CKPTS=rounds the last of each round."""
    for j in range(int(state("first")), int(state("i"))):
        checkpoint = experiment() / f"iter{j}/ckpt"
        ends_round = (j + 1) % int(state("SPLITS")) == 0
        if str(checkpoint) != state("reference") and not (state("KEEP_CKPTS") == "rounds" and ends_round):
            for name in ("model", "last"):
                shutil.rmtree(checkpoint / name, ignore_errors=True)


# ---------------------------------------------------------------------------------------------- disk and time


def checkpoint_size() -> int:
    """Bytes of a checkpoint, which is float32; 0 where the policy's weights are not here yet."""
    files = weights(state("policy")) or weights(state("MODEL"))
    size = sum(path.stat().st_size for path in files)
    config = files[0].with_name("config.json") if files else Path()
    half = config.is_file() and re.search(r'"(torch_)?dtype": *"b?float16"', config.read_text(encoding="utf-8"))
    return 2 * size if half else size


def resume_size(size: int) -> int:
    """Two resume points while one replaces the other, weights and two moments each."""
    return 6 * size if float(state("SAVE_MINUTES")) else 0


def check_disk() -> None:
    """Raises Refused where this iteration does not fit."""
    size = checkpoint_size()
    need = 100 * MIB if 0 < size < 1024 * MIB else 1024 * MIB  # the records
    if not Path(state("iter"), "ckpt/DONE").exists():
        need += 2 * size + resume_size(size)  # the checkpoint and the best one
    free = shutil.disk_usage(experiment()).free
    if free < need:
        raise Refused(
            f"iteration {state('i')} needs about {need // MIB} MiB on the disk of {experiment()}, which has "
            f"{free // MIB} MiB free. Free some; KEEP_CKPTS=last and SAVE_MINUTES=0 need less; or make exps a link to "
            "a larger disk."
        )


def json_lines(path: Path) -> list[dict]:
    with open(path, "rb") as file:
        return [json.loads(line) for line in file if line.strip()]


def loop_seconds(iteration: Path) -> float | None:
    """Seconds of the loop's stages in an iteration, of a stage that was run again the last time; None: not known."""
    try:
        seconds = {row["stage"]: row["seconds"] for row in json_lines(iteration / "logs/times.jsonl")}
        return sum(took for stage, took in seconds.items() if stage not in EVALUATION)
    except (OSError, ValueError, KeyError):
        return None


def measured_seconds() -> list[float]:
    """Those of the complete iterations."""
    found = (loop_seconds(path.parent) for path in experiment().glob("iter*/next.json"))
    return [seconds for seconds in found if seconds is not None]


def record_bytes() -> int:
    """At most so many bytes of records an iteration writes: a token is some 6 bytes as a number and 4 as text, and each
    response stands in samples and scores, two of each prompt's in pairs and data too."""
    values = current()
    try:
        prompts = sum(sum(1 for _ in open(path, "rb")) for path in [input_files()[0], input_files()[-1]])
    except OSError:
        return 0
    copies = 2 * int(values["NUM_SAMPLES"]) + 2 * 2
    return prompts * (copies * 10 * int(values["MAX_NEW_TOKENS"]) + 4 * 10 * int(values["MAX_PROMPT_TOKENS"]))


def kept_checkpoints(left: Collection[int]) -> int:
    """How many checkpoints are there at most of the iterations that are left, one that is being replaced included."""
    keep, splits = state("KEEP_CKPTS"), int(state("SPLITS"))
    rounds = sum((j + 1) % splits == 0 for j in left)
    return {"all": len(left), "rounds": rounds, "last": 1}[keep] + (keep != "all")


def disk_lines(left: Collection[int], size: int, records: str) -> list[str]:
    """The disk that the iterations which are left take, with checkpoints of this size."""
    if size:
        kept, keep = kept_checkpoints(left), state("KEEP_CKPTS")
        lines = [f"disk: checkpoints {kept} x {amount(size)} = {amount(kept * size)} (KEEP_CKPTS={keep})"]
        more = amount(size + resume_size(size))
        lines.append(f"      while training {more} more (resume points and the best weights)")
    else:
        lines = [f"disk: checkpoints: not known before {state('MODEL')} is here; a weight takes 4 bytes"]
    lines.append(f"      records: {records}")
    if experiment().exists():
        lines.append(f"      free: {amount(shutil.disk_usage(experiment()).free)}")
    return lines


def cost() -> None:
    numbers = range(int(state("first")), int(state("ITERATIONS")))
    left = [j for j in numbers if not (experiment() / f"iter{j}/next.json").exists()]
    print(f"\n# What it will cost: iterations that are left, {len(left)}")
    records = record_bytes()
    amount_left = f"at most {amount(len(left) * records)}" if records else "not known without the prompts"
    for line in disk_lines(left, checkpoint_size(), amount_left):
        print(f"# {line}")
    if seconds := measured_seconds():
        each = sum(seconds) / len(seconds)
        total = f"{len(left)} x {each / 60:,.1f} min = {len(left) * each / 3600:,.1f} h"
        print(f"# time: {total}, by the {len(seconds)} iterations that were measured")
    else:
        print(f"# time: not known before an iteration of {experiment()} was measured (bash comal.sh --try)")


COMMANDS = {"check": check_run, "files": check_files, "fork": fork, "note": note, "prune": prune, "disk": check_disk}
COMMANDS["cost"] = cost

if __name__ == "__main__":
    run(COMMANDS[sys.argv[1]])
