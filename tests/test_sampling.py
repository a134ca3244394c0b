"""sampling.py: flags with a value a file, and files through real worker processes with a stand-in for the engine.

python -m pytest tests/test_sampling.py
"""

import pickle
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers.loop import ROOT
from helpers.work import RecordWork

import data_utils
import sampling
import vllm_model
from judges import base
from judges.base import JudgeConfig
from records import Record, read
from sampling import per_file
from utils import StageError
from vllm_model import Engine, SamplerConfig
from workers.journal import Skipped


class EchoSampler(RecordWork):
    """Answers with the settings it was given; skips the prompt `skip`."""

    def __init__(self, config, num_samples, temperature, top_p):
        self.config, self.num_samples, self.temperature, self.top_p = config, num_samples, temperature, top_p

    def __call__(self, task):
        job, record = task
        if record["prompt"] == "skip":
            return Skipped(record["prompt_id"], "too long")
        return {"prompt_id": record["prompt_id"], "prompt": record["prompt"], "samples": self.samples(job)}

    def samples(self, job):
        text = f"{self.config.model} at {self.temperature[job]} and {self.top_p[job]}"
        return [{"text": text}] * self.num_samples[job]


@pytest.mark.parametrize(
    "value, kind, count, expected",
    [("5", int, 1, [5]), ("5", int, 3, [5, 5, 5]), ("5, 1", int, 2, [5, 1]), ("0.8,1", float, 2, [0.8, 1.0])],
)
def test_per_file_repeats_one_value_and_keeps_one_each(value, kind, count, expected):
    assert per_file("flag", value, kind, count) == expected


@pytest.mark.parametrize(
    "value, count, message",
    [
        ("5,1", 3, "--num_samples has 2 values for 3 input files"),
        ("5,1", 1, "--num_samples has 2 values for 1"),
        ("", 1, "--num_samples has 0 values"),
        ("five", 1, "takes numbers .int., got 'five'"),
        ("0.5", 1, "takes numbers .int., got '0.5'"),
    ],
)
def test_per_file_refuses(value, count, message):
    with pytest.raises(StageError, match=message):
        per_file("num_samples", value, int, count)


def test_main_samples_each_file_with_its_own_settings(some_model, jsonl, tmp_path, monkeypatch):
    monkeypatch.setattr(sampling, "Sampler", EchoSampler)
    train = jsonl(
        "train.jsonl", {"prompt": "x"}, {"prompt": "skip", "prompt_id": "b"}, {"prompt": "z\u2028", "prompt_id": "c"}
    )
    test = jsonl("test.jsonl", {"prompt": "x"})
    outputs = [tmp_path / "train.samples.jsonl", tmp_path / "test.samples.jsonl"]
    sampling.main(
        f"{train},{test}",
        ",".join(map(str, outputs)),
        num_samples="3,1",
        temperature="0.8,0",
        top_p="0.95,1",
        model=some_model,
        gpus="none",
        chunk_size=2,
    )
    first, second = (list(read(path, Record)) for path in outputs)
    assert [record["prompt_id"] for record in first] == ["2d711642b726b044", "c"]  # the first is made from the text
    assert [record["prompt"] for record in first] == ["x", "z\u2028"]
    texts = [[sample["text"] for sample in record["samples"]] for record in first + second]
    assert texts == [[f"{some_model} at 0.8 and 0.95"] * 3] * 2 + [[f"{some_model} at 0.0 and 1.0"]]
    assert [record["prompt_id"] for record in read(tmp_path / "train.samples.skipped.jsonl", Record)] == ["b"]


def test_main_checks_its_flags_before_a_worker_starts(jsonl, tmp_path):
    prompts = jsonl("train.jsonl", {"prompt": "x"})
    with pytest.raises(StageError, match="--temperature"):
        sampling.main(str(prompts), str(tmp_path / "a"), temperature="hot", model="M", gpus="none")
    with pytest.raises(StageError, match="--top_p has 2 values for 1 input files"):
        sampling.main(str(prompts), str(tmp_path / "a"), top_p="1,1", model="M", gpus="none")
    with pytest.raises(StageError, match="--gpus names 99"):
        sampling.main(str(prompts), str(tmp_path / "a"), model="M", gpus="99")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    "config, message",
    [
        ("{}", "config.json has no model_type"),
        ('{"model_type": 3}', "config.json has no model_type"),
        ('{"model_type": "no-such"}', "config.json: transformers .* does not know the model_type 'no-such'"),
    ],
)
def test_a_model_of_an_unknown_kind_is_refused_before_a_worker_starts(jsonl, tmp_path, config, message):
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text(config)
    prompts = jsonl("train.jsonl", {"prompt": "x"})
    with pytest.raises(StageError, match=message):
        sampling.main(str(prompts), str(tmp_path / "out"), model=str(tmp_path / "model"), gpus="none")
    with pytest.raises(StageError, match=message):
        JudgeConfig(judge=str(tmp_path / "model"), gpus="none").fingerprint()
    assert not list(tmp_path.glob("out*"))


def test_an_architecture_that_vllm_does_not_know_is_a_plain_error(model_dirs, monkeypatch):
    def refuse(**settings):
        raise ValueError("Model architectures ['Qwen2ForCausalLM'] are not supported for now. Supported: ...")

    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=refuse))
    with pytest.raises(StageError, match="vLLM does not know the architecture that .*/config.json names: "):
        Engine(model_dirs["policy"], "", 64, SamplerConfig(model="", gpus="none"))


@pytest.mark.parametrize("tokenizer, path", [("", ""), ("owner/name", "cache/owner/name")])
def test_names_are_resolved_once_and_given_names_stay(some_model, monkeypatch, tmp_path, tokenizer, path):
    (tmp_path / "ckpt").mkdir()
    (tmp_path / "ckpt/model").symlink_to(some_model)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data_utils, "_download", lambda name, only=None: Path("cache", name))
    policy = SamplerConfig(model="ckpt", tokenizer=tokenizer, gpus="none")
    template = str(ROOT / "prompts/offsetbias.txt")
    judge = JudgeConfig(judge="ckpt", judge_tokenizer=tokenizer, gpus="none", template=template)
    assert policy.fingerprint()["model"] == judge.fingerprint()["judge"] == data_utils.model_fingerprint(some_model)
    for module in (vllm_model, base):  # not called again, in the workers either
        monkeypatch.setattr(module, "resolve_tokenizer", None)
    monkeypatch.setattr(vllm_model, "resolve_model", None)
    policy, judge = pickle.loads(pickle.dumps((policy, judge)))
    found = {"names": ("ckpt", tokenizer), "paths": ("ckpt/model", path)}
    assert {"names": (policy.model, policy.tokenizer), "paths": (policy.model_path, policy.tokenizer_path)} == found
    assert {"names": (judge.judge, judge.judge_tokenizer), "paths": (judge.judge_path, judge.tokenizer_path)} == found
