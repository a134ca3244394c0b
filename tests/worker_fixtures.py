"""What tests of worker processes share: notes that they take in a folder, and a check that none is left."""

import multiprocessing
from pathlib import Path

import pytest


def note(folder, text):
    with open(folder / "notes", "a") as notes:
        notes.write(f"{text}\n")


def notes(folder):
    return (folder / "notes").read_text().split("\n")[:-1] if (folder / "notes").exists() else []


def alive(pid):
    try:
        return (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture(autouse=True)
def no_child_left(tmp_path):
    """After the test, every worker that it started has ended."""
    yield
    assert multiprocessing.active_children() == []
    for mark in tmp_path.glob("pid-*"):
        assert not alive(int(mark.name.removeprefix("pid-")))
