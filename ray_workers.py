"""`workers.map_chunks` on a Ray cluster (--engine ray): the same work in actors on all GPUs of the cluster.

Ray places the actors, notices when one or its node is lost, and starts it again where there is room; a chunk that was lost
with it goes to the next actor that is free. The project's folder, the models, and the files of the experiment should be
under the same path on every node: a shared file system, or models from the Hub. Ray is an optional package (pip install ray).
"""

import os
import socket
import threading

from utils import StageError, log
from workers import IN_FLIGHT, MAX_STARTS, Chunk, retry


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
        raise StageError(f"no Ray cluster at {address} ({error}); start one (ray start --head, on the other nodes ray start "
                         "--address=...), or name it in RAY_ADDRESS") from None
    if pool.gpus not in ("auto", "none"):
        raise StageError(f"--gpus {pool.gpus}: with --engine ray, Ray hands out the GPUs; give auto or none")
    resources = ray.cluster_resources()
    gpus = 0 if pool.gpus == "none" else int(resources.get("GPU", 0))
    if gpus and gpus < pool.gpus_per_worker or not gpus and pool.gpus_per_worker > 1:
        raise StageError(f"--gpus_per_worker {pool.gpus_per_worker}, but Ray's cluster has {gpus} GPUs")
    nodes = [node for node in ray.nodes() if node["Alive"]]
    count = gpus // pool.gpus_per_worker if gpus else pool.cpu_workers
    log.info("%d actor%s on %d Ray node%s (%s)", count, "s" * (count > 1), len(nodes), "s" * (len(nodes) > 1),
             f"{gpus} GPUs" if gpus else "CPU")
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


def map_chunks(make_work, chunks, count, pool, give_up):
    """Yield `(tasks, results)` for every chunk, as `workers.map_chunks` does, from `count` actors."""
    import ray
    from ray.exceptions import RayActorError, RayError
    on_gpu = pool.gpus != "none" and ray.cluster_resources().get("GPU", 0) > 0
    kind = ray.remote(Actor).options(num_cpus=1, num_gpus=pool.gpus_per_worker if on_gpu else 0, max_restarts=MAX_STARTS,
                                     max_concurrency=IN_FLIGHT)
    chunks, redo, numbers = map(Chunk, chunks), [], iter(range(1 << 60))
    chunk = next(chunks, None)
    actors = [kind.remote(make_work, on_gpu) for _ in range(count)] if chunk else []
    free = []  # an actor is in it once a chunk that it could take
    starting = lambda actor: actor.ready.options(max_task_retries=-1).remote()  # noqa: E731 - answers once it is (again) there
    running = {starting(actor): (actor, None) for actor in actors}  # reference: (actor, its chunk; None: it starts)
    try:
        while chunk or redo or any(own for _, own in running.values()):
            while free and (redo or chunk):
                actor = free.pop(0)
                if redo:
                    own = redo.pop(0)
                else:
                    own, chunk = chunk, next(chunks, None)
                running[actor.run.remote(next(numbers), own.tasks)] = actor, own
            if not running:
                raise StageError("all of Ray's actors were lost, each more than "
                                 f"{MAX_STARTS} times; out of memory? See Ray's logs (ray logs)")
            done, _ = ray.wait(list(running), timeout=pool.stall_timeout or None)
            if not done:
                raise StageError(f"no actor of Ray's made progress for {pool.stall_timeout:g} s (--stall_timeout); has the "
                                 "cluster room for them (ray status)?")
            for reference in done:
                actor, own = running.pop(reference)
                try:
                    value = ray.get(reference)
                except RayError as error:
                    reason = f"an actor of Ray's was lost: {str(error).strip().splitlines()[0]}"
                    log.warning("%s", reason)
                    free = [other for other in free if other is not actor]
                    if not isinstance(error, RayActorError):  # an exception in its work: a new process
                        ray.kill(actor, no_restart=False)
                    if own:
                        if not any(other is actor and theirs is None for other, theirs in running.values()):
                            running[starting(actor)] = actor, None
                        retried, culprit = retry(own)
                        redo += retried
                        if culprit:
                            yield culprit, [give_up(culprit[0], reason)]
                    continue
                if own is None:
                    if value:
                        raise StageError(f"an actor of Ray's failed:\n{value}")
                    free += [actor] * IN_FLIGHT
                elif value[0] == "error":
                    raise StageError(f"an actor of Ray's failed:\n{value[1]}")
                else:
                    free.append(actor)
                    yield own.tasks, value[1]
    finally:
        for actor in actors:
            ray.kill(actor)
