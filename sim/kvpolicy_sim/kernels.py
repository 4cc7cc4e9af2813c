"""The sequential part of a replay, compiled by numba at its first call.

Look-ahead leaves only this to be done token by token: normalise a row of weights over the
columns that are still alive, fold it into the statistic, and evict where the law says so.
Everything else of a block is GEMMs. Nothing is compiled when this module is imported.

Axes: N query heads that decide together, Q tokens of a block, r rows (tokens with queries),
C columns: the slots held at the block's start, then the block's own tokens, by position.
"""

from typing import NamedTuple

import numpy as np

from kvpolicy.compiler import numba
from kvpolicy_sim.rules import LAST_ROW, POOL_MAX, POOL_MEAN, POSITION, RANDOM, SUM, Rule

UNDERFLOW = np.float32(1e-20)
"""Weights relative to the block's largest whose sum is too small to be divided by."""

_TAKEN = np.uint64((1 << 64) - 1)
"""Rank of a column that is no candidate."""

# Infinite scores never occur; reassociation lets sums run in vector registers.
_FAST = {"nsz", "arcp", "contract", "reassoc"}


class Columns(NamedTuple):
    """The columns of a block, all [C]; changed in place but for positions and pins.

    Attributes:
        positions: int64, ascending.
        is_pinned: Whether a column lies in a protected span.
        alive: float32, 1 or 0.
        accumulated: float32 statistic.
        evicted_at: int64, tokens seen when a column was evicted; 0 if it was not.
    """

    positions: np.ndarray
    is_pinned: np.ndarray
    alive: np.ndarray
    accumulated: np.ndarray
    evicted_at: np.ndarray


@numba.njit(nogil=True, cache=True)
def splitmix64(x: np.uint64) -> np.uint64:
    """The splitmix64 finaliser (Steele, Lea and Flood 2014)."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@numba.njit(nogil=True, cache=True, fastmath=_FAST, error_model="numpy")
def walk(weights, rows, scales, sums, columns, first, size, rule):  # noqa: ANN001, ANN201
    """Take the tokens [first, first + size) one by one.

    Args:
        weights: [N, r, C] float32, exp(logit - reference of the row), zero in the future; on
            return zero where a column was not alive either.
        rows: [r] int64 offsets of the tokens that have queries, ascending.
        scales: [N, r] float32 factor from `weights` to what the policy observes; negative
            where it observes the normalised row.
        sums: [N, r] float32, written: sum of a row over what is alive.
        columns: `Columns`.
        first: Tokens seen before the block.
        size: Tokens of the block.
        rule: `Rule`.

    Returns:
        Tokens taken: fewer than `size` if a row's sum underflows, which the first row of a
        block cannot, since its largest weight is 1.
    """
    held = len(columns.positions) - size
    pooled = np.zeros(len(columns.positions), np.float32)
    row = 0
    for offset in range(size):
        visible = held + offset + 1
        if row < len(rows) and rows[row] == offset:
            for head in range(weights.shape[0]):
                sums[head, row] = _hide_dead(weights[head, row], columns.alive, visible)
                if sums[head, row] < UNDERFLOW:
                    return offset
            if rule.score >= LAST_ROW:
                _pool(weights[:, row], scales[:, row], sums[:, row], pooled, visible, rule.pool)
            if rule.score >= SUM:
                _accumulate(columns.accumulated, pooled, columns.alive, visible, rule)
            row += 1
        n = first + offset + 1
        if n == rule.first_due:
            _evict(columns, pooled, visible, n, rule.first_count, rule)
        elif n > rule.first_due and (n - rule.first_due) % rule.interval == 0:
            _evict(columns, pooled, visible, n, rule.interval, rule)
    return size


@numba.njit(nogil=True, cache=True, fastmath=_FAST, error_model="numpy")
def _hide_dead(weights, alive, visible):  # noqa: ANN001, ANN202
    """Zero the weights of evicted columns; return the sum of the others."""
    total = np.float32(0)
    for c in range(visible):
        weights[c] *= alive[c]
        total += weights[c]
    return total


@numba.njit(nogil=True, cache=True, fastmath=_FAST, error_model="numpy")
def _pool(weights, scales, sums, pooled, visible, pool):  # noqa: ANN001, ANN202
    """Reduce the heads' rows, normalised or scaled, into `pooled`."""
    num_heads = weights.shape[0]
    pooled[:visible] = 0
    for head in range(num_heads):
        row = weights[head]
        factor = scales[head] if scales[head] >= 0 else np.float32(1) / sums[head]
        if pool == POOL_MAX:
            for c in range(visible):
                pooled[c] = max(pooled[c], row[c] * factor)
        else:
            share = factor / np.float32(num_heads) if pool == POOL_MEAN else factor
            for c in range(visible):
                pooled[c] += row[c] * share


@numba.njit(nogil=True, cache=True, fastmath=_FAST, error_model="numpy")
def _accumulate(accumulated, pooled, alive, visible, rule):  # noqa: ANN001, ANN202
    """Fold a pooled row into the statistic (kvpolicy.policy.Accumulation)."""
    unit = np.float32(1)
    if rule.is_relative:
        unit = np.float32(alive[:visible].sum())
    decay = np.float32(rule.decay)
    for c in range(visible):
        accumulated[c] = accumulated[c] * decay + pooled[c] * unit


@numba.njit(nogil=True, cache=True)
def _evict(columns, pooled, visible, n, count, rule):  # noqa: ANN001, ANN202
    """Evict the `count` lowest-scored candidates after n tokens."""
    begin = np.searchsorted(columns.positions[:visible], rule.sinks)
    end = np.searchsorted(columns.positions[:visible], n - rule.recent)
    if rule.score == POSITION:
        _evict_oldest(columns, begin, end, n, count)
        return
    ranks = _ranks(columns, pooled, begin, end, n, rule)
    if count == 1:
        lowest, threshold = begin, _TAKEN
        for c in range(begin, end):
            if ranks[c - begin] < threshold:
                lowest, threshold = c, ranks[c - begin]
        columns.alive[lowest] = 0
        columns.evicted_at[lowest] = n
        return
    threshold = np.partition(ranks, count - 1)[count - 1]
    ties = count - (ranks < threshold).sum()
    for c in range(begin, end):
        is_tie = ranks[c - begin] == threshold and ties > 0
        if is_tie or ranks[c - begin] < threshold:
            ties -= is_tie
            columns.alive[c] = 0
            columns.evicted_at[c] = n


@numba.njit(nogil=True, cache=True)
def _evict_oldest(columns, begin, end, n, count):  # noqa: ANN001, ANN202
    """Evict the first candidates among the columns [begin, end), which are in order."""
    for c in range(begin, end):
        if count > 0 and columns.alive[c] != 0 and not columns.is_pinned[c]:
            columns.alive[c] = 0
            columns.evicted_at[c] = n
            count -= 1


@numba.njit(nogil=True, cache=True)
def _ranks(columns, pooled, begin, end, n, rule):  # noqa: ANN001, ANN202
    """Scores of the columns [begin, end) as words in the same order; `_TAKEN` for no candidate.

    Weights and their sums are not negative, so that the order of the numbers is the order of
    their bits.
    """
    ranks = np.empty(end - begin, np.uint64)
    if rule.score == RANDOM:
        link = splitmix64(rule.hash ^ np.uint64(n))
        for c in range(begin, end):
            ranks[c - begin] = splitmix64(link ^ np.uint64(columns.positions[c]))
    elif rule.score == LAST_ROW:
        ranks[:] = pooled[begin:end].view(np.uint32)
    elif rule.score == SUM:
        ranks[:] = columns.accumulated[begin:end].view(np.uint32)
    else:
        means = columns.accumulated[begin:end] / (n - columns.positions[begin:end])
        ranks[:] = means.astype(np.float32).view(np.uint32)
    for c in range(begin, end):
        if columns.alive[c] == 0 or columns.is_pinned[c]:
            ranks[c - begin] = _TAKEN
    return ranks


def prepare() -> None:
    """Compile the walk, or load what an earlier run compiled: seconds, once per process."""
    columns = Columns(
        positions=np.zeros(1, np.int64),
        is_pinned=np.zeros(1, np.bool_),
        alive=np.ones(1, np.float32),
        accumulated=np.zeros(1, np.float32),
        evicted_at=np.zeros(1, np.int64),
    )
    weights, row = np.ones((1, 1, 1), np.float32), np.zeros((1, 1), np.float32)
    rule = Rule(SUM, POOL_MEAN, 1.0, False, 0, 0, 2, 1, 1, np.uint64(0))
    walk(weights, np.zeros(1, np.int64), row, row.copy(), columns, 0, 1, rule)
