"""comal.sh --prepare, and runs without a network after it: the demo's models, fitted briefly, as local folders and in a
cache of the Hub.

python -m pytest tests/test_prepare.py
"""

import json
import os
import re
import shutil
import subprocess
import sys
import uuid

import pytest
from helpers.loop import ROOT, environment

COMMIT = "0123456789abcdef0123456789abcdef01234567"
WITHOUT_NETWORK = ["unshare", "--net", "bash", "-c", 'ip link set lo up 2>/dev/null; exec "$@"', "-"]


def in_cache(cache, name, files):
    """A repository in a folder laid out as the Hub's cache: {path in the repository: file}."""
    repository = cache / f"models--{name.replace('/', '--')}"
    (repository / "blobs").mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(COMMIT)
    for number, (path, source) in enumerate(files.items()):
        blob, link = repository / "blobs" / f"{number:040x}", repository / "snapshots" / COMMIT / path
        shutil.copy(source, blob)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))


@pytest.fixture(scope="module")
def cache(demo_models, tmp_path_factory):
    """A cache with our/policy-round5 and -round4, as the published checkpoints (files in model/, no tokenizer), their
    tokenizer our/base without weights, and our/judge with its files at the root."""
    cache = tmp_path_factory.mktemp("hub")
    policy, judge = demo_models / "policy/model", demo_models / "judge/model"
    names = ("config.json", "generation_config.json", "model.safetensors")
    model = {f"model/{name}": policy / name for name in names if (policy / name).exists()}
    assert len(model) >= 2
    for number in (4, 5):
        in_cache(cache, f"our/policy-round{number}", model)
    in_cache(cache, "our/base", {path.name: path for path in policy.iterdir() if path.name not in names})
    in_cache(cache, "our/judge", {path.name: path for path in judge.iterdir()})
    return cache


ON_HUB = {
    "MODEL": "our/policy-round5",
    "REFERENCE": "our/policy-round4",
    "TOKENIZER": "our/base",
    "JUDGE": "our/judge",
}


@pytest.fixture
def comal(demo_models):
    """A function that runs comal.sh with the demo's settings, in an experiment of its own."""
    name = f"test-{uuid.uuid4().hex[:8]}"

    def run(*arguments, prefix=(), **settings):
        given = {
            "RECIPE": "demo",
            "NAME": name,
            "DEMO_MODELS": str(demo_models),
            "PYTHON": sys.executable,
            "GPUS": "none",
        }
        given |= {"ROUNDS": "1", "SPLITS": "2", "MAX_JUDGE_TOKENS": "1000"}
        done = subprocess.run(
            [*prefix, "bash", "comal.sh", *arguments],
            cwd=ROOT,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=600,
            env=environment(**given | settings),
        )
        return done.stdout, done.returncode

    run.exp = ROOT / "exps" / name
    yield run
    shutil.rmtree(run.exp, ignore_errors=True)


def listed(output):
    """{(kind, name): the rest of its line} of what prepare.py prints."""
    lines = (re.match(r"(model|tokenizer|judge|prompts) +([^ ]+?)(?: in|:) (.*)", line) for line in output.splitlines())
    return {(line[1], line[2]): line[3] for line in lines if line}


def test_local_models_and_prompts_are_checked_and_measured(comal, demo_models):
    output, code = comal("--prepare")
    assert code == 0, output
    found = listed(output)
    prompts = [f"{demo_models}/prompts/{name}.jsonl" for name in ("train_0", "train_1", "test", "eval")]
    models = [("model", f"{demo_models}/policy"), ("judge", f"{demo_models}/judge")]
    assert list(found) == [*models, *(("prompts", path) for path in prompts)], output
    size = sum(path.stat().st_size for path in (demo_models / "policy/model").iterdir())
    assert found[models[0]] == f"{demo_models}/policy/model: {size / 2**20:.1f} MiB"
    assert found["prompts", prompts[0]].startswith("32 prompts, ")
    assert re.search(r"^together +\d+\.\d MiB$", output, re.M) and "HF_HUB_OFFLINE=1" in output.splitlines()[-1]
    assert not list(comal.exp.glob("iter*")) and not (comal.exp / "run.json").exists()


def test_what_the_hub_has_is_found_in_its_cache(comal, cache):
    settings = ON_HUB | {"HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1", "FIRST_ITERATION": "1"}
    output, code = comal("--prepare", **settings)
    assert code == 0, output
    found = listed(output)
    kinds = {**dict.fromkeys(("MODEL", "REFERENCE"), "model"), "TOKENIZER": "tokenizer", "JUDGE": "judge"}
    assert list(found)[:4] == [(kinds[name], ON_HUB[name]) for name in kinds]
    folder = f"{cache}/models--our--policy-round5/snapshots/{COMMIT}/model: "
    assert found["model", "our/policy-round5"].startswith(folder)
    plan = comal("--plan", **settings)[0]
    assert "# disk: checkpoints 1 x" in plan, plan  # its weights were found for the estimate too


@pytest.mark.parametrize(
    "setting, message",
    [
        ({"REFERENCE": "our/none"}, "model our/none: no such directory, and the Hub did not provide it"),
        ({"TOKENIZER": ""}, "no tokenizer in"),
        ({"JUDGE": "our/judge,our/none"}, "model our/none: no such directory, and the Hub did not provide it"),
        ({"JUDGE_FLAGS": "--judge_tokenizer our/none"}, "model our/none: no such directory"),
        ({"JUDGE_FLAGS": "--labls x"}, "did you mean --labels?"),
        ({"ENGINE_ARGS": '{"max_seqs": 8}'}, "ENGINE_ARGS: vLLM's engine has no argument max_seqs; did you mean "),
        ({"JUDGE_ENGINE_ARGS": '{"quantisation": "fp8"}'}, "did you mean quantization?"),
    ],
)
def test_what_is_not_there_is_named(comal, cache, setting, message):
    output, code = comal("--prepare", **ON_HUB | {"HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1"} | setting)
    assert code == 1 and message in output and "everything that the run needs is here" not in output, output


def test_damaged_weights_are_refused(comal, demo_models, tmp_path):
    shutil.copytree(demo_models / "judge/model", tmp_path / "judge")
    with open(tmp_path / "judge/model.safetensors", "r+b") as file:
        file.truncate(10_000)
    output, code = comal("--prepare", JUDGE=str(tmp_path / "judge"))
    assert code == 1 and "model.safetensors is damaged" in output, output


def test_a_server_has_nothing_to_fetch(comal):
    output, code = comal("--prepare", JUDGE="some-model", JUDGE_TYPE="server", API_BASE="http://127.0.0.1:9/v1")
    assert code == 0 and listed(output)["judge", "some-model"] == "runs elsewhere, nothing to fetch", output


def test_gpus_of_the_run_need_not_be_here(comal, demo_models):
    """On a login node: the full recipe, with prompts that are there."""
    prompts = demo_models / "prompts"
    settings = {"RECIPE": "full", "GPUS": "0,1,2,3", "TENSOR_PARALLEL_SIZE": "2", "TOKENIZER": ""}
    settings |= {"MODEL": str(demo_models / "policy"), "JUDGE": str(demo_models / "judge")}
    output, code = comal("--prepare", **settings, PROMPTS_DIR=str(prompts), EVAL_PROMPTS=str(prompts / "eval.jsonl"))
    assert code == 0 and "everything that the run needs is here" in output, output


# ---------------------------------------------------------------------------------------------- without a network


def test_there_is_no_network_in_a_namespace_of_its_own():
    """That the test below means something."""
    if subprocess.run([*WITHOUT_NETWORK, "true"], capture_output=True).returncode:
        pytest.skip("this process may not make a network namespace")
    interfaces = subprocess.run([*WITHOUT_NETWORK, "cat", "/proc/net/dev"], text=True, capture_output=True).stdout
    assert re.findall(r"^ *(\w+):", interfaces, re.M) == ["lo"]


@pytest.mark.slow
@pytest.mark.cpu_engine
def test_a_run_that_goes_on_from_checkpoints_needs_no_network(comal, cache):
    """The last iteration of a round from a policy and a reference of the Hub's cache, with real engines."""
    if subprocess.run([*WITHOUT_NETWORK, "true"], capture_output=True).returncode:
        pytest.skip("this process may not make a network namespace")
    settings = ON_HUB | {"FIRST_ITERATION": "1", "KL_FROM_START": "true", "NUM_EPOCHS": "1"}
    settings |= {"HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    output, code = comal(prefix=WITHOUT_NETWORK, **settings)
    assert code == 0 and "=== iteration 1 of 2" in output and "=== iteration 0 of" not in output, output[-4000:]
    run = json.loads((comal.exp / "run.json").read_text())
    assert (run["FIRST_ITERATION"], run["REFERENCE"]) == ("1", "our/policy-round4")
    first = json.loads((comal.exp / "iter1/ckpt/metrics.jsonl").read_text().splitlines()[0])
    assert first["normalised_loss"] == pytest.approx(1, abs=1e-3)  # the pairs' log-probabilities are the policy's
    assert (comal.exp / "round1").resolve() == (comal.exp / "iter1/ckpt").resolve()
    (experiment,) = json.loads((comal.exp / "report/summary.json").read_text())["experiments"]
    (row,) = experiment["iterations"]
    assert row["iteration"] == 1 and row["kl_start"] is not None and row["win_rate_start"] is not None
    assert row["win_rate_start"] == row["win_rate_previous"]  # the policy before is the initial one
    assert experiment["start"]["response_tokens"] and not row["reference_moved"]
    matrix = json.loads((comal.exp / "matrix/iter1.json").read_text())
    assert matrix["names"] == ["start", "iter1"]
    tokenizers = {path.name for path in (comal.exp / "iter1/ckpt/model").glob("tokenizer*")}
    assert "tokenizer.json" in tokenizers  # it is saved beside the weights, which came without one
