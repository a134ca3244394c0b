"""The peak memory of training on GPUs, simulated by benchmarks/memory.py.

python -m pytest tests/test_simulation.py
"""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import memory

pytestmark = pytest.mark.slow


@pytest.fixture
def small(monkeypatch):
    """Bytes of a short pair with a policy of two layers and a small vocabulary, simulated in a second."""
    shape = memory.SHAPES["1.5B"] | dict(vocab_size=1000, num_hidden_layers=2, tie_word_embeddings=True)
    monkeypatch.setitem(memory.SHAPES, "small", shape)
    return lambda ranks, **settings: memory.peak("small", ranks, **dict(prompt=1, response=63) | settings)


def test_what_a_simulation_counts(small):
    """Hidden 1,536, intermediate 8,960, 2 key-value heads of 12, 1,000 tokens: bytes by hand."""
    layer = 1536 * (2 * 1536 + 2 * 256 + 3 * 8960) + (1536 + 2 * 256) + 2 * 1536
    parameters = 2 * layer + 1000 * 1536 + 1536
    # Weights, gradients and two moments in float32, divided among the processes; what else there is does not change.
    two, four = small(2), small(4)
    assert 16 * parameters / 4 < four and two - four == pytest.approx(16 * parameters * (1 / 2 - 1 / 4), rel=0.1)
    # Moments and weights divided, and whole parameters in bfloat16 and gradients in float32 besides.
    assert small(4, sharding="optimizer") > (12 / 4 + 2 + 4) * parameters > four
    kept, recomputed = (small(4, response=2047, gradient_checkpointing=recompute) for recompute in (False, True))
    assert four < recomputed < kept


@pytest.mark.parametrize("gradient_checkpointing, gib", [(False, 21), (True, 9)])
def test_a_long_pair_of_the_recipe_fits(gradient_checkpointing, gib, capsys):
    """Qwen2-1.5B on 4 GPUs, a pair of 2 x 2,047 tokens."""
    found = memory.peak("1.5B", 4, prompt=1, response=2047, gradient_checkpointing=gradient_checkpointing) / memory.GIB
    with capsys.disabled():
        print(f" [{found:.2f} GiB] ", end="")
    assert 0.8 * gib < found <= gib
