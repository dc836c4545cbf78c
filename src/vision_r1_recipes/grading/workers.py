"""A small pool of killable processes for sympy, which can hang inside C code where no signal handler runs.

Each worker is a pair of processes: a keeper that imports sympy once, and a child of it that does the work. A child
that uses up its CPU time is ended by the kernel; the keeper says so and forks the next one, which costs milliseconds
and no import.
"""

import atexit
import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import wait
from pathlib import Path


CPU_SECONDS = 0.8  # of a worker for one request; then the kernel ends it, inside C code too
MEMORY_BYTES = 2 * 2**30  # of address space; a request that wants more is given up
WALL_SECONDS = 20  # until the parent ends a worker that neither answers nor uses its CPU time
START_SECONDS = 120  # for importing sympy, which a cold network disk makes slow
LOST = object()  # the reply to a request on which a worker gave up, for time or memory

_LOST_LINE = "lost\n"


class Worker:
    """One keeper and its child, started at the first request and replaced when they die.

    Pipes to a fresh interpreter rather than `multiprocessing`: the user's `__main__` is not imported again, and it
    matters neither how the parent was started nor which threads it has.
    """

    process: subprocess.Popen | None = None

    def _read(self, seconds: float) -> str:
        if wait([self.process.stdout], seconds):
            return self.process.stdout.readline()
        self.stop()
        return ""

    def _start(self) -> bool:
        self.stop()
        code = (
            "import sys; sys.path.append(sys.argv.pop(1)); "
            "from vision_r1_recipes.grading.workers import serve; serve()"
        )
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", code, str(Path(__file__).parents[2]), str(CPU_SECONDS), str(MEMORY_BYTES)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is the parent's, and both processes can be ended at once
            text=True,
        )
        return self._read(START_SECONDS) == "ready\n"

    def stop(self) -> None:
        """End both processes."""
        if process := self.process:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def ask(self, name: str, arguments: Sequence[str]):
        """The reply to one request or `LOST`; `RuntimeError` when no worker can be started."""
        request = json.dumps([name, arguments]) + "\n"
        for _ in range(3):
            if (self.process is None or self.process.poll() is not None) and not self._start():
                continue
            line = ""
            try:
                self.process.stdin.write(request)
                self.process.stdin.flush()
                line = self._read(WALL_SECONDS)
                return LOST if line == _LOST_LINE else json.loads(line)
            except OSError:  # it had died before the request came: not this item's fault
                continue
            except ValueError:  # it died in the middle
                return LOST
            finally:  # also after Ctrl-C: a late reply must not become the next request's
                if not line.endswith("\n"):
                    self.stop()
        raise RuntimeError(f"no worker for sympy can be started with {sys.executable}; try `import math_verify` there")


class Pool:
    """
    Args:
        size (`int`):
            Workers; each is started when it is needed for the first time.
    """

    def __init__(self, size: int):
        self.size = size
        self.reset()
        atexit.register(self.stop)
        os.register_at_fork(after_in_child=self.reset)

    def reset(self) -> None:
        """Forget the workers (which in a forked child are the parent's), without a word to them."""
        self.workers = [Worker() for _ in range(self.size)]
        self.idle: queue.LifoQueue[Worker] = queue.LifoQueue()
        for worker in self.workers:
            self.idle.put(worker)

    def stop(self) -> None:
        """End all processes; the next request starts them again."""
        for worker in self.workers:
            worker.stop()

    def ask(self, name: str, *arguments: str):
        """The worker's reply, or `LOST`. From any thread."""
        worker = self.idle.get()
        try:
            return worker.ask(name, arguments)
        finally:
            self.idle.put(worker)

    def map(self, ask: Callable, requests: Sequence) -> list:
        """`ask` of each request, `size` at a time: where each worker has a core, requests of which `k` are lost take
        the time of the others and at most `ceil(k / size) * CPU_SECONDS`."""
        if len(requests) < 2:
            return [ask(request) for request in requests]
        with ThreadPoolExecutor(self.size) as threads:
            return list(threads.map(ask, requests))


def serve() -> None:
    """The keeper: one JSON request per line on stdin, one JSON reply per line on the original stdout."""
    import resource

    from . import maths

    # A cluster sends it to all processes of a job. The parent may want its answers until the step is done.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    cpu_seconds, memory = float(sys.argv[1]), int(sys.argv[2])
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # the LaTeX parser prints
    maths.warm_up()
    replies.write("ready\n")
    replies.flush()
    while child := os.fork():
        _, status = os.waitpid(child, 0)
        if os.WIFEXITED(status):  # there is no more to read
            return
        with contextlib.suppress(BrokenPipeError):
            replies.write(_LOST_LINE)
            replies.flush()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(ValueError):  # macOS takes no such limit
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    while line := sys.stdin.readline():
        name, arguments = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, cpu_seconds)  # not caught: the kernel ends the process
        try:
            reply = maths.REQUESTS[name](*arguments)
        except Exception:
            reply = None
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(reply), file=replies, flush=True)
    os._exit(0)
