"""What is fetched and checked before anything is sampled, as the stages that need it come after hours.

    python -m launch.prepare fetch --models POLICY,REFERENCE --tokenizer TOKENIZER --prompts a.jsonl,b.jsonl --judge J
    python -m launch.prepare engine_args --policy '{"max_num_seqs": 512}' --judge '{"quantization": "fp8_per_channel"}'

`bash comal.sh --prepare` runs both with the settings of the run. What the Hub provides stays in its cache, where a run
with HF_HUB_OFFLINE=1 finds it.
"""

from pathlib import Path

from data_utils import load_tokenizer, resolve_tokenizer, weight_files
from judges.base import JudgeConfig
from launch.settings import amount
from records import Prompt, read
from utils import run, split_list
from vllm_model import usable_model
from workers.engine_settings import read_engine_args


class Listing:
    """Prints a line for each thing that is here, and counts the bytes of every file once."""

    def __init__(self) -> None:
        self.sizes: dict[Path, int] = {}

    def add(self, what: str, name: str, place: str | Path, files: list[Path], note: str = "") -> None:
        found = {file.resolve(): file.stat().st_size for file in files}
        self.sizes |= found
        where = "" if str(place) == name else f" in {place}"
        print(f"{what:10} {name}{where}: {note}{amount(sum(found.values()))}", flush=True)


def files_of(directory: str | Path) -> list[Path]:
    return [path for path in Path(directory).rglob("*") if path.is_file()]


def tokenizer_files(directory: str | Path) -> list[Path]:
    """The files of a directory that are not weights."""
    weights = weight_files(directory)
    return [path for path in Path(directory).iterdir() if path.is_file() and path not in weights]


def add_judge(listing: Listing, judge: JudgeConfig) -> None:
    """Fetch and check one judge. Raises StageError."""
    if not judge.kind.needs_engine:
        print(f"{'judge':10} {judge.judge}: runs elsewhere, nothing to fetch", flush=True)
        return
    load_tokenizer(judge.judge_path, judge.tokenizer_path)
    listing.add("judge", judge.judge, judge.judge_path, files_of(judge.judge_path))
    if judge.tokenizer_path:
        listing.add("tokenizer", judge.judge_tokenizer, judge.tokenizer_path, tokenizer_files(judge.tokenizer_path))


def engine_args(policy: str = "", judge: str = ""):
    """Refuse what is no JSON object, and arguments that the installed vLLM's engine does not have.

    Args:
        policy: ENGINE_ARGS
        judge: JUDGE_ENGINE_ARGS
    """
    read_engine_args(policy, "ENGINE_ARGS")
    read_engine_args(judge, "JUDGE_ENGINE_ARGS")


def fetch(models: str, prompts: str, tokenizer: str = "", **judge: JudgeConfig):
    """Fetch and check the models and the prompts of a run, and print where each is and how much disk it takes.

    Exit code 0 means that all of them are here and whole.

    Args:
        models: checkpoint directories or Hub ids, comma-separated, the policy first
        prompts: prompt files, comma-separated
        tokenizer: directory or Hub id of the policy's tokenizer; default: the policy's own
    """
    config, listing = JudgeConfig(**judge), Listing()  # wrong flags are refused before gigabytes are fetched
    directories = []
    for name in dict.fromkeys(split_list(models)):
        directories.append(usable_model(name))
        listing.add("model", name, directories[-1], files_of(directories[-1]))
    tokenizer_dir = tokenizer and resolve_tokenizer(directories[0], tokenizer)
    load_tokenizer(directories[0], tokenizer_dir)
    if tokenizer:
        listing.add("tokenizer", tokenizer, tokenizer_dir, tokenizer_files(tokenizer_dir))
    for member in config.members():
        add_judge(listing, member)
    for name in dict.fromkeys(split_list(prompts)):
        count = sum(1 for _ in read(name, Prompt))
        listing.add("prompts", name, name, [Path(name)], f"{count:,} prompts, ")
    print(f"{'together':10} {amount(sum(listing.sizes.values()))}")


if __name__ == "__main__":
    run(fetch, engine_args)
