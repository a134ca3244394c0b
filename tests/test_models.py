"""Dealing examples to forward passes and processes, and what tells a model from another.

python -m pytest tests/test_models.py
"""

import math
import random
from types import SimpleNamespace

import pytest
import torch
from helpers.training import load, run_here

from data_utils import model_fingerprint
from training.models import local_batches, micro_batches, start_accelerator


def test_micro_batches_hold_what_fits_longest_first():
    assert micro_batches([0, 1, 2, 3, 4], [3, 9, 4, 5, 4], 10) == [[1], [3, 2], [4, 0]]
    assert micro_batches([4, 2], [3, 9, 4, 5, 4], 0) == [[4], [2]]
    assert micro_batches(range(2), [20, 30], 10) == [[1], [0]]


@pytest.mark.parametrize(
    "count, size, processes", [(1, 1, 1), (8, 4, 2), (9, 4, 2), (1, 8, 8), (7, 2, 3), (32, 3, 8), (13, 1, 5)]
)
def test_local_batches_deal_equal_rounds_and_each_example_once(count, size, processes):
    indices = random.Random(0).sample(range(100), count)
    batches = [indices[i : i + size] for i in range(0, count, size)]
    dealt = [
        list(local_batches(batches, SimpleNamespace(num_processes=processes, process_index=index)))
        for index in range(processes)
    ]
    assert {len(rounds) for rounds in dealt} == {math.ceil(math.ceil(count / size) / processes)}
    assert sorted(i for rounds in dealt for batch, counts in rounds if counts for i in batch) == sorted(indices)
    assert all(0 < len(batch) <= size and set(batch) <= set(indices) for rounds in dealt for batch, _ in rounds)


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


# A file system of a few megabytes, in a mount namespace of its own. $1: the directory, $2: its size in KiB; then
# inpo.py's command. The first run fills it up; the second one has space.
FULL_DISK = """
mount -t tmpfs -o size=$2k none "$1" || exit 77
directory=$1; shift 2
"$@"; echo "first exit code $?:" $(ls "$directory/ckpt")
mount -o remount,size=100m "$directory" || exit 77
"$@"; echo "second exit code $?"
cp -r "$directory/ckpt" "$directory-result"
"""
