"""`workers.map_chunks` on a Ray cluster (--engine ray): the same work in actors on all GPUs of the cluster.

Ray places the actors, notices when one or its node is lost, and starts it again where there is room; a chunk that was
lost with it goes to the next actor that is free. The project's folder, the models, and the files of the experiment
should be under the same path on every node: a shared file system, or models from the Hub. Ray is an optional package
(pip install ray).
"""

import itertools
import os
import socket
import threading
import time

from utils import StageError, log
from workers.pool import IN_FLIGHT, Chunk, retry

MAX_RESTARTS = 100  # of an actor; a record that ends its actor is found by halving its chunk, over some ten of them


def connect(pool):
    """Join the cluster; returns the number of actors for this PoolConfig.

    Raises StageError when there is no Ray, no cluster, or not enough of it.
    """
    try:
        import ray
    except ImportError:
        raise StageError("--engine ray needs Ray: pip install ray (on every node)") from None
    address = os.environ.get("RAY_ADDRESS", "auto")
    try:
        host, found, port = address.rpartition(":")
        if found and "/" not in host:  # Ray itself would go on trying for minutes
            socket.create_connection((host, int(port)), timeout=10).close()
        ray.init(address=address, log_to_driver=False, logging_level="ERROR", ignore_reinit_error=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise StageError(
            f"no Ray cluster at {address} ({error}); start one (ray start --head, on the other nodes ray start "
            "--address=...), or name it in RAY_ADDRESS"
        ) from None
    if pool.gpus not in ("auto", "none"):
        raise StageError(f"--gpus {pool.gpus}: with --engine ray, Ray hands out the GPUs; give auto or none")
    resources = ray.cluster_resources()
    gpus = 0 if pool.gpus == "none" else int(resources.get("GPU", 0))
    if (gpus and gpus < pool.gpus_per_worker) or (not gpus and pool.gpus_per_worker > 1):
        raise StageError(f"--gpus_per_worker {pool.gpus_per_worker}, but Ray's cluster has {gpus} GPUs")
    nodes = [node for node in ray.nodes() if node["Alive"]]
    count = gpus // pool.gpus_per_worker if gpus else pool.cpu_workers
    log.info(
        "%d actor%s on %d Ray node%s (%s)",
        count,
        "s" * (count > 1),
        len(nodes),
        "s" * (len(nodes) > 1),
        f"{gpus} GPUs" if gpus else "CPU",
    )
    return count


class Actor:
    """The work of one worker process; IN_FLIGHT threads call it, one of which moves the work on at a time."""

    def __init__(self, make_work, on_gpu):
        if not on_gpu:
            os.environ["CUDA_VISIBLE_DEVICES"] = ""
        self.lock, self.finished, self.error, self.work = threading.Lock(), {}, None, None
        try:
            self.work = make_work()
        except StageError as error:
            self.error = str(error)

    def ready(self):
        return self.error

    def run(self, number, tasks):
        """('done', results) or ('error', message of a StageError)."""
        try:
            with self.lock:
                self.work.begin(number, tasks)
            while True:
                with self.lock:
                    if number in self.finished:
                        return "done", self.finished.pop(number)
                    self.finished.update(self.work.step())
        except StageError as error:
            return "error", str(error)


class _Remote:
    """An actor as its owner sees it."""

    def __init__(self, actor):
        self.actor, self.chunks = actor, []
        self.start()

    def start(self):
        """It is, or will be, starting: `starting` answers once it is there, again where Ray has to restart it."""
        self.is_ready, self.since = False, time.monotonic()
        self.starting = self.actor.ready.options(max_task_retries=-1).remote()

    def takes(self, chunk):
        """As `workers._Worker.takes`: a chunk that an actor was lost over goes alone."""
        return self.is_ready and (
            not self.chunks
            or (len(self.chunks) < IN_FLIGHT and not any(other.losses for other in (chunk, *self.chunks)))
        )


def map_chunks(make_work, chunks, count, pool, give_up):
    """Yield `(tasks, results)` for every chunk, as `workers.map_chunks` does, from `count` actors."""
    import ray
    from ray.exceptions import RayActorError, RayError

    on_gpu = pool.gpus != "none" and ray.cluster_resources().get("GPU", 0) > 0
    kind = ray.remote(Actor).options(
        num_cpus=1, num_gpus=pool.gpus_per_worker if on_gpu else 0, max_restarts=MAX_RESTARTS, max_concurrency=IN_FLIGHT
    )
    chunks, redo, numbers = map(Chunk, chunks), [], itertools.count()
    chunk = next(chunks, None)
    remotes = [_Remote(kind.remote(make_work, on_gpu)) for _ in range(count)] if chunk else []
    running = {remote.starting: (remote, None) for remote in remotes}  # reference: (remote, its chunk; None: it starts)

    def hand(remote, own):
        remote.chunks.append(own)
        remote.since = time.monotonic()
        running[remote.actor.run.remote(next(numbers), own.tasks)] = remote, own

    try:
        while chunk or redo or any(remote.chunks for remote in remotes):
            for _ in range(IN_FLIGHT):
                for remote in remotes:
                    if redo and remote.takes(redo[0]):
                        hand(remote, redo.pop(0))
                    elif chunk and remote.takes(chunk):
                        hand(remote, chunk)
                        chunk = next(chunks, None)
            if not running:
                raise StageError(f"all of Ray's actors were lost, {MAX_RESTARTS} times each; see Ray's logs (ray logs)")
            done, _ = ray.wait(list(running), timeout=5)
            late = [
                remote
                for remote in remotes
                if pool.stall_timeout and time.monotonic() - remote.since > pool.stall_timeout
            ]
            if not done and late and not any(remote.is_ready for remote in remotes):
                raise StageError(
                    f"no actor of Ray's was there after {pool.stall_timeout:g} s (--stall_timeout); has the "
                    "cluster room for them (ray status)?"
                )
            for remote in late:
                if remote.chunks:
                    log.warning("an actor of Ray's made no progress for %g s (--stall_timeout)", pool.stall_timeout)
                    remote.since = time.monotonic()
                    ray.kill(remote.actor, no_restart=False)
            for reference in done:
                remote, own = running.pop(reference)
                if own:
                    remote.chunks.remove(own)
                try:
                    value = ray.get(reference)
                except RayError as error:
                    lines = str(error).strip().splitlines()
                    reason = f"an actor of Ray's was lost: {lines[0]}" + (f" ... {lines[-1]}" if len(lines) > 1 else "")
                    log.warning("%s", reason)
                    if own is None:  # it will not come back
                        continue
                    if remote.is_ready:
                        if not isinstance(error, RayActorError):  # an exception in its work: a new process
                            ray.kill(remote.actor, no_restart=False)
                        remote.start()
                        running[remote.starting] = remote, None
                    retried, culprit = retry(own)
                    redo += retried
                    if culprit:
                        yield culprit, [give_up(culprit[0], reason)]
                    continue
                kind_of_answer, value = ("ready", value) if own is None else value
                if kind_of_answer == "error" or (own is None and value):
                    raise StageError(f"an actor of Ray's failed:\n{value}")
                remote.since = time.monotonic()
                if own is None:
                    remote.is_ready = True
                else:
                    yield own.tasks, value
    finally:
        for remote in remotes:
            ray.kill(remote.actor)
