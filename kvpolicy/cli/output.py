"""What commands print: text on stdout, progress on a terminal's stderr, JSON where asked."""

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table
from rich.text import Text

from kvpolicy.errors import PolicyError

Advance = Callable[[float], None]

T = TypeVar("T")

PIPED_WIDTH = 120


def require_targets(
    targets: Sequence[str | None],
    inputs: Sequence[str | None] = (),
    folders: Sequence[str | None] = (),
) -> None:
    """Refuse files that cannot be written, before any work is done.

    Args:
        targets: Files to be written; None where there is none.
        inputs: Files that are read.
        folders: Folders to be filled, and made where they are missing.

    Raises:
        PolicyError: A target has no folder, is one, is an input, or is named twice; or a folder
            cannot be made.
    """
    taken = {Path(name).resolve(): "is read by this command" for name in inputs if name}
    for name in targets:
        if name is None:
            continue
        path = Path(name).resolve()
        reason = taken.get(path)
        if reason is None and path.is_dir():
            reason = "is a folder"
        if reason is None and not path.parent.is_dir():
            reason = f"lies in {path.parent}, which is no folder"
        if reason is not None:
            raise PolicyError(f"cannot write {name!r}: it {reason}; choose another file")
        taken[path] = "is written twice"
    for name in folders:
        path = Path(name).resolve() if name else None
        if path is None:
            continue
        if path in taken or not (path if path.exists() else path.parent).is_dir():
            raise PolicyError(
                f"cannot fill {name!r}: it is no folder and cannot become one; choose another"
            )


class Output:
    """Where a command's results go.

    Args:
        json_target: The ``--json`` option: a file, ``-`` for stdout, or None.
        inputs: Files that the command reads and must not overwrite.
        others: Further files that it writes.
        folders: Folders that it fills.

    Raises:
        PolicyError: A file cannot be written where it is asked for.
    """

    def __init__(
        self,
        json_target: str | None = None,
        *,
        inputs: Sequence[str | None] = (),
        others: Sequence[str | None] = (),
        folders: Sequence[str | None] = (),
    ) -> None:
        require_targets([None if json_target == "-" else json_target, *others], inputs, folders)
        self._target = json_target
        width = None if sys.stdout.isatty() else PIPED_WIDTH
        self.console = Console(quiet=json_target == "-", width=width, highlight=False)
        self._progress_console = Console(stderr=True)

    @property
    def width(self) -> int:
        """Columns of text that fit into a line."""
        return self.console.width

    @property
    def is_terminal(self) -> bool:
        """Whether a person watches the text."""
        return self.console.is_terminal

    def print(self, *items: Any) -> None:
        """Print text or rich renderables; nothing when stdout belongs to JSON."""
        if self.is_terminal or self.console.quiet:
            self.console.print(*items)
            return
        with self.console.capture() as captured:
            self.console.print(*items)
        # rich fills lines up with blanks, which only a terminal's background needs.
        sys.stdout.write("".join(f"{x.rstrip()}\n" for x in captured.get().splitlines()))

    def json(self, result: dict[str, Any]) -> None:
        """Write the result where ``--json`` says."""
        if self._target is None:
            return
        text = as_json(result)
        if self._target == "-":
            sys.stdout.write(text)
            sys.stdout.flush()
        else:
            self.write(self._target, text)

    @staticmethod
    def write(target: str, text: str) -> None:
        """Write a file completely or not at all."""
        part = Path(f"{target}.part")
        part.write_text(text, encoding="utf-8")
        part.replace(target)

    @contextmanager
    def progress(self) -> Iterator["Steps"]:
        """Progress bars with rates; invisible unless stderr is a terminal."""
        with Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TaskProgressColumn(),
            _Rate(),
            TimeElapsedColumn(),
            console=self._progress_console,
            transient=True,
            disable=not self._progress_console.is_terminal,
        ) as progress:
            yield Steps(progress)


def as_json(result: dict[str, Any]) -> str:
    """A result as the text of a JSON file."""
    return json.dumps(result, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


class Steps:
    """The bars of one command."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def begin(self, description: str, total: float | None = None, unit: str = "") -> Advance:
        """Show a bar and return the function that advances it."""
        task = self._progress.add_task(description, total=total, unit=unit)
        return lambda amount: self._progress.advance(task, amount)


class _Rate(ProgressColumn):
    """Units per second."""

    def render(self, task: Task) -> Text:
        """Format a task's speed."""
        if not task.speed or not task.fields.get("unit"):
            return Text()
        return Text(f"{task.speed:,.0f} {task.fields['unit']}/s", style="cyan")


def table(*columns: str, title: str | None = None, left: int = 1) -> Table:
    """An undecorated table; the first `left` columns are text, the others figures."""
    made = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for index, column in enumerate(columns):
        is_text = index < left
        made.add_column(
            column, justify="left" if is_text else "right", overflow="fold", no_wrap=not is_text
        )
    return made


def by_budget(
    series: Mapping[str, Mapping[int, T]], show: Callable[[T], str], full: str | None = None
) -> Table:
    """A table with a line per series and a column per budget.

    Args:
        series: What there is at each budget, by what the budgets have in common.
        show: A cell's text.
        full: The full cache's, in a line of its own; None for no such line.
    """
    budgets = sorted({budget for cells in series.values() for budget in cells})
    rows = table("slots", *map(str, budgets))
    for label, cells in series.items():
        rows.add_row(label, *(show(cells[b]) if b in cells else "-" for b in budgets))
    if full is not None:
        rows.add_row("full", *[full] * len(budgets))
    return rows


def figure(value: float | None, digits: int = 2) -> str:
    """A number for a table cell, a dash for none."""
    return "-" if value is None else f"{value:,.{digits}f}"


def size(num_bytes: float) -> str:
    """Bytes in a readable unit."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < 1024 or unit == "GiB":
            return f"{num_bytes:,.0f} {unit}" if unit == "B" else f"{num_bytes:,.1f} {unit}"
        num_bytes /= 1024
    raise AssertionError("the loop returns")


def count(number: int, what: str) -> str:
    """A number of things."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def ranges(indices: Sequence[int], most: int | None = None) -> str:
    """Ascending indices as options take them: 0, 1, 2, 5 is ``0:3,5``.

    Args:
        indices: The indices.
        most: Ranges shown; default all.
    """
    runs: list[list[int]] = []
    for index in indices:
        if runs and runs[-1][1] == index:
            runs[-1][1] = index + 1
        else:
            runs.append([index, index + 1])
    parts = [str(a) if b == a + 1 else f"{a}:{b}" for a, b in runs]
    return ",".join(parts[:most]) + (",..." if most is not None and len(parts) > most else "")
