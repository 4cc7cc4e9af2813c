"""The local engine: worker processes of one thread, each a fresh interpreter.

Jobs and results travel as JSON. A worker that dies costs the unit that it was at and is replaced;
workers whose sweep dies end at once, in the middle of a unit.
"""

import json
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pkgutil import resolve_name
from typing import Any

Job = Mapping[str, Any]

ONE_THREAD: dict[str, str] = dict.fromkeys(
    ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS"), "1"
)
"""What keeps numeric libraries, which read it when they are imported, to one thread."""

MOST_TEXT = 4000
"""Characters of an error that are kept, and of where it was raised."""

_PATIENCE = 5.0
"""Seconds that a worker may take to end after it was told to."""


@dataclass(frozen=True)
class Outcome:
    """What came of a job.

    Attributes:
        name: The job's name.
        seconds: From its start to its end.
        result: What the work returned; None if it failed.
        error: Why it failed, on one line; None if it did not.
        traceback: Where it failed; empty if that is not known.
    """

    name: str
    seconds: float
    result: dict[str, Any] | None = None
    error: str | None = None
    traceback: str = ""


def run_locally(work: str, jobs: Mapping[str, Job], workers: int) -> Iterator[Outcome]:
    """Do jobs in worker processes, and give what comes of each as soon as it is known.

    The processes end with the generator, whatever ends it.

    Args:
        work: Import path of the function that computes a job, as ``module:function``.
        jobs: By name, in the order in which they are begun.
        workers: Processes.
    """
    waiting = deque(jobs.items())
    busy: list[_Worker] = []
    try:
        while waiting and len(busy) < workers:
            busy.append(_Worker(work).begin(*waiting.popleft()))
        while busy:
            ready = wait([worker.connection for worker in busy])
            for worker in [each for each in busy if each.connection in ready]:
                busy.remove(worker)
                outcome = worker.finish()
                if not (waiting and worker.is_alive):
                    worker.end()
                if waiting:
                    successor = worker if worker.is_alive else _Worker(work)
                    busy.append(successor.begin(*waiting.popleft()))
                yield outcome
    finally:
        for worker in busy:
            worker.stop()
        for worker in busy:
            worker.end()


class _Worker:
    """A process and the job it is at.

    Attributes:
        connection: Where its answer will come from.
        is_alive: Whether it can take another job.
    """

    def __init__(self, work: str) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self._process: SpawnProcess = context.Process(
            target=_serve, args=(theirs, work), name="kvpolicy-sweep", daemon=True
        )
        with _interrupts_held_back():
            self._process.start()
        theirs.close()
        self.is_alive = True
        self._name, self._began = "", 0.0

    def begin(self, name: str, job: Job) -> "_Worker":
        """Send a job; that the process is gone shows when its answer is read."""
        self._name, self._began = name, time.perf_counter()
        try:
            self.connection.send_bytes(json.dumps(job).encode())
        except OSError:
            self.is_alive = False
        return self

    def finish(self) -> Outcome:
        """Read the answer, or the death, of a process that has something to say."""
        answer: dict[str, Any]
        try:
            answer = json.loads(self.connection.recv_bytes())
        except (EOFError, OSError):
            self.is_alive = False
            self._process.join()
            answer = {"error": f"the worker process ended: {_reason(self._process.exitcode)}"}
        return Outcome(self._name, time.perf_counter() - self._began, **answer)

    def stop(self) -> None:
        """Interrupt whatever it is at."""
        self._process.terminate()

    def end(self) -> None:
        """Let the process go, which ends when nobody can ask it anything."""
        self.connection.close()
        self._process.join(_PATIENCE)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._process.close()


def _reason(code: int | None) -> str:
    if code is None or code >= 0:
        return f"exit code {code}"
    hint = ", as when memory runs out" if code == -signal.SIGKILL else ""
    return f"signal {-code} ({signal.strsignal(-code)}){hint}"


@contextmanager
def _interrupts_held_back() -> Iterator[None]:
    """Start processes that Ctrl-C does not reach: it is ours to end them, not the terminal's.

    A process inherits which signals are held back. Ours comes as soon as the process has started.
    """
    resource_tracker.ensure_running()  # starting it releases what is held back
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _serve(connection: Connection, work: str) -> None:
    """A worker process: answer jobs until there is nobody to answer."""
    os.environ.update(ONE_THREAD)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # stdout is the sweep's own
    threading.Thread(target=_end_with_parent, daemon=True).start()
    while True:
        try:
            job = json.loads(connection.recv_bytes())
        except (EOFError, OSError):
            return
        connection.send_bytes(attempt(work, job))


def _end_with_parent() -> None:
    """End this process, in the middle of whatever it does, when the sweep's has ended."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def attempt(work: str, job: dict[str, Any]) -> bytes:
    """Do a job; what comes of it as JSON, an error included."""
    try:
        return json.dumps({"result": resolve_name(work)(job)}, allow_nan=False).encode()
    except BaseException as error:  # whatever a stranger's policy raises
        told = " ".join(str(error).split())
        return json.dumps(
            {
                "error": f"{type(error).__name__}: {told}"[:MOST_TEXT],
                "traceback": "".join(traceback.format_exception(error))[-MOST_TEXT:],
            }
        ).encode()
