"""Workers as processes of this machine: the local executor of the scheduler."""

import contextlib
import ctypes
import gc
import multiprocessing
import multiprocessing.connection
import multiprocessing.util
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator

from utils import StageError, log
from workers.worker import Work, Worker, prepare_threads, start_work


class LocalExecutor:
    """One worker process for each dictionary of environment variables; `make_work()` is called once in each.

    See scheduler.Executor for its methods.
    """

    waits_for_room = False

    def __init__(self, make_work: Callable[[], Work], environments: list[dict[str, str]]):
        self.make_work, self.environments = make_work, environments
        self.processes = {}  # by slot: (process, connection)
        gpus = [environment["CUDA_VISIBLE_DEVICES"] for environment in environments]
        where = f"GPUs {' '.join(gpus)}" if any(gpus) else "CPU"
        log.info("%d worker%s on %s", len(gpus), "s" * (len(gpus) > 1), where)

    def __len__(self) -> int:
        return len(self.environments)

    def start(self, slot: int) -> str:
        context = multiprocessing.get_context("spawn")
        connection, theirs = context.Pipe()
        process = context.Process(target=_main, args=(self.make_work, self.environments[slot], theirs), daemon=False)
        process.start()
        theirs.close()
        self.processes[slot] = process, connection
        gpus = self.environments[slot]["CUDA_VISIBLE_DEVICES"]
        return f"worker {slot} ({'GPU ' + gpus if gpus else 'CPU'}, pid {process.pid})"

    def send(self, slot: int, number: int, tasks: dict) -> None:
        with contextlib.suppress(BrokenPipeError):  # it has died, which is noticed when its events are read
            self.processes[slot][1].send((number, tasks))

    def events(self) -> Iterator[tuple]:
        connections = [connection for _, connection in self.processes.values()]
        sentinels = [process.sentinel for process, _ in self.processes.values()]
        multiprocessing.connection.wait(connections + sentinels, timeout=1)
        for slot, (process, connection) in list(self.processes.items()):
            try:
                if connection.poll():
                    yield slot, *connection.recv()
                    continue
            except (EOFError, OSError):
                process.join()
            if process.exitcode is not None:
                yield slot, "lost", None, f"died with exit code {process.exitcode}"

    def stop(self, slot: int, wait: float = 0) -> None:
        process, connection = self.processes.pop(slot, (None, None))
        if process is None:
            return
        with contextlib.suppress(OSError):
            connection.send(None)
        process.join(wait)
        for kill in (lambda: os.killpg(process.pid, signal.SIGKILL), process.kill):
            with contextlib.suppress(OSError):
                kill()
        process.join()
        connection.close()


def die_with_parent() -> None:
    """Ask the kernel to kill this process when its parent ends, however that ends (Linux only)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # 1 = PR_SET_PDEATHSIG
    parent = multiprocessing.parent_process()
    if parent and os.getppid() != parent.pid:  # it ended before the kernel was asked
        os._exit(1)


def _main(make_work, environment, connection):
    """The life of a worker process."""
    os.environ.update(environment)
    prepare_threads()
    die_with_parent()
    os.setpgid(0, 0)  # with whatever the engine starts, it can be killed as a group
    _end_group_with_this_process()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then ends the workers
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    gc.disable()  # nothing to collect while libraries are imported; saves 2 of 10 seconds
    try:
        worker = Worker(start_work(make_work))
        gc.enable()
        connection.send(("ready", None, None))
        while True:
            if not worker.left or connection.poll():
                if (message := connection.recv()) is None:
                    break
                for event in worker.begin(*message):
                    connection.send(event)
            if worker.left:  # also before the next chunk is begun, so that it starts at once
                for event in worker.step():
                    connection.send(event)
    except StageError as error:
        connection.send(("error", None, str(error)))
    except (EOFError, BrokenPipeError):
        pass
    except BaseException:
        connection.send(("lost", None, f"failed:\n{traceback.format_exc().rstrip()}"))
    if not multiprocessing.active_children():  # those of an engine on several GPUs want an orderly end
        multiprocessing.util._exit_function()  # as at the end of any such process: semaphores are removed
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)  # taking the libraries down would take 3 seconds


def _end_group_with_this_process():
    """Start a process that kills this one's group once this one has ended in whatever way: an engine on several GPUs is
    processes of its own, which would stay, with the GPUs' memory, after a worker that is killed."""
    leader = os.getpid()
    if os.fork() == 0:
        while os.getppid() == leader:
            time.sleep(0.5)
        os.killpg(leader, signal.SIGKILL)
