"""A file that is written in the background and appears under its name when it is complete."""

import fcntl
import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from kvpolicy.errors import TraceError

Parts = Sequence[bytes | memoryview]


class _Job(NamedTuple):
    """What to write next, and what to do when it is written."""

    make: Callable[[], Parts]
    nbytes: int
    done: Callable[[], object]


class Disk:
    """A thread that writes what it is given, in order.

    Args:
        path: Where the file appears when it is complete.
        part: Where it is before, in the same directory.
        most: Bytes that may wait; more than that, and `put` waits.
    """

    def __init__(self, path: Path, part: Path, most: int) -> None:
        self._path, self._part, self._most = path, part, most
        self._file = _create(self._part)
        self._changed = threading.Condition()
        self._jobs: deque[_Job] = deque()
        self._waiting = 0
        self._is_ending = False
        self._fault: BaseException | None = None
        self.is_done = False
        self._thread = threading.Thread(target=self._run, name=f"write {path.name}", daemon=True)
        self._thread.start()

    def put(
        self, make: Callable[[], Parts], nbytes: int, done: Callable[[], object] = lambda: None
    ) -> None:
        """Write parts behind what was written before.

        Args:
            make: Gives the parts, in the background.
            nbytes: What they take in memory meanwhile.
            done: Called when they are written.

        Raises:
            TraceError: Something before could not be written.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._fault or self._has_room(nbytes))
            self.raise_fault()
            self._jobs.append(_Job(make, nbytes, done))
            self._waiting += nbytes
            self._changed.notify_all()

    def raise_fault(self) -> None:
        """Raise TraceError if something could not be written."""
        if self._fault is not None:
            raise TraceError(
                f"cannot write {self._part}: {self._fault}; its complete chunks can be recovered "
                f"with: kvpolicy inspect {self._part} --repair OUT"
            ) from self._fault

    def finish(self) -> None:
        """Wait for the last byte to be safe, then give the file its name.

        Raises:
            TraceError: It could not be written.
        """
        self._stop()
        self.raise_fault()
        try:
            os.fsync(self._file)
            self._part.replace(self._path)
            _sync_directory(self._path.parent)
        except OSError as error:
            self._fault = error
            self.raise_fault()
        self._close()

    def abandon(self, *, keep: bool) -> None:
        """Stop without completing the file; once it is complete, do nothing.

        Args:
            keep: Write what waits and leave the file as it is, instead of removing it.
        """
        if self.is_done:
            return
        if not keep:
            with self._changed:
                self._jobs.clear()
        self._stop()
        if not keep:
            self._part.unlink(missing_ok=True)
        self._close()

    def _has_room(self, nbytes: int) -> bool:
        """Whether something may join the queue; anything may that finds it empty."""
        return not self._waiting or self._waiting + nbytes <= self._most

    def _stop(self) -> None:
        """Let the thread come to its end."""
        with self._changed:
            self._is_ending = True
            self._changed.notify_all()
        self._thread.join()

    def _close(self) -> None:
        self.is_done = True
        os.close(self._file)

    def _run(self) -> None:
        """Write until told to end, or until writing fails."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._jobs or self._is_ending)
                if not self._jobs:
                    return
                job = self._jobs.popleft()
            try:
                _write(self._file, job.make())
                job.done()
            except BaseException as error:
                with self._changed:
                    self._fault = error
                    self._jobs.clear()
                    self._changed.notify_all()
                return
            with self._changed:
                self._waiting -= job.nbytes
                self._changed.notify_all()


def beside(path: Path, suffix: str) -> Path:
    """A file next to another one."""
    return path.with_name(path.name + suffix)


def _create(part: Path) -> int:
    """An empty file that nobody else is writing.

    Raises:
        OSError: It cannot be created.
        TraceError: Somebody else has it.
    """
    file = os.open(part, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Between open and lock the other writer may have finished, and renamed it.
        if os.fstat(file).st_ino != part.stat().st_ino:
            raise BlockingIOError
        os.ftruncate(file, 0)
    except OSError as error:
        os.close(file)
        if isinstance(error, BlockingIOError | FileNotFoundError):
            raise TraceError(f"{part} is being written by somebody else") from error
        raise
    return file


def _write(file: int, parts: Parts) -> None:
    """Write everything, however many calls that takes."""
    left = [memoryview(part).cast("B") for part in parts if len(part)]
    while left:
        written = os.writev(file, left)
        while left and written >= len(left[0]):
            written -= len(left.pop(0))
        if left and written:
            left[0] = left[0][written:]


def _sync_directory(path: Path) -> None:
    """Make a rename survive a loss of power, where the file system can."""
    with suppress(OSError):
        directory = os.open(path, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
