"""setup.sh in a project of its own, with a stand-in for Python and pip."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


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


@pytest.fixture(name="project")
def project_fixture(tmp_path):
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
