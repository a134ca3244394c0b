"""The formulas for a GPU's memory against simulated peaks, and what `auto` chooses from them.

python -m pytest tests/test_memory.py
"""

from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from training import memory
from training.logps import install_head
from training.memory import GIB, Needs, check_choices, choose, needs, plan
from utils import StageError

SHAPES = {
    "1.5B": dict(
        vocab_size=151_936, hidden_size=1536, intermediate_size=8960, num_attention_heads=12, num_key_value_heads=2
    ),
    "7B": dict(
        vocab_size=152_064, hidden_size=3584, intermediate_size=18_944, num_attention_heads=28, num_key_value_heads=4
    ),
}
H100, RTX_6000, A10 = 79.1 * GIB, 47.5 * GIB, 22.1 * GIB


def qwen2(policy, checkpointing=False):
    """A Qwen2 without weights."""
    config = AutoConfig.for_model("qwen2", num_hidden_layers=28, tie_word_embeddings=policy == "1.5B", **SHAPES[policy])
    config._attn_implementation = "sdpa"
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    if checkpointing:
        model.gradient_checkpointing_enable()
    return install_head(model)


@pytest.mark.parametrize(
    "policy, processes, positions, whole, checkpointing, peak",
    [  # GiB, by benchmarks/memory.py: pairs of 100 + 2 x 350 tokens, and one of 1 + 2 x 2,047
        ("1.5B", 4, 800, False, False, 10.36),
        ("1.5B", 4, 6400, False, False, 26.60),
        ("1.5B", 4, 4095, False, False, 20.06),
        ("1.5B", 4, 6400, False, True, 8.99),
        ("1.5B", 4, 6400, True, False, 33.35),
        ("1.5B", 4, 6400, True, True, 15.74),
        ("7B", 8, 6400, False, False, 59.04),
        ("7B", 8, 6400, False, True, 20.57),
    ],
)
def test_formulas_are_near_the_simulated_peak_and_not_below(policy, processes, positions, whole, checkpointing, peak):
    need = needs(qwen2(policy, checkpointing), processes, whole)
    assert 1 <= (need.fixed + positions * need.position) / GIB / peak <= 1.1


def test_needs_of_log_probabilities_by_hand():
    model = qwen2("1.5B")
    count = sum(parameter.numel() for parameter in model.parameters())
    block, layer = 6 * 1024 * 151_936, 16 * 1536 + 10 * 1536 + 8 * 8960
    assert needs(model, 8, whole=True, training=False) == (2 * count + block, layer)
    assert needs(model, 8, whole=False, training=False) == (count / 2 + 4 * 151_936 * 1536 + block, layer)


def chosen(policy, processes, card, tokens="auto", sharding="auto", longest=2000, **settings):
    model = qwen2(policy, **settings)
    needed = {"optimizer": needs(model, processes, True), "full": needs(model, processes, False)}
    return choose(needed, card, tokens, sharding, longest)


def test_auto_takes_what_fits():
    assert chosen("1.5B", 8, H100) == (16_384, "optimizer")
    assert chosen("1.5B", 8, A10)[1] == "full" and 3000 < chosen("1.5B", 8, A10)[0] < 5000
    assert chosen("7B", 8, H100)[1] == "full" and 6000 < chosen("7B", 8, H100)[0] < 8000
    assert chosen("7B", 8, H100, checkpointing=True) == (16_384, "optimizer")
    assert chosen("7B", 8, A10) == (0, "full")  # not even the weights: one pair a pass, and out of memory it will be
    # The longest pair has to fit as well.
    assert chosen("1.5B", 4, RTX_6000)[1] == "optimizer" and chosen("1.5B", 4, RTX_6000, longest=9000)[1] == "full"


def test_what_is_given_is_taken():
    assert chosen("1.5B", 8, H100, tokens="4096", sharding="full") == (4096, "full")
    assert chosen("1.5B", 8, H100, tokens=0) == (0, "optimizer")
    assert chosen("7B", 8, H100, sharding="optimizer")[1] == "optimizer"
    assert chosen("7B", 8, H100, tokens=16_384) == (16_384, "full")


def test_on_a_cpu_auto_is_one_example_a_pass_and_full_sharding():
    needed = {"optimizer": Needs(0, 1), "full": Needs(0, 1)}
    assert choose(needed, None, "auto", "auto", 10) == (0, "full")
    assert choose(needed, None, "150", "optimizer", 10) == (150, "optimizer")


def test_the_log_states_the_choice_and_warns_of_what_may_not_fit(monkeypatch, caplog):
    caplog.set_level("INFO")
    run = SimpleNamespace(is_fsdp2=True, num_processes=8, parallelism_config=None, mixed_precision="bf16")
    monkeypatch.setattr(memory, "card_bytes", lambda accelerator: H100)  # a card that is not here
    assert plan(qwen2("1.5B"), run, "auto", "auto", 4095) == (16_384, "optimizer")
    assert "micro_batch_tokens 16384 (auto), sharding optimizer (auto): a GPU of 79.1 GiB, of which 85 %" in caplog.text
    assert "WARNING" not in caplog.text
    assert plan(qwen2("7B"), run, 4096, "full", 9000)[0] == 4096
    assert "micro_batch_tokens 4096, sharding full: a GPU of 79.1 GiB" in caplog.text
    assert "WARNING: the longest example needs some 76." in caplog.text and "--gradient_checkpointing" in caplog.text
    within_a_node = SimpleNamespace(dp_shard_enabled=True, dp_shard_size=2)
    run.parallelism_config = within_a_node
    assert plan(qwen2("1.5B"), run, "auto", "auto", 4095)[1] == "optimizer"
    assert f"it needs {needs(qwen2('1.5B'), 2, True).fixed / GIB:.1f} GiB" in caplog.text


@pytest.mark.parametrize(
    "tokens, sharding, message",
    [
        (-1, "auto", "--micro_batch_tokens should be auto or a whole number, at least 0, got -1"),
        ("many", "auto", "--micro_batch_tokens should be auto or a whole number, at least 0, got many"),
        (0, "none", "--sharding should be auto, optimizer or full, got none"),
    ],
)
def test_wrong_choices_are_refused(tokens, sharding, message):
    with pytest.raises(StageError, match=message):
        check_choices(tokens, sharding)
