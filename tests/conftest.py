"""What the tests share: the modules on the import path, no network, small files, and two tiny tokenizers.

bash tests/run.sh
"""

import contextlib
import gc
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import uuid
from collections import Counter
from pathlib import Path

import pytest
from filelock import FileLock

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "data" / "demo")]
os.environ["HF_HUB_OFFLINE"] = "1"  # read when the Hub's client is first imported


@pytest.hookimpl(hookwrapper=True)
def pytest_collection(session):
    """The tests are imported as data_utils.import_transformers imports: without collecting garbage, and with
    scikit-learn hidden from transformers. That spares seconds in each process."""
    gc.disable()
    sys.modules["sklearn"] = None
    yield
    del sys.modules["sklearn"]
    gc.enable()


LOOPS = ("test_end_to_end.py", "test_faults.py", "test_nodes.py")  # these look at the finished run
SERVED = ("test_servers.py", "test_trial.py")  # these ask the server with the judge
STAGES = ("test_bad_input.py", "test_odd_input.py")  # these fork one process that has imported PyTorch


def pytest_collection_modifyitems(items):
    """The files of the finished run come first, then those of the server, then those with many slow tests: so two
    processes end at about the same time. What needs vLLM on the CPU is skipped where only a build for GPUs is
    installed."""
    from workers.pool import no_cpu_engine

    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: (item.path.name not in LOOPS, item.path.name not in SERVED, -slow[item.path]))
    reason = no_cpu_engine()
    for item in items if reason else ():
        if item.get_closest_marker("cpu_engine"):
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """One process takes all tests of a file, and of the files that share a run, a server or a process."""
    from xdist.scheduler import LoadFileScheduling

    class Groups(LoadFileScheduling):
        def _split_scope(self, nodeid):
            file = super()._split_scope(nodeid)
            groups = {"loops": LOOPS, "served": SERVED, "stages": STAGES}
            return next((name for name, files in groups.items() if file.endswith(files)), file)

    return Groups(config, log)


@pytest.fixture(autouse=True)
def log_level():
    """A script that a test runs in this process may have set the level of the log; the next test finds it as it was."""
    yield
    logging.getLogger("comal").setLevel(logging.NOTSET)


@pytest.fixture(scope="session", autouse=True)
def private_cache(tmp_path_factory):
    """What `datasets` makes of the tests' files stays out of the user's cache."""
    os.environ["HF_DATASETS_CACHE"] = str(tmp_path_factory.mktemp("datasets-cache"))


@pytest.fixture
def jsonl(tmp_path):
    """A function that writes records to a JSONL file of the test's own folder and returns its path."""

    def write(name, *records):
        path = tmp_path / name
        lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        path.write_text("".join(lines), encoding="utf-8", newline="\n")
        return path

    return write


@pytest.fixture
def loop(tmp_path):
    """comal.sh with a script in the place of its stages; what is left of it is ended and removed."""
    (tmp_path / "a folder").mkdir()  # paths with a space
    loop = Loop(tmp_path / "a folder", f"test-{uuid.uuid4().hex[:8]}")
    yield loop
    for pid in processes(loop.name):
        with contextlib.suppress(ProcessLookupError):  # it has just ended
            os.kill(pid, signal.SIGKILL)
    shutil.rmtree(loop.exps, ignore_errors=True)


@pytest.fixture(scope="session")
def some_model(tmp_path_factory):
    """A directory with a config.json and whole, if few, weights: what a stage checks of a model before it starts."""
    import torch
    from safetensors.torch import save_file

    directory = tmp_path_factory.mktemp("some-model")
    (directory / "config.json").write_text('{"model_type": "qwen2"}')
    save_file({"weight": torch.zeros(3)}, directory / "model.safetensors")
    return str(directory)


@pytest.fixture(scope="session")
def demo_models(tmp_path_factory, worker_id):
    """The demo's models, fitted briefly, and 32 prompts an iteration; built once, also for tests that run in
    parallel."""
    folder = tmp_path_factory.getbasetemp() if worker_id == "master" else tmp_path_factory.getbasetemp().parent
    directory = folder / "demo-models"
    with FileLock(folder / "demo-models.lock"):
        built = subprocess.run(
            ["bash", "data/demo/build.sh", str(directory)],
            cwd=ROOT,
            text=True,
            timeout=600,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=os.environ
            | {
                "PYTHON": sys.executable,
                "POLICY_EPOCHS": "3",
                "JUDGE_SHORT_EPOCHS": "1",
                "JUDGE_EPOCHS": "1",
                "JUDGE_PHRASINGS": "24",
                "PROMPTS_PER_ITERATION": "32",
            },
        )
    assert built.returncode == 0, built.stdout
    return directory


@pytest.fixture(scope="session")
def model_dirs(tmp_path_factory):
    """{"policy": a ChatML tokenizer, "judge": one in Llama 3's style}, as directories with a model's config."""
    from game import write_models

    from judges.base import read_template

    directory = tmp_path_factory.mktemp("models")
    write_models(directory, read_template(ROOT / "prompts" / "offsetbias.txt"))
    return {name: str(directory / f"{name}-config") for name in ("policy", "judge")}


@pytest.fixture(scope="session")
def tokenizers(model_dirs):
    from data_utils import load_tokenizer

    return {name: load_tokenizer(directory) for name, directory in model_dirs.items()}


@pytest.fixture(params=["policy", "judge"])
def tokenizer(request, tokenizers):
    return tokenizers[request.param]


from helpers.finished import finished_fixture  # noqa: E402, F401
from helpers.loop import Loop, processes  # noqa: E402
from helpers.served import served_fixture  # noqa: E402, F401
from helpers.training import setting_fixture, train_fixture  # noqa: E402, F401
