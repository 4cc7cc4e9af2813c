"""Files of JSON objects, one a line, that outlive a process which is stopped at any moment.

The first line is a header. Every other one is written and flushed at once, so that whoever reads
the file has all that was finished. A last line without its end was being written when the process
stopped; it is left out, and dropped before the next line would join it.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvpolicy.errors import PolicyError

MOST_BYTES = 1 << 30
"""Of a file that is read."""


class Journal:
    """One such file.

    Attributes:
        path: The file; made with the first line if it does not exist.

    Args:
        path: The file.
        header: The first line; its first key names the kind of file, with a version as value.
        program: What writes such files, for error messages.
        remedy: What to do about one that cannot be read.
    """

    def __init__(
        self, path: str | Path, header: Mapping[str, Any], program: str, remedy: str
    ) -> None:
        self.path = Path(path)
        self._header: dict[str, Any] = json.loads(json.dumps(header))  # as it will be read
        self._program, self._remedy = program, remedy
        self._kind, self._version = next(iter(self._header.items()))

    def read(self) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """Header and lines; our own header and no lines if nothing was written yet.

        Raises:
            PolicyError: The file is not of this kind and version, or is damaged.
        """
        if not self.path.exists():
            return dict(self._header), []
        *lines, rest = self._bytes().split(b"\n")
        opening = json.dumps({self._kind: self._version}).partition(": ")[0].encode()
        if not lines and rest[: len(opening)] != opening[: len(rest)]:
            raise self.damaged("line 1")
        read = [self._object(line, number) for number, line in enumerate(lines, 1)]
        if not read:
            return dict(self._header), []
        if read[0].get(self._kind) != self._version:
            raise self.foreign()
        return read[0], read[1:]

    def append(self, line: Mapping[str, Any]) -> None:
        """Write a line down, behind the header if it is the first one.

        Raises:
            ValueError: It has a number that JSON cannot hold; nothing is written.
        """
        is_new = not self.path.exists() or self.path.stat().st_size == 0
        lines = [self._header, line] if is_new else [line]
        text = "".join(json.dumps(each, allow_nan=False) + "\n" for each in lines)
        with self.path.open("ab") as file:
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())

    def trim(self) -> None:
        """Drop a last line without its end, which the next one would join."""
        if self.path.exists():
            data = self._bytes()
            whole = data.rfind(b"\n") + 1
            if whole < len(data):
                os.truncate(self.path, whole)

    def damaged(self, where: str) -> PolicyError:
        """What to raise about a place that cannot be right."""
        return PolicyError(
            f"{self.path} is damaged or not written by {self._program}: {where} cannot be right; "
            f"{self._remedy}"
        )

    def foreign(self) -> PolicyError:
        """What to raise about another kind of file, or another version."""
        return PolicyError(
            f"{self.path} was not written by this version of {self._program}; {self._remedy}"
        )

    def _bytes(self) -> bytes:
        if not self.path.is_file():  # opening a pipe would wait for its other end
            raise PolicyError(f"{self.path} is no file; {self._remedy}")
        size = self.path.stat().st_size
        if size > MOST_BYTES:
            raise PolicyError(
                f"{self.path} has {size:,} bytes, more than {self._program} leaves behind "
                f"({MOST_BYTES:,}); {self._remedy}"
            )
        return self.path.read_bytes()

    def _object(self, line: bytes, number: int) -> dict[str, Any]:
        try:
            value = json.loads(line, parse_constant=_refuse)
        except (ValueError, RecursionError):
            value = None
        if not isinstance(value, dict):
            raise self.damaged(f"line {number}")
        return value


def _refuse(constant: str) -> None:
    raise ValueError(constant)


_LARGE = 1e300
"""Beyond any figure; comparing with it is exact for integers of any size, and false for NaN."""


def is_figure(value: object) -> bool:
    """Whether a value that was read is a finite number."""
    return isinstance(value, int | float) and type(value) is not bool and abs(value) < _LARGE


def is_count(value: object) -> bool:
    """Whether a value that was read is a number of things."""
    return type(value) is int and 0 <= value < 1 << 53
