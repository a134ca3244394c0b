"""Dealing examples to forward passes and processes, models to nodes, and what tells a model from another.

python -m pytest tests/test_models.py
"""

import math
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.training import load, run_here

from data_utils import model_fingerprint
from training.memory import count_parameters, shard_within_nodes
from training.models import local_batches, micro_batches, start_accelerator


def test_micro_batches_hold_what_fits_longest_first():
    assert micro_batches([0, 1, 2, 3, 4], [3, 9, 4, 5, 4], 10) == [[1], [3, 2], [4, 0]]
    assert micro_batches([4, 2], [3, 9, 4, 5, 4], 0) == [[4], [2]]
    assert micro_batches(range(2), [20, 30], 10) == [[1], [0]]


def test_micro_batches_of_several_processes_by_hand():
    lengths = [9, 4, 4, 3, 3, 3]
    # 12 positions make three groups. Two processes need four: 8 positions (and 9 alone) are the least for that, 9 for
    # the three of three processes.
    assert micro_batches(range(6), lengths, 12) == [[0], [1, 2, 3], [4, 5]]
    assert micro_batches(range(6), lengths, 12, processes=2) == [[0], [1, 2], [3, 4], [5]]
    assert micro_batches(range(6), lengths, 12, processes=3) == [[0], [3, 4, 5], [1, 2]]
    assert micro_batches(range(6), lengths, 0, processes=4) == [[0], [1], [2], [3], [4], [5]]
    assert micro_batches(range(5), [5] * 5, 25, processes=2) == [[0, 1, 2], [3, 4]]
    assert sorted(micro_batches(range(4), [5] * 4, 99, processes=3)) == [[0], [1], [2, 3]]
    assert micro_batches(range(2), [3, 5], 99, processes=8) == [[1], [0]]


def dealt_to(processes, batches, lengths):
    """What `local_batches` gives each process."""
    return [
        local_batches(batches, lengths, SimpleNamespace(num_processes=processes, process_index=index))
        for index in range(processes)
    ]


def test_nothing_is_dealt_where_nothing_is_left():
    assert dealt_to(2, [], []) == [[], []]


@pytest.mark.parametrize("tokens", [0, 700, 5000])
@pytest.mark.parametrize("count, processes", [(1, 1), (9, 1), (1, 8), (7, 3), (32, 8), (13, 5), (40, 4)])
def test_examples_are_dealt_once_and_in_equally_many_passes(count, processes, tokens):
    generator = random.Random(count)
    indices, lengths = generator.sample(range(100), count), [generator.randint(50, 400) for _ in range(100)]
    batches = micro_batches(indices, lengths, tokens, processes)
    dealt = dealt_to(processes, batches, lengths)
    assert len({len(passes) for passes in dealt}) == 1
    assert sorted(i for passes in dealt for batch, counts in passes if counts for i in batch) == sorted(indices)
    assert sum(not counts for passes in dealt for _, counts in passes) == max(0, -len(batches) % processes)
    if count >= processes * len(dealt[0]):
        assert all(counts for passes in dealt for _, counts in passes)
    for batch, _ in (one for passes in dealt for one in passes):
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= tokens
    # No more passes than the budget demands.
    assert len(dealt[0]) == math.ceil(len(micro_batches(indices, lengths, tokens)) / processes)


@pytest.mark.parametrize("processes", [4, 8])
@pytest.mark.parametrize("tokens, allowed", [(0, 1.1), (4096, 1.35), (8192, 1.35), (16_384, 1.35)])
def test_no_process_has_much_more_to_do_than_the_others(processes, tokens, allowed):
    """Positions of the slowest process over those of perfect dealing, without padding: the mean of 200 updates.

    Pairs of UltraFeedback's prompts and responses around 256 tokens have a median of 721 tokens, and their logarithms
    a standard deviation of 0.41 (benchmarks/common.py draws them); these vary a little more. At 0 tokens there is no
    padding.
    """
    generator, ratios = np.random.default_rng(0), []
    for _ in range(200):
        lengths = generator.lognormal(6.55, 0.5, 32).clip(60, 4000).astype(int).tolist()
        dealt = dealt_to(processes, micro_batches(range(32), lengths, tokens, processes), lengths)
        positions = [sum(len(batch) * max(lengths[i] for i in batch) for batch, _ in passes) for passes in dealt]
        ratios.append(max(positions) / (sum(lengths) / processes))
    assert np.mean(ratios) <= allowed


def test_attention_does_not_go_through_cudnn():
    torch.backends.cuda.enable_cudnn_sdp(True)
    run_here(start_accelerator, seed=0)
    assert not torch.backends.cuda.cudnn_sdp_enabled() and torch.backends.cuda.mem_efficient_sdp_enabled()


def test_model_fingerprint_sees_config_sizes_and_weights(setting, tmp_path):
    model = tmp_path / "model"
    load(setting.policy).save_pretrained(model)
    weights, config = model / "model.safetensors", model / "config.json"
    fingerprints = [model_fingerprint(model)]
    data = weights.read_bytes()
    for changed in (data[:-1] + bytes([data[-1] ^ 1]), data + b"0"):
        weights.write_bytes(changed)
        fingerprints.append(model_fingerprint(model))
    config.write_text(config.read_text() + " ")
    assert len({*fingerprints, model_fingerprint(model)}) == 4
    weights.write_bytes(data)
    config.write_text(config.read_text()[:-1])
    assert model_fingerprint(model) == fingerprints[0]


@pytest.mark.parametrize(
    "processes, here, spare, expected",
    [("16", "8", 1, (2, 8)), ("16", "8", -1, None), ("8", "8", 1, None), ("2", "1", 1, None)],
)
def test_nodes_hold_the_whole_model_where_it_fits(setting, monkeypatch, processes, here, spare, expected):
    count = load(setting.policy).num_parameters()
    assert count_parameters(setting.policy) == count
    monkeypatch.setenv("WORLD_SIZE", processes)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", here)
    # Half of the memory holds 16 bytes for each parameter of this process's share, and a byte to spare, or lacks one.
    found = shard_within_nodes(setting.policy, 2 * (16 * count // int(here) + spare))
    assert (found and (found.dp_replicate_size, found.dp_shard_size)) == expected
