"""Finished cells: what one batch of samples gave under one policy, on disk if asked for.

The file has one JSON object per line. The first line says with which settings it was begun;
every other one is a cell, written and flushed at once when it is done, so that a run which was
stopped at any moment goes on from its last cell. A last line without its end was being written
when the run stopped, and is dropped.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from kvpolicy.errors import PolicyError
from kvpolicy.evaluation.measured import Measured
from kvpolicy.evaluation.sample import Sample

VERSION = 1

MOST_BYTES = 1 << 30
"""Of a file that is read."""


@dataclass(frozen=True)
class Key:
    """Which cell.

    Attributes:
        policy: Canonical spec.
        context: Tokens of each sample.
        first: Index of the batch's first sample among those of this context.
    """

    policy: str
    context: int
    first: int


@dataclass(frozen=True)
class Cell:
    """What came of it.

    Attributes:
        measured: One entry per sample of the batch.
        seconds: Time that the policy's forward took.
    """

    measured: list[Measured]
    seconds: float


class Cells:
    """Finished cells of one run."""

    def __init__(self) -> None:
        self._cells: dict[Key, Cell] = {}

    def add(self, key: Key, cell: Cell) -> None:
        """Note a cell."""
        self._cells[key] = cell

    def find(self, key: Key, samples: Sequence[Sample]) -> Cell | None:
        """The cell of these samples, or None if it is not finished."""
        return self._cells.get(key)


class CellFile(Cells):
    """Finished cells that are kept in a file.

    Args:
        path: The file; made with the first cell if it does not exist.
        settings: Whatever decides what a cell's figures are, apart from its key.

    Raises:
        PolicyError: The file is not one of these, is damaged, or was begun with other settings.
    """

    def __init__(self, path: str | Path, settings: Mapping[str, Any]) -> None:
        super().__init__()
        self._path = Path(path)
        self._settings = dict(settings)
        if self._path.exists():
            self._read()

    def add(self, key: Key, cell: Cell) -> None:
        """Note a cell and write it down."""
        super().add(key, cell)
        line = {**asdict(key), **asdict(cell)}
        is_new = not self._path.exists() or self._path.stat().st_size == 0
        lines = [{"kvpolicy_eval": VERSION, "settings": self._settings}] if is_new else []
        text = "".join(json.dumps(x, allow_nan=False) + "\n" for x in [*lines, line])
        with self._path.open("ab") as file:
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())

    def find(self, key: Key, samples: Sequence[Sample]) -> Cell | None:
        """The cell of these samples, or None if it is not finished.

        Raises:
            PolicyError: The file has figures that these samples cannot have.
        """
        cell = super().find(key, samples)
        if cell is not None and not _fits(cell, samples):
            raise self._damaged(
                f"the cell of {key.policy} at {key.context} tokens, sample {key.first}"
            )
        return cell

    def _read(self) -> None:
        if not self._path.is_file():
            raise PolicyError(f"{self._path} is no file; give another one")
        size = self._path.stat().st_size
        if size > MOST_BYTES:
            raise PolicyError(
                f"{self._path} has {size:,} bytes, more than an evaluation leaves behind "
                f"({MOST_BYTES:,}); give another file"
            )
        *lines, rest = self._path.read_bytes().split(b"\n")
        if lines:
            self._require_settings(self._object(lines[0], 1))
        elif rest[: len(_OPENING)] != _OPENING[: len(rest)]:
            raise self._damaged("line 1")
        for number, line in enumerate(lines[1:], 2):
            read = _cell(self._object(line, number))
            if read is None:
                raise self._damaged(f"line {number}")
            self._cells.setdefault(*read)
        if rest:  # the next line must not join it
            os.truncate(self._path, size - len(rest))

    def _object(self, line: bytes, number: int) -> dict[str, Any]:
        try:
            value = json.loads(line, parse_constant=_refuse)
        except (ValueError, RecursionError):
            value = None
        if not isinstance(value, dict):
            raise self._damaged(f"line {number}")
        return value

    def _require_settings(self, header: dict[str, Any]) -> None:
        version, found = header.get("kvpolicy_eval"), header.get("settings")
        if version != VERSION or not isinstance(found, dict):
            raise PolicyError(
                f"{self._path} was not written by this version of kvpolicy eval; give another file"
            )
        expected = json.loads(json.dumps(self._settings))
        differing = [
            f"{name} {found.get(name)!r:.60}, now {expected.get(name)!r:.60}"
            for name in sorted({*found, *expected}, key=str)
            if found.get(name) != expected.get(name)
        ]
        if differing:
            raise PolicyError(
                f"{self._path} was begun with other settings: {'; '.join(differing[:4])}; "
                "give the same ones, or another file"
            )

    def _damaged(self, where: str) -> PolicyError:
        return PolicyError(
            f"{self._path} is damaged or no file of finished cells: {where} cannot be right; "
            "give another file"
        )


_LARGE = 1e300
"""Beyond any figure; comparing with it is exact for integers of any size, and false for NaN."""

_OPENING = b'{"kvpolicy_eval": '


def _refuse(constant: str) -> None:
    raise ValueError(constant)


def _cell(line: dict[str, Any]) -> tuple[Key, Cell] | None:
    """Read a cell; None if it is none."""
    if set(line) != {"policy", "context", "first", "measured", "seconds"}:
        return None
    policy, context, first = line["policy"], line["context"], line["first"]
    seconds, entries = line["seconds"], line["measured"]
    is_right = (
        isinstance(policy, str)
        and _is_count(context)
        and _is_count(first)
        and _is_figure(seconds)
        and seconds >= 0
        and isinstance(entries, list)
        and all(map(_is_measured, entries))
    )
    if not is_right:
        return None
    return Key(policy, context, first), Cell([Measured(**entry) for entry in entries], seconds)


def _is_measured(entry: object) -> bool:
    if not isinstance(entry, dict) or set(entry) != {field.name for field in fields(Measured)}:
        return False
    columns = [(entry[name], _is_figure) for name in ("nll", "kl")]
    columns += [(entry[name], _is_count) for name in ("right", "agreed")]
    return (entry["diverged"] is None or _is_count(entry["diverged"])) and all(
        isinstance(values, list) and all(map(check, values)) for values, check in columns
    )


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 53


def _is_figure(value: object) -> bool:
    return isinstance(value, int | float) and type(value) is not bool and abs(value) < _LARGE


def _fits(cell: Cell, samples: Sequence[Sample]) -> bool:
    """Whether a cell has a figure for every target, and no more tokens right than there are."""
    if len(cell.measured) != len(samples):
        return False
    for measured, sample in zip(cell.measured, samples, strict=True):
        sizes = [target.size for target in sample.targets]
        columns = (measured.nll, measured.right, measured.kl, measured.agreed)
        if any(len(column) != len(sizes) for column in columns):
            return False
        counts = zip(measured.right, measured.agreed, sizes, strict=True)
        if any(right > size or agreed > size for right, agreed, size in counts):
            return False
    return True
