"""workers/engine_settings.py: what engines are started with, on a CPU and, as far as it can be built here, on a GPU.

python -m pytest tests/test_engine_settings.py
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from judges.base import JudgeConfig
from utils import StageError
from vllm_model import SamplerConfig
from workers.engine_settings import (
    FLAGS,
    EngineConfig,
    cache_folder,
    constant_path,
    engine_arguments,
    engine_settings,
    read_engine_args,
    sequences_at_once,
)

ROOT = Path(__file__).resolve().parents[1]
MODEL = SimpleNamespace(num_hidden_layers=28, num_key_value_heads=2, num_attention_heads=12, hidden_size=1536)


def settings_of(role, on_gpu=True, **config):
    return engine_settings(EngineConfig(gpus="none", **config), "", MODEL, 4096, role, on_gpu)


# ---------------------------------------------------------------------------------------------- --engine_args


def test_engine_args_are_a_json_object_of_arguments_that_vllm_has():
    assert read_engine_args("") == {}
    given = '{"quantization": "fp8_per_channel", "compilation_config": {"mode": 0}}'
    assert read_engine_args(given) == {"quantization": "fp8_per_channel", "compilation_config": {"mode": 0}}
    assert len(engine_arguments()) > 100 and FLAGS.keys() < set(engine_arguments())


@pytest.mark.parametrize(
    "text, message",
    [
        ("fp8", "--engine_args should be a JSON object .*not valid JSON: Expecting value"),
        ('"fp8"', 'should be a JSON object .*, got "fp8"'),
        ("[]", "should be a JSON object .*, got \\[\\]"),
        ('{"watermark": Infinity}', "Infinity is not JSON"),
        ('{"quantisation": "fp8"}', "no argument quantisation; did you mean quantization\\?"),
        ('{"max-num-seqs": 8}', "no argument max-num-seqs; did you mean max_num_seqs\\?"),
        ('{"xyzzy": 8}', "no argument xyzzy$"),
        ('{"tensor_parallel_size": 2}', "tensor_parallel_size is set by --tensor_parallel_size"),
        ('{"max_model_len": 2}', "max_model_len is set by --max_prompt_tokens"),
    ],
)
def test_engine_args_that_are_refused(text, message):
    with pytest.raises(StageError, match=message):
        EngineConfig(gpus="none", engine_args=text)


def test_engine_args_come_before_the_projects_own_and_dictionaries_are_joined():
    given = {"max_num_batched_tokens": 99, "compilation_config": {"mode": 0}, "hf_overrides": {"head_dtype": "model"}}
    found = settings_of("judge", engine_args=json.dumps(given))
    assert found["max_num_batched_tokens"] == 99
    assert found["compilation_config"] == {"cudagraph_mode": "NONE", "mode": 0}
    assert found["hf_overrides"] == {"head_dtype": "model"}


def test_results_depend_on_engine_args_and_on_how_the_output_layer_computes(some_model):
    def judged(**given):
        return JudgeConfig(judge=some_model, gpus="none", **given).fingerprint()

    before = judged()  # on a CPU that of earlier versions, whose unfinished files can be continued
    assert not {"engine_args", "head_dtype"} & before.keys()
    assert judged(dtype="bfloat16") == before | {"dtype": "bfloat16", "head_dtype": "float32"}
    assert judged(engine_args='{"block_size":64}') == before | {"engine_args": {"block_size": 64}}
    policy = SamplerConfig(model=some_model, gpus="none", dtype="bfloat16", engine_args='{"block_size": 16}')
    assert policy.fingerprint()["engine_args"] == {"block_size": 16} and "head_dtype" not in policy.fingerprint()


def test_the_dtype_of_a_judge_on_a_gpu_is_known_in_the_stage(some_model, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    assert JudgeConfig(judge=some_model).fingerprint()["head_dtype"] == "float32"
    assert "head_dtype" not in JudgeConfig(judge=some_model, dtype="float32").fingerprint()


# ---------------------------------------------------------------------------------------------- the arguments


def test_what_the_roles_are_started_with():
    for on_gpu in (False, True):
        judge, reward = settings_of("judge", on_gpu), settings_of("reward", on_gpu)
        assert judge["hf_overrides"] == reward["hf_overrides"] == {"head_dtype": "float32"}
        assert (reward["runner"], reward["convert"]) == ("pooling", "classify") and "runner" not in judge
        assert ("compilation_config" in judge) == ("compilation_config" in reward) == on_gpu
        assert judge["dtype"] == ("bfloat16" if on_gpu else "float32") and judge["enforce_eager"] is not on_gpu
        assert judge.keys() | reward.keys() <= set(engine_arguments())
    policy = settings_of("policy", on_gpu=False)
    assert not {"hf_overrides", "compilation_config", "max_num_seqs"} & policy.keys()
    # 28 layers x (keys, values) x 2 heads x 128 x 4 bytes = 57,344 a token, 4,096 of them, 128 sequences: 28 GiB, so 1
    assert policy["kv_cache_memory_bytes"] == 2**30 and policy["max_num_batched_tokens"] == 4096


@pytest.mark.parametrize(
    "card, weights, kv_bytes, expected",
    [
        # Qwen2-1.5B in bfloat16, 3.1 GB: 28 layers x 2 x 2 heads x 128 x 2 bytes = 28,672 a token, 29.36 MB for 1,024.
        (80, 3.1, 28_672, 1024),  # (72 - 3.1) / 0.02936 = 2,346
        (48, 3.1, 28_672, 1024),  # (43.2 - 3.1) / 0.02936 = 1,365
        (24, 3.1, 28_672, 630),  # (21.6 - 3.1) / 0.02936 = 630.1
        # Llama 8B, 16.1 GB: 32 x 2 x 8 x 128 x 2 = 131,072 a token, 134.2 MB for 1,024.
        (80, 16.1, 131_072, 416),  # (72 - 16.1) / 0.1342 = 416.5
        (48, 16.1, 131_072, 256),  # 201.9
        (16, 16.1, 131_072, 256),  # the weights alone do not fit: vLLM will say so
    ],
)
def test_sequences_at_once_by_hand(card, weights, kv_bytes, expected):
    assert sequences_at_once(int(card * 0.9e9), int(weights * 1e9), kv_bytes, 1024) == expected


# ---------------------------------------------------------------------------------------------- the process


def test_the_cache_has_a_folder_for_each_machine_and_gpu(monkeypatch):
    monkeypatch.setattr("platform.node", lambda: "node7")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    monkeypatch.delenv("VLLM_CACHE_ROOT", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert cache_folder() == "/cache/vllm/node7-gpu-2-3"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == f"{Path.home()}/.cache/vllm/node7-gpu-2-3"
    monkeypatch.setenv("VLLM_CACHE_ROOT", "/scratch/vllm")
    assert cache_folder() == "/scratch/vllm/node7-gpu-2-3"
    monkeypatch.setenv("VLLM_CACHE_ROOT", cache_folder())
    assert cache_folder() == "/scratch/vllm/node7-gpu-2-3"


def test_constant_path_is_this_processs_own_and_is_removed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    for name in ("tmp", "iter0", "iter1"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(name)
    read = [sys.executable, "-S", "-c", "print(open('model/config.json').read(), end='')"]
    with constant_path("iter0") as path:  # a relative one
        assert path == "model" and Path(path, "config.json").read_text() == "iter0"
        first = os.getcwd()
        assert subprocess.run(read, capture_output=True, text=True, check=True).stdout == "iter0"
    with pytest.raises(KeyError), constant_path(str(tmp_path / "iter1")):
        assert Path("model/config.json").read_text() == "iter1" and os.getcwd() != first
        raise KeyError
    assert os.getcwd() == str(tmp_path)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["config.json"] * 3 + ["iter0", "iter1", "tmp"]


# ---------------------------------------------------------------------------------------------- vLLM's own objects

BUILD = """
import json, sys
sys.path[:0] = [{root!r}]
from types import SimpleNamespace
from workers.engine_settings import EngineConfig, constant_path, engine_settings
from transformers import AutoConfig
from vllm.config import CompilationConfig, ModelConfig
from vllm.engine.arg_utils import EngineArgs

from vllm.config.quantization import resolve_quantization_config

# Of docs/judges.md; vLLM's own `fp8` takes no other checkpoints than those in fp8.
found = {{name: resolve_quantization_config(name, None) is not None for name in ("fp8_per_channel", "fp8")}}
checkpoints = {checkpoints!r}
models = [AutoConfig.from_pretrained(path) for path in checkpoints]
hashed = lambda path: ModelConfig(model=path, tokenizer={tokenizer!r}, dtype="float32").compute_hash()
found["by their paths"] = [hashed(path) for path in checkpoints]
found["by the constant path"] = []
for path in checkpoints:
    with constant_path(path) as same:
        found["by the constant path"].append(hashed(same))
for role, path in (("judge", checkpoints[0]), ("reward", {reward!r})):
    settings = engine_settings(EngineConfig(gpus="none"), path, models[0], 64, role, True)
    arguments = EngineArgs(model=path, tokenizer={tokenizer!r}, **settings)
    built = arguments.create_model_config()
    mode = CompilationConfig(**settings["compilation_config"]).cudagraph_mode
    found[role] = [str(built.dtype), str(built.head_dtype), str(built.runner_type), mode.name]
    given = EngineConfig(gpus="none", engine_args='{{"hf_overrides": {{"head_dtype": "model"}}}}')
    settings = engine_settings(given, path, models[0], 64, role, True)
    built = EngineArgs(model=path, tokenizer={tokenizer!r}, **settings).create_model_config()
    found[role].append(str(built.head_dtype))
settings = engine_settings(EngineConfig(gpus="none"), checkpoints[0], models[0], 64, "policy", True)
found["policy"] = EngineArgs(model=checkpoints[0], tokenizer={tokenizer!r}, **settings).max_num_seqs
print(json.dumps(found))
"""


@pytest.mark.slow
def test_vllm_takes_the_settings_and_finds_compiled_code_by_the_constant_path(model_dirs, tmp_path):
    """Built on a CPU, from the arguments for a GPU: nothing of it runs."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    checkpoints = [str(tmp_path / f"iter{number}" / "ckpt/model") for number in range(2)]
    for path in checkpoints:
        AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model_dirs["policy"])).save_pretrained(path)
    config = AutoConfig.from_pretrained(model_dirs["policy"], num_labels=1, pad_token_id=0)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / "reward")
    script = BUILD.format(
        root=str(ROOT), checkpoints=checkpoints, reward=str(tmp_path / "reward"), tokenizer=model_dirs["policy"]
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(set(found["by their paths"])) == 2 and len(set(found["by the constant path"])) == 1
    assert found["fp8_per_channel"] and not found["fp8"]
    assert found["policy"] == 1024  # a tiny model; the "card" is this machine's memory
    assert found["judge"] == ["torch.bfloat16", "torch.float32", "generate", "NONE", "torch.bfloat16"]
    assert found["reward"] == ["torch.bfloat16", "torch.float32", "pooling", "NONE", "torch.bfloat16"]
