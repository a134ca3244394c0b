"""The short form of tests/faults.sh: a loop of one iteration, killed at random moments, against one left alone.

python -m pytest tests/test_faults.py
"""

import random
import shutil
import uuid

import faults
import pytest
import torch
from helpers.loop import ROOT, start

pytestmark = pytest.mark.slow


@pytest.fixture
def folder():
    folder = ROOT / "exps" / f"test-{uuid.uuid4().hex[:8]}"
    folder.mkdir(parents=True)
    yield folder
    shutil.rmtree(folder)


@pytest.mark.skipif(torch.cuda.is_available(), reason="on GPUs vLLM's arithmetic depends on the batch")
def test_comal_killed_at_random_moments_gives_the_same_files(folder, demo_models):
    settings = {
        "DEMO_MODELS": str(demo_models),
        "ROUNDS": "1",
        "SPLITS": "1",
        "SAVE_MINUTES": "0.005",
        "MAX_JUDGE_TOKENS": "1000",
    }
    with open(folder / "log", "ab") as log:
        assert start(log, folder.name, NAME=f"{folder.name}/plain", **settings).wait(600) == 0
    kills = list(
        faults.disturb(folder / "log", folder.name, 5, random.Random(0), 12, NAME=f"{folder.name}/killed", **settings)
    )
    assert len(kills) >= 3 and [kill["left"] for kill in kills] == [[]] * len(kills)
    assert faults.differing(folder / "plain", folder / "killed") == []
