"""Attention rows of single tokens, computed from keys where they lie in the pages.

A gathered copy of the keys takes longer than the products themselves. Compiled by numba at its
first call, seconds once and then kept on disk; nothing is compiled when this module is imported.
It serves float32 pages in the ``vec`` packing.

Axes: R rows, n blocks per row, Q queries of a row, H_kv KV heads, G query heads per KV head,
D head dimension, P slots of a block, S = n P slots of a row.
"""

from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from kvpolicy.compiler import numba
from kvpolicy_vllm.intrinsics import as_tuple, pointer, prefetch, take
from kvpolicy_vllm.pages import Runs
from kvpolicy_vllm.threads import share

# Infinite and missing numbers stay what they are; sums may run in vector registers.
_FAST = {"nsz", "arcp", "contract", "reassoc"}

POOLS = {"mean": 0, "max": 1, "sum": 2}
"""Reductions from the query heads of a group to their KV head."""

_MEAN, _MAX = POOLS["mean"], POOLS["max"]

_LANES = 16
"""Numbers of a cache line, compared side by side."""

_AHEAD = 2
"""How many runs before they are read keys are asked for."""

_LOG2_E = np.float32(1.44269504)
_LN2_HIGH, _LN2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)
_SMALLEST = np.float32(-87)
_HALF, _ONE = np.float32(0.5), np.float32(1)
# exp(f) = 1 + f + f^2 p(f) for |f| <= ln 2 / 2, as in Moshier's Cephes library.
_C0, _C1, _C2 = (
    np.float32(1.9875691500e-4),
    np.float32(1.3981999507e-3),
    np.float32(8.3334519073e-3),
)
_C3, _C4, _C5 = (
    np.float32(4.1665795894e-2),
    np.float32(1.6666665459e-1),
    np.float32(5.0000001201e-1),
)


class _Call(NamedTuple):
    """What a call of `pooled_rows` hands to the threads that share its work, int64 each.

    Attributes:
        taken: Tasks that threads have taken; the only number that changes.
        memory: Address of the pages; those of the other tensors follow.
        numbers: [X] of the pages, then R, Q, H_kv, G, D, n and S.
        first: `Runs` of the keys, field by field.
        together: KV heads of a task.
        pool: One of `POOLS`.
    """

    taken: int
    memory: int
    blocks: int
    visible: int
    query: int
    pooled: int
    numbers: int
    rows: int
    queries: int
    kv_heads: int
    group: int
    dim: int
    num_blocks: int
    num_slots: int
    first: int
    page: int
    head: int
    together: int
    pool: int


_FIELDS = len(_Call._fields)


def pooled_rows(
    memory: Tensor,
    runs: Runs,
    blocks: Tensor,
    visible: Tensor,
    query: Tensor,
    pooled: Tensor,
    pool: int,
) -> None:
    """Softmax rows of queries, reduced from query heads to KV heads.

    Keys are read once for all queries of a row, so that many of them cost little more than one.

    Args:
        memory: [X] float32, all pages as they lie in memory.
        runs: `Runs` of the keys, [D, P].
        blocks: [R, n] int64.
        visible: [R, Q] int64 slots that a query attends to.
        query: [R, Q, H_kv, G, D] float32, scaled.
        pooled: [R, H_kv, Q, S] float32, contiguous, written; zero for what is not visible.
        pool: One of `POOLS`.
    """
    blocks, visible, query = blocks.contiguous(), visible.contiguous(), query.contiguous()
    tensors = (memory, blocks, visible, query, pooled)
    sizes = (memory.numel(), *query.shape, blocks.shape[1], pooled.shape[3])
    rows, queries, kv_heads = query.shape[:3]
    # Heads of a page are read best by one thread, one after the other, where rows are enough.
    # Many queries are not kept waiting by memory, but by what they need of the nearest cache.
    together = kv_heads if queries == 1 and rows >= torch.get_num_threads() else 1
    addresses = (x.data_ptr() for x in tensors)
    call = _Call._make((0, *addresses, *sizes, *runs, together, pool))
    share(_compiled(), call, tasks=rows * (kv_heads // together))


@cache
def _compiled() -> Any:
    """`_work` as a function that threads may run without the interpreter."""
    signature = numba.void(numba.types.CPointer(numba.int64))
    return numba.cfunc(signature, cache=True)(_work)


def _work(place):  # noqa: ANN001, ANN202
    """Take rows and KV heads of the `_Call` at a place until none is left."""
    call = _Call(*as_tuple(numba.carray(place, _FIELDS), _FIELDS))
    rows, queries, kv_heads, num_slots = call.rows, call.queries, call.kv_heads, call.num_slots
    memory = numba.carray(pointer(call.memory, numba.float32), call.numbers)
    blocks = numba.carray(pointer(call.blocks, numba.int64), (rows, call.num_blocks))
    visible = numba.carray(pointer(call.visible, numba.int64), (rows, queries))
    shape = rows, queries, kv_heads, call.group, call.dim
    query = numba.carray(pointer(call.query, numba.float32), shape)
    shape = rows, kv_heads, queries, num_slots
    pooled = numba.carray(pointer(call.pooled, numba.float32), shape)
    taken = numba.carray(place, 1)
    parts = -(-kv_heads // call.together)
    task = take(taken)
    while task < rows * parts:
        row, part = divmod(task, parts)
        heads = slice(part * call.together, (part + 1) * call.together)
        keys = Runs(call.first + heads.start * call.head, call.page, call.head)
        asked, reduced = query[row, :, heads], pooled[row, heads]
        _pool(memory, keys, blocks[row], visible[row], asked, reduced, call.pool)
        task = take(taken)


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _pool(memory, keys, blocks, visible, query, pooled, pool):  # noqa: ANN001, ANN202
    """Softmax rows of heads' queries [Q, H_kv, G, D] over their keys, reduced to [H_kv, Q, S]."""
    queries, kv_heads, group, dim = query.shape
    num_slots = pooled.shape[2]
    size = num_slots // len(blocks)
    rows = np.empty((kv_heads, queries * group, dim), np.float32)
    for head in range(kv_heads):
        for each in range(queries):
            rows[head, each * group : (each + 1) * group] = query[each, head]
    logits = np.empty((kv_heads, queries * group, num_slots), np.float32)
    products = np.empty((queries * group, size), np.float32)
    powers = np.empty(num_slots, np.int32)
    count = -(-visible.max() // size) * kv_heads
    for run in range(count):  # in the order in which they lie in a page
        block, head = divmod(run, kv_heads)
        start = _start(keys, blocks[block], head)
        block_ahead, head_ahead = divmod(min(run + _AHEAD, count - 1), kv_heads)
        ahead = _start(keys, blocks[block_ahead], head_ahead)
        _multiply(memory, start, ahead, rows[head], products)
        logits[head, :, block * size : (block + 1) * size] = products
    for head in range(kv_heads):
        for each in range(queries):
            reduced, seen = pooled[head, each], visible[each]
            reduced[:] = 0
            for member in range(each * group, (each + 1) * group):
                total = _exponentiate(logits[head, member], powers, seen)
                _reduce(logits[head, member], reduced, seen, total, group, pool)


@numba.njit(nogil=True, cache=True)
def _start(runs, block, head):  # noqa: ANN001, ANN202
    """Index in memory at which the run of a block and head begins."""
    return runs.first + block * runs.page + head * runs.head


@numba.njit(nogil=True, cache=True, fastmath=_FAST, error_model="numpy")
def _multiply(memory, start, ahead, rows, products):  # noqa: ANN001, ANN202
    """Products [X, P] of rows [X, D] with one run's keys; eight rows of keys at once.

    Meanwhile the keys of the run `ahead` are fetched.
    """
    num_rows, dim = rows.shape
    size = products.shape[1]
    products[:] = 0
    for d in range(0, dim, 8):
        for line in range(d * size, (d + 8) * size, _LANES):
            prefetch(memory, ahead + line)
        at, then = start + d * size, start + (d + 4) * size
        k0, k1 = memory[at : at + size], memory[at + size : at + 2 * size]
        k2, k3 = memory[at + 2 * size : at + 3 * size], memory[at + 3 * size : then]
        k4, k5 = memory[then : then + size], memory[then + size : then + 2 * size]
        k6, k7 = (
            memory[then + 2 * size : then + 3 * size],
            memory[then + 3 * size : then + 4 * size],
        )
        for row in range(num_rows):
            q0, q1, q2, q3 = rows[row, d], rows[row, d + 1], rows[row, d + 2], rows[row, d + 3]
            q4, q5, q6, q7 = rows[row, d + 4], rows[row, d + 5], rows[row, d + 6], rows[row, d + 7]
            out = products[row]
            for slot in range(size):
                out[slot] += (
                    q0 * k0[slot]
                    + q1 * k1[slot]
                    + q2 * k2[slot]
                    + q3 * k3[slot]
                    + q4 * k4[slot]
                    + q5 * k5[slot]
                    + q6 * k6[slot]
                    + q7 * k7[slot]
                )


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _exponentiate(row, powers, count):  # noqa: ANN001, ANN202
    """Replace the first numbers of a row by exp(number - largest); return their sum."""
    largest = _largest(row, count)
    for c in range(count):
        x = row[c] - largest
        x = max(x, _SMALLEST)
        k = np.floor(x * _LOG2_E + _HALF)
        powers[c] = (np.int32(k) + np.int32(127)) << np.int32(23)
        f = x - k * _LN2_HIGH - k * _LN2_LOW
        p = ((((_C0 * f + _C1) * f + _C2) * f + _C3) * f + _C4) * f + _C5
        row[c] = p * f * f + f + _ONE
    return _scale(row, powers.view(np.float32), count)


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _largest(row, count):  # noqa: ANN001, ANN202
    """The largest of the first numbers of a row, side by side and then of those."""
    lanes = np.full(_LANES, -np.inf, np.float32)
    whole = count // _LANES * _LANES
    for c in range(0, whole, _LANES):
        part = row[c : c + _LANES]
        for lane in range(_LANES):
            lanes[lane] = max(lanes[lane], part[lane])
    largest = lanes.max()
    for c in range(whole, count):
        largest = max(largest, row[c])
    return largest


@numba.njit(nogil=True, cache=True, fastmath=_FAST, error_model="numpy")
def _scale(row, factors, count):  # noqa: ANN001, ANN202
    """Multiply the first numbers of a row by factors; return their sum."""
    total = np.float32(0)
    for c in range(count):
        row[c] *= factors[c]
        total += row[c]
    return total


@numba.njit(nogil=True, cache=True, fastmath=_FAST, error_model="numpy")
def _reduce(row, reduced, count, total, group, pool):  # noqa: ANN001, ANN202
    """Fold one query head's normalised row into its KV head's."""
    factor = _ONE / total
    if pool == _MAX:
        for c in range(count):
            weight = row[c] * factor
            reduced[c] = max(weight, reduced[c])
        return
    if pool == _MEAN:
        factor /= np.float32(group)
    for c in range(count):
        reduced[c] += row[c] * factor


@numba.njit(nogil=True, cache=True, fastmath=_FAST, error_model="numpy")
def fold_rows(memory, runs, blocks, visible, pooled, fading, gain):  # noqa: ANN001, ANN201
    """Fold pooled rows into the statistic kept with the slots, a row's queries in their order.

    Args:
        memory: [X] float32, all pages as they lie in memory.
        runs: `Runs` of the statistic, [P].
        blocks: [R, n] int64.
        visible: [R, Q] int64.
        pooled: [R, H_kv, Q, S] float32, any strides.
        fading: [R, Q] float32 factor on what is there; with 0 the statistic starts over.
        gain: [R, Q] float32 factor on the weights.
    """
    rows, kv_heads, queries, num_slots = pooled.shape
    size = num_slots // blocks.shape[1]
    for row in range(rows):
        for head in range(kv_heads):
            for each in range(queries):
                for block in range(-(-visible[row, each] // size)):
                    first = block * size
                    count = min(size, visible[row, each] - first)
                    start = _start(runs, blocks[row, block], head)
                    kept = memory[start : start + count]
                    if fading[row, each] == 0:  # whatever is there, numbers or not
                        kept[:] = 0
                    fresh = pooled[row, head, each, first : first + count]
                    for slot in range(count):
                        kept[slot] = kept[slot] * fading[row, each] + fresh[slot] * gain[row, each]


def prepare() -> None:
    """Compile what this module computes, or load what an earlier run compiled."""
    _compiled()
    memory, pooled = np.zeros(1, np.float32), np.zeros((1, 1, 1, 1), np.float32)
    blocks = visible = np.ones((1, 1), np.int64)
    ones = np.ones((1, 1), np.float32)
    fold_rows(memory, Runs(0, 0, 0), blocks * 0, visible, pooled, ones, ones)
