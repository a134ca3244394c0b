"""The settings of comal.sh: where they come from, what is refused, and which GPUs are used.

python -m pytest tests/test_comal_settings.py
"""

import os
import re
import subprocess
import sys

import pytest
from helpers.loop import ROOT

sys.path.insert(0, str(ROOT / "launch"))
import settings as launch_settings


def test_help_explains_every_setting():
    done = subprocess.run(["bash", "comal.sh", "--help"], cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 0 and "bash comal.sh --plan" in done.stdout
    for name, setting in launch_settings.settings().items():
        assert setting.text and re.search(rf"^  {name}=", done.stdout, re.M), setting
    for method in launch_settings.methods(re.search(r'METHODS="(.*?)"', (ROOT / "comal.sh").read_text(), re.S)[1]):
        assert f"\n  {method} " in done.stdout


def test_any_judge_reaches_the_stages(loop):
    plan, code = loop.run("--plan", JUDGE="own/judge,own/policy", JUDGE_TYPE="generative,reward", JUDGE_WEIGHTS="1,3")
    flags = "--judge own/judge,own/policy --judge_type generative,reward --judge_weights 1,3"
    assert code == 0 and plan.count(flags) == 4, plan  # two kinds of scoring, the evaluation, the matrix
    plan = loop.run("--plan", JUDGE_FLAGS="--labels 'A x,B x' --reward_temperature 2")[0]
    assert plan.count("--labels A\\ x\\,B\\ x --reward_temperature 2") == 4, plan
    output, code = loop.run(JUDGE=f"{loop.folder}/models/judge,no-such-model", JUDGE_TYPE="reward")
    assert code == 1 and "no-such-model (JUDGE): no such directory" in output
    plan, code = loop.run("--plan", JUDGE="some-model", JUDGE_TYPE="server", API_BASE="http://127.0.0.1:8000/v1")
    assert (
        code == 0 and "--judge some-model --judge_type server" in plan and "--api_base http://127.0.0.1:8000/v1" in plan
    )


def test_arguments_come_before_the_environment(loop):
    plan, code = loop.run("METHOD=inpo-small", "ETA=0.25", "--plan", "UPDATE_INTERVAL=3", ETA="0.5")
    assert code == 0 and plan.count("--eta 0.25") == 2 and "ETA=0.25 (0.333333)" in plan
    assert "INPO, fixed reference, 4 iterations" in plan and "the reference stays" in plan
    assert "UPDATE_INTERVAL is not used by METHOD=inpo-small" in plan


@pytest.mark.parametrize(
    "arguments, environment, message",
    [
        (["LEARNING_RTE=1"], {}, "unknown argument LEARNING_RTE=1. Did you mean LEARNING_RATE=...?"),
        (["eta=1"], {}, "unknown argument eta=1. Did you mean ETA=...?"),
        (["--pln"], {}, "unknown argument --pln. Did you mean --plan?"),
        (["--prepair"], {}, "unknown argument --prepair. Did you mean --prepare?"),
        (["PATH=/"], {}, "unknown argument PATH=/"),
        (["GPUS_PER_WORKER=2"], {}, "GPUS_PER_WORKER is now called TENSOR_PARALLEL_SIZE"),
        (["SAVE_STEPS=9"], {}, "SAVE_STEPS has become SAVE_MINUTES, minutes of training between points where it can"),
        (
            [],
            {"GPUS_PER_WORKER": "2"},
            "GPUS_PER_WORKER is in the environment, but it is now called TENSOR_PARALLEL_SIZE",
        ),
        ([], {"LEARNING_RTE": "1"}, "LEARNING_RTE is in the environment; did you mean LEARNING_RATE?"),
        ([], {"NUM_EPOCH": "1"}, "NUM_EPOCH is in the environment; did you mean NUM_EPOCHS?"),
    ],
)
def test_misspelt_settings_are_refused(loop, arguments, environment, message):
    output, code = loop.run(*arguments, **environment)
    assert code == 1 and output.startswith(f"comal.sh: {message}") and not loop.exps.exists(), output


def test_a_variable_that_may_mean_something_else_is_told_of(loop):
    output, code = loop.run("--plan", SEEDS="0 1")
    assert code == 0 and "WARNING: SEEDS in the environment is no setting, SEED is" in output


def test_the_disk_is_checked(loop):
    with open(loop.folder / "models/policy/model/model.safetensors", "wb") as file:
        file.truncate(2**42)  # without contents
    output, code = loop.run()
    assert code == 1 and "needs about 33555456 MiB" in output and "KEEP_CKPTS=last" in output, output


@pytest.mark.parametrize(
    "setting, message",
    [
        ("RECIPE=Demo", "RECIPE=Demo is unknown; choose one of: demo full"),
        ("METHOD=como", "METHOD=como is unknown; choose one of: comal inpo-small inpo-large iter-ipo iter-dpo ipo dpo"),
        ("PAIR_RULE=bestworst", "PAIR_RULE=bestworst is unknown; choose one of: top_two best_worst random"),
        ("SOFT_LABELS=maybe", "SOFT_LABELS=maybe is unknown; choose one of: true false"),
        ("KEEP_CKPTS=some", "KEEP_CKPTS=some is unknown; choose one of: all rounds last"),
        ("ON_ERROR=no", "ON_ERROR=no is unknown; choose one of: fail skip"),
        ("ROUNDS=x", "ROUNDS=x should be a whole number, at least 1"),
        ("EVAL_EVERY=0", "EVAL_EVERY=0 should be a whole number, at least 1"),
        ("NUM_SAMPLES=1", "NUM_SAMPLES=1 should be a whole number, at least 2"),
        ("UPDATE_INTERVAL=six", "UPDATE_INTERVAL=six should be a whole number, at least 0"),
        ("SAVE_MINUTES=x", "SAVE_MINUTES=x should be a number, 0 or more"),
        ("EVAL_STEPS=0", "EVAL_STEPS=0 should be a whole number, at least 1"),
        (
            "FIRST_ITERATION=06",
            "FIRST_ITERATION=06 should be a whole number, at least 0",
        ),  # bash would read it as octal
        ("FIRST_ITERATION=12", "FIRST_ITERATION=12, but the last iteration has the number 11; raise ROUNDS"),
        ("WEIGHT_DECAY=w", "WEIGHT_DECAY=w should be a number, 0 or more"),
        ("EVAL_TOP_P=1.1", "EVAL_TOP_P=1.1 should be at most 1"),
        ("STALL_TIMEOUT=-1", "STALL_TIMEOUT=-1 should be a whole number, at least 0"),
        ("ETA=0", "ETA=0 should be greater than 0"),
        ("ETA=-1", "ETA=-1 should be a number greater than 0"),
        ("BETA=b", "BETA=b should be a number, 0 or more"),
        ("BETA=0.0", "BETA=0.0 should be greater than 0"),
        ("LEARNING_RATE=0e-5", "LEARNING_RATE=0e-5 should be greater than 0"),
        ("TOP_P=0", "TOP_P=0 should be greater than 0"),
        ("TOP_P=1.1", "TOP_P=1.1 should be at most 1"),
        ("WARMUP_RATIO=2", "WARMUP_RATIO=2 should be at most 1"),
        ("JUDGE_TYPE=bt", "JUDGE_TYPE=bt should be generative, reward or server; of several judges one each, "),
        ("JUDGE_TYPE=reward,openai", "JUDGE_TYPE=reward,openai: openai is now called server"),
        ("MICRO_BATCH_TOKENS=all", "MICRO_BATCH_TOKENS=all should be a whole number, at least 0, or auto"),
        ("ROUNDS=auto", "ROUNDS=auto should be a whole number, at least 1"),
        ("SHARDING=none", "SHARDING=none is unknown; choose one of: auto full optimizer"),
        ("JUDGE_WEIGHTS=x", "JUDGE_WEIGHTS=x should be numbers, comma-separated"),
        ("JUDGE_TYPE=server", "OPENAI_API_KEY is not set"),
        ("JUDGE_FLAGS=--labels 'A", "JUDGE_FLAGS=--labels 'A cannot be split into flags: No closing quotation"),
        ("ENGINE_ARGS=[1]", "ENGINE_ARGS=[1] should be a JSON object such as '{\"max_num_seqs\": 512}'"),
        ("JUDGE_ENGINE_ARGS={'a': 1}", "JUDGE_ENGINE_ARGS={'a': 1} should be a JSON object"),
        ("NAME=../../x", "NAME=../../x should be the name of a folder in exps/"),
        ("NAME=a/../../x", "NAME=a/../../x should be the name of a folder in exps/"),
        ("NAME=/tmp/x", "NAME=/tmp/x should be the name of a folder in exps/"),
    ],
)
def test_wrong_settings_are_refused(setting, message):
    name, value = setting.split("=")
    methods = {"METHODS": re.search(r'METHODS="(.*?)"', (ROOT / "comal.sh").read_text(), re.S)[1]}
    values = launch_settings.defaults({"RECIPE": "demo", "METHOD": "comal"}) | methods | {name: value}
    with pytest.raises(launch_settings.Refused, match=f"^{re.escape(message)}"):
        launch_settings.check_values(values)


def test_a_wrong_setting_is_refused_at_once(loop):
    """Before anything else is printed or written, as an argument and in the environment."""
    for arguments, given in ((["--plan"], {"ETA": "0"}), (["ETA=0"], {})):
        assert loop.run(*arguments, **given) == ("comal.sh: ETA=0 should be greater than 0\n", 1)
    assert not loop.exps.exists()


@pytest.mark.parametrize(
    "setting, message",
    [
        ("MODEL=no/such/model", "no/such/model (MODEL): no such directory"),
        ("REFERENCE=no/such/model", "no/such/model (REFERENCE): no such directory"),
        ("EVAL_PROMPTS=none.jsonl", "none.jsonl does not exist"),
        ("SPLITS=9", "train_2.jsonl does not exist"),
        ("GPUS=97", "GPUS=97 names GPU 97, but nvidia-smi lists: "),
    ],
)
def test_what_does_not_exist_is_refused(loop, setting, message):
    output, code = loop.run(setting)
    assert code == 1 and message in output and not loop.exps.exists(), output


LISTING = """#!/bin/sh
echo 'GPU 0: NVIDIA A100 (UUID: GPU-0a)'
echo 'GPU 1: NVIDIA A100 (UUID: GPU-1b)'
echo '  MIG 3g.20gb     Device  0: (UUID: MIG-2c)'
echo '  MIG 3g.20gb     Device  1: (UUID: MIG-3d)'
"""


@pytest.fixture
def two_gpus(tmp_path):
    """Settings of a machine with two GPUs, the second one with two MIG instances."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/nvidia-smi").write_text(LISTING)
    (tmp_path / "bin/nvidia-smi").chmod(0o755)
    return {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "CUDA_VISIBLE_DEVICES": "0,1"}


@pytest.mark.parametrize(
    "settings, visible",
    [
        ({}, "0,1"),
        ({"GPUS": "1", "PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:9"}, "1"),
        ({"GPUS": "GPU-1b,0"}, "GPU-1b,0"),
        ({"CUDA_VISIBLE_DEVICES": "GPU-0a,GPU-1b"}, "GPU-0a,GPU-1b"),
        ({"CUDA_VISIBLE_DEVICES": "MIG-3d"}, "MIG-3d"),
        ({"GPUS": "MIG-2c,MIG-3d"}, "MIG-2c"),
    ],
)
def test_training_gets_the_gpus_that_are_named(loop, two_gpus, settings, visible):
    plan, code = loop.run("--plan", **(two_gpus | settings))
    environment = f"CUDA_VISIBLE_DEVICES={visible} CUDA_DEVICE_ORDER=PCI_BUS_ID "
    environment += f"PYTORCH_ALLOC_CONF={settings.get('PYTORCH_CUDA_ALLOC_CONF', 'expandable_segments:True')}"
    command = rf"^env {environment} .* --num_processes {len(visible.split(','))} inpo.py "
    assert code == 0 and re.search(command, plan, re.M), plan
    assert ("training uses MIG-2c alone" in plan) == (visible == "MIG-2c")


def test_gpus_are_named_as_nvidia_smi_lists_them(loop, two_gpus):
    message = "nvidia-smi lists: 0,1; give numbers or UUIDs of nvidia-smi -L, auto or none"
    for wrong in ("2", "GPU-1", "0,MIG-9"):
        output, code = loop.run(GPUS=wrong, **two_gpus)
        assert code == 1 and message in output, output
    assert not loop.exps.exists()
    output, code = loop.run(GPUS="MIG-3d", FAIL="sampling.py", **two_gpus)
    assert "stage sampling failed" in output, output
    assert "--gpus MIG-3d" in (loop.exps / "run/iter0/logs/sampling.log").read_text()


def test_a_vllm_for_gpus_is_refused_at_once_where_none_is_used(loop, tmp_path):
    (tmp_path / "vllm-0.32.0.dist-info").mkdir()
    (tmp_path / "vllm-0.32.0.dist-info/METADATA").write_text("Name: vllm\nVersion: 0.32.0\n")
    output, code = loop.run(PYTHON=sys.executable, PYTHONPATH=str(tmp_path), GPUS="none")
    message = (
        r"no GPU is used \(GPUS=none\), but vLLM 0.32.0 of \S+ is a build for GPUs and cannot run on a CPU; SETUP_FOR"
    )
    assert code == 1 and re.search(message, output) and not loop.exps.exists(), output


def test_packages_for_the_cpu_use_no_gpu(loop, two_gpus):
    plan, code = loop.run("--plan", RECIPE="", SETUP_FOR="cpu", **two_gpus)
    assert code == 0 and "the demo (two tiny models, minutes on a CPU), because GPUS=none" in plan, plan
    assert "--gpus none" in plan and "CUDA_VISIBLE_DEVICES" not in plan


def test_every_setting_is_checked_for_what_it_is():
    """Each of those that have a check exists, and what results depend on is the rest."""
    known = launch_settings.settings().keys()
    checked = launch_settings.CHOICES.keys() | launch_settings.WHOLE.keys() | launch_settings.NUMBERS
    assert checked | launch_settings.POSITIVE | launch_settings.AT_MOST_ONE | launch_settings.FREE <= known
    assert {"METHOD", "SEED", "ETA", "TEMPERATURE", "JUDGE_FLAGS", "FROM"} <= known - launch_settings.FREE


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"NODES": "2"}, "MASTER_ADDR, the address of node 0, is not set"),
        ({"NODES": "2", "NODE_RANK": "2"}, "NODE_RANK=2 should be less than NODES=2"),
    ],
)
def test_the_address_of_node_0_is_needed(loop, settings, message):
    output, code = loop.run("--plan", **settings)
    assert code == 1 and message in output
