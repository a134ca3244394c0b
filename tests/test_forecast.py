"""comal.sh --try: the arithmetic of its forecast, and what it takes for wrong.

python -m pytest tests/test_forecast.py
"""

import math
import re
import sys

import pytest
from helpers.loop import ROOT

sys.path.insert(0, str(ROOT / "launch"))
import checks
from forecast import (
    Size,
    Stage,
    each,
    forecast,
    logprobs_stage,
    references,
    training_stages,
    validations_ratio,
    worked,
)

# ---------------------------------------------------------------------------------------------- the forecast


LOG = """03:00:01 64 records in 12.50 s, after a start of 40.00 s
03:01:00 exps/x/train.scores.jsonl: 64 records written, 0 skipped
03:01:09 32 records in 2.50 s, after a start of 9.10 s
"""


def test_a_log_says_how_long_a_stage_has_worked():
    assert worked(LOG) == [(64, 12.5), (32, 2.5)]
    assert worked("1024 records, 362 pairs") == []


def test_one_more_record_takes_what_a_larger_stage_took_longer():
    assert each([(320, 13.0), (64, 5.0)]) == 8 / 256  # 3 s of warm-up
    # Means 100 and 3: (-90 x -2 + 100 x 2.5 + -10 x -0.5) / (90^2 + 100^2 + 10^2).
    assert each([(10, 1.0), (200, 5.5), (90, 2.5)]) == pytest.approx(435 / 18_200)
    assert each([(320, 4.0), (64, 5.0)]) == 0  # noise
    assert each([(320, 16.0), (64, 1.0)]) == 0.05  # no more than the largest stage took for each
    assert each([(128, 4.0), (128, 6.0)]) == 6 / 128 and each([(64, 16.0)]) == 0.25


def test_log_probabilities_apart_from_their_start():
    """Two models; the test file's 20 pairs take 1 s, and so the 100 pairs of a model 5 s."""
    log = "".join(
        f"loaded in {load} s\n80 pairs in {first} s\n20 pairs in 1.00 s\n" for load, first in ((7, 9), (5, 4))
    )
    log = re.sub(r"in (\d) s", r"in \1.00 s", log)
    found = logprobs_stage(40, log)
    assert found == Stage(40, work=10, loading=12) and found.start == 18


def test_training_apart_from_its_start():
    """40 pairs of 100 tokens in batches of 32 and 8, two epochs. Updates of 3,200 tokens at 320 (10 s, the warm-up) and
    1,600 tokens/s (2 s), of 800 tokens at 800 tokens/s (1 s) both times: without the first one 4 s for 48 pairs, so
    80 pairs take 20/3 s. Two validations of 10 pairs, 1,000 tokens, at 500 tokens/s: 2 s each."""
    speeds = [320, 800, 1600, 800]
    metrics = [{"step": i, "loss": 1.0, "tokens_per_s": speed} for i, speed in enumerate(speeds)]
    for place in (2, 5):
        metrics.insert(place, {"step": place, "validation_loss": 1.0, "validation_tokens_per_s": 500})
    found = training_stages(30, metrics, [100] * 40, [100] * 10, 32)
    assert found["validation"] == Stage(4, work=4)
    assert found["training"].work == pytest.approx(20 / 3) and found["training"].start == pytest.approx(26 - 20 / 3)
    one = training_stages(30, metrics[:1], [100] * 32, [100] * 10, 32)  # a single update counts as it is
    assert one["training"].work == 10 and one["validation"].work == 0


@pytest.mark.parametrize(
    "first, iterations, policy, reference, interval, found",
    [
        (0, 6, "sft", "sft", 2, (9, 2)),  # one model in 0, 2 and 4; rounds of 2: that of 0 and 1 ends with sft
        (0, 6, "sft", "sft", 1, (6, 3)),  # Iter-IPO: the reference is the policy; the first round ends with iteration 0
        (0, 6, "sft", "sft", 0, (11, 0)),  # INPO with a fixed reference
        (0, 1, "sft", "other", 0, (2, 0)),
        (4, 6, "a", "b", 4, (4, 1)),
    ],
)
def test_models_of_the_log_probabilities(first, iterations, policy, reference, interval, found):
    assert references(first, iterations, policy, reference, "sft", interval, 2) == found


def test_starts_are_counted_once_and_work_grows():
    trial = Size(1, train=64, test=64, evaluation=64, models=1, from_start=0, cells=1)
    whole = Size(12, train=640, test=128, evaluation=128, models=23, from_start=1, cells=3)
    stages = {
        "sampling": Stage(50, work=10),
        "scoring": Stage(100, work=60),
        "pairs": Stage(2),
        "logprobs": Stage(30, work=6, loading=10),
        "training": Stage(40, work=20),
        "validation": Stage(3, work=3),
        "responses": Stage(45, work=5),
        "evaluation": Stage(60, work=8),
        "matrix": Stage(55, work=4),
    }
    found = forecast(stages, trial, whole, samples=4, pairs=(32, 64), validations=1.5)
    assert found == {
        "sampling": (12 * 40, pytest.approx(12 * 10 * (4 * 768 + 128) / (4 * 128 + 64))),
        "scoring": (12 * 40, pytest.approx(12 * 60 * 768 / 128)),
        "pairs": (24, 0),
        # 320 and 128 pairs an iteration for 32 and 64, under 23 models for one; 14 s of start, 10 s of loading a model.
        "logprobs": (12 * 14 + 23 * 10, pytest.approx(23 * 6 * 448 / 96)),
        "training": (12 * 20, 12 * 20 * 10),
        "validation": (0, 12 * 1.5 * 2 * 3),
        "responses": (40, 10),
        "evaluation": (52, 12 * 2 * 8),
        "matrix": (51, 3 * 2 * 4),
        # One round ends with another reference: one model, the 128 test pairs.
        "start_logprobs": (24, pytest.approx(6 * 128 / 96)),
    }


def test_validations_of_an_iteration():
    assert validations_ratio(3, 10_000, 32, 500, in_trial=3) == 4 / 3  # 939 updates: one besides the epochs' ends
    assert validations_ratio(3, 400, 32, 500, in_trial=3) == 1
    assert validations_ratio(3, 400, 32, 500, in_trial=0) == 0


# ---------------------------------------------------------------------------------------------- what looks wrong


@pytest.mark.parametrize(
    "trainer, eta, soft, same, loss, normal, wrong",
    [
        ("inpo", 0.002, False, True, 62_500, "(1/(2 eta))^2 = 62,500", False),
        ("inpo", 0.002, False, True, 25, "(1/(2 eta))^2 = 62,500", True),  # that of eta 0.1
        ("ipo", 0.1, False, True, 62_500, "(1/(2 eta))^2 = 25", True),
        ("inpo", 1 / 3, True, True, 1.18, "at most (1/(2 eta))^2 = 2.25", False),
        ("inpo", 1 / 3, True, True, 4, "at most (1/(2 eta))^2 = 2.25", True),
        ("dpo", 1, True, True, math.log(2), "log 2 = 0.6931", False),
        ("dpo", 1, False, True, 0.5, "log 2 = 0.6931", True),
        ("inpo", 0.002, False, False, 70_000, "not fixed, as the reference is another model", False),
        ("slic", 1, False, True, 3, "not fixed, as slic.py is a trainer of your own", False),
    ],
)
def test_the_first_loss(trainer, eta, soft, same, loss, normal, wrong):
    check = checks.first_loss(loss, trainer, eta, soft, same)
    assert check.normal == normal and bool(check.wrong) == wrong
    assert not wrong or (check.wrong.startswith("The first loss is ") and "ETA" in check.wrong)


@pytest.mark.parametrize(
    "check, right, off, words",
    [
        (
            lambda value: checks.normalised_loss(value, "inpo", 0.002),
            1.01,
            1.1,
            "instead of 1: training computes other",
        ),
        (lambda value: checks.normalised_loss(value, "inpo", 1 / 3), 1.2, math.nan, "nan instead of 1"),
        (checks.margin, -0.1, 0.8, "first margin is 0.8 nats instead of 0"),
        (checks.label_mass, 0.95, 0.4, "only 0.400 of its probability to its labels: give the TEMPLATE"),
        (checks.position_bias, 0.2, 0.5, "differ by 0.500 on average, no less than random verdicts"),
        (checks.clearness, [0.9, 0.2], [0.52, 0.49], "near 1/2 (|2P - 1| is 0.030 on average)"),
        (lambda value: checks.response_tokens(value, 2048), 300, 1.2, "Most responses are empty"),
        (lambda value: checks.truncated(value, 2048), 0.02, 0.25, "25.0 % of the responses ran into MAX_NEW_TOKENS"),
        (lambda value: checks.kept(value, "top_two"), 0.98, 0.5, "Only 50.0 % of the prompts gave a pair"),
        (lambda value: checks.kept(value, "random"), 0.35, 0.1, "Only 10.0 % of the prompts gave a pair"),
        (lambda value: checks.skipped(value, 192), 3, 20, "10.4 % of the prompts were left out"),
    ],
)
def test_each_finding(check, right, off, words):
    assert check(right).wrong == ""
    assert words in check(off).wrong and check(off).wrong.endswith(".")


@pytest.mark.parametrize(
    "check",
    [checks.margin, checks.label_mass, checks.position_bias]
    + [lambda value: checks.truncated(value, 8), lambda value: checks.kept(value, "random")]
    + [lambda value: checks.skipped(value, 8), lambda value: checks.response_tokens(value, 8)],
)
def test_what_is_not_known_is_not_wrong(check):
    assert check(None).found.startswith("not known") and check(None).wrong == ""


def test_findings_about_memory_and_disk():
    assert checks.training_memory(70, 80) == checks.training_memory(None, None) == ""
    assert "96 % of a GPU's memory" in checks.training_memory(77, 80)
    assert checks.host_memory(90, 100) == "" and "95 % of the host's memory" in checks.host_memory(95, 100)
    assert checks.disk(2**40, 2**41) == ""
    assert "will write 2,048 GiB, and 1,024 GiB are free" in checks.disk(2**41, 2**40)
