"""The settings of comal.sh: what they are called and mean, which values they may have, and what follows from them.

    python3 launch/settings.py help                     what `bash comal.sh --help` prints
    python3 launch/settings.py arguments [NAME=VALUE ...]   refuse misspelt names, of arguments and in the environment
    python3 launch/settings.py resolve [NAME ...]       check the values; print what follows from them, as assignments.
                                                        The names are those that the user has given

A setting is a line `NAME=${NAME:-default}  # explanation` of comal.sh or launch/settings.sh, and data/demo/settings.sh
overrides some; nothing of it is stated again here. comal.sh calls this with the values in the environment. It runs
before the packages are installed, so it needs nothing but Python 3.9.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import shlex
import sys
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FULL = (ROOT / "comal.sh", ROOT / "launch/settings.sh")
DEMO = ROOT / "data/demo/settings.sh"

# Old names, refused with what became of them, and old values, refused with the new one.
RENAMED = {
    "GPUS_PER_WORKER": "is now called TENSOR_PARALLEL_SIZE",
    "SAVE_STEPS": "has become SAVE_MINUTES, minutes of training between points where it can go on",
}
RENAMED_VALUES = {"JUDGE_TYPE": {"offsetbias-lm": "generative", "bt-mixture": "reward", "openai": "server"}}


class Refused(Exception):
    """A message for the user: what is wrong, and what to do."""


@dataclass
class Setting:
    default: str  # as it stands in the file, with names of other settings
    text: str
    group: str


def read(*paths: Path) -> dict[str, Setting]:
    """{name: Setting} of the lines `NAME=${NAME:-default}  # explanation`, in their order; a comment line that stands
    on top of them is the group's title."""
    found, group = {}, ""
    for path in paths:
        for line in path.read_text(encoding="utf-8").splitlines():
            match = re.fullmatch(r"([A-Z][A-Z0-9_]*)=\$\{\1:?-(.*?)\}(?:\s+#\s*(.*))?", line)
            if match:
                found[match[1]] = Setting(match[2], match[3] or "", group)
            elif line.startswith("# "):
                group = line[2:]
    return found


def settings() -> dict[str, Setting]:
    """All settings, with the defaults of the full recipe."""
    found, demo = read(*FULL), read(DEMO)
    return found | {name: demo[name] for name in demo if name not in found}


def defaults(values: dict[str, str]) -> dict[str, str]:
    """{name: default} in the recipe of these values, with the names in it replaced by these values."""
    chosen = settings() | (read(DEMO) if values.get("RECIPE") == "demo" else {})

    def expand(text: str) -> str:
        replace = lambda m: (values.get(m[1]) or expand(m[2])) if m[1] else values.get(m[3], "")
        return re.sub(r"\$\{(\w+):?-([^{}]*)\}|\$(\w+)", replace, text)

    return {name: expand(setting.default) for name, setting in chosen.items()}


def methods(table: str) -> dict[str, dict[str, str]]:
    """{method: {TRAINER, ETA, UPDATE_INTERVAL, iterations, METHOD_TITLE}} of the table in comal.sh."""
    names = ("TRAINER", "ETA", "UPDATE_INTERVAL", "iterations", "METHOD_TITLE")
    rows = [line.split(None, 5) for line in table.strip().splitlines()]
    return {row[0]: dict(zip(names, row[1:])) for row in rows}


# ---------------------------------------------------------------------------------------------- names


def check_names(arguments: list[str], environment: dict[str, str]) -> None:
    """Refuse what is no setting. Raises Refused with the nearest name."""
    known = settings()
    for argument in arguments:
        name, equals, _ = argument.partition("=")
        if name in RENAMED:
            raise Refused(f"{name} {RENAMED[name]}")
        if not equals or name not in known:
            if name in ("PYTHON", "PYTHON_BASE", "SETUP_FOR"):
                raise Refused(f"{name} is for set-up, and comes before the command: {argument} bash comal.sh")
            flags = {flag.lstrip("-").upper(): flag for flag in ("--try", "--plan", "--prepare", "--help")}
            near = difflib.get_close_matches(name.upper().lstrip("-"), [*known, *flags], 1, 0.6)
            what = f" Did you mean {flags.get(near[0], f'{near[0]}=...')}?" if near else ""
            raise Refused(
                f"unknown argument {argument}.{what} Arguments are --try, --plan, --prepare, --help, and settings "
                "as NAME=value; --help explains them"
            )
    for name in sorted(environment.keys() - known.keys()):
        if name in RENAMED:
            raise Refused(f"{name} is in the environment, but it {RENAMED[name]}")
        near = difflib.get_close_matches(name, known, 1, 0.85)
        if near and len(name) >= 8 and difflib.SequenceMatcher(None, name, near[0]).ratio() > 0.9:
            raise Refused(f"{name} is in the environment; did you mean {near[0]}? If not, unset {name}")
        if near:
            say(f"WARNING: {name} in the environment is no setting, {near[0]} is")


# ---------------------------------------------------------------------------------------------- values

NUMBER = r"[0-9]*\.?[0-9]+(e-?[0-9]+)?"
SEVERAL = f"{NUMBER}(,{NUMBER})*"
JUDGE_TYPES = "generative", "reward", "server"
SERVER = "server"
CHOICES = {
    "RECIPE": ("demo", "full"),
    "PAIR_RULE": ("top_two", "best_worst", "random"),
    "SELECT": ("best", "last"),
    "ON_ERROR": ("fail", "skip"),
    "KEEP_CKPTS": ("all", "rounds", "last"),
    "ENGINE": ("local", "ray"),
    "SHARDING": ("auto", "full", "optimizer"),
    **dict.fromkeys(("SOFT_LABELS", "GRADIENT_CHECKPOINTING", "KL_FROM_START"), ("true", "false")),
}
WHOLE = {  # the least value
    **dict.fromkeys(("FIRST_ITERATION", "NODE_RANK", "SEED", "STALL_TIMEOUT", "UPDATE_INTERVAL"), 0),
    **dict.fromkeys(("EVAL_EVERY", "EVAL_STEPS", "GLOBAL_BATCH_SIZE", "MASTER_PORT", "MAX_JUDGE_TOKENS"), 1),
    **dict.fromkeys(("MAX_LENGTH", "MAX_NEW_TOKENS", "MAX_PROMPT_TOKENS", "NODES", "NUM_EPOCHS", "ROUNDS"), 1),
    **dict.fromkeys(("SPLITS", "TENSOR_PARALLEL_SIZE"), 1),
    "NUM_SAMPLES": 2,
    "MICRO_BATCH_TOKENS": 0,  # or auto
}
NUMBERS = {"EVAL_TEMPERATURE", "MAX_GRAD_NORM", "SAVE_MINUTES", "TAU_ETA_RATIO", "TEMPERATURE", "WEIGHT_DECAY"}
POSITIVE = {"BETA", "EVAL_TOP_P", "LEARNING_RATE", "TOP_P"}
AT_MOST_ONE = {"EVAL_TOP_P", "TOP_P", "WARMUP_RATIO"}
# What the results do not depend on; an experiment may go on with other values of these.
FREE = {"API_BASE", "DEMO_MODELS", "ENGINE", "EVAL_EVERY", "GPUS", "GRADIENT_CHECKPOINTING", "KEEP_CKPTS", "NAME"}
FREE |= {"KL_FROM_START", "MASTER_ADDR", "MASTER_PORT", "MICRO_BATCH_TOKENS", "NODES", "NODE_RANK", "ON_ERROR"}
FREE |= {"RECIPE", "REPORT_TO", "ROUNDS", "SAVE_MINUTES", "SHARDING", "STALL_TIMEOUT", "TENSOR_PARALLEL_SIZE"}


def check_values(values: dict[str, str], given: Collection[str] = ()) -> None:
    """Refuse, before hours of work, what can be known to be wrong. `given`: the names that the user has given.

    Raises Refused.
    """
    for name, old in RENAMED_VALUES.items():
        for value in values[name].split(","):
            if value in old:
                raise Refused(f"{name}={values[name]}: {value} is now called {old[value]}")
    for name, choices in {**CHOICES, "METHOD": tuple(methods(values["METHODS"]))}.items():
        if values[name] not in choices:
            raise Refused(f"{name}={values[name]} is unknown; choose one of: {' '.join(choices)}")
    for name, least in WHOLE.items():
        whole = re.fullmatch("0|[1-9][0-9]*", values[name]) and int(values[name]) >= least
        auto = ", or auto" if name == "MICRO_BATCH_TOKENS" else ""
        if not whole and not (auto and values[name] == "auto"):
            raise Refused(f"{name}={values[name]} should be a whole number, at least {least}{auto}")
    for name in sorted(NUMBERS | POSITIVE | AT_MOST_ONE):
        if not re.fullmatch(NUMBER, values[name]):
            raise Refused(f"{name}={values[name]} should be a number, 0 or more")
        if name in POSITIVE and not float(values[name]) > 0:
            raise Refused(f"{name}={values[name]} should be greater than 0")
        if name in AT_MOST_ONE and float(values[name]) > 1:
            raise Refused(f"{name}={values[name]} should be at most 1")
    eta = values["ETA"]
    if eta and not re.fullmatch(SEVERAL, eta):
        raise Refused(f"ETA={eta} should be a number greater than 0, or one a round, comma-separated")
    if eta and "dpo" not in values["METHOD"] and not all(float(value) > 0 for value in eta.split(",")):
        raise Refused(f"ETA={eta} should be greater than 0")
    name = values["NAME"]
    if os.path.isabs(name) or ".." in name.split("/") or re.search(r"[,\x00-\x1f]", name) or not name.strip("./"):
        raise Refused(f"NAME={name} should be the name of a folder in exps/, without .. and without a comma")
    if int(values["NODE_RANK"]) >= int(values["NODES"]):
        raise Refused(f"NODE_RANK={values['NODE_RANK']} should be less than NODES={values['NODES']}")
    if values["ENGINE"] == "ray" and values["GPUS"] not in ("auto", "none"):
        raise Refused(f"GPUS={values['GPUS']}: with ENGINE=ray, Ray hands out the GPUs; give auto or none")
    check_engine_args(values)
    check_start(values, given)
    check_judge(values)


def check_engine_args(values: dict[str, str]) -> None:
    """Refuse what is no JSON object; once vLLM is installed, launch/prepare.py checks the names. Raises Refused."""
    for name in ("ENGINE_ARGS", "JUDGE_ENGINE_ARGS"):
        try:
            found = json.loads(values[name] or "{}")
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise Refused(f"""{name}={values[name]} should be a JSON object such as '{{"max_num_seqs": 512}}'""")


def check_start(values: dict[str, str], given: Collection[str]) -> None:
    """Where the experiment begins: with MODEL, REFERENCE and FIRST_ITERATION, or as the fork FROM. Raises Refused."""
    first, iterations = int(values["FIRST_ITERATION"]), int(resolve(values)["ITERATIONS"])
    for name in ("FIRST_ITERATION", "REFERENCE"):
        if values["FROM"] and name in given:
            raise Refused(f"FROM says where to go on and with which reference; leave out {name}")
    if first >= iterations:
        remedy = "raise ROUNDS" if iterations > 1 else f"METHOD={values['METHOD']} has no other"
        raise Refused(f"FIRST_ITERATION={first}, but the last iteration has the number {iterations - 1}; {remedy}")


def check_judge(values: dict[str, str]) -> None:
    """scoring.py checks a judge in full; this is what should be said before the policy has sampled for hours."""
    types, weights = values["JUDGE_TYPE"], values["JUDGE_WEIGHTS"]
    if not set(types.split(",")) <= set(JUDGE_TYPES):
        raise Refused(
            f"JUDGE_TYPE={types} should be {', '.join(JUDGE_TYPES[:-1])} or {JUDGE_TYPES[-1]}; of several judges one "
            "each, comma-separated"
        )
    if weights and not re.fullmatch(SEVERAL, weights):
        raise Refused(f"JUDGE_WEIGHTS={weights} should be numbers, comma-separated")
    if SERVER in types and not (values["API_BASE"] or any(map(os.environ.get, ("OPENAI_BASE_URL", "OPENAI_API_KEY")))):
        raise Refused("OPENAI_API_KEY is not set; OpenAI wants one. For another server give API_BASE")
    judge_flags(values)


def judge_flags(values: dict[str, str]) -> list[str]:
    """JUDGE_FLAGS as words. Raises Refused where a quote is not closed."""
    try:
        return shlex.split(values["JUDGE_FLAGS"])
    except ValueError as error:
        raise Refused(f"JUDGE_FLAGS={values['JUDGE_FLAGS']} cannot be split into flags: {error}") from None


# ---------------------------------------------------------------------------------------------- what follows


def resolve(values: dict[str, str]) -> dict[str, str]:
    """What a method makes of the settings: TRAINER, METHOD_TITLE, ETA, UPDATE_INTERVAL, ITERATIONS, and whether there
    is ONE_ITERATION over all prompts."""
    method = methods(values["METHODS"])[values["METHOD"]]
    one = method["iterations"] == "one"
    found = {name: method[name] for name in ("TRAINER", "METHOD_TITLE", "ETA", "UPDATE_INTERVAL")}
    if values["ETA"] and method["ETA"] != "-":
        found["ETA"] = values["ETA"]
    found["ITERATIONS"] = "1" if one else str(int(values["ROUNDS"]) * int(values["SPLITS"]))
    return found | {"ONE_ITERATION": str(one).lower(), "FROM": values["FROM"].rstrip("/")}


def changes(values: dict[str, str], given: list[str]) -> list[str]:
    """["NAME=value (default)"] of the settings that differ from the recipe's, and what the method does not use."""
    resolved, usual = resolve(values), defaults(values)
    names = usual if values["RECIPE"] == "demo" else read(*FULL)
    names = [name for name in names if values[name] != usual[name] and name != "RECIPE"]
    found = [f"{name}={values[name]} ({usual[name] or 'empty'})" for name in names]
    if "ETA" in given and resolved["ETA"] == "-":
        found.append(f"ETA is not used by METHOD={values['METHOD']}, BETA is")
    if "UPDATE_INTERVAL" in given and values["UPDATE_INTERVAL"] != resolved["UPDATE_INTERVAL"]:
        found.append(f"UPDATE_INTERVAL is not used by METHOD={values['METHOD']}")
    return found


def current() -> dict[str, str]:
    """The values of all settings, and METHODS, as comal.sh has put them into the environment."""
    return {name: os.environ.get(name, "") for name in [*settings(), "METHODS"]}


def print_help() -> None:
    """comal.sh's own header, then the settings by group, with default and explanation."""
    text = (ROOT / "comal.sh").read_text(encoding="utf-8")
    header = text.split("\n\n")[0].splitlines()[1:]
    print("\n".join(line.lstrip("#").removeprefix(" ") for line in header if line.startswith("#")))
    known = {name: settings()[name].default for name in ("METHOD", "DEMO_MODELS")}
    full, demo = (defaults({**known, "RECIPE": recipe}) | {"RECIPE": ""} for recipe in ("full", "demo"))
    group = ""
    for name, setting in settings().items():
        if setting.group != group:
            group = setting.group
            print(f"\n{group}")
        note = f"  [demo: {demo[name] or 'empty'}]" if demo[name] != full[name] else ""
        print(f"  {name + '=' + full[name]:46} {setting.text}{note}")
    print("\nMethods (METHOD)")
    table = text.partition('METHODS="')[2].partition('"')[0].replace("$UPDATE_INTERVAL", "UPDATE_INTERVAL")
    moves = {"0": "never moves", "1": "moves after every iteration"}
    for name, row in methods(table).items():
        eta = "" if row["ETA"] == "-" else f", ETA {row['ETA']}"
        when = moves.get(row["UPDATE_INTERVAL"], f"moves every {row['UPDATE_INTERVAL']} iterations")
        once = "; one iteration over all prompts" * (row["iterations"] == "one")
        print(f"  {name:12} {row['METHOD_TITLE']}: {row['TRAINER']}.py{eta}; the reference {when}{once}")


def say(message: str) -> None:
    print(f"comal.sh: {message}", file=sys.stderr)


def amount(size: float) -> str:
    """A number of bytes for people."""
    for power, unit in ((30, "GiB"), (20, "MiB")):
        if size >= 2**power:
            return f"{size / 2**power:,.1f} {unit}"
    return f"{size / 2**10:,.1f} KiB"


def run(command: Callable[[], None]) -> None:
    """Where a command refuses something, that is said, and the exit code is 1."""
    try:
        command()
    except Refused as refused:
        say(str(refused))
        sys.exit(1)


def main() -> None:
    command, *words = sys.argv[1:]
    if command == "help":
        print_help()
    elif command == "arguments":
        check_names(words, dict(os.environ))
    else:
        values = current()
        check_values(values, words)
        for name, value in resolve(values).items():
            print(f"{name}={shlex.quote(value)}")
        print(f"judge_flags=({shlex.join(judge_flags(values))})")
        print(f"changed={shlex.quote(', '.join(changes(values, words)) or 'none')}")


if __name__ == "__main__":
    run(main)
