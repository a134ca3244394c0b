"""One whole run of comal.sh on real parts, on which several files of tests look."""

import shutil
import subprocess
import sys
import uuid
from pathlib import Path
from types import SimpleNamespace

import pytest

from helpers.hub import fill_cache
from helpers.loop import ROOT, environment

WITHOUT_NETWORK = ["unshare", "--net", "bash", "-c", 'ip link set lo up && exec "$@"', "-"]


def can_leave_the_network():
    return subprocess.run([*WITHOUT_NETWORK, "true"], capture_output=True).returncode == 0


@pytest.fixture(scope="session", name="finished")
def finished_fixture(demo_models, tmp_path_factory):
    """A whole run, on which several files look: the demo's iterations 1 and 2 of 3, from a policy and a reference in
    the Hub's cache, and, where this process may make a namespace, without a network.

    `run(*arguments, **settings)` is comal.sh once more with its settings, `folder` its folder, `name` that of its
    parent in exps/, `output` what it printed.
    """
    name = f"test-{uuid.uuid4().hex[:8]}"
    settings = {
        "RECIPE": "demo",
        "PYTHON": sys.executable,
        "NAME": f"{name}/run",
        "DEMO_MODELS": str(demo_models),
        "FIRST_ITERATION": "1",
        "ROUNDS": "1",
        "SPLITS": "3",
        "EVAL_EVERY": "2",
        "SAVE_MINUTES": "0.005",
        "MAX_JUDGE_TOKENS": "1000",
        "KL_FROM_START": "true",
    } | fill_cache(tmp_path_factory.mktemp("hub"), demo_models)
    prefix = WITHOUT_NETWORK if can_leave_the_network() else []

    def run(*arguments, **changed):
        return subprocess.run(
            [*prefix, "bash", "comal.sh", *arguments],
            cwd=ROOT,
            env=environment(**settings | changed),
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=600,
        )

    (ROOT / "exps" / name).mkdir(parents=True)
    try:
        done = run()
        assert done.returncode == 0, done.stdout[-4000:]
        yield SimpleNamespace(
            name=name, folder=ROOT / "exps" / name / "run", settings=settings, run=run, output=done.stdout
        )
    finally:
        shutil.rmtree(ROOT / "exps" / name)


def copy_run(finished, folder):
    """A copy of the finished run as if it had been made in `folder`, without what tells when and how."""
    old, new = (str(path.relative_to(ROOT)).encode() for path in (finished.folder, folder))

    def copy(source, target):
        Path(target).write_bytes(Path(source).read_bytes().replace(old, new))

    shutil.copytree(finished.folder, folder, copy_function=copy, symlinks=True, ignore=shutil.ignore_patterns(".*"))
