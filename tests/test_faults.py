"""The short form of tests/faults.sh: a loop that is killed at random moments, against one left alone.

python -m pytest tests/test_faults.py
"""

import random
import shutil

import faults
import pytest
import torch
from helpers.finished import copy_run

pytestmark = pytest.mark.slow

# What the killed loop does again; the other iteration and the evaluation of the last policy are there, to save time.
AGAIN = ("run.json", "start", "iter1/*.jsonl", "iter1/data", "iter1/ckpt", "iter1/next.json", "round1")
AGAIN += ("report", "game.json")


@pytest.mark.skipif(torch.cuda.is_available(), reason="on GPUs vLLM's arithmetic depends on the batch")
def test_comal_killed_at_random_moments_gives_the_same_files(finished):
    parent = finished.folder.parent
    killed = parent / "killed"
    copy_run(finished, killed)
    for path in (path for pattern in AGAIN for path in killed.glob(pattern)):
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    settings = finished.settings | {"NAME": f"{finished.name}/killed"}
    kills = list(faults.disturb(parent / "log", finished.name, 2, random.Random(0), 12, **settings))
    assert [kill["left"] for kill in kills] == [[], []]
    assert faults.differing(finished.folder, killed) == []
