"""What each possible eviction of a decision unit would cost in attention mass.

Axes: T tokens, E evictions that a later query feels.
"""

from collections.abc import Iterator
from typing import NamedTuple, Self

import numpy as np

from kvpolicy import Occupancy


class Solution(NamedTuple):
    """Evictions that follow the occupancy law.

    Attributes:
        mass: Retained mass, the mean over the counted queries.
        evicted_at: [T] int64, tokens seen when a token was evicted; 0 if it never was.
    """

    mass: float
    evicted_at: np.ndarray


class Losses(NamedTuple):
    """Attention mass lost by every token that leaves at every eviction, in rows.

    Token s < due[e] loses values[starts[e] + s] if it leaves at eviction e.

    Attributes:
        values: float64, rows of unequal length.
        starts: [E] int64, where rows start.
        due: [E] int64, their lengths: tokens seen, all of which may leave.
    """

    values: np.ndarray
    starts: np.ndarray
    due: np.ndarray

    def row(self, e: int) -> np.ndarray:
        """What the tokens [0, due[e]) lose; a view."""
        return self.values[self.starts[e] : self.starts[e] + self.due[e]]


class Problem:
    """The attention of a decision unit, summed up to what its evictions are decided by.

    A unit is a KV head, or a layer whose heads keep one set; its attention is the mean over its
    query heads. A token that is evicted loses what later queries would have given it, whatever
    happens to the others. These sums are all that an offline optimum has to know; they take 8
    bytes for each of about T * T / (2 * interval) pairs of an eviction and a token.

    Queries count where more tokens than the budget were seen; all of them if there is none such.

    Args:
        tokens: T.
        occupancy: When tokens leave, and how many.

    Attributes:
        due: [E] int64, tokens seen at the evictions that come before the last query.
        counts: [E] int64, tokens that leave at each.
    """

    def __init__(self, tokens: int, occupancy: Occupancy) -> None:
        if tokens < 1:
            raise ValueError(f"a problem needs at least one token: got {tokens}")
        self.tokens, self.occupancy = tokens, occupancy
        self.due = np.array(list(_due(occupancy, tokens)), np.int64)
        self.counts = np.full(len(self.due), occupancy.interval)
        ends = self.due.cumsum()
        self._losses = Losses(np.zeros(int(self.due.sum())), ends - self.due, self.due)
        retained = occupancy.retained or 0
        self._first_counted = retained if retained < tokens else 0
        self._total = 0.0
        self._rows = 0
        self._is_summed = False

    @classmethod
    def of(cls, attention: np.ndarray, occupancy: Occupancy) -> Self:
        """State the problem of a whole attention matrix, lower triangular, [T, T]."""
        problem = cls(len(attention), occupancy)
        problem.add_rows(0, attention)
        return problem

    def add_rows(self, first: int, rows: np.ndarray) -> None:
        """Add the attention of the queries that follow those added so far.

        Args:
            first: Index of the first query.
            rows: [n, S] attention to the tokens [0, S), zero for those after the query.

        Raises:
            ValueError: Rows are out of order, too narrow, negative, not finite, or see the
                future; nothing is added.
        """
        last = first + len(rows)
        self._require_fitting(first, last, rows)
        self._total += float(rows[max(self._first_counted - first, 0) :].sum(dtype=np.float64))
        self._rows = last
        bounds = [*self.due.tolist(), self.tokens]
        begin, end = np.searchsorted(self.due, [first, last - 1], side="right")
        for e in range(max(begin - 1, 0), end):
            # The queries [due, next due) come after eviction e and before the next one.
            queries = slice(max(bounds[e] - first, 0), bounds[e + 1] - first)
            self._losses.row(e)[:] += rows[queries, : bounds[e]].sum(axis=0, dtype=np.float64)

    @property
    def num_evictions(self) -> int:
        """E."""
        return len(self.due)

    def losses(self) -> Losses:
        """What every token loses if it leaves at every eviction.

        Raises:
            ValueError: Not all rows have been added.
        """
        if self._rows < self.tokens:
            raise ValueError(f"only {self._rows} of {self.tokens} rows were added")
        if not self._is_summed:
            for e in range(self.num_evictions - 2, -1, -1):
                self._losses.row(e)[:] += self._losses.row(e + 1)[: self.due[e]]
            self._is_summed = True
        return self._losses

    def lost(self, left_at: np.ndarray) -> float:
        """Attention lost, summed over all queries.

        Args:
            left_at: [T] index of the eviction at which each token leaves, -1 for none.
        """
        losses, leavers = self.losses(), np.flatnonzero(left_at >= 0)
        return float(losses.values[losses.starts[left_at[leavers]] + leavers].sum())

    def mass(self, lost: float) -> float:
        """Retained mass if so much attention is lost."""
        self.losses()
        return (self._total - lost) / (self.tokens - self._first_counted)

    def solution(self, left_at: np.ndarray) -> Solution:
        """Describe a solution, given as for `lost`."""
        evicted_at = np.where(left_at >= 0, np.append(self.due, 0)[left_at], 0)
        if self.occupancy.is_due(self.tokens):
            # No query follows, so it does not matter which tokens go.
            held = np.flatnonzero(evicted_at == 0)
            evicted_at[held[: self.occupancy.interval]] = self.tokens
        return Solution(self.mass(self.lost(left_at)), evicted_at)

    def _require_fitting(self, first: int, last: int, rows: np.ndarray) -> None:
        if first != self._rows or last > self.tokens:
            raise ValueError(
                f"rows [{first}, {last}) do not follow the {self._rows} of {self.tokens} added"
            )
        if not last <= rows.shape[1] <= self.tokens:
            raise ValueError(
                f"rows [{first}, {last}) need {last} to {self.tokens} columns: got {rows.shape[1]}"
            )
        if len(rows) and not (rows.min() >= 0 and rows.max() < np.inf):  # so written, NaN fails
            raise ValueError(f"rows [{first}, {last}) have values that are negative or not finite")
        if np.triu(rows[:, first:], 1).any():
            raise ValueError(f"rows [{first}, {last}) attend to later tokens")


def _due(occupancy: Occupancy, tokens: int) -> Iterator[int]:
    """Tokens seen at the evictions that the last query, or an earlier one, feels."""
    due = occupancy.next_due(0)
    while due is not None and due < tokens:
        yield due
        due = occupancy.next_due(due)
