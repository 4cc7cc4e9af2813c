"""What each possible eviction of a decision unit would cost in attention mass.

Axes: T tokens, E evictions that a later query feels.
"""

from dataclasses import replace
from typing import NamedTuple, Self

import numpy as np

from kvpolicy import Occupancy
from kvpolicy_sim.statistics import uncounted_steps


class Solution(NamedTuple):
    """Evictions that follow the occupancy law.

    Attributes:
        mass: Retained mass, the mean over the counted queries.
        evicted_at: [T] int64, tokens seen when a token was evicted; 0 if it never was. A kept
            prompt's tokens come first.
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

    Queries count where more tokens than the budget, and than a bulk prompt, were seen; all of
    them if there is none such. A prompt that is never evicted is no part of what is to be decided:
    tokens are counted from its end on, and its attention is retained whatever happens.

    Args:
        tokens: All that are seen.
        occupancy: When tokens leave, and how many.
        prompt_tokens: Those of them that are a prompt, for laws that set prompts apart.

    Attributes:
        tokens: T, those that may leave.
        kept: Tokens before them that may not: a kept prompt's.
        law: When tokens leave, settled, and with n counted from the kept ones on.
        due: [E] int64, tokens seen at the evictions that come before the last query.
        counts: [E] int64, tokens that leave at each.
    """

    def __init__(self, tokens: int, occupancy: Occupancy, prompt_tokens: int = 0) -> None:
        is_kept = occupancy.prompts == "keep"
        self.kept = prompt_tokens if is_kept else 0
        if tokens - self.kept < 1:
            raise ValueError(
                f"a problem needs at least one token: got {tokens}, {self.kept} of them kept"
            )
        self.tokens = tokens - self.kept
        law = replace(occupancy, prompts="stream") if is_kept else occupancy
        self.law = law.of_prompt(prompt_tokens)
        first_due = self.law.next_due(0) or self.tokens
        self.due = np.arange(first_due, self.tokens, self.law.interval)
        self.counts = np.array([self.law.surplus(n) for n in self.due.tolist()], np.int64)
        ends = self.due.cumsum()
        self._losses = Losses(np.zeros(int(self.due.sum())), ends - self.due, self.due)
        uncounted = uncounted_steps(self.law)
        self._first_counted = self.kept + uncounted if uncounted < self.tokens else 0
        self._total = 0.0
        self._rows = 0
        self._is_summed = False

    @classmethod
    def of(cls, attention: np.ndarray, occupancy: Occupancy, prompt_tokens: int = 0) -> Self:
        """State the problem of a whole attention matrix, lower triangular, over all tokens."""
        problem = cls(len(attention), occupancy, prompt_tokens)
        problem.add_rows(0, attention)
        return problem

    def add_rows(self, first: int, rows: np.ndarray) -> None:
        """Add the attention of the queries that follow those added so far.

        Args:
            first: Index of the first query.
            rows: [n, S] attention to the tokens [0, S), zero for those after the query; kept
                tokens and their queries included.

        Raises:
            ValueError: Rows are out of order, too narrow, negative, not finite, or see the
                future; nothing is added.
        """
        last = first + len(rows)
        self._require_fitting(first, last, rows)
        counted = max(self._first_counted - first, 0)
        self._total += float(rows[counted:].sum(dtype=np.float64))
        self._rows = last
        rows = rows[max(self.kept - first, 0) :, self.kept :]
        first, last = max(first - self.kept, 0), last - self.kept
        if last <= 0:
            return
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
        if self._rows < self.kept + self.tokens:
            raise ValueError(f"only {self._rows} of {self.kept + self.tokens} rows were added")
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
        return (self._total - lost) / (self.kept + self.tokens - self._first_counted)

    def solution(self, left_at: np.ndarray) -> Solution:
        """Describe a solution, given as for `lost`."""
        evicted_at = np.where(left_at >= 0, np.append(self.kept + self.due, 0)[left_at], 0)
        # At the last token no query follows, so it does not matter which tokens go.
        held = np.flatnonzero(evicted_at == 0)
        evicted_at[held[: self.law.surplus(self.tokens)]] = self.kept + self.tokens
        evicted_at = np.concatenate([np.zeros(self.kept, np.int64), evicted_at])
        return Solution(self.mass(self.lost(left_at)), evicted_at)

    def _require_fitting(self, first: int, last: int, rows: np.ndarray) -> None:
        total = self.kept + self.tokens
        if first != self._rows or last > total:
            raise ValueError(
                f"rows [{first}, {last}) do not follow the {self._rows} of {total} added"
            )
        if not last <= rows.shape[1] <= total:
            raise ValueError(
                f"rows [{first}, {last}) need {last} to {total} columns: got {rows.shape[1]}"
            )
        if len(rows) and not (rows.min() >= 0 and rows.max() < np.inf):  # so written, NaN fails
            raise ValueError(f"rows [{first}, {last}) have values that are negative or not finite")
        if np.triu(rows[:, first:], 1).any():
            raise ValueError(f"rows [{first}, {last}) attend to later tokens")
