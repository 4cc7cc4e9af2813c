"""The tables of a replay's page: what each policy cost, and marked spans.

Axes: H_kv KV heads.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kvpolicy.page.keys import Key
from kvpolicy.page.markup import Markup, element, figure, interval, is_number, size
from kvpolicy.page.tables import grouped_table
from kvpolicy_sim.result import PolicyResult

Entry = dict[str, Any]
"""One of the results of `Report.as_dict`."""

MOST_MARKS = 8
"""Marked spans shown."""


@dataclass(frozen=True)
class Row:
    """A policy on the page.

    Attributes:
        key: What it goes by.
        result: What was measured.
        entry: The figures drawn from that.
    """

    key: Key
    result: PolicyResult
    entry: Entry

    @property
    def evicts(self) -> bool:
        """Whether the policy has a budget at all."""
        return self.result.budget is not None

    @property
    def loss(self) -> np.ndarray:
        """One minus retained mass, [layers, H_kv]."""
        return np.clip(1 - np.array(self.entry["head_mass"]), 0, None)


@dataclass(frozen=True)
class Column:
    """A figure of every policy.

    Attributes:
        group: What it is about; neighbours of one group share a heading.
        title: Which figure of the group.
        path: Keys under which an entry has it.
        best: `max` or `min`; None for a figure of which neither is better.
        show: How it is written.
        below: A remark in small print, empty if there is none.
    """

    group: str
    title: str
    path: tuple[str, ...]
    best: Callable[[list[float]], float] | None
    show: Callable[[float | None], str]
    below: Callable[[Entry], str] = lambda _: ""

    def value(self, row: Row) -> float | None:
        """The figure of a policy; None if it was not measured."""
        found: Any = row.entry
        for key in self.path:
            found = None if found is None else found[key]
        return found

    def cell(self, row: Row, *, is_best: bool) -> Markup:
        """The figure of a policy, as the table has it."""
        shown, below = self.show(self.value(row)), self.below(row.entry)
        star = element("span", "★", class_="star", role="img", aria_label="best:", title="best")
        value = element("b", star, shown) if is_best else shown
        return element("td", value, *([element("small", below)] if below else []))

    def winners(self, rows: Sequence[Row]) -> set[str]:
        """Specs of the policies that are best among those with their budget.

        Policies whose figures look alike share a place; if all do, there is no best one.
        """
        found: set[str] = set()
        if self.best is None:
            return found
        for budget in {row.result.budget for row in rows if row.evicts}:
            values = {
                row.key.spec: value
                for row in rows
                if row.result.budget == budget and is_number(value := self.value(row))
            }
            best = self.show(self.best([*values.values()])) if values else ""
            first = {spec for spec, value in values.items() if self.show(value) == best}
            found |= first if len(first) < len(values) else set()
        return found


def policy_table(rows: Sequence[Row]) -> Markup:
    """What every policy kept and lost; figures that no policy has are left out."""
    columns = [c for c in COLUMNS if any(c.value(row) is not None for row in rows)]
    winners = [column.winners(rows) for column in columns]
    body = (
        element(
            "tr",
            element("th", row.key.full_name(), scope="row"),
            *(
                column.cell(row, is_best=row.key.spec in best)
                for column, best in zip(columns, winners, strict=True)
            ),
            class_=None if row.evicts else "full",
        )
        for row in rows
    )
    titles = [(column.group, column.title) for column in columns]
    return grouped_table("Replay of every policy", "policy", titles, body)


def mark_table(rows: Sequence[Row]) -> Markup:
    """How much of the attention on marked spans each policy retained."""
    names = [mark["name"] for mark in rows[0].entry["marks"]][:MOST_MARKS]
    titles = ("attention retained", "kept at the end")
    body = (
        element(
            "tr",
            element("th", row.key.full_name(), scope="row"),
            *(
                element("td", figure(value, 3))
                for mark in row.entry["marks"][:MOST_MARKS]
                for value in (mark["retained_mass"], mark["kept"])
            ),
        )
        for row in rows
    )
    columns = [(name, title) for name in names for title in titles]
    return grouped_table("Attention on marked spans", "policy", columns, body)


def _digits(digits: int, factor: float = 1.0) -> Callable[[float | None], str]:
    return lambda value: figure(None if value is None else factor * value, digits)


def _bootstrap(entry: Entry) -> str:
    found = entry["retained_mass"]["interval"]
    return "" if found is None else interval(found[0], found[1], 4)


def _merged(entry: Entry) -> str:
    """What a memory stands for; empty where there is none."""
    return "" if entry["memory_share"] is None else f"for {figure(entry['merged'])} tokens"


def _slots(entry: Entry) -> str:
    return f"{figure(entry['slot_equivalents'], 1)} slots at peak"


def _least_regret(entry: Entry) -> str:
    """Where the interval begins whose end the cell shows; empty if it is a point."""
    if entry["regret"] is None:
        return ""
    low, high = (figure(100 * entry["regret"][bound], 2) for bound in ("lower", "upper"))
    return "" if low == high else f"at least {low}"


COLUMNS = (
    Column("kept", "%", ("retention_ratio",), min, _digits(1, 100)),
    Column("retained mass", "mean", ("retained_mass", "mean"), max, _digits(4), _bootstrap),
    Column("retained mass", "p5", ("retained_mass", "p5"), max, _digits(4)),
    Column("retained mass", "min", ("retained_mass", "min"), max, _digits(4)),
    Column("output error", "mean", ("output_error", "mean"), min, _digits(4)),
    Column("output error", "p95", ("output_error", "p95"), min, _digits(4)),
    Column("recall", "@16", ("recall", "16"), max, _digits(3)),
    Column("recall", "@64", ("recall", "64"), max, _digits(3)),
    Column("regret", "%", ("regret", "upper"), min, _digits(2, 100), _least_regret),
    Column("absorbed", "attention on it", ("memory_share",), None, _digits(4), _merged),
    Column("memory", "K and V", ("bytes_kept",), min, size, _slots),
    Column("time", "s", ("seconds",), min, _digits(2)),
)
"""Figures of `policy_table`."""
