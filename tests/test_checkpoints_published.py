"""The published checkpoints, with tiny models through the real engines: as local folders, in the Hub's cache without a
network, and behind a mirror of the Hub.

python -m pytest tests/test_checkpoints_published.py
"""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from helpers.loop import ROOT
from helpers.mirror import COMMIT, mirror
from safetensors.torch import load_file, save_file

from analysis.outside import read_outputs
from data_utils import load_tokenizer, resolve_model

NUM_PROMPTS = 6


@pytest.fixture(scope="module")
def published(demo_models, tmp_path_factory):
    """A folder of repositories as the Hub's: two checkpoints with their files in `model/` and no tokenizer."""
    root = tmp_path_factory.mktemp("published")
    policy = resolve_model(str(demo_models / "policy"))
    weights = load_file(f"{policy}/model.safetensors")
    torch.manual_seed(0)
    for number in (3, 4):
        folder = root / f"lab/tiny-1.5b-round{number}/model"
        folder.mkdir(parents=True)
        shutil.copy(f"{policy}/config.json", folder)
        noisy = {name: weight + 0.02 * torch.randn_like(weight) for name, weight in weights.items()}
        save_file(noisy, folder / "model.safetensors", metadata={"format": "pt"})
    (root / "lab/tiny-1.5b-round4/model/training.pth").write_bytes(b"the trainer's state, which nothing here reads")
    return root


@pytest.fixture(scope="module")
def matrix(demo_models, tmp_path_factory):
    """A function that runs `eval.py matrix` for models and returns what it logged and what it printed; all with the
    same output, prompts and tokenizer."""
    output = tmp_path_factory.mktemp("eval") / "matrix.json"
    prompts = output.with_name("prompts.jsonl")
    prompts.write_text("".join((demo_models / "prompts/eval.jsonl").read_text().splitlines(True)[:NUM_PROMPTS]))
    flags = ["--gpus", "auto" if torch.cuda.is_available() else "none", "--max_new_tokens", "24", "--temperature", "1"]
    flags += ["--input", prompts, "--tokenizer", demo_models / "policy", "--judge", demo_models / "judge"]

    def run(*models, **environment):
        words = ["eval.py", "matrix", "--output", output, "--models", ",".join(models), *flags]
        done = run_python(*words, **environment)
        return done.stderr, done.stdout, json.loads(output.read_text())

    return run


def run_python(*words, **environment):
    words = [sys.executable, *map(str, words)]
    done = subprocess.run(
        words, cwd=ROOT, env=os.environ | environment, text=True, capture_output=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.slow
def test_a_local_folder_and_a_model_behind_a_mirror_play_and_are_known_again(published, matrix, tmp_path):
    local, hub = f"{published}/lab/tiny-1.5b-round3", "lab/tiny-1.5b-round4"
    with mirror(published) as (address, downloaded):
        online = {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": address}
        log, printed, result = matrix(local, hub, **online)
    assert "models: 2, with responses from before: 0" in log
    assert "comparisons: 1, judged before: 0" in log
    assert log.count("1 worker on ") == 3  # both models and the judge
    named = re.findall(r"(\S+) against (\S+): win rate", log)  # by the models' names, and not by the files' hashes
    assert len(named) == 1 and set(named[0]) == set(result["names"]), named
    assert result["num_prompts"] == NUM_PROMPTS and len(result["responses"]) == 2
    assert "Best worst case: " in printed and "HTTP Request" not in log
    assert sorted(downloaded) == [f"{hub}/model/{file}" for file in ("config.json", "model.safetensors")]
    # Without a network, one from the Hub's cache and the other from a cache that was filled in another way: both are
    # recognised by their contents, wherever they come from.
    cached = tmp_path / "hub/models--lab--tiny-1.5b-round3"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs/main").write_text(COMMIT)
    shutil.copytree(published / "lab/tiny-1.5b-round3", cached / f"snapshots/{COMMIT}")
    log, _, again = matrix(hub, "lab/tiny-1.5b-round3", HF_HOME=str(tmp_path), HF_HUB_OFFLINE="1")
    assert "models: 2, with responses from before: 2" in log and "comparisons: 1, judged before: 1" in log
    assert "1 worker on " not in log
    assert again["names"] == ["tiny-1.5b-round4", "tiny-1.5b-round3"] and again["win"][0][1] == result["win"][1][0]


def test_what_a_mirror_serves_besides_checkpoints(tokenizers, model_dirs, tmp_path):
    """AlpacaEval's instructions and reference outputs, and the tokenizer of a base model without its weights."""
    rows = [{"instruction": f"Say {word}.", "output": word, "dataset": "x"} for word in ("sea", "city")]
    data, base = tmp_path / "hub/datasets/tatsu-lab/alpaca_eval", tmp_path / "hub/lab/tiny-base"
    data.mkdir(parents=True)
    for name in ("alpaca_eval", "alpaca_eval_gpt4_baseline"):
        (data / f"{name}.json").write_text(json.dumps(rows))
    shutil.copytree(model_dirs["policy"], base)
    (base / "model.safetensors").write_bytes(b"weights")
    with mirror(tmp_path / "hub") as (address, downloaded):
        hub = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": address}
        script = (
            "import eval, data_utils; eval.alpaca_eval('prompts.jsonl'); "
            "print(eval.alpaca_eval_file(eval.BASELINES['alpaca_eval_gpt4'], '')); "
            "print(data_utils.resolve_tokenizer('lab/tiny-base'))"
        ).replace("prompts.jsonl", str(tmp_path / "prompts.jsonl"))
        outputs, tokenizer = run_python("-c", script, **hub).stdout.split()
    prompts = [json.loads(line) for line in (tmp_path / "prompts.jsonl").read_text().splitlines()]
    assert [(row["prompt_id"], row["prompt"]) for row in prompts] == [
        ("alpaca_eval-0", "Say sea."),
        ("alpaca_eval-1", "Say city."),
    ]
    assert [record["samples"][0]["text"] for record in read_outputs(outputs)] == ["sea", "city"]
    assert load_tokenizer(tokenizer).get_vocab() == tokenizers["policy"].get_vocab()
    assert "lab/tiny-base/model.safetensors" not in downloaded


def test_what_the_hub_refuses_is_said(tmp_path):
    (tmp_path / "hub/lab/llama").mkdir(parents=True)
    (tmp_path / "hub/lab/llama/gated").touch()
    script = """
import data_utils
for name in ("lab/llama", "lab/none"):
    try:
        data_utils.resolve_model(name)
    except data_utils.StageError as error:
        print(error)
"""
    with mirror(tmp_path / "hub") as (address, _):
        hub = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": address}
        gated, unknown = run_python("-c", script, **hub).stdout.splitlines()
    assert gated.startswith("model lab/llama: ") and "it is gated; accept its licence" in gated
    assert unknown.startswith("model lab/none: ") and "it has none of this name" in unknown


def test_the_costs_in_the_docs_are_what_they_say():
    """Judgements are prompts x pairs x 2, starts the models and one judge, disk 2 bytes a parameter."""
    page = (ROOT / "docs/checkpoints.md").read_text()
    names = page[page.index("models=$(echo") : page.index(" | tr ' ' ,)")].removeprefix("models=$(echo ")
    expanded = subprocess.run(
        ["bash", "-c", f"echo {names}"], text=True, capture_output=True, check=True
    ).stdout.split()
    assert len(expanded) == len(set(expanded)) == 26
    layer = 2 * 1536 * 1536 + 2 * 1536 * 256 + 1536 + 2 * 256 + 3 * 1536 * 8960 + 2 * 1536  # Qwen2-1.5B
    policy = 151_936 * 1536 + 28 * layer + 1536  # the output layer is the input's
    layer = 2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14_336 + 2 * 4096  # Llama-3-8B
    judge = 2 * 128_256 * 4096 + 32 * layer + 4096
    assert f"{policy:,} parameters" in page and f"{judge:,};" in page
    rows = [line.strip("| ").split(" | ") for line in page.split("## What it costs")[1].splitlines() if " GB" in line]
    for name, *cells, disk in rows[:4]:
        models, pairs, judgements, starts = (int(cell.replace(",", "")) for cell in cells)
        if "more" in name or "AlpacaEval" in name:
            assert (models, pairs) == (1, 26 if "more" in name else 1)
        else:
            assert pairs == models * (models - 1) // 2
        assert (judgements, starts) == (805 * pairs * 2, models + 1)
        assert disk.split(" + ")[0] == f"{models * 2 * policy / 1e9:.1f} GB"
    assert f"{2 * judge / 1e9:.1f} GB" in page and f"({26 * 4 * policy / 1e9:.0f} GB" in page
