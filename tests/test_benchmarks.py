"""benchmarks/: the arithmetic behind their figures, and gpu.py as far as it runs without a GPU.

python -m pytest tests/test_benchmarks.py
"""

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import common  # noqa: E402
import cost  # noqa: E402


def test_flops_of_a_forward_pass_by_hand():
    """Hidden 4, two heads and one key-value head of dimension 2, intermediate 6, 3 layers, vocabulary 10: a layer has
    4 x 4 + 4 x 2 + 4 x 2 + 4 x 4 + 3 x 4 x 6 = 120 weights."""
    config = SimpleNamespace(
        hidden_size=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=6,
        num_hidden_layers=3,
        vocab_size=10,
    )
    rows = [([0] * 5, [[0] * 2, [0] * 3]), ([0], [[0]])]
    # A prompt of 5 sees 15 keys; its responses 2 x 5 + 3 and 3 x 5 + 6; the second row 1 and 1 + 1: 52 together.
    assert common.attention_flops(config, rows) == 4 * 4 * 3 * 52
    # 12 tokens go through the layers, 6 positions through the output layer.
    assert common.forward_flops(config, rows) == 2 * (3 * 120 * 12 + 4 * 10 * 6) + 4 * 4 * 3 * 52
    # Without sharing, each response has its prompt before it again.
    alone = [([0] * 5, [[0] * 2]), ([0] * 5, [[0] * 3]), ([0], [[0]])]
    assert common.forward_flops(config, alone) - common.forward_flops(config, rows) == 2 * 3 * 120 * 5 + 4 * 4 * 3 * 15


def test_flops_of_qwen2_are_two_a_weight_and_token():
    """Of a model that is made, without biases and norms (under 1 % of its weights); attention aside."""
    config = common.make_config("tiny")
    weights = sum(parameter.numel() for parameter in common.make_model("tiny").parameters() if parameter.dim() == 2)
    rows = [([0], [[0] * 99])]
    dense = common.forward_flops(config, rows) - common.attention_flops(config, rows)
    head = config.hidden_size * config.vocab_size
    assert dense == 2 * ((weights - head) * 100 + head * 99)


# ---------------------------------------------------------------------------------------------- the cost on paper

A_POLICY = cost.Model("a policy", hidden=1000, layers=10, key_values=100, vocabulary=1000, parameters=1e9)


def training_seconds(**rates):
    """Of an iteration on two GPUs whose products take no time: that of what they tell each other."""
    return cost.training(A_POLICY, 2, cost.Rates(matrix_rate=1e9, launch=0, **rates))[0]


def test_traffic_of_sharded_training_by_hand():
    """937.5 updates of 16 pairs a GPU. A shard of 1e9 parameters takes 8 GB, two gathered layers 0.4, a pair of 790
    tokens 83 x 1000 x 10 x 790 bytes = 0.656 GB."""
    # 90 % of 12 GB: 2.4 GB are left, for 3 pairs a pass, so 6 passes of 8 GB, half of which comes from the other GPU.
    assert training_seconds(memory=12, link=450) == pytest.approx(937.5 * 6 * 4 / 450)
    assert training_seconds(memory=12, link=25) == pytest.approx(937.5 * 6 * 4 / 25)
    # Of 60 GB, gathered once an update: 2 + 4 bytes a parameter, half of them from the other GPU.
    assert training_seconds(memory=60, link=450) == pytest.approx(937.5 * 3 / 450)
    # Of 10 GB nothing is left.
    assert cost.training(A_POLICY, 2, cost.Rates(memory=10)) is None


def test_kernels_take_time_to_launch():
    """16 passes of a pair on each of two GPUs, 122 kernels a layer of 10."""
    policy = replace(A_POLICY, parameters=1e6)
    taken, _ = cost.training(policy, 2, cost.Rates(matrix_rate=1e9, memory=0.8, launch=5))
    assert taken == pytest.approx(937.5 * 16 * 122 * 10 * 5e-6)


def test_fp8_halves_judging_and_the_cache_spares_two_compilations():
    usual, _ = cost.hours(cost.POLICIES[0], 8, cost.Rates())
    assert cost.hours(cost.POLICIES[0], 8, cost.Rates(fp8=True))[0]["judging"] == pytest.approx(usual["judging"] / 2)
    without = cost.hours(cost.POLICIES[0], 8, cost.Rates(cached=False))[0]
    assert 3600 * (without["starts"] - usual["starts"]) == pytest.approx(2 * cost.Rates().compile)


def test_cost_and_plan_count_the_same_bytes(monkeypatch, tmp_path):
    """benchmarks/cost.py against what `comal.sh --plan` prints (launch/experiment.py), with its settings."""
    monkeypatch.syspath_prepend(str(ROOT / "launch"))
    import experiment

    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("{}\n" * ((cost.PROMPTS + cost.TEST) // 2))
    values = {"NUM_SAMPLES": cost.K, "MAX_NEW_TOKENS": cost.RESPONSE, "MAX_PROMPT_TOKENS": cost.PROMPT}
    monkeypatch.setattr(experiment, "current", lambda: values)
    monkeypatch.setattr(experiment, "input_files", lambda: [prompts, prompts])
    assert cost.work(cost.JUDGE)["record bytes"] == experiment.record_bytes()
    monkeypatch.setenv("SAVE_STEPS", "200")
    kept, best = 2, 1  # KEEP_CKPTS=last
    assert kept + best + experiment.resume_size(1) == 9
    size = f"{9 * cost.POLICIES[1].checkpoint / 1e12:.2f} TB"
    assert any(line.startswith("| 8B ") and size in line for line in cost.disk())
