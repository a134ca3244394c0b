"""comal.sh --prepare, with small random models as local folders and in a cache of the Hub. A run without a network
after it: tests/test_end_to_end.py.

python -m pytest tests/test_prepare.py
"""

import re
import shutil
import subprocess
import sys
import uuid

import pytest
from helpers.hub import COMMIT, ON_HUB, fill_cache
from helpers.loop import ROOT, STAGE, environment
from helpers.training import save_model

from launch import prepare
from utils import StageError

PROMPTS = ("train_0", "train_1", "test", "eval")


@pytest.fixture(scope="module")
def models(model_dirs, tmp_path_factory):
    """What data/demo/build.sh makes, with random weights: policy, judge and prompts."""
    folder = tmp_path_factory.mktemp("demo")
    (folder / "prompts").mkdir()
    for seed, name in enumerate(("policy", "judge")):
        save_model(folder / f"{name}/model", model_dirs[name], seed)
        (folder / f"{name}/DONE").touch()
    for name in PROMPTS:
        lines = [f'{{"prompt_id": "{name}-{number}", "prompt": "Where to? {number}"}}\n' for number in range(32)]
        (folder / f"prompts/{name}.jsonl").write_text("".join(lines))
    return folder


@pytest.fixture(scope="module")
def on_hub(models, tmp_path_factory):
    """The settings of a run that takes all models from the Hub's cache."""
    return fill_cache(tmp_path_factory.mktemp("hub"), models)


@pytest.fixture
def comal(models):
    """A function that runs comal.sh with the demo's settings, in an experiment of its own."""
    name = f"test-{uuid.uuid4().hex[:8]}"

    def run(*arguments, **settings):
        given = {"RECIPE": "demo", "NAME": name, "DEMO_MODELS": str(models), "PYTHON": sys.executable, "GPUS": "none"}
        given |= {"ROUNDS": "1", "SPLITS": "2", "MAX_JUDGE_TOKENS": "1000"}
        done = subprocess.run(
            ["bash", "comal.sh", *arguments],
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


@pytest.fixture
def prepare_here(models, on_hub, monkeypatch):
    """A function that does in this process what comal.sh starts: prepare.fetch for a run from the Hub's cache."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", on_hub["HF_HUB_CACHE"])

    def run(**changed):
        given = {"models": f"{ON_HUB['MODEL']},{ON_HUB['REFERENCE']}", "tokenizer": ON_HUB["TOKENIZER"]}
        given |= {"judge": ON_HUB["JUDGE"], "gpus": "none", "template": str(ROOT / "prompts/offsetbias.txt")}
        prepare.fetch(**given | {"prompts": f"{models}/prompts/test.jsonl"} | changed)

    return run


def listed(output):
    """{(kind, name): the rest of its line} of what prepare.py prints."""
    lines = (re.match(r"(model|tokenizer|judge|prompts) +([^ ]+?)(?: in|:) (.*)", line) for line in output.splitlines())
    return {(line[1], line[2]): line[3] for line in lines if line}


def test_local_models_and_prompts_are_checked_and_measured(comal, models):
    output, code = comal("--prepare")
    assert code == 0, output
    found = listed(output)
    prompts = [f"{models}/prompts/{name}.jsonl" for name in PROMPTS]
    folders = [("model", f"{models}/policy"), ("judge", f"{models}/judge")]
    assert list(found) == [*folders, *(("prompts", path) for path in prompts)], output
    size = sum(path.stat().st_size for path in (models / "policy/model").iterdir())
    assert found[folders[0]] == f"{models}/policy/model: {size / 2**20:.1f} MiB"
    assert found["prompts", prompts[0]].startswith("32 prompts, ")
    assert re.search(r"^together +\d+\.\d MiB$", output, re.M) and "HF_HUB_OFFLINE=1" in output.splitlines()[-1]
    assert not list(comal.exp.glob("iter*")) and not (comal.exp / "run.json").exists()


def test_what_the_hub_has_is_found_in_its_cache(comal, prepare_here, on_hub, capsys):
    prepare_here()
    found = listed(capsys.readouterr().out)
    kinds = {**dict.fromkeys(("MODEL", "REFERENCE"), "model"), "TOKENIZER": "tokenizer", "JUDGE": "judge"}
    assert list(found)[:4] == [(kinds[name], ON_HUB[name]) for name in kinds]
    folder = f"{on_hub['HF_HUB_CACHE']}/models--our--policy-round5/snapshots/{COMMIT}/model: "
    assert found["model", "our/policy-round5"].startswith(folder)
    plan = comal("--plan", **on_hub | {"FIRST_ITERATION": "1"})[0]
    assert "# disk: checkpoints 1 x" in plan, plan  # its weights were found for the estimate too


@pytest.mark.parametrize(
    "setting, message",
    [
        ({"REFERENCE": "our/none"}, "model our/none: no such directory, and the Hub did not provide it"),
        ({"JUDGE_FLAGS": "--labls x"}, "did you mean --labels?"),
        ({"ENGINE_ARGS": '{"max_seqs": 8}'}, "ENGINE_ARGS: vLLM's engine has no argument max_seqs; did you mean "),
        ({"JUDGE_ENGINE_ARGS": '{"quantisation": "fp8"}'}, "did you mean quantization?"),
    ],
)
def test_what_is_not_there_ends_comal(comal, on_hub, setting, message):
    output, code = comal("--prepare", **on_hub | setting)
    assert code == 1 and message in output and "everything that the run needs is here" not in output, output


@pytest.mark.parametrize(
    "setting, message",
    [
        ({"tokenizer": ""}, "no tokenizer in"),
        ({"judge": "our/judge,our/none"}, "model our/none: no such directory, and the Hub did not provide it"),
        ({"judge_tokenizer": "our/none"}, "model our/none: no such directory"),
    ],
)
def test_what_is_not_there_is_named(prepare_here, setting, message):
    with pytest.raises(StageError, match=message):
        prepare_here(**setting)


def test_damaged_weights_are_refused(prepare_here, models, tmp_path):
    shutil.copytree(models / "judge/model", tmp_path / "judge")
    with open(tmp_path / "judge/model.safetensors", "r+b") as file:
        file.truncate(10_000)
    with pytest.raises(StageError, match="model.safetensors is damaged"):
        prepare_here(judge=str(tmp_path / "judge"))


def test_a_server_has_nothing_to_fetch(prepare_here, capsys):
    prepare_here(judge="some-model", judge_type="server", api_base="http://127.0.0.1:9/v1")
    assert listed(capsys.readouterr().out)["judge", "some-model"] == "runs elsewhere, nothing to fetch"


def test_gpus_of_the_run_need_not_be_here(comal, models, tmp_path):
    """On a login node: the full recipe, with prompts that are there. A script stands in for launch/prepare.py, which
    gets no GPUs."""
    python, prompts = tmp_path / "python", models / "prompts"
    python.write_text(STAGE.replace("script=$1\n", 'script=$1\necho "$*"\n'))
    python.chmod(0o755)
    settings = {"RECIPE": "full", "GPUS": "0,1,2,3", "TENSOR_PARALLEL_SIZE": "2", "TOKENIZER": ""}
    settings |= {"PYTHON": str(python), "MODEL": str(models / "policy"), "JUDGE": str(models / "judge")}
    output, code = comal("--prepare", **settings, PROMPTS_DIR=str(prompts), EVAL_PROMPTS=str(prompts / "eval.jsonl"))
    assert code == 0 and "everything that the run needs is here" in output, output
    started = re.search(
        rf"^-m launch.prepare fetch --models {models}/policy,.* --judge {models}/judge .*", output, re.M
    )
    assert started and "--gpus" not in started[0], output
