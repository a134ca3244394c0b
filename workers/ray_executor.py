"""Workers as actors of a Ray cluster (--engine ray): the same work on all GPUs of the cluster.

Ray places the actors, waits for room where there is none, and notices when one or its node is lost. The project's
folder, the models, and the files of the experiment should be under the same path on every node: a shared file system,
or models from the Hub. Ray is an optional package (pip install ray).
"""

import os
import socket
import threading
from collections.abc import Callable, Iterator

from utils import StageError, log
from workers.scheduler import IN_FLIGHT
from workers.worker import Work, Worker, prepare_threads, start_work


def connect(gpus: str, tensor_parallel_size: int, cpu_workers: int) -> tuple[int, bool]:
    """Join the cluster; returns the number of actors that PoolConfig's settings ask for, and whether they have GPUs.

    Raises StageError when there is no Ray, no cluster, or not enough of it.
    """
    try:
        import ray
    except ImportError:
        raise StageError("--engine ray needs Ray: pip install ray (on every node)") from None
    address = os.environ.get("RAY_ADDRESS", "auto")
    try:
        host, colon, port = address.rpartition(":")
        if colon and "/" not in host:  # Ray itself would go on trying for minutes
            socket.create_connection((host, int(port)), timeout=10).close()
        ray.init(address=address, log_to_driver=False, logging_level="ERROR", ignore_reinit_error=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise StageError(
            f"no Ray cluster at {address} ({error}); start one (ray start --head, on the other nodes ray start "
            "--address=...), or name it in RAY_ADDRESS"
        ) from None
    if gpus not in ("auto", "none"):
        raise StageError(f"--gpus {gpus}: with --engine ray, Ray hands out the GPUs; give auto or none")
    found = 0 if gpus == "none" else int(ray.cluster_resources().get("GPU", 0))
    if (found and found < tensor_parallel_size) or (not found and tensor_parallel_size > 1):
        raise StageError(f"--tensor_parallel_size {tensor_parallel_size}, but Ray's cluster has {found} GPUs")
    nodes = sum(node["Alive"] for node in ray.nodes())
    count = found // tensor_parallel_size if found else cpu_workers
    where = f"{nodes} Ray node{'s' * (nodes > 1)} ({f'{found} GPUs' if found else 'CPU'})"
    log.info("%d actor%s on %s", count, "s" * (count > 1), where)
    return count, bool(found)


class Actor:
    """The work of one worker process; IN_FLIGHT threads call it, one of which moves the work on at a time."""

    def __init__(self, make_work: Callable[[], Work], on_gpu: bool):
        if not on_gpu:
            os.environ["CUDA_VISIBLE_DEVICES"] = ""
        os.environ["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"  # Ray's numbers are those of nvidia-smi
        prepare_threads()
        self.lock, self.found, self.error = threading.Lock(), {}, None
        try:
            self.worker = Worker(start_work(make_work))
        except StageError as error:
            self.error = str(error)

    def ready(self) -> str | None:
        """None, or the message of the StageError that its start has raised."""
        return self.error

    def run(self, number: int, tasks: dict | None = None) -> list[tuple]:
        """Begin the chunk of this number, or go on with it without `tasks`; returns its next events."""
        try:
            if tasks is not None:
                with self.lock:
                    self._keep(self.worker.begin(number, tasks))
            while True:
                with self.lock:
                    if number in self.found:
                        return self.found.pop(number)
                    self._keep(self.worker.step())
        except StageError as error:
            return [("error", number, str(error))]

    def _keep(self, events):
        for event in events:
            self.found.setdefault(event[1], []).append(event)


class RayExecutor:
    """Actors of the cluster that RAY_ADDRESS names; `make_work()` is called once in each.

    See scheduler.Executor for its methods.

    Raises StageError as `connect` does.
    """

    waits_for_room = True

    def __init__(self, make_work: Callable[[], Work], gpus: str, tensor_parallel_size: int, cpu_workers: int):
        self.count, self.on_gpu = connect(gpus, tensor_parallel_size, cpu_workers)
        import ray

        num_gpus = tensor_parallel_size if self.on_gpu else 0
        self.kind = ray.remote(Actor).options(num_cpus=1, num_gpus=num_gpus, max_concurrency=IN_FLIGHT)
        self.make_work, self.actors = make_work, {}
        self.running = {}  # Ray's reference: (slot, number of its chunk; None while it starts)

    def __len__(self) -> int:
        return self.count

    def start(self, slot: int) -> str:
        self.actors[slot] = self.kind.remote(self.make_work, self.on_gpu)
        self.running[self.actors[slot].ready.remote()] = slot, None
        return "an actor of Ray's"

    def send(self, slot: int, number: int, tasks: dict) -> None:
        self.running[self.actors[slot].run.remote(number, tasks)] = slot, number

    def events(self) -> Iterator[tuple]:
        import ray

        done, _ = ray.wait(list(self.running), timeout=1)
        for reference in done:
            slot, number = self.running.pop(reference)
            try:
                value = ray.get(reference)
            except ray.exceptions.RayError as error:
                lines = str(error).strip().splitlines()
                yield slot, "lost", None, "was lost: " + "\n".join(lines)
                continue
            if number is None:
                yield slot, "error" if value else "ready", None, value
                continue
            if value[-1][0] == "failed":  # there is more to come
                self.running[self.actors[slot].run.remote(number)] = slot, number
            for event in value:
                yield slot, *event

    def stop(self, slot: int, wait: float = 0) -> None:
        import ray

        if slot in self.actors:
            ray.kill(self.actors.pop(slot))
        self.running = {reference: own for reference, own in self.running.items() if own[0] != slot}
