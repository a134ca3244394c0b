"""benchmarks/: the arithmetic behind their figures, and gpu.py as far as it runs without a GPU.

python -m pytest tests/test_benchmarks.py
"""

import sys
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import common  # noqa: E402


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
