"""A file in memory without reading it."""

import mmap
import os
import stat
import sys
from pathlib import Path

from kvpolicy.errors import TraceError

# Python names it from 3.13 on. Without it a private mapping must fit into memory and swap.
_NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)


class Mapping:
    """A mapped file. Who writes to `data` writes to a private copy of the page.

    The mapping lasts as long as anything that was made of `data`.

    Args:
        path: The file.

    Raises:
        OSError: It cannot be opened.
        TraceError: It is empty or no file.
    """

    def __init__(self, path: Path) -> None:
        # Not blocking: a FIFO would wait for its writer.
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            status = os.fstat(file)
            if stat.S_ISDIR(status.st_mode):
                raise IsADirectoryError(f"{path} is a directory, not a trace")
            if not stat.S_ISREG(status.st_mode) or not status.st_size:
                raise TraceError(f"{path}: not a kvpolicy trace: it is empty or no file")
            self._map = mmap.mmap(
                file,
                status.st_size,
                flags=mmap.MAP_PRIVATE | _NO_RESERVE,
                prot=mmap.PROT_READ | mmap.PROT_WRITE,
            )
        except ValueError as error:
            raise TraceError(f"{path}: its size changes while it is opened") from error
        finally:
            os.close(file)
        # A view keeps the map alive, which torch does for the object that it is given only.
        self.data = memoryview(self._map)

    def __len__(self) -> int:
        return len(self._map)

    def release(self) -> None:
        """Give the memory of what was read back; what is read again is read from the file."""
        self._map.madvise(mmap.MADV_DONTNEED)
