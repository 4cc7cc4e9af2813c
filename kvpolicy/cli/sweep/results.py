"""What a sweep's folder holds: ``results.jsonl``, a line per unit that was computed.

Lines are never changed, and lines of units that the grid no longer has stay where they are. A
unit that failed is computed again by the next sweep; its last line counts.
"""

import fcntl
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvpolicy.cli.sweep.pool import Outcome
from kvpolicy.cli.sweep.units import Unit, identity
from kvpolicy.errors import PolicyError
from kvpolicy.journal import Journal, is_figure

VERSION = 1

FILE = "results.jsonl"


@dataclass(frozen=True)
class Record:
    """A line of the file.

    Attributes:
        seconds: Time that the unit took.
        result: What came of it; None if it failed.
        error: Why it failed; None if it did not.
    """

    seconds: float
    result: dict[str, Any] | None
    error: str | None


class Results:
    """Results of units, in a folder.

    Args:
        folder: The sweep's folder.
        is_writing: Whether results will be added.

    Raises:
        PolicyError: The folder's file is no sweep's, or damaged.
    """

    def __init__(self, folder: Path, *, is_writing: bool = False) -> None:
        header = {"kvpolicy_sweep": VERSION}
        remedy = "give another folder with --out"
        self._journal = Journal(folder / FILE, header, "kvpolicy sweep", remedy)
        self._records: dict[str, Record] = {}
        _, lines = self._journal.read()
        for number, line in enumerate(lines, 2):
            record = _read(line)
            if record is None:
                raise self._journal.damaged(f"line {number}")
            self._note(line["unit"], record)
        if is_writing:
            self._journal.trim()

    def find(self, unit: Unit) -> Record | None:
        """What came of a unit; None if it was not computed.

        Raises:
            PolicyError: The file has a result that the unit cannot have.
        """
        record = self._records.get(unit.id)
        if record is None or record.result is None:
            return record
        if not unit.source.is_result(unit.policy, record.result):
            raise self._journal.damaged(f"the result of {unit.policy} on {unit.source.label}")
        return record

    def is_finished(self, unit: Unit) -> bool:
        """Whether a unit has a result."""
        record = self.find(unit)
        return record is not None and record.result is not None

    def add(self, unit: Unit, outcome: Outcome) -> Record:
        """Write down what came of a unit."""
        record = Record(outcome.seconds, outcome.result, outcome.error)
        told = (
            {"error": outcome.error, "traceback": outcome.traceback}
            if outcome.result is None
            else {"result": outcome.result}
        )
        self._journal.append(
            {
                "unit": unit.id,
                "source": unit.source.label,
                "policy": str(unit.policy),
                "inputs": unit.inputs,
                "seconds": outcome.seconds,
                **told,
            }
        )
        self._note(unit.id, record)
        return record

    def missing(self, units: Iterable[Unit]) -> dict[str, Unit]:
        """Units that have no result, by their names, in order."""
        return {unit.id: unit for unit in units if not self.is_finished(unit)}

    def _note(self, name: str, record: Record) -> None:
        known = self._records.get(name)
        if known is None or known.result is None or record.result is not None:
            self._records[name] = record


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Make a sweep's folder, and keep other sweeps out of it.

    Raises:
        PolicyError: Another sweep is writing to it.
        OSError: It cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise PolicyError(
                f"another sweep is writing to {folder}; wait for it, or give another --out"
            ) from None
        yield


def _read(line: Mapping[str, Any]) -> Record | None:
    """Read a line; None if it cannot be one."""
    result, error, inputs = line.get("result"), line.get("error"), line.get("inputs")
    is_right = (
        isinstance(inputs, dict)
        and line.get("unit") == identity(inputs)
        and is_figure(line.get("seconds"))
        and (isinstance(result, dict) if error is None else isinstance(error, str))
        and (result is None) != (error is None)
    )
    return Record(line["seconds"], result, error) if is_right else None
