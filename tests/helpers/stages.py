"""Stages as the tests of their input run them: the scripts as they are, on the CPU, each in a process of its own.

It is forked from one that has imported PyTorch, which alone would take seconds.
"""

import multiprocessing
import os
import re
import runpy
import sys
from types import SimpleNamespace

import pytest
import torch

from helpers.examples import CHAT, DATA, PAIR, PROMPT, SAMPLES, SCORES, content
from helpers.training import ROOT, save_model

# Imported once, by the process from which those of the cases are forked.
PRELOAD = [
    "helpers.preload",
    "torch",
    "torch.distributed.checkpoint.api",
    "accelerate.utils",
    "datasets",
    "numpy",
    "tqdm",
    "safetensors.torch",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.auto.modeling_auto",
    "transformers.models.qwen2.modeling_qwen2",
    "transformers.generation.utils",
]
SECONDS = 60  # for a refusal; they take less than one, or start a worker in six

FILES = {"input": "{tmp}/in.jsonl", "output": "{tmp}/out.jsonl"}
LOCAL = {"local_file": "{tmp}/in.jsonl"}
PROMPTS = LOCAL | {"output_dir": "{tmp}/prompts", "field": "prompt", "num_splits": 1, "num_test": 1}
SFT = LOCAL | {"output": "{tmp}/sft.jsonl", "validation_output": "{tmp}/test.jsonl", "num_validation": 1}
TRAIN = {"model": "{policy}", "input": "{tmp}/in.jsonl", "output": "{tmp}/ckpt"}
COMPARE = {"responses": "{tmp}/in.jsonl", "baseline": "{tmp}/baseline.jsonl", "output": "{tmp}/out.jsonl"}
STAGES = {  # the script, its flags, a valid record
    "sampling": ("sampling.py", FILES | {"model": "{policy}"}, PROMPT),
    "scoring": ("scoring.py", FILES | {"judge": "{judge}"}, SAMPLES),
    "make_pairs": ("data_processing.py make_pairs", FILES, SCORES),
    "make_prompts": ("data_processing.py make_prompts", PROMPTS, PROMPT),
    "make_sft": ("data_processing.py make_sft", SFT, CHAT),
    "get_logprobs": ("get_logprobs.py", FILES | {"model": "{policy}", "reference": "{policy}"}, PAIR),
    "inpo": ("inpo.py", TRAIN, DATA),
    "ipo": ("ipo.py", TRAIN, DATA),
    "dpo": ("dpo.py", TRAIN, DATA),
    "mle": ("mle.py", TRAIN, CHAT),
    "generate": ("eval.py generate", FILES | {"model": "{policy}"}, PROMPT),
    "compare": ("eval.py compare", COMPARE | {"judge": "{judge}"}, SAMPLES),
}


def check_refused(stage, done, name, code, expected):
    """The exit code, and that the last thing printed is one short message with each of the `expected` words, which
    " | " separates: as a whole word, so that `prompt` is not found in `prompt_id`, nor `1` in `1.5`."""
    printed, script = done.stderr, STAGES[name][0]
    _, found, said = printed.rpartition(f"\n{script}: error: ")
    assert "Traceback" not in printed and found and done.code == code, printed
    assert len(said) < 600 and said.count("\n") <= 2, said
    for words in stage.fill(expected).split(" | "):
        assert re.search(rf"(?<![\w.-]){re.escape(words)}(?!\w|[.,/-]\w)", said), (words, said)


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


@pytest.fixture(scope="module", name="context")
def context_fixture():
    """Starts processes as forks of one that has imported the heavy packages, on the CPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        patch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{ROOT / 'tests'}")  # where it finds helpers.preload
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        first = context.Process(target=os.getpid)  # returns when all is imported
        first.start()
        first.join()
        yield context


@pytest.fixture(scope="module", name="places")
def places_fixture(setting, model_dirs, tmp_path_factory):
    """What {policy}, {reference}, {judge} and {data} stand for in flags and in expected words, and {off} and {tokens}:
    by how much the stored log-probabilities of the one model differ from those of the other where they differ most for
    the response's length, and this length."""
    judge = save_model(tmp_path_factory.mktemp("judge"), model_dirs["judge"], 2)
    sides = ("chosen", "rejected")
    logps = [(record[f"last_{side}_logp"], record[f"ref_{side}_logp"]) for record in setting.records for side in sides]
    counts = [len(record[f"{side}_token_ids"]) for record in setting.records for side in sides]
    found = [(abs(last - reference), tokens) for (last, reference), tokens in zip(logps, counts)]
    off, tokens = max(found, key=lambda one: one[0] / one[1] ** 0.5)
    models = {"policy": setting.policy, "reference": setting.reference, "judge": judge}
    return models | {"data": setting.data, "off": f"{off:.3g}", "tokens": str(tokens)}


@pytest.fixture(name="stage")
def stage_fixture(context, places, tmp_path):
    """An object that runs a stage. `folder` is {tmp}, `files()` what is in it, `fill(text)` puts in what {tmp} and the
    places stand for."""
    folder, logs = tmp_path / "files", tmp_path / "logs"
    folder.mkdir()
    logs.mkdir()

    def fill(text):
        known = {"tmp": str(stage.folder)} | places
        return re.sub(r"\{(\w+)\}", lambda match: known.get(match[1], match[0]), text)

    def run(name, *records, seconds=SECONDS, uid=0, argv=(), **flags):
        """Write the records to in.jsonl, if there are any, and run the stage: its exit code and stderr."""
        if records:
            (stage.folder / "in.jsonl").write_bytes(content(records))
        script, defaults, _ = STAGES[name]
        given = {flag: value for flag, value in (defaults | flags).items() if value is not ...}
        words = [*script.split(), *(f"--{flag}={value}" for flag, value in given.items()), *argv]
        process = context.Process(target=run_script, args=([fill(word) for word in words], logs, uid))
        process.start()
        process.join(seconds)
        if process.exitcode is None:
            process.kill()
            process.join()
        return SimpleNamespace(code=process.exitcode, stderr=(logs / "stderr").read_text())

    stage = SimpleNamespace(
        folder=folder,
        fill=fill,
        run=run,
        files=lambda: {str(path.relative_to(stage.folder)) for path in stage.folder.rglob("*")},
    )
    return stage
