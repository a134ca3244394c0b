"""Reward models and panels: judges of judges/ beside the generative one, on real parts.

python -m pytest tests/test_judge_types.py
"""

import itertools
import math
import re

import pytest
from helpers.judging import samples, score
from helpers.loop import ROOT

from judges.base import JudgeConfig
from records import Record, read
from utils import StageError

pytestmark = pytest.mark.slow


# ---------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    "settings, message",
    [
        (
            {"judge_type": "reward", "reward_temperature": "0"},
            "--reward_temperature should be a number greater than 0, got 0",
        ),
        ({"judge": "a,b", "judge_type": "reward,server,reward"}, "--judge_type has 3 values for 2 judges"),
        ({"judge": "a,b", "judge_weights": "1"}, "as many as judges (2), got 1"),
        ({"judge": "a,b", "judge_weights": "1,-1"}, "as many as judges (2), got 1,-1"),
        ({"judge_type": "server", "api_concurrency": 0}, "--api_concurrency should be at least 1"),
        ({"engine": "slurm"}, "--engine should be local or ray, got slurm"),
    ],
)
def test_settings_that_are_refused(settings, message):
    with pytest.raises(StageError, match=re.escape(message)):
        JudgeConfig(**{"judge": "J", "template": str(ROOT / "prompts/offsetbias.txt")} | settings)


def test_members_share_what_is_given_once():
    config = JudgeConfig(
        judge="a,b",
        judge_type="reward,server",
        judge_weights="1,3",
        labels="x,y;u,v",
        gpus="none",
        api_base="http://h/v1",
        template=str(ROOT / "prompts/offsetbias.txt"),
    )
    first, second = config.members()
    assert (first.judge, first.judge_type, first.labels) == ("a", "reward", "x,y")
    assert (second.judge, second.judge_type, second.labels, second.chunk_size) == ("b", "server", "u,v", 8)
    assert config.weights() == [0.25, 0.75] and first.members() == [first] and first.weights() == [1]


# ---------------------------------------------------------------------------------------------- reward models


@pytest.fixture(scope="module")
def reward_models(tmp_path_factory, model_dirs):
    """Two tiny reward models with random weights, in a judge's and in the policy's architecture and tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

    found = []
    for seed, source in enumerate(model_dirs.values()):
        directory = str(tmp_path_factory.mktemp(f"reward-{seed}"))
        torch.manual_seed(seed)
        tokenizer = AutoTokenizer.from_pretrained(source)
        config = AutoConfig.from_pretrained(
            source, num_labels=1, initializer_range=0.2, pad_token_id=tokenizer.pad_token_id or 0
        )
        AutoModelForSequenceClassification.from_config(config).save_pretrained(directory)
        tokenizer.save_pretrained(directory)
        found.append(directory)
    return found


def plain_rewards(directory, record):
    """The rewards of a record's samples, one at a time, with transformers."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(directory, dtype=torch.float32).eval()
    tokenizer, found = AutoTokenizer.from_pretrained(directory), []
    for sample in record["samples"]:
        chat = [{"role": "user", "content": record["prompt"]}, {"role": "assistant", "content": sample["text"]}]
        ids = tokenizer.encode(tokenizer.apply_chat_template(chat, tokenize=False), add_special_tokens=False)
        with torch.no_grad():
            found.append(model(torch.tensor([ids])).logits.item())
    return found


@pytest.mark.cpu_engine
def test_a_mixture_of_reward_models(reward_models, jsonl, tmp_path):
    records = samples(3)
    source, output = jsonl("samples.jsonl", *records), tmp_path / "scores.jsonl"
    mixture = {"judge": ",".join(reward_models), "judge_weights": "1,3", "reward_temperature": "0.5,2"}
    score(source, output, judge_type="reward", **mixture)
    found = list(read(output, Record))
    assert [one["prompt_id"] for one in found] == ["0", "1", "2"] and not list(tmp_path.glob("*.partial*"))
    for record, one in zip(records, found):
        first, second = (plain_rewards(directory, record) for directory in reward_models)
        assert max(map(abs, first + second)) > 0.05
        assert one["panel"][0]["rewards"] == pytest.approx(first, abs=1e-4)
        assert one["panel"][1]["rewards"] == pytest.approx(second, abs=1e-4)
        for i, j in itertools.permutations(range(3), 2):
            expected = sum(
                weight / (1 + math.exp(-(r[i] - r[j]) / t)) for weight, r, t in ((0.25, first, 0.5), (0.75, second, 2))
            )
            assert one["win_probs"][i][j] == pytest.approx(expected, abs=1e-4)
        assert one["order_gap"] == pytest.approx(0) and one["label_mass"] == 1
    assert found[2]["win_probs"][0][2] == 0.5  # identical responses


def test_probabilities_and_rewards_of_bfloat16_judges_have_no_steps(demo_models, reward_models, jsonl, tmp_path):
    """With a bfloat16 output layer a few margins, and so a few values of P, would come again and again."""
    source, output = jsonl("samples.jsonl", *samples(31)), tmp_path / "scores.jsonl"
    judges = f"{demo_models / 'judge'},{reward_models[0]}"
    score(source, output, judge=judges, judge_type="generative,reward", dtype="bfloat16")
    found = list(read(output, Record))[:30]
    for values in (
        [one["panel"][0]["win_probs"][i][j] for one in found for i, j in ((0, 1), (0, 2), (1, 2))],
        [reward for one in found for reward in one["panel"][1]["rewards"]],
    ):
        assert len(values) == 90 and len({f"{value:.6f}" for value in values}) > 45


def test_a_policy_is_no_reward_model(demo_models, jsonl, tmp_path):
    source, judge = jsonl("samples.jsonl", *samples(1)), demo_models / "policy"
    output = score(source, tmp_path / "scores.jsonl", check=False, judge=judge, judge_type="reward")
    assert "is a Qwen2ForCausalLM" in output and "a reward model is a sequence classifier with one" in output
    assert not (tmp_path / "scores.jsonl").exists()
