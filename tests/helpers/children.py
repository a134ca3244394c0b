"""That no worker process outlives the test that started it."""

import multiprocessing

import pytest

from helpers.work import alive


@pytest.fixture(autouse=True)
def no_child_left(tmp_path):
    """After the test, every worker that it started has ended."""
    yield
    assert multiprocessing.active_children() == []
    for mark in tmp_path.glob("pid-*"):
        assert not alive(int(mark.name.removeprefix("pid-")))
