"""What a report's pictures show, as arrays no larger than what is drawn.

Axes: H_kv KV heads, T tokens, n bins, P policies.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kvpolicy.page.keys import series_name
from kvpolicy_sim.page.tables import Row
from kvpolicy_sim.report import Report
from kvpolicy_sim.result import PolicyResult
from kvpolicy_sim.statistics import is_retained

BINS = 120
"""Most points of a curve over a sequence."""

PIXELS = 128
"""Most positions, and most moments, of a retention map."""


@dataclass(frozen=True)
class MassOverTime:
    """How retained mass develops.

    Attributes:
        tokens: [n] tokens seen at the middle of each bin.
        mass: [P, n] mean over the bin's steps, and layers, heads and sequences.
    """

    tokens: np.ndarray
    mass: np.ndarray


def mass_over_time(report: Report, results: Sequence[PolicyResult]) -> MassOverTime:
    """Average retained mass per step, then per bin of steps."""
    stride = report.header.query_stride
    num_rows = max(-(-sequence.tokens // stride) for sequence in report.sequences.values())
    bins = min(num_rows, BINS)
    bin_of = np.arange(num_rows) * bins // num_rows
    tokens = np.bincount(bin_of, np.arange(num_rows) * stride + 1) / np.bincount(bin_of)
    mass: list[np.ndarray] = []
    for result in results:
        total, rows = np.zeros(bins), np.zeros(bins)
        for outcome in result.outcomes.values():
            mean = outcome.retained_mass.mean(axis=(0, 1), dtype=np.float64)
            total += np.bincount(bin_of[: mean.size], mean, bins)
            rows += np.bincount(bin_of[: mean.size], minlength=bins)
        mass.append(total / rows)
    return MassOverTime(tokens, np.stack(mass))


def median_place(values: np.ndarray) -> tuple[int, int]:
    """Row and column of the median of a matrix, of the lower one if there are two."""
    place = np.argsort(values, axis=None, kind="stable")[(values.size - 1) // 2]
    row, column = np.unravel_index(place, values.shape)
    return int(row), int(column)


def retention_map(evicted_at: np.ndarray) -> np.ndarray:
    """Which positions one KV head held after how many tokens; [moments, n].

    Shares of each bin of positions, NaN where none of them has been seen.

    Args:
        evicted_at: [T], tokens seen when a token was evicted; 0 if it never was.
    """
    total = evicted_at.size
    pixels = min(total, PIXELS)
    edges = np.arange(pixels + 1) * total // pixels
    seen = edges[1:, None]  # a row shows the end of its bin of tokens
    held = (evicted_at == 0) | (evicted_at > seen)  # [moments, T], also of tokens to come
    shares = np.add.reduceat(held, edges[:-1], axis=1, dtype=np.float64) / np.diff(edges)
    return np.where(edges[:-1] < seen, shares, np.nan)


def similarity(results: Sequence[PolicyResult]) -> np.ndarray:
    """Jaccard similarity of what policies hold at the end, the mean over KV heads; [P, P]."""
    total = np.zeros((len(results), len(results)))
    for place in results[0].outcomes:
        held = np.stack([is_retained(result.outcomes[place].evicted_at) for result in results], 1)
        flags = held.astype(np.float32)  # [H_kv, P, T]
        both = flags @ flags.transpose(0, 2, 1)  # exact: counts far below 2^24
        sizes = held.sum(axis=-1)  # [H_kv, P]
        either = sizes[:, :, None] + sizes[:, None, :] - both
        total += (both / np.maximum(either, 1)).mean(axis=0, dtype=np.float64)
    return total / len(results[0].outcomes)


@dataclass(frozen=True)
class BudgetLine:
    """Policies that differ in their budgets alone.

    Attributes:
        series: What they have in common.
        budgets: [n], ascending.
        mass: [n] mean retained mass.
        low: [n] lower ends of its interval; the mean where there is none.
        high: [n] upper ends.
    """

    series: str
    budgets: np.ndarray
    mass: np.ndarray
    low: np.ndarray
    high: np.ndarray


def budget_lines(rows: Sequence[Row]) -> list[BudgetLine]:
    """Retained mass by budget, a line per series, of what evicts to a budget."""
    found: dict[str, dict[float, tuple[float, float, float]]] = {}
    for row in rows:
        if row.result.budget:
            mass = row.entry["retained_mass"]
            ends = mass["interval"] or (mass["mean"], mass["mean"])
            points = found.setdefault(series_name(row.result.policy), {})
            points[row.result.budget] = (mass["mean"], *ends)
    lines: list[BudgetLine] = []
    for series, points in found.items():
        budgets = sorted(points)
        columns = np.array([points[budget] for budget in budgets]).T
        lines.append(BudgetLine(series, np.array(budgets), *columns))
    return lines


@dataclass(frozen=True)
class Optimum:
    """What a policy that knows the future reaches, between two bounds.

    Attributes:
        budgets: [n], ascending.
        low: [n] retained mass that can be reached.
        high: [n] retained mass that nothing exceeds.
    """

    budgets: np.ndarray
    low: np.ndarray
    high: np.ndarray


def optimum(rows: Sequence[Row]) -> Optimum | None:
    """The optimum at every budget; None without an oracle.

    At each budget it is that of policies without a memory and with a set per head, if there are
    any, because fewer tokens or one set for a whole layer can reach less. Laws that evict at other
    times move the bounds apart.
    """
    found: dict[float, list[tuple[float, float]]] = {}
    rows = [row for row in rows if row.entry["regret"] and row.result.budget]
    free = {row.result.budget for row in rows if _is_free(row)}
    for row in rows:
        regret, budget = row.entry["regret"], row.result.budget
        if budget and (_is_free(row) or budget not in free):
            bounds = (regret["optimum_lower"], regret["optimum_upper"])
            found.setdefault(budget, []).append(bounds)
    if not found:
        return None
    budgets = sorted(found)
    low, high = np.array(
        [(min(x for x, _ in found[b]), max(x for _, x in found[b])) for b in budgets]
    ).T
    return Optimum(np.array(budgets), low, high)


def _is_free(row: Row) -> bool:
    """Whether a policy may choose a set of its whole budget for each head."""
    return all(
        getattr(member, "scope", "head") == "head" and not member.occupancy.state_slots
        for member in row.result.policy.members
    )


def spans(positions: np.ndarray) -> list[tuple[int, int]]:
    """Ascending positions as runs: first and last of each."""
    if not positions.size:
        return []
    breaks = np.flatnonzero(np.diff(positions) > 1)
    firsts, lasts = positions[np.r_[0, breaks + 1]], positions[np.r_[breaks, -1]]
    return [*zip(firsts.tolist(), lasts.tolist(), strict=True)]
