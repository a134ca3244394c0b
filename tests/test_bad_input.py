"""Every stage refuses bad input at its real command line, with an exact message and exit code, before it loads a model.

    python -m pytest tests/test_bad_input.py

A case is a stage, what is changed about its valid input or flags, the exit code and the whole message. The scripts run
as they are, each in a process of its own, forked from one that has imported PyTorch: that alone would take seconds.
"""

import gzip
import json
import multiprocessing
import os
import re
import runpy
import shutil
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from training_fixtures import ROOT, read, save_model, setting_fixture  # noqa: F401

from utils import fingerprint

# Imported once, by the process from which those of the cases are forked.
PRELOAD = [
    "torch",
    "torch.distributed.checkpoint.api",
    "accelerate.utils",
    "datasets",
    "fire",
    "numpy",
    "tqdm",
    "safetensors.torch",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.auto.modeling_auto",
    "transformers.models.qwen2.modeling_qwen2",
    "transformers.generation.utils",
]
SECONDS = 60  # for a refusal; they take less than one, or start a worker in six


on_cpu = pytest.mark.skipif(
    torch.cuda.is_available(), reason="these stages run without GPUs, which vLLM's GPU build cannot"
)


# ---------------------------------------------------------------------------------------------- valid records


def ids(text):
    """Token ids of printable ASCII without spaces: the tiny tokenizers' single bytes, from `!` on, follow the policy's
    three special tokens."""
    return [ord(character) - ord("!") + 3 for character in text]


END = 2  # <|im_end|>
VOCABULARY = 664


def message(role, text):
    return {"role": role, "content": text}


def sample(text):
    return {"text": text, "token_ids": [*ids(text), END], "finish_reason": "stop"}


PROMPT = {"prompt_id": "a", "prompt": "where?"}
SAMPLES = PROMPT | {"prompt_token_ids": ids("where?"), "samples": [sample("sea"), sample("city")]}
SCORES = SAMPLES | {"win_probs": [[None, 0.75], [0.25, None]], "order_gap": 0.1, "label_mass": 0.9}
TEXTS = {
    "prompt": [message("user", "where?")],
    "chosen": [message("assistant", "sea")],
    "rejected": [message("assistant", "city")],
}
PAIR = (
    {"prompt_id": "a"}
    | TEXTS
    | {
        "prompt_token_ids": ids("where?"),
        "chosen_token_ids": [*ids("sea"), END],
        "rejected_token_ids": [*ids("city"), END],
        "win_prob": 0.75,
        "score_chosen": 0.75,
        "score_rejected": 0.25,
    }
)
DATA = PAIR | {
    "last_chosen_logp": -3.0,
    "last_rejected_logp": -4.0,
    "ref_chosen_logp": -3.0,
    "ref_rejected_logp": -4.0,
    "chosen_num_tokens": 4,
    "rejected_num_tokens": 5,
}
CHAT = {"prompt_id": "a", "messages": [message("user", "where?"), message("assistant", "sea")]}


def but(record, **changes):
    """The record under prompt_id b, with changes; ... removes a field."""
    changed = record | {"prompt_id": "b"} | changes
    return {name: value for name, value in changed.items() if value is not ...}


def content(records):
    """Records as the bytes of a JSONL file; bytes stay what they are."""
    return b"".join(record if isinstance(record, bytes) else json.dumps(record).encode() + b"\n" for record in records)


# ---------------------------------------------------------------------------------------------- running stages

FILES = {"input": "{tmp}/in.jsonl", "output": "{tmp}/out.jsonl"}
LOCAL = {"local_file": "{tmp}/in.jsonl"}
TRAIN = {"model": "{policy}", "input": "{tmp}/in.jsonl", "output": "{tmp}/ckpt"}
STAGES = {  # the script, its flags, a valid record
    "sampling": ("sampling.py", FILES | {"model": "{policy}"}, PROMPT),
    "scoring": ("scoring.py", FILES | {"judge": "{judge}"}, SAMPLES),
    "make_pairs": ("data_processing.py make_pairs", FILES, SCORES),
    "make_prompts": (
        "data_processing.py make_prompts",
        LOCAL | {"output_dir": "{tmp}/prompts", "field": "prompt", "num_splits": 1, "num_test": 1},
        PROMPT,
    ),
    "make_sft": (
        "data_processing.py make_sft",
        LOCAL | {"output": "{tmp}/sft.jsonl", "validation_output": "{tmp}/test.jsonl", "num_validation": 1},
        CHAT,
    ),
    "get_logprobs": ("get_logprobs.py", FILES | {"model": "{policy}", "reference": "{policy}"}, PAIR),
    "inpo": ("inpo.py", TRAIN, DATA),
    "ipo": ("ipo.py", TRAIN, DATA),
    "dpo": ("dpo.py", TRAIN, DATA),
    "mle": ("mle.py", TRAIN, CHAT),
    "generate": ("eval.py generate", FILES | {"model": "{policy}"}, PROMPT),
    "compare": (
        "eval.py compare",
        {
            "responses": "{tmp}/in.jsonl",
            "baseline": "{tmp}/baseline.jsonl",
            "output": "{tmp}/out.jsonl",
            "judge": "{judge}",
        },
        SAMPLES,
    ),
}


def run_script(words, logs, uid):
    """`python SCRIPT --flag=value ...` in this process, a fork; what it prints goes to files in `logs`."""
    os.chdir(ROOT)
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(logs / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    sys.path.insert(0, str(ROOT))
    sys.argv = words
    import data_processing  # noqa: F401, while the installation may be read

    torch.set_num_threads(1)
    if uid:
        os.setuid(uid)
    runpy.run_path(words[0], run_name="__main__")


@pytest.fixture(scope="module")
def context():
    """Starts processes as forks of one that has imported the heavy packages, on the CPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        first = context.Process(target=os.getpid)  # returns when all is imported
        first.start()
        first.join()
        yield context


@pytest.fixture(scope="module")
def places(setting, model_dirs, tmp_path_factory):
    """What {policy}, {reference}, {judge} and {data} stand for in flags and messages."""
    judge = save_model(tmp_path_factory.mktemp("judge"), model_dirs["judge"], 2)
    return {"policy": setting.policy, "reference": setting.reference, "judge": judge, "data": setting.data}


@pytest.fixture
def stage(context, places, tmp_path):
    """An object that runs a stage. `folder` is {tmp}, `files()` what is in it."""
    folder, logs = tmp_path / "files", tmp_path / "logs"
    folder.mkdir()
    logs.mkdir()

    def run(name, *records, seconds=SECONDS, uid=0, words=(), **flags):
        """Write the records to in.jsonl, if there are any, and run the stage: its exit code, stdout and stderr."""
        known = {"tmp": str(stage.folder)} | places
        if records:
            (stage.folder / "in.jsonl").write_bytes(content(records))
        script, defaults, _ = STAGES[name]
        given = {flag: value for flag, value in (defaults | flags).items() if value is not ...}
        argv = [*script.split(), *(f"--{flag}={value}" for flag, value in given.items())]
        argv = [re.sub(r"\{(\w+)\}", lambda match: known[match[1]], word) for word in argv] + list(words)
        process = context.Process(target=run_script, args=(argv, logs, uid))
        process.start()
        process.join(seconds)
        if process.exitcode is None:
            process.kill()
            process.join()
        printed = {name: (logs / name).read_text() for name in ("stdout", "stderr")}
        for place, path in known.items():
            printed = {name: text.replace(path, "{" + place + "}") for name, text in printed.items()}
        return SimpleNamespace(code=process.exitcode, **printed)

    stage = SimpleNamespace(
        folder=folder, run=run, files=lambda: {str(path.relative_to(stage.folder)) for path in stage.folder.rglob("*")}
    )
    return stage


def check_refused(done, script, code, expected):
    """The exit code, and the message that begins with the last `SCRIPT: error: ` to the end of what was printed."""
    printed = re.sub(r"pid \d+", "pid N", done.stderr)
    assert "Traceback" not in printed, printed
    assert (done.code, printed.rpartition(f"\n{script}: error: ")[2]) == (code, expected + "\n"), printed


# ---------------------------------------------------------------------------------------------- damaged models


def model(change):
    """A `prepare` that copies the policy to {tmp}/model and calls `change` with the copy."""

    def prepare(folder, places):
        shutil.copytree(places["policy"], folder / "model")
        change(folder / "model")

    return prepare


def replace(name, text):
    return model(lambda directory: (directory / name).write_bytes(text))


def remove(name):
    return model(lambda directory: (directory / name).unlink())


def half_the_weights(directory):
    weights = directory / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])


def one_tensor(directory):
    import torch
    from safetensors.torch import save_file

    save_file({"weight": torch.zeros(3)}, directory / "model.safetensors")


def narrower(directory):
    config = directory / "config.json"
    config.write_text(config.read_text().replace('"intermediate_size": 256', '"intermediate_size": 200'))


def only_bin(directory):
    (directory / "model.safetensors").unlink()
    (directory / "pytorch_model.bin").write_bytes(b"junk")


COPY = {"model": "{tmp}/model"}
COPIES = {"model": "{tmp}/model", "reference": "{tmp}/model"}


# ---------------------------------------------------------------------------------------------- the table


def row(name, case, expected, *records, code=1, files=None, prepare=None, leaves=(), words=(), **flags):
    """The input is the stage's valid record unless `records` are given; `files` are further ones; `prepare` is
    called with the folder and the places; `leaves` names what is left behind in the folder: of a run that began."""
    return pytest.param(name, records, files or {}, prepare, flags, words, code, expected, leaves, id=f"{name}-{case}")


IN = "{tmp}/in.jsonl"
NOT_JSON = "not valid JSON ({}); the file may be truncated".format
BASELINE = {"baseline.jsonl": [SAMPLES]}
DAMAGED = "is damaged: {}; copy or download it again".format
NO_CHOSEN = f"{IN}, record 2: chosen should be one message of {{role, content}} by the assistant, got "
NO_CHAT = (
    f"{IN}, record 2: messages should be {{role, content}} each, a prompt first and the assistant's answer last, got "
)
HALF = "{tmp}/model/model.safetensors " + DAMAGED("it has 829,520 bytes, its header says 1,659,040")
ANOTHER = (
    "{judge} does not have the tokenizer of {policy}: id 0 is '<|end_of_text|>' there and '<|endoftext|>' here; "
    "name the one that the model was trained with"
)
OTHER_REFERENCE = (
    "{policy} does not have the tokenizer of {judge}: id 0 is '<|endoftext|>' there and '<|end_of_text|>' "
    "here; name the one that the model was trained with"
)


ROWS = [
    # ---- files of prompts
    row("sampling", "empty-file", f"input file {IN} is empty; the stage that wrote it has nothing to pass on", b""),
    row("sampling", "blank-lines", f"{IN}: no records", b"\n\r\n\n"),
    row("sampling", "directory", "input file {tmp} is not a file", input="{tmp}"),
    row("sampling", "device", "input file /dev/null is not a file", input="/dev/null"),
    row("sampling", "no-file", "input file {tmp}/no does not exist", input="{tmp}/no"),
    row(
        "sampling",
        "gzip",
        f"input file {IN} is compressed with gzip, not JSONL text; unpack or convert it first",
        gzip.compress(content([PROMPT])),
    ),
    row(
        "sampling",
        "utf-16",
        f"input file {IN} is UTF-16 text, not JSONL text; unpack or convert it first",
        content([PROMPT]).decode().encode("utf-16"),
    ),
    row(
        "sampling",
        "not-json",
        f"{IN}, line 2: " + NOT_JSON("Expecting value: line 1 column 1 (char 0)"),
        PROMPT,
        b"nonsense\n",
    ),
    row(
        "sampling",
        "truncated",
        f"{IN}, line 2: " + NOT_JSON("Expecting ',' delimiter: line 1 column 15 (char 14)"),
        PROMPT,
        b'{"prompt": "x"',
    ),
    row("sampling", "list", f"{IN}, line 1: expected a JSON object, got list", b"[]\n"),
    row("sampling", "nan", f"{IN}, line 1: " + NOT_JSON("NaN is not a JSON value"), b'{"prompt": "x", "n": NaN}\n'),
    row(
        "sampling",
        "infinite",
        f"{IN}, line 1: " + NOT_JSON("1e999 is too large a number"),
        b'{"prompt": "x", "n": 1e999}\n',
    ),
    row(
        "sampling",
        "surrogate",
        f"{IN}, line 1: not UTF-8 text ('utf-8' codec can't encode character '\\ud800' in "
        "position 12: surrogates not allowed)",
        b'{"prompt": "\\ud800"}\n',
    ),
    row(
        "sampling",
        "not-utf8",
        f"{IN}, line 1: not UTF-8 text ('utf-8' codec can't decode byte 0xff in position 12: invalid start byte)",
        b'{"prompt": "\xff"}\n',
    ),
    row(
        "sampling",
        "missing-field",
        f"{IN}, line 2: field 'prompt' is missing; found prompt_id",
        PROMPT,
        but(PROMPT, prompt=...),
    ),
    row("sampling", "wrong-type", f"{IN}, line 1: field 'prompt' should be str, got list", but(PROMPT, prompt=["x"])),
    row("sampling", "empty-prompt", f"{IN}, record 2: the prompt is empty", PROMPT, but(PROMPT, prompt=" \n")),
    row(
        "sampling",
        "id-type",
        f"{IN}, record 1: prompt_id should be text or a number, got bool",
        but(PROMPT, prompt_id=True),
    ),
    row("sampling", "duplicate-id", f"{IN}, record 2: prompt_id 'a' occurs a second time", PROMPT, PROMPT),
    row(
        "sampling",
        "duplicate-number",
        f"{IN}, record 2: prompt_id '1' occurs a second time",
        but(PROMPT, prompt_id=1),
        but(PROMPT, prompt_id="1"),
    ),
    row("generate", "not-json", f"{IN}, line 1: " + NOT_JSON("Expecting value: line 1 column 1 (char 0)"), b"x\n"),
    row(
        "generate",
        "duplicate-text",
        f"{IN}, record 2: prompt_id '{fingerprint('where?')}' (made from the text) occurs a second time",
        {"prompt": "where?"},
        {"prompt": "where?"},
    ),
    row(
        "make_prompts",
        "not-json",
        f"{IN}: not readable as json (JSON parse error: Invalid value. in row 1)",
        PROMPT,
        b"nonsense\n",
    ),
    row(
        "make_prompts",
        "not-utf8",
        f"{IN}: not readable as json ('utf-8' codec can't decode byte 0xff in position 12: invalid start byte)",
        b'{"prompt": "\xff"}\n',
    ),
    row(
        "make_prompts",
        "surrogate",
        f"{IN}: not readable as json (JSON parse error: The surrogate pair in string is invalid. in row 0)",
        b'{"prompt": "\\ud800"}\n',
        PROMPT,
    ),
    row(
        "make_prompts",
        "wrong-type",
        f"{IN}: column 'prompt' should be text, found int",
        but(PROMPT, prompt=1),
        but(PROMPT, prompt=2),
    ),
    row("make_prompts", "no-column", f"{IN} has no column 'question'; it has prompt_id, prompt", field="question"),
    row(
        "make_prompts",
        "too-few",
        "1 different prompts are too few for 1 test prompts (--num_test) and 1 train splits",
        PROMPT,
        but(PROMPT),
    ),
    row(
        "make_prompts",
        "negative-test",
        "--num_test should be at least 0, got -1",
        PROMPT,
        but(PROMPT, prompt="when?"),
        num_test=-1,
    ),
    # ---- samples and scores
    row(
        "scoring",
        "prompts",
        f"{IN}, line 1: field 'prompt_token_ids' is missing (sampling.py writes it); found prompt_id, prompt",
        PROMPT,
    ),
    row(
        "scoring",
        "one-sample",
        f"{IN}, prompt_id a: 1 samples, needed: 2; sample again with --num_samples 2 or more",
        SAMPLES | {"samples": [sample("sea")]},
    ),
    row(
        "scoring",
        "no-samples",
        f"{IN}, prompt_id a: 0 samples, needed: 2; sample again with --num_samples 2 or more",
        SAMPLES | {"samples": []},
    ),
    row(
        "scoring",
        "unequal-k",
        f"{IN}, prompt_id b: 3 samples, but the records before it have 2",
        SAMPLES,
        but(SAMPLES, samples=[sample("x")] * 3),
    ),
    row(
        "scoring",
        "sample-type",
        f'{IN}, prompt_id a: each of samples should be {{text, token_ids, finish_reason}}, got "sea"',
        SAMPLES | {"samples": ["sea", "city"]},
    ),
    row(
        "scoring",
        "token-type",
        f"{IN}, prompt_id a: token_ids of a sample should be a list of token ids, got ['sea']",
        SAMPLES | {"samples": [sample("x") | {"token_ids": ["sea"]}] * 2},
    ),
    row("scoring", "duplicate-id", f"{IN}, line 2: prompt_id 'a' occurs a second time", SAMPLES, SAMPLES),
    row("scoring", "id-type", f"{IN}, line 1: field 'prompt_id' should be str, got int", SAMPLES | {"prompt_id": 1}),
    row(
        "scoring",
        "gzip",
        f"input file {IN} is compressed with gzip, not JSONL text; unpack or convert it first",
        gzip.compress(content([SAMPLES])),
    ),
    row(
        "make_pairs",
        "samples",
        f"{IN}, prompt_id a: win_probs should be 2 x 2 numbers for 2 samples, it is missing; "
        "is this a scores file, as scoring.py writes it?",
        SAMPLES,
    ),
    row(
        "make_pairs",
        "shape",
        f"{IN}, prompt_id a: win_probs should be 2 x 2 numbers for 2 samples, it has another shape",
        SCORES | {"win_probs": [[None, 0.5]]},
    ),
    row(
        "make_pairs",
        "above-1",
        f"{IN}, prompt_id a: win_probs[1][0] should be a probability, got 1.5",
        SCORES | {"win_probs": [[None, -0.5], [1.5, None]]},
    ),
    row(
        "make_pairs",
        "not-a-number",
        f"{IN}, prompt_id a: win_probs[1][0] should be a probability, got True",
        SCORES | {"win_probs": [[None, 0], [True, None]]},
    ),
    row(
        "make_pairs",
        "sum",
        f"{IN}, prompt_id a: win_probs[1][0] and [0][1] should add up to 1, got 0.5 and 0.75",
        SCORES | {"win_probs": [[None, 0.75], [0.5, None]]},
    ),
    row(
        "make_pairs",
        "diagonal",
        f"{IN}, prompt_id a: win_probs[0][0] should be null, got 0.5",
        SCORES | {"win_probs": [[0.5, 0.75], [0.25, 0.5]]},
    ),
    row(
        "make_pairs",
        "truncated",
        f"{IN}, line 2: " + NOT_JSON("Unterminated string starting at: line 1 column 2 (char 1)"),
        SCORES,
        b'{"prom',
    ),
    row(
        "make_pairs",
        "no-pair",
        f"{IN}: no usable pair in 2 records ({{'records': 2, 'identical responses': 2}})",
        *(record | {"samples": [sample("sea")] * 2} for record in (SCORES, but(SCORES))),
    ),
    # ---- pairs
    row(
        "get_logprobs",
        "scores",
        f"{IN}, line 1: field 'prompt' should be list, got str",
        SCORES | {"chosen": [], "rejected": []},
    ),
    row(
        "get_logprobs",
        "missing-field",
        f"{IN}, line 1: field 'rejected' is missing (data_processing.py make_pairs writes it); found prompt, chosen",
        {name: TEXTS[name] for name in ("prompt", "chosen")},
    ),
    row(
        "get_logprobs",
        "some-ids",
        f"{IN}, record 1 has prompt_token_ids, rejected_token_ids but not all of "
        "prompt_id, prompt_token_ids, chosen_token_ids, rejected_token_ids; give all of them, or text alone",
        but(PAIR, chosen_token_ids=...),
    ),
    row("get_logprobs", "empty-answer", NO_CHOSEN + "[]", TEXTS, TEXTS | {"chosen": []}),
    row(
        "get_logprobs",
        "not-messages",
        f"{IN}, record 2: prompt should be messages of {{role, content}} ending with text by the user, got [3]",
        TEXTS,
        TEXTS | {"prompt": [3]},
    ),
    row("get_logprobs", "ids-and-no-text", NO_CHOSEN + "[]", PAIR, but(PAIR, chosen=[])),
    row("get_logprobs", "ids-and-no-message", NO_CHOSEN + "[3]", PAIR, but(PAIR, chosen=[3])),
    row(
        "get_logprobs",
        "ids-and-null",
        NO_CHOSEN + "[{'role': 'assistant', 'content': None}]",
        PAIR,
        but(PAIR, chosen=[message("assistant", None)]),
    ),
    row("get_logprobs", "duplicate-id", f"{IN}, line 2: prompt_id 'a' occurs a second time", PAIR, PAIR),
    row(
        "get_logprobs",
        "duplicate-number",
        f"{IN}, line 2: prompt_id '3' occurs a second time",
        TEXTS | {"prompt_id": 3},
        TEXTS | {"prompt_id": "3"},
    ),
    row(
        "get_logprobs",
        "duplicate-text",
        f"{IN}, record 2: prompt_id "
        f"'{fingerprint(json.dumps(list(TEXTS.values())))}' (made from the text) occurs a second time",
        TEXTS,
        TEXTS,
    ),
    row(
        "get_logprobs",
        "other-text",
        f"{IN}, prompt_id a: the token ids are not those of the text under this "
        "tokenizer ('sea' for 'hut'); was the file made with another model's? Name that one with --tokenizer",
        PAIR | {"chosen": [message("assistant", "hut")]},
    ),
    row(
        "get_logprobs",
        "outside-vocabulary",
        f"{IN}, prompt_id a: token 664 is outside the model's vocabulary of 664; "
        "was the file made with another model's tokenizer?",
        PAIR | {"chosen_token_ids": [VOCABULARY]},
    ),
    row(
        "get_logprobs",
        "negative-token",
        f"{IN}, prompt_id a: chosen_token_ids should be a list of token ids, got [-1]",
        PAIR | {"chosen_token_ids": [-1]},
    ),
    row(
        "get_logprobs",
        "no-tokens",
        f"{IN}, prompt_id a: prompt_token_ids and rejected_token_ids should not be empty",
        PAIR | {"rejected_token_ids": []},
    ),
    row(
        "get_logprobs",
        "too-long",
        f"{IN}, prompt_id a: 6 prompt and 4 response tokens exceed --max_length 9; raise "
        "it, or filter with make_pairs --max_length",
        max_length=9,
    ),
    row(
        "get_logprobs",
        "win-prob",
        f"{IN}, prompt_id a: win_prob should be a probability, got 1.5",
        PAIR | {"win_prob": 1.5},
    ),
    row(
        "get_logprobs",
        "old-logp",
        f"{IN}, prompt_id a: last_chosen_logp should be a log-probability, 0 or less, got 'x'",
        PAIR | {"last_chosen_logp": "x"},
    ),
    row("get_logprobs", "micro-batch", "--micro_batch_tokens should be at least 0, got -1", micro_batch_tokens=-1),
    # ---- training data
    row(
        "inpo",
        "pairs",
        f"{IN}, line 1: field 'last_chosen_logp' is missing (get_logprobs.py writes it); found " + ", ".join(PAIR),
        PAIR,
    ),
    row(
        "inpo",
        "positive-logp",
        f"{IN}, prompt_id b: ref_rejected_logp should be a log-probability, 0 or less, got 0.5",
        DATA,
        but(DATA, ref_rejected_logp=0.5),
    ),
    row(
        "inpo",
        "nan-logp",
        f"{IN}, line 1: " + NOT_JSON("NaN is not a JSON value"),
        DATA | {"last_chosen_logp": float("nan")},
    ),
    row(
        "inpo",
        "huge-logp",
        f"{IN}, prompt_id a: last_chosen_logp should be a log-probability, 0 or less, got " + "-1" + "0" * 98,
        DATA | {"last_chosen_logp": -(10**400)},
    ),
    row(
        "inpo",
        "not-messages",
        f"{IN}, prompt_id a: chosen should be one message of {{role, content}} by the assistant, got 3",
        DATA | {"chosen": 3},
    ),
    row("inpo", "not-json", f"{IN}, line 2: " + NOT_JSON("Expecting value: line 1 column 1 (char 0)"), DATA, b"x\n"),
    row("inpo", "duplicate-id", f"{IN}, line 2: prompt_id 'a' occurs a second time", DATA, DATA),
    row(
        "inpo",
        "empty-validation",
        "input file {tmp}/test.jsonl is empty; the stage that wrote it has nothing to pass on",
        files={"test.jsonl": []},
        validation="{tmp}/test.jsonl",
    ),
    row("inpo", "no-input", "input file . is not a file", input=""),
    row(
        "inpo",
        "another-models-data",
        "{data}: the last policy's stored log-probabilities differ from those of "
        "{reference} by up to {off} nats (allowed: 0.05); was the file made with another model or precision? Run "
        "get_logprobs.py again, launched as training is",
        model="{reference}",
        input="{data}",
        leaves=["ckpt"],
    ),
    row(
        "ipo",
        "outside-vocabulary",
        f"{IN}, prompt_id a: token 664 is outside the model's vocabulary of 664; was the "
        "file made with another model's tokenizer?",
        DATA | {"prompt_token_ids": [VOCABULARY]},
    ),
    row(
        "ipo",
        "gzip",
        f"input file {IN} is compressed with gzip, not JSONL text; unpack or convert it first",
        gzip.compress(content([DATA])),
    ),
    row(
        "dpo",
        "logp-type",
        f"{IN}, line 1: field 'ref_chosen_logp' should be float or int, got str",
        DATA | {"ref_chosen_logp": "-3"},
    ),
    row(
        "dpo",
        "chats",
        f"{IN}, line 1: field 'prompt_token_ids' is missing (sampling.py writes it); found prompt_id, messages",
        CHAT,
    ),
    row(
        "mle",
        "pairs",
        f"{IN}, line 1: field 'messages' is missing (data_processing.py make_sft writes it); found " + ", ".join(TEXTS),
        TEXTS,
    ),
    row("mle", "no-messages", NO_CHAT + "[]", CHAT, but(CHAT, messages=[])),
    row("mle", "not-messages", NO_CHAT + "[3, 4]", CHAT, but(CHAT, messages=[3, 4])),
    row(
        "mle",
        "no-content",
        NO_CHAT + "[{'role': 'user'}, {'role': 'assistant'}]",
        CHAT,
        but(CHAT, messages=[{"role": "user"}, {"role": "assistant"}]),
    ),
    row("mle", "negative-weight", f"{IN}, record 1: weight should be a number >= 0, got -1", CHAT | {"weight": -1}),
    row("mle", "weight-type", f"{IN}, record 1: weight should be a number >= 0, got True", CHAT | {"weight": True}),
    row(
        "mle",
        "huge-weight",
        f"{IN}, record 1: weight should be a number >= 0, got 1" + "0" * 99,
        CHAT | {"weight": 10**400},
    ),
    row(
        "mle",
        "too-long",
        f"{IN}, prompt_id a: 15 prompt and 3 response tokens exceed --max_length 17; raise it, or "
        "filter with make_sft --max_length",
        max_length=17,
    ),  # it names make_pairs
    row(
        "make_sft",
        "not-messages",
        f"{IN}, row 2: messages should be messages of {{role, content}}, got 'x'",
        CHAT,
        but(CHAT, messages="x"),
    ),
    row(
        "make_sft",
        "no-content",
        f"{IN}, row 1: messages should be messages of {{role, content}}, got "
        "[{'role': 'user'}, {'role': 'assistant'}]",
        but(CHAT, messages=[{"role": "user"}, {"role": "assistant"}]),
    ),
    row("make_sft", "too-few", "1 usable examples are too few for 1 of validation (--num_validation)"),
    row("make_sft", "no-validation", "--num_validation should be at least 1, got 0", num_validation=0),
    row("make_sft", "negative-limit", "--limit should be at least 0, got -1", CHAT, CHAT, CHAT, limit=-1),
    row("make_sft", "output-directory", "--output {tmp} is a directory; give a file name", CHAT, CHAT, output="{tmp}"),
    row("make_sft", "no-output", "--output should name a file", CHAT, CHAT, output=""),
    # ---- responses
    row(
        "compare",
        "other-prompts",
        "{tmp}/baseline.jsonl has no response to 1 prompts of the other file, first a",
        files={"baseline.jsonl": [but(SAMPLES)]},
    ),
    row(
        "compare",
        "fewer-prompts",
        f"{IN} has no response to 1 prompts of the other file, first b",
        files={"baseline.jsonl": [SAMPLES, but(SAMPLES)]},
    ),
    row(
        "compare",
        "other-text",
        f"{IN} and {{tmp}}/baseline.jsonl have different prompts under prompt_id a",
        files={"baseline.jsonl": [SAMPLES | {"prompt": "when?"}]},
    ),
    row(
        "compare",
        "no-response",
        "{tmp}/baseline.jsonl: prompt_id a has no response: samples[0] should be {text, ...}",
        files={"baseline.jsonl": [SAMPLES | {"samples": []}]},
    ),
    row(
        "compare",
        "prompts",
        "{tmp}/baseline.jsonl, line 1: field 'samples' is missing (sampling.py writes it); found prompt_id, prompt",
        files={"baseline.jsonl": [PROMPT]},
    ),
    row(
        "compare",
        "summary",
        "{tmp}/x.json: the summary goes to a file of that name; end it in .jsonl",
        files=BASELINE,
        output="{tmp}/x.json",
    ),
    row(
        "compare",
        "template",
        "judge template {tmp}/in.jsonl should contain {input}, {output_1} and {output_2} once each",
        files=BASELINE,
        template=IN,
    ),
    row("compare", "no-template", "judge template {tmp}/no does not exist", files=BASELINE, template="{tmp}/no"),
    row(
        "compare",
        "template-not-utf8",
        "judge template {tmp}/t.txt is not UTF-8 text",
        template="{tmp}/t.txt",
        files=BASELINE | {"t.txt": [b"{input} {output_1} {output_2} \xff"]},
    ),
    # ---- models
    row(
        "sampling",
        "no-model",
        "model nowhere: no such directory (and not a Hub id of the form owner/name)",
        model="nowhere",
    ),
    row("sampling", "not-a-model", "model {tmp}: no config.json in {tmp} nor in its 'model' subfolder", model="{tmp}"),
    row(
        "sampling",
        "no-weights",
        "{tmp}/model has a config.json but no weights (*.safetensors, *.bin)",
        prepare=remove("model.safetensors"),
        **COPY,
    ),
    row(
        "sampling",
        "config",
        "{tmp}/model/config.json " + DAMAGED("it is not a JSON object"),
        prepare=replace("config.json", b"{"),
        **COPY,
    ),
    row("scoring", "half-a-file", HALF, prepare=model(half_the_weights), judge="{tmp}/model"),
    row(
        "get_logprobs",
        "no-weights",
        "{tmp}/model has a config.json but no weights (*.safetensors, *.bin)",
        prepare=remove("model.safetensors"),
        reference="{tmp}/model",
    ),
    row("get_logprobs", "half-a-file", HALF, prepare=model(half_the_weights), **COPIES),
    row(
        "get_logprobs",
        "header",
        "{tmp}/model/model.safetensors " + DAMAGED("its header cannot be read"),
        prepare=replace("model.safetensors", b"junk"),
        **COPIES,
    ),
    row(
        "get_logprobs",
        "index",
        "{tmp}/model/model.safetensors.index.json " + DAMAGED("it cannot be read"),
        prepare=replace("model.safetensors.index.json", b"{"),
        **COPIES,
    ),
    row(
        "get_logprobs",
        "missing-shard",
        "{tmp}/model lacks 2.safetensors, which model.safetensors.index.json names; copy or download it again",
        prepare=replace("model.safetensors.index.json", b'{"weight_map": {"w": "2.safetensors"}}'),
        **COPIES,
    ),
    row(
        "get_logprobs",
        "config",
        "{tmp}/model/config.json " + DAMAGED("it is not a JSON object"),
        prepare=replace("config.json", b"[]"),
        **COPIES,
    ),
    row(
        "get_logprobs",
        "shapes",
        "model {tmp}/model does not load: its weights do not have the shapes of its config.json",
        prepare=model(narrower),
        leaves=["out.jsonl.last.partial"],
        **COPIES,
    ),
    row(
        "inpo",
        "another-models-weights",
        "model {tmp}/model does not load: its files lack weights, first lm_head.weight",
        prepare=model(one_tensor),
        **COPY,
    ),
    row(
        "inpo",
        "bin",
        "model {tmp}/model does not load: unpack requires a buffer of 4 bytes",
        prepare=model(only_bin),
        **COPY,
    ),
    row(
        "inpo",
        "no-weights",
        "{tmp}/model has a config.json but no weights (*.safetensors, *.bin)",
        prepare=remove("model.safetensors"),
        **COPY,
    ),
    row("mle", "half-a-file", HALF, prepare=model(half_the_weights), **COPY),
    # ---- tokenizers
    row("get_logprobs", "another-tokenizer", ANOTHER, tokenizer="{judge}"),
    row("get_logprobs", "another-reference", OTHER_REFERENCE, reference="{judge}"),
    row("dpo", "another-tokenizer", ANOTHER, tokenizer="{judge}"),
    row(
        "sampling",
        "another-tokenizer",
        "worker 0 (CPU, pid N) failed:\n" + ANOTHER,
        tokenizer="{judge}",
        leaves=["out.jsonl.partial"],
    ),
    row(
        "mle",
        "no-tokenizer",
        "no tokenizer in {tmp}/model; name one with --tokenizer (--judge_tokenizer)",
        prepare=remove("tokenizer.json"),
        **COPY,
    ),
    row(
        "mle",
        "tokenizer",
        "no tokenizer in {tmp}/model (Expecting property name enclosed in double quotes: line 1 "
        "column 2 (char 1)); name one with --tokenizer (--judge_tokenizer)",
        prepare=replace("tokenizer.json", b"{"),
        **COPY,
    ),
    row(
        "mle",
        "no-chat-template",
        "the tokenizer of {tmp}/model has no chat template; name another one with --tokenizer",
        prepare=remove("chat_template.jinja"),
        **COPY,
    ),
    row(
        "mle",
        "chat-template",
        "the chat template of {tmp}/model does not work: Expected an expression, got 'end of statement block'",
        prepare=replace("chat_template.jinja", b"{% for %}"),
        **COPY,
    ),
    # ---- flags
    row("sampling", "unknown-flag", "unknown flag --modle; did you mean --model?", code=2, words=["--modle", "x"]),
    row("scoring", "unknown-flag", "unknown flag --nothing; see scoring.py --help", code=2, words=["--nothing", "x"]),
    row("make_pairs", "word", "unexpected argument 'x'; every setting is a --flag", code=2, words=["x"]),
    row("inpo", "missing-flag", "missing --output; see inpo.py --help", code=2, output=...),
    row("ipo", "no-value", "--seed needs a value", code=2, words=["--seed"]),
    row("dpo", "flag-twice", "--model is given twice", code=2, words=["--model", "x"]),
    row("sampling", "text-for-int", "--seed takes int, got 'x'", code=2, seed="x"),
    row("mle", "fraction-for-int", "--num_epochs takes int, got '1.5'", code=2, num_epochs="1.5"),
    row("inpo", "text-for-float", "--eta takes float, got '1/3'", code=2, eta="1/3"),
    row("inpo", "text-for-bool", "--soft_labels takes bool, got 'maybe'", code=2, soft_labels="maybe"),
    row("inpo", "infinite-eta", "--eta takes float, got 'inf'", code=2, eta="inf"),
    row("inpo", "eta-0", "--eta should be greater than 0, got 0.0", eta=0),
    row("ipo", "eta-negative", "--eta should be greater than 0, got -1.0", eta=-1),
    row("dpo", "beta-0", "--beta should be greater than 0, got 0.0", beta=0),
    row("inpo", "ratio", "--tau_eta_ratio should be between 0 and 1, got 2.0", tau_eta_ratio=2),
    row("mle", "learning-rate", "--learning_rate should be greater than 0, got 0.0", learning_rate=0),
    row("mle", "weight-decay", "--weight_decay should be at least 0, got -1.0", weight_decay=-1),
    row("mle", "max-grad-norm", "--max_grad_norm should be at least 0, got -1.0", max_grad_norm=-1),
    row("inpo", "tolerance", "--start_tolerance should be at least 0, got -1.0", start_tolerance=-1),
    row("mle", "seed", "--seed should be between 0 and 4294967295, got -1", seed=-1),
    row("mle", "select", "--select should be best or last, got worst", select="worst"),
    row("inpo", "output", "{tmp} exists and is not a training run's; choose another --output", output="{tmp}"),
    row("make_pairs", "rule", "--pair_rule should be one of top_two, best_worst, random, got worst", pair_rule="worst"),
    row(
        "make_pairs",
        "two-inputs",
        "these flags need one file each, or equally long comma-separated lists: --input has 2, --output has 1",
        input=f"{IN},{IN}",
    ),
    row(
        "make_pairs",
        "output-is-input",
        "--output {tmp}/in.jsonl is written twice or is also an input; give another name",
        output=IN,
    ),
    row("sampling", "k-0", "--num_samples should be at least 1, got 0", num_samples=0),
    row("sampling", "k-too-large", "--num_samples should be at most 4096, got 4097", num_samples=4097),
    row("sampling", "temperature", "--temperature should be at least 0, got -1", temperature=-1),
    row("sampling", "nan-temperature", "--temperature takes numbers (float), got 'nan'", temperature="nan"),
    row("generate", "temperature", "--temperature should be at least 0, got -1.0", temperature=-1),
    row("sampling", "top-p", "--top_p should be greater than 0 and at most 1, got 1.1", top_p=1.1),
    row("sampling", "no-new-tokens", "--max_new_tokens should be at least 1, got 0", max_new_tokens=0),
    row("sampling", "no-prompt-tokens", "--max_prompt_tokens should be at least 1, got 0", max_prompt_tokens=0),
    row("scoring", "no-prompt-tokens", "--max_prompt_tokens should be at least 1, got 0", max_prompt_tokens=0),
    row("scoring", "dtype", "--dtype should be one of auto, bfloat16, float16, float32, got int8", dtype="int8"),
    row(
        "scoring",
        "memory",
        "--gpu_memory_utilization should be greater than 0 and at most 1, got 0.0",
        gpu_memory_utilization=0,
    ),
    row("scoring", "labels", "--labels should be two different answers, comma-separated, got 'a'", labels="a"),
    row("sampling", "gpus", "--gpus names 97, but CUDA_VISIBLE_DEVICES allows none", gpus="97"),
    row("scoring", "gpus", "--gpus names 0,1, but CUDA_VISIBLE_DEVICES allows none", gpus="0,1"),
    row(
        "generate",
        "no-workers",
        "--gpus auto, --gpus_per_worker 1, --cpu_workers 0: each GPU may be named once, and "
        "the numbers should be at least 1",
        cpu_workers=0,
    ),
    row("generate", "no-output", "--output should name a file", input="", output=""),
]


@pytest.mark.parametrize("name, records, files, prepare, flags, words, code, expected, leaves", ROWS)
def test_refused(
    stage,
    places,
    setting,
    name,
    records,
    files,
    prepare,
    flags,
    words,
    code,
    expected,
    leaves,
):
    script, _, valid = STAGES[name]
    (stage.folder / "in.jsonl").write_bytes(content(records or [valid]))
    for file, lines in files.items():
        (stage.folder / file).write_bytes(content(lines))
    if prepare:
        prepare(stage.folder, places)
    before = stage.files()
    done = stage.run(name, words=words, **flags)
    off = max(
        abs(record[f"last_{side}_logp"] - record[f"ref_{side}_logp"])
        for record in setting.records
        for side in ("chosen", "rejected")
    )
    script = script if code == 1 or " " in script else script.split()[0]
    check_refused(done, script, code, expected.replace("{off}", f"{off:.3g}"))
    left = stage.files() - before
    assert {path.partition("/")[0] for path in left} == set(leaves) and not left & {"ckpt/model", "ckpt/DONE"}
    if not leaves:  # neither a worker nor training was started
        assert " on CPU" not in done.stderr and "global batch" not in done.stderr


# ---------------------------------------------------------------------------------------------- what no row can say


@pytest.fixture
def public(stage):
    """The stage with a folder that every user can reach, and a user who may not do everything."""
    with tempfile.TemporaryDirectory(prefix="comal-") as folder:
        stage.folder = Path(folder)
        stage.folder.chmod(0o755)
        stage.uid = 65534 if os.getuid() == 0 else 0
        yield stage
        stage.folder.chmod(0o755)


def test_no_permission_to_read(public):
    (public.folder / "in.jsonl").write_bytes(content([SCORES]))
    (public.folder / "in.jsonl").chmod(0)
    done = public.run("make_pairs", uid=public.uid)
    check_refused(done, "data_processing.py make_pairs", 1, "Permission denied ({tmp}/in.jsonl)")
    assert public.files() == {"in.jsonl"}


def test_no_permission_to_write(public):
    (public.folder / "in.jsonl").write_bytes(content([SCORES]))
    public.folder.chmod(0o555)
    done = public.run("make_pairs", uid=public.uid)
    check_refused(done, "data_processing.py make_pairs", 1, "Permission denied ({tmp}/out.jsonl.tmp)")
    assert public.files() == {"in.jsonl"}


# ---------------------------------------------------------------------------------------------- what is accepted

LINE_ENDS = "a\u2028b\u2029c\u0085d"


@pytest.mark.parametrize(
    "lines",
    [
        pytest.param([b"\xef\xbb\xbf", SCORES, but(SCORES)], id="byte-order-mark"),
        pytest.param([content([SCORES, but(SCORES)]).replace(b"\n", b"\r\n")], id="carriage-returns"),
        pytest.param([b"\n", SCORES, b"\n \r\n\n", but(SCORES)], id="blank-lines"),
        pytest.param([SCORES, content([but(SCORES)]).rstrip()], id="no-last-line-break"),
    ],
)
def test_make_pairs_overlooks_what_editors_leave(stage, lines):
    done = stage.run("make_pairs", *lines)
    assert done.code == 0, done.stderr
    assert read(stage.folder / "out.jsonl") == [PAIR, but(PAIR)]


@pytest.mark.parametrize("prompt", [LINE_ENDS, "\U0001f600", "<|im_end|>\n<|im_start|>assistant", "\x00\x1f", " x "])
@pytest.mark.parametrize("escaped", [True, False])
def test_make_pairs_keeps_every_prompt(stage, prompt, escaped):
    done = stage.run("make_pairs", json.dumps(SCORES | {"prompt": prompt}, ensure_ascii=escaped).encode() + b"\n")
    assert done.code == 0, done.stderr
    lines = (stage.folder / "out.jsonl").read_bytes().decode().split("\n")
    assert [json.loads(line) for line in lines[:-1]] == [PAIR | {"prompt": [message("user", prompt)]}]


def test_make_prompts_keeps_line_ends_inside_prompts(stage):
    texts = {LINE_ENDS, "x", "y"}
    lines = (json.dumps({"prompt": text}).encode() + b"\r\n\r\n" for text in texts)
    done = stage.run("make_prompts", b"\xef\xbb\xbf", *lines)
    assert done.code == 0, done.stderr
    lines = b"".join((stage.folder / f"prompts/{name}.jsonl").read_bytes() for name in ("train", "test")).decode()
    assert {json.loads(line)["prompt"] for line in lines.split("\n")[:-1]} == texts


def test_make_prompts_reads_parquet(stage):
    import datasets

    datasets.Dataset.from_list([{"prompt": "x"}, {"prompt": "y"}]).to_parquet(stage.folder / "in.parquet")
    done = stage.run("make_prompts", local_file="{tmp}/in.parquet")
    assert done.code == 0, done.stderr


def test_special_spellings_in_pairs_stay_text(stage, setting):
    spelling = "<|im_end|>\n<|im_start|>user\nsea<|endoftext|>"
    pair = {
        "prompt": [message("user", spelling)],
        "chosen": [message("assistant", spelling)],
        "rejected": [message("assistant", "x\u2028y")],
    }
    done = stage.run("get_logprobs", b"\xef\xbb\xbf", pair)
    assert done.code == 0, done.stderr
    (record,) = [json.loads(line) for line in (stage.folder / "out.jsonl").read_bytes().split(b"\n")[:-1]]
    assert {name: record[name] for name in pair} == pair
    special = range(3)  # <|endoftext|>, <|im_start|>, <|im_end|>
    assert [token for token in record["prompt_token_ids"] if token in special] == [1, END, 1]  # the template's own
    assert [token for token in record["chosen_token_ids"] if token in special] == [END]
    assert setting.tokenizer.decode(record["chosen_token_ids"][:-1]) == spelling
    assert record["last_chosen_logp"] == record["ref_chosen_logp"] < 0


def test_numbers_as_ids_become_text(stage):  # written as a number, which training refuses
    done = stage.run("get_logprobs", PAIR | {"prompt_id": 7})
    assert done.code == 0, done.stderr
    assert [record["prompt_id"] for record in read(stage.folder / "out.jsonl")] == ["7"]


def test_settings_of_nothing_do_not_matter(stage):  # a wrong flag that was refused late forbids the right one
    (stage.folder / "out.jsonl.last.partial").write_text('{"made_with": {"model": "another"}}\n')
    done = stage.run("get_logprobs", PAIR)
    assert done.code == 0, done.stderr


def test_log_probabilities_of_some_pairs_do_not_matter(stage):  # KeyError
    done = stage.run("get_logprobs", PAIR | {"last_chosen_logp": -1.0}, but(PAIR), micro_batch_tokens=999)
    assert done.code == 0, done.stderr
    first, second = read(stage.folder / "out.jsonl")
    assert first["last_chosen_logp"] == second["last_chosen_logp"] != -1


@on_cpu
def test_long_prompts_are_skipped_and_special_spellings_stay_text(stage, setting):
    """One start of the engine: a file with one prompt of 100,000 tokens among others, and a file with nothing else."""
    spelling = "<|im_end|>\n<|im_start|>assistant\nsea<|im_end|>"
    (stage.folder / "long.jsonl").write_bytes(content([{"prompt_id": "long", "prompt": "!?" * 50_000}]))
    done = stage.run(
        "sampling",
        PROMPT,
        {"prompt_id": "long", "prompt": "!?" * 50_000},
        but(PROMPT, prompt=spelling),
        input=f"{IN},{{tmp}}/long.jsonl",
        output="{tmp}/out.jsonl,{tmp}/none.jsonl",
        seconds=120,
        num_samples=2,
        max_prompt_tokens=100,
        max_new_tokens=4,
    )
    check_refused(done, "sampling.py", 1, "every record of {tmp}/none.jsonl was skipped; see {tmp}/none.skipped.jsonl")
    skipped = {"prompt_id": "long", "skipped": "the prompt has 100011 tokens, --max_prompt_tokens is 100"}
    assert read(stage.folder / "out.skipped.jsonl") == read(stage.folder / "none.skipped.jsonl") == [skipped]
    records = read(stage.folder / "out.jsonl")
    assert [record["prompt_id"] for record in records] == ["a", "b"]
    for record, prompt in zip(records, ("where?", spelling)):
        assert (
            setting.tokenizer.decode(record["prompt_token_ids"])
            == f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
        )
        assert sum(token < 3 for token in record["prompt_token_ids"]) == 3 and len(record["samples"]) == 2


@on_cpu
def test_compare_takes_responses_without_token_ids(stage):  # KeyError when all is judged
    """As the docstring of eval.py says; the second and last engine of this file."""
    (stage.folder / "baseline.jsonl").write_bytes(content([PROMPT | {"samples": [{"text": "city"}]}]))
    done = stage.run("compare", PROMPT | {"samples": [{"text": "sea"}]}, seconds=120, max_prompt_tokens=1000)
    assert done.code == 0, done.stderr
    summary = json.loads((stage.folder / "out.json").read_text())
    assert (summary["num_prompts"], summary["mean_characters"]) == (1, [3, 4])
