"""setup.sh where there is an environment of the user's own already: that one is used, and nothing is installed.

python -m pytest tests/test_setup_own.py
"""

import os
import sys
from pathlib import Path

import pytest
from helpers.setup import FAKE_PYTHON, OLD_DRIVER, assert_made, assert_refused, project_fixture, write_program  # noqa: F401


@pytest.fixture
def own_environment(project, tmp_path):
    """(folder, settings) of an environment with a real Python that finds all packages: empty files do."""
    packages = tmp_path / "packages"
    packages.mkdir()
    for name in ("torch", "transformers", "vllm", "accelerate", "datasets", "msgspec"):
        (packages / f"{name}.py").write_text("raise ImportError('looked for, never imported')")
    folder = tmp_path / "own environment"
    # -S leaves out site-packages, so that only the files above count.
    write_program(folder / "bin/python", f'#!/bin/sh\nexec "{sys.executable}" -S "$@"\n')
    return folder, {"PYTHONPATH": packages}


def assert_used(project, result, python):
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"{python}\n"
    assert "nothing is installed" in result.stderr
    assert project.calls("-m ") == []


def test_setup_uses_the_python_given(project, own_environment):
    folder, settings = own_environment
    python = folder / "bin/python"
    assert_used(project, project.setup(PYTHON=python, **settings), python)
    # A path relative to where the caller stands is resolved there.
    relative = os.path.relpath(python)
    assert_used(project, project.setup(PYTHON=relative, **settings), Path.cwd() / relative)
    assert not (project.dir / ".venv").exists()


@pytest.mark.parametrize("package", ["torch", "vllm", "accelerate"])
def test_setup_refuses_the_python_given_when_it_lacks_a_package(project, own_environment, package):
    folder, settings = own_environment
    (settings["PYTHONPATH"] / f"{package}.py").unlink()
    assert_refused(project, project.setup(PYTHON=folder / "bin/python", **settings), f"lacks: {package}\n")
    assert not (project.dir / ".venv").exists()


def test_setup_refuses_a_python_given_that_is_not_there(project):
    assert_refused(project, project.setup(PYTHON="/nowhere/python"), "PYTHON=/nowhere/python", "unset PYTHON")


TORCH = """
__version__ = "2.13.0"
class version: cuda = {cuda!r}
class cuda:
    def init(): {init}
"""


@pytest.mark.parametrize(
    "cuda, init, words",
    [
        ("13.0", "raise RuntimeError('The driver is too old\\nmore')", ["sees none: The driver is too old\n", "580"]),
        (None, "pass", ["torch 2.13.0 is a build for the CPU", "Install a build for CUDA"]),
        ("13.0", "pass", []),
    ],
)
def test_setup_checks_that_the_python_given_sees_the_gpus(project, own_environment, cuda, init, words):
    folder, settings = own_environment
    write_program(project.bin / "nvidia-smi", OLD_DRIVER)
    (settings["PYTHONPATH"] / "torch.py").write_text(TORCH.format(cuda=cuda, init=init))
    result = project.setup(PYTHON=folder / "bin/python", **settings)
    if not words:
        return assert_used(project, result, folder / "bin/python")
    assert_refused(project, result, "driver 550.54.15", "The Python named by PYTHON", *words)


@pytest.mark.parametrize("variable", ["VIRTUAL_ENV", "CONDA_PREFIX"])
def test_setup_uses_an_active_environment_that_has_vllm(project, own_environment, variable):
    folder, settings = own_environment
    settings[variable] = folder
    assert_used(project, project.setup(**settings), folder / "bin/python")
    (settings["PYTHONPATH"] / "vllm.py").unlink()
    assert_made(project, project.setup(**settings))


def test_setup_leaves_a_venv_it_did_not_make(project):
    write_program(project.python, FAKE_PYTHON)
    kept = project.dir / ".venv/kept"
    kept.touch()
    assert_used(project, project.setup(), project.python)
    assert_refused(project, project.setup(FAKE_MISSING="vllm"), "lacks: vllm", "delete a .venv of your own")
    assert kept.exists()
