"""Finished cells: what one batch of samples gave under one policy, on disk if asked for.

The file is a journal. Its header says with which settings it was begun, every other line is a
cell, so that a run which was stopped at any moment goes on from its last cell.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from kvpolicy.errors import PolicyError
from kvpolicy.evaluation.measured import Measured
from kvpolicy.evaluation.sample import Sample
from kvpolicy.journal import Journal, is_count, is_figure

VERSION = 1


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
        self._settings = dict(settings)
        header = {"kvpolicy_eval": VERSION, "settings": self._settings}
        self._journal = Journal(path, header, "kvpolicy eval", "give another file")
        found, lines = self._journal.read()
        self._require_settings(found.get("settings"))
        for number, line in enumerate(lines, 2):
            read = _cell(line)
            if read is None:
                raise self._journal.damaged(f"line {number}")
            self._cells.setdefault(*read)
        self._journal.trim()

    def add(self, key: Key, cell: Cell) -> None:
        """Note a cell and write it down."""
        super().add(key, cell)
        self._journal.append({**asdict(key), **asdict(cell)})

    def find(self, key: Key, samples: Sequence[Sample]) -> Cell | None:
        """The cell of these samples, or None if it is not finished.

        Raises:
            PolicyError: The file has figures that these samples cannot have.
        """
        cell = super().find(key, samples)
        if cell is not None and not fits(cell.measured, samples):
            raise self._journal.damaged(
                f"the cell of {key.policy} at {key.context} tokens, sample {key.first}"
            )
        return cell

    def _require_settings(self, found: object) -> None:
        if not isinstance(found, dict):
            raise self._journal.foreign()
        expected = json.loads(json.dumps(self._settings))
        differing = [
            f"{name} {found.get(name)!r:.60}, now {expected.get(name)!r:.60}"
            for name in sorted({*found, *expected}, key=str)
            if found.get(name) != expected.get(name)
        ]
        if differing:
            raise PolicyError(
                f"{self._journal.path} was begun with other settings: {'; '.join(differing[:4])}; "
                "give the same ones, or another file"
            )


def _cell(line: dict[str, Any]) -> tuple[Key, Cell] | None:
    """Read a cell; None if it is none."""
    if set(line) != {"policy", "context", "first", "measured", "seconds"}:
        return None
    policy, context, first = line["policy"], line["context"], line["first"]
    seconds, entries = line["seconds"], line["measured"]
    is_right = (
        isinstance(policy, str)
        and is_count(context)
        and is_count(first)
        and is_figure(seconds)
        and seconds >= 0
    )
    measured = read_measured(entries)
    if not is_right or measured is None:
        return None
    return Key(policy, context, first), Cell(measured, seconds)


def read_measured(entries: object) -> list[Measured] | None:
    """Read how samples went, as `asdict` writes it; None if it is not that."""
    if not isinstance(entries, list) or not all(map(_is_measured, entries)):
        return None
    return [Measured(**entry) for entry in entries]


def _is_measured(entry: object) -> bool:
    if not isinstance(entry, dict) or set(entry) != {field.name for field in fields(Measured)}:
        return False
    columns = [(entry[name], is_figure) for name in ("nll", "kl")]
    columns += [(entry[name], is_count) for name in ("right", "agreed")]
    return (entry["diverged"] is None or is_count(entry["diverged"])) and all(
        isinstance(values, list) and all(map(check, values)) for values, check in columns
    )


def fits(entries: Sequence[Measured], samples: Sequence[Sample]) -> bool:
    """Whether each target has its figures, and no more tokens are right than there are."""
    if len(entries) != len(samples):
        return False
    for measured, sample in zip(entries, samples, strict=True):
        sizes = [target.size for target in sample.targets]
        columns = (measured.nll, measured.right, measured.kl, measured.agreed)
        if any(len(column) != len(sizes) for column in columns):
            return False
        counts = zip(measured.right, measured.agreed, sizes, strict=True)
        if any(right > size or agreed > size for right, agreed, size in counts):
            return False
    return True
