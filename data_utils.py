"""Models, tokenizers and data sets by name, and chats as token ids."""

import contextlib
import functools
import gc
import hashlib
import itertools
import json
import re
import runpy
import sys
from importlib.util import find_spec
from pathlib import Path

import safetensors

from utils import StageError, check_input, first_line

# ---------------------------------------------------------------------------------------------- models


def resolve_model(name: str) -> str:
    """The local directory of a model: a path, a path with a `model` subfolder (our checkpoints, the released
    ones), or a Hub id of either form, which is downloaded. Raises StageError when there is none."""
    path = Path(name)
    if not path.exists():
        path = _download(name)
    for candidate in (path, path / "model"):
        config = candidate / "config.json"
        if config.is_file():
            with contextlib.suppress(ValueError):
                if isinstance(json.loads(config.read_bytes()), dict):
                    return str(candidate)
            raise StageError(f"{config} is damaged: it is not a JSON object; copy or download it again")
    raise StageError(f"model {name}: no config.json in {path} nor in its 'model' subfolder")


def _download(name, only=None):
    if name.count("/") != 1 or name.startswith((".", "/")):
        raise StageError(f"model {name}: no such directory (and not a Hub id of the form owner/name)")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=only, ignore_patterns=["*.pth", "*.gguf", "original/*"]))
    except Exception as error:  # the Hub client raises a dozen kinds; all mean that there is no model
        raise StageError(
            f"model {name}: no such directory, and the Hub did not provide it: {_hub_says(error)}"
        ) from None


def _hub_says(error: Exception) -> str:
    """Why the Hub's client did not provide a model. Of the two commonest errors the first line is only a number."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    if isinstance(error, GatedRepoError):
        return "it is gated; accept its licence on its page there, and log in with `hf auth login`"
    if isinstance(error, RepositoryNotFoundError):
        return "it has none of this name, or a private one, which needs `hf auth login`"
    return first_line(error)


def has_tokenizer(directory: str | Path) -> bool:
    """Whether a directory holds a tokenizer."""
    return any(Path(directory, name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json"))


def resolve_tokenizer(name: str) -> str:
    """The local directory of a tokenizer: a path or a Hub id, which is downloaded, or the `model` subfolder of either.
    No name has none: then a model's own tokenizer is meant."""
    if not name:
        return ""
    path = Path(name)
    if not path.exists():
        path = _download(name, only=["*.json", "*.jinja", "*.txt", "*.model"])  # not the weights
    return str(next((place for place in (path, path / "model") if has_tokenizer(place)), path))


def check_weights(directory: str | Path) -> None:
    """Raise StageError unless a model directory holds all its weights, as far as that shows without loading them.

    Shards that an index names must be there, and safetensors files as long as their headers say.
    """
    directory = Path(directory)
    if not weight_files(directory):
        raise StageError(f"{directory} has a config.json but no weights (*.safetensors, *.bin)")
    for index in directory.glob("*.index.json"):
        try:
            names = {str(name) for name in json.loads(index.read_bytes())["weight_map"].values()}
        except (ValueError, KeyError, TypeError, AttributeError):
            raise StageError(f"{index} is damaged: it cannot be read; copy or download it again") from None
        missing = sorted(name for name in names if not (directory / name).is_file())
        if missing:
            raise StageError(
                f"{directory} lacks {', '.join(missing)}, which {index.name} names; copy or download it again"
            )
    for path in directory.glob("*.safetensors"):
        try:
            with safetensors.safe_open(path, "numpy"):  # compares the header with the length of the file
                pass
        except safetensors.SafetensorError as error:
            raise StageError(f"{path} is damaged ({first_line(error)}); copy or download it again") from None


def weight_files(directory: str | Path) -> list[Path]:
    """A model directory's weight files, in order of their names."""
    return sorted([*Path(directory).glob("*.safetensors"), *Path(directory).glob("*.bin")])


def model_fingerprint(directory: str | Path) -> str:
    """16 digits that tell a model from another one: a hash of its config.json and of 64 blocks spread over each of its
    weight files. Fine-tuning changes nearly every weight, so that is enough, and takes milliseconds."""
    digest = hashlib.sha256((Path(directory) / "config.json").read_bytes())
    for path in weight_files(directory):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with open(path, "rb") as file:
            for block in range(64):
                file.seek(block * max(0, size - 4096) // 63)  # the last block is the end
                digest.update(file.read(4096))
    return digest.hexdigest()[:16]


def check_architecture(directory: str | Path) -> None:
    """Raise StageError unless transformers knows the kind of model that the config.json of a directory describes."""
    path = Path(directory) / "config.json"
    kind = json.loads(path.read_bytes()).get("model_type")
    if not isinstance(kind, str) or not kind:
        raise StageError(f"{path} has no model_type, so nothing can tell how to load it; copy or download it again")
    # The table of names imports nothing, so that reading it takes milliseconds; importing transformers takes seconds.
    table = Path(getattr(find_spec("transformers"), "origin", "")).parent / "models/auto/auto_mappings.py"
    if table.is_file() and kind in runpy.run_path(str(table))["CONFIG_MAPPING_NAMES"]:
        return
    from transformers import CONFIG_MAPPING, __version__

    if kind not in CONFIG_MAPPING:
        raise StageError(f"{path}: transformers {__version__} does not know the model_type {kind!r}")


# ---------------------------------------------------------------------------------------------- tokenizers


@functools.cache
def import_transformers() -> None:
    """Import transformers' models and tokenizers in half the time, which every stage with a model takes.

    Garbage collection would look through all modules again and again, and where scikit-learn is installed, transformers
    imports it for a way of decoding that is not used here.
    """
    collecting, hidden = gc.isenabled(), {"sklearn"} - sys.modules.keys()
    gc.disable()
    sys.modules |= dict.fromkeys(hidden)  # type: ignore[arg-type]  # None: as if it were not installed
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401
    finally:
        for name in hidden:
            del sys.modules[name]
        if collecting:
            gc.enable()


def load_tokenizer(model: str, tokenizer: str = ""):
    """The tokenizer in the directory `tokenizer` or, when that is empty, in the model's.

    Raises StageError when there is none, it has no chat template, or the model has one of its own with other ids.
    """
    import_transformers()
    from transformers import AutoTokenizer

    source = tokenizer or model
    if not has_tokenizer(source):  # of some models transformers would make up an empty one
        raise StageError(f"no tokenizer in {source}; name one with --tokenizer (--judge_tokenizer)")
    try:
        loaded = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise StageError(
            f"no tokenizer in {source} ({first_line(error)}); name one with --tokenizer (--judge_tokenizer)"
        ) from None
    if not loaded.chat_template:
        raise StageError(f"the tokenizer of {source} has no chat template; name another one with --tokenizer")
    try:
        end_token_id(loaded)
    except Exception as error:  # Jinja's, and whatever a template raises
        raise StageError(f"the chat template of {source} does not work: {first_line(error)}") from None
    if tokenizer:
        check_vocabulary(loaded, tokenizer, model)
    return loaded


def check_vocabulary(tokenizer, source: str, model: str) -> None:
    """Raise StageError where the model has a tokenizer of its own whose ids stand for other tokens than those of
    `tokenizer`, which came from `source`."""
    from transformers import AutoTokenizer

    if not has_tokenizer(model):
        return
    own = {number: token for token, number in AutoTokenizer.from_pretrained(model).get_vocab().items()}
    for token, number in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]):
        if own.get(number, token) != token:
            raise StageError(
                f"{source} does not have the tokenizer of {model}: id {number} is {token!r} there and "
                f"{own[number]!r} here; name the one that the model was trained with"
            )


# ---------------------------------------------------------------------------------------------- data sets


def load_rows(source: str, split: str, local: str):
    """Rows of a data set: the file `local`, .jsonl, .json or .parquet, or else the split of a Hub data set.

    Raises StageError where there is none, or where it cannot be read.
    """
    from datasets import load_dataset

    if not local:
        try:
            return load_dataset(source, split=split)
        except Exception as error:  # `datasets` raises many kinds; all mean that there is no data
            raise StageError(
                f"data set {source}: the Hub did not provide it ({first_line(error)}); "
                "give a local file of the same format with --local_file"
            ) from None
    kind = "parquet" if local.endswith(".parquet") else "json"
    check_input(local, also="Parquet" if kind == "parquet" else "")
    try:
        if kind == "json":
            with open(local, encoding="utf-8") as file:  # Arrow meets bytes that are no text only when they are used
                for _ in file:
                    pass
        return load_dataset(kind, data_files=local, split="train")
    except Exception as error:
        raise StageError(f"{local}: not readable as {kind} ({first_line(error.__cause__ or error)})") from None


def first_exchange(messages: list[dict]) -> list[dict] | None:
    """The messages up to the first non-empty answer of the assistant, or None."""
    for position, message in enumerate(messages):
        if message["role"] == "assistant":
            usable = position and message["content"].strip() and messages[position - 1]["content"].strip()
            return [{"role": m["role"], "content": m["content"]} for m in messages[: position + 1]] if usable else None
    return None


def as_pair(row: dict) -> tuple[dict | None, str | None]:
    """({prompt, chosen, rejected} as lists of messages, None) from a row, or (None, why there is none)."""
    try:
        chosen, rejected = as_messages(row["chosen"], "assistant"), as_messages(row["rejected"], "assistant")
        if chosen == rejected:
            return None, "identical responses"
        common = len(list(itertools.takewhile(lambda both: both[0] == both[1], zip(chosen, rejected))))
        prompt = chosen[:common] or as_messages(row.get("prompt"), "user")
    except (TypeError, KeyError):
        return None, "without a prompt and two answers"
    pair = {"prompt": prompt, "chosen": chosen[common:], "rejected": rejected[common:]}
    roles = [[message["role"] for message in pair[name][-2:]] for name in ("chosen", "rejected")]
    if roles != [["assistant"], ["assistant"]] or not prompt or prompt[-1]["role"] != "user":
        return None, "without a prompt and two answers"
    if not all(
        isinstance(message["content"], str) and message["content"] for part in pair.values() for message in part
    ):
        return None, "empty or without text"
    return pair, None


def as_messages(value, role: str) -> list[dict]:
    """Messages with role and content alone; text is one message of `role`. Raises TypeError, KeyError for anything
    else."""
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    return [{"role": message["role"], "content": message["content"]} for message in value]


# ---------------------------------------------------------------------------------------------- chat encoding


def encode_chat(tokenizer, messages: list[dict], add_generation_prompt: bool = True) -> list[int]:
    """Token ids of a chat. The template's special tokens become themselves; the same spellings inside the
    messages stay ordinary text, so a prompt that contains `<|im_end|>` cannot end its own turn.

    Args:
        messages: list of {"role", "content"}.
    """
    pattern = special_token_pattern(tokenizer)
    contents = "".join(message["content"] for message in messages)
    if not pattern or not pattern.search(contents):
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
        return tokenizer.encode(text, add_special_tokens=False)
    # Spellings inside the contents are hidden behind private-use characters while the template is rendered, so
    # that every spelling in the rendered text is the template's own.
    free = (chr(code) for code in itertools.count(0xE000) if chr(code) not in contents)
    hidden = {token: next(free) for token in set(pattern.findall(contents))}
    masked = [
        {**message, "content": pattern.sub(lambda match: hidden[match[0]], message["content"])} for message in messages
    ]
    text = tokenizer.apply_chat_template(masked, tokenize=False, add_generation_prompt=add_generation_prompt)
    restore = str.maketrans({character: token for token, character in hidden.items()})
    ids = []
    for position, part in enumerate(pattern.split(text)):  # ordinary text and special tokens in turn
        if position % 2:
            ids.append(tokenizer.convert_tokens_to_ids(part))
        elif part:
            ids.extend(encode_text(tokenizer, part.translate(restore)))
    return ids


@functools.cache
def special_token_pattern(tokenizer):
    """A regular expression with one group that matches any special token's spelling, or None."""
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    tokens = sorted(special | set(tokenizer.all_special_tokens), key=len, reverse=True)
    return re.compile("(" + "|".join(map(re.escape, tokens)) + ")") if tokens else None


def encode_text(tokenizer, text: str) -> list[int]:
    """Token ids of ordinary text: nothing is added, and no spelling in it becomes a special token."""
    return tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)


def encode_prompt(tokenizer, prompt: str) -> list[int]:
    """Token ids of one user message, up to where the assistant's answer begins."""
    return encode_chat(tokenizer, [{"role": "user", "content": prompt}])


def end_token_id(tokenizer) -> int:
    """The token that the chat template puts after an assistant's answer (`<|im_end|>`, `<|eot_id|>`), else EOS."""
    marker = "answer"
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "x"}, {"role": "assistant", "content": marker}], tokenize=False
    )
    following = tokenizer.encode(text[text.rindex(marker) + len(marker) :], add_special_tokens=False)
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return next((token for token in following if token in special), tokenizer.eos_token_id)
