"""metrics.jsonl, TensorBoard and the terminal.

python -m pytest tests/test_metrics.py
"""

import pytest
from helpers.training import column

from utils import StageError


def test_tensorboard_has_the_figures_of_the_metrics(train):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    output = train()
    events = EventAccumulator(str(output / "tensorboard/comal"))
    events.Reload()
    for name in ("loss", "margin", "kl_last", "learning_rate"):
        found = events.Scalars(name)
        assert [event.value for event in found] == pytest.approx(column(output, name), rel=1e-6)
        assert [event.step for event in found] == column(output, "step")
    assert not (train(report_to="none", output="without") / "tensorboard").exists()
    for value, message in (("wandb", "it is not installed"), ("tensorbord", "should be none, tensorboard or wandb")):
        with pytest.raises(StageError, match=message):
            train(report_to=value, output=value)


def test_a_full_disk_under_the_metrics_is_a_message(train, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(StageError, match="metrics.jsonl: No space left on device; free some space .* update 0 is kept"):
        train(output=tmp_path / "full")
