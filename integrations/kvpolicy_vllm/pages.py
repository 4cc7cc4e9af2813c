"""vLLM's CPU pages as slots: reading, appending, moving, and the policy state in their tail.

A layer's cache is [N, H_kv, P, 2 D] (blocks, KV heads, slots of a block). Inside a block and
head the first half is K and the second half V, packed as the CPU kernel wants them. Every
page ends in a tail of policy state, one int32 position and one float32 statistic per slot.

Axes: N blocks, P slots of a block, R rows, M moved or written cells, S slots of a row.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from math import gcd, prod
from typing import NamedTuple

import torch
from torch import Tensor


class Cells(NamedTuple):
    """M cells, one KV head's slot each: block, KV head and offset within the block."""

    block: Tensor
    head: Tensor
    offset: Tensor


class Moves(NamedTuple):
    """Cells that are copied onto others, disjoint from them: the slots that an eviction moves.

    Attributes:
        source: [M] survivors.
        target: [M] the places of slots that go.
        dropped: Slots that go, over all KV heads, of each row.
    """

    source: Cells
    target: Cells
    dropped: list[int]


class Runs(NamedTuple):
    """Where a block's numbers of one head lie: `first` + block * `page` + head number * `head`."""

    first: int
    page: int
    head: int


class Scratch:
    """Memory for copies that are read at once, kept from one to the next.

    A fresh copy of a batch's keys is so large that the allocator asks the system for it, which
    hands it over page by page, at several times the cost of the copy.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor with unknown content, which the next one of that name overwrites."""
        size, buffer = prod(shape), self._buffers.get(name)
        if buffer is None or buffer.numel() < size or buffer.dtype != dtype:
            buffer = self._buffers[name] = torch.empty(size, dtype=dtype)
        return buffer[:size].view(shape)


@dataclass(frozen=True)
class Pages:
    """Views of one layer's cache; nothing is copied.

    Attributes:
        keys: Kernel layout, see `packing`.
        values: Kernel layout, see `packing`.
        positions: [N, H_kv, P] int32.
        accumulated: [N, H_kv, P] float32.
        block_size: P.
        packing: ``vec`` (K [D, P], V [P, D]) or ``amx`` (K [P/16, D/2, 16, 2],
            V [D/16, P/2, 16, 2]).
        runs: [N, H_kv, 2 P D], keys and values of a block and head as they lie in memory.
        memory: [X] float32, everything from the first page on as it lies in memory.
        state: [N, 2, H_kv, P] int32, the bits of positions and statistics.
        scratch: For copies that are read at once; layers run one after the other and share it.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor
    accumulated: Tensor
    block_size: int
    packing: str
    runs: Tensor
    memory: Tensor
    state: Tensor
    scratch: Scratch = field(default_factory=Scratch, repr=False, compare=False)

    @classmethod
    def of(cls, cache: Tensor, isa: str, scratch: Scratch | None = None) -> "Pages":
        """View a layer's cache [N, H_kv, P, 2 D] under the kernel's instruction set."""
        num_blocks, kv_heads, block_size, width = cache.shape
        head_dim = width // 2
        halves = cache.view(num_blocks, kv_heads, 2, block_size * head_dim)
        packing = "amx" if isa == "amx" else "vec"
        key_shape, value_shape = _shapes(packing, block_size, head_dim)
        return cls(
            keys=halves[:, :, 0].unflatten(-1, key_shape),
            values=halves[:, :, 1].unflatten(-1, value_shape),
            positions=_tail(cache, torch.int32)[:, 0],
            accumulated=_tail(cache, torch.float32)[:, 1],
            block_size=block_size,
            packing=packing,
            runs=halves.flatten(2),
            memory=_flat(cache),
            state=_tail(cache, torch.int32),
            scratch=scratch or Scratch(),
        )

    @property
    def head_dim(self) -> int:
        """D."""
        return self.runs.shape[-1] // (2 * self.block_size)

    @property
    def has_plain_keys(self) -> bool:
        """Whether the keys of a block and head are float32 numbers [D, P] in `memory`."""
        return self.packing == "vec" and self.runs.dtype == torch.float32

    @cached_property
    def key_runs(self) -> Runs:
        """Where in `memory` keys lie, if plain."""
        return Runs(0, self.runs.stride(0), self.runs.stride(1))

    @cached_property
    def statistic_runs(self) -> Runs:
        """Where in `memory` statistics lie."""
        first = int(self.accumulated.storage_offset() - self.memory.storage_offset())
        return Runs(first, self.accumulated.stride(0), self.accumulated.stride(1))

    def read_keys_transposed(self, blocks: Tensor) -> Tensor:
        """Keys of whole blocks [R, n]: [R, H_kv, n, D, P]."""
        return self._unpack_keys(self._gather(blocks, 0, self.block_size * self.head_dim))

    def keys_by_row(self, blocks: Tensor) -> Iterator[Tensor]:
        """Keys of whole blocks [R, n], one row after the other: [H_kv, n, D, P].

        Each is to be read before the next is asked for, which overwrites it: a row's keys stay
        in the processor's cache meanwhile, all rows' would not.
        """
        size = self.block_size * self.head_dim
        windows, index = self._windows(blocks, 0, size)
        for row in index:
            copied = self.scratch.take("keys", (row.numel(), size), self.runs.dtype)
            torch.index_select(windows, 0, row.flatten(), out=copied)
            yield self._unpack_keys(copied.view(1, *row.shape, size))[0]

    def _unpack_keys(self, runs: Tensor) -> Tensor:
        """Runs of keys [R, H_kv, n, P D] as [R, H_kv, n, D, P]."""
        if self.packing == "vec":
            return runs.unflatten(-1, (self.head_dim, self.block_size))
        keys = runs.unflatten(-1, self.keys.shape[2:])  # [R, H_kv, n, P/16, D/2, 16, 2]
        return keys.permute(0, 1, 2, 4, 6, 3, 5).flatten(-2).flatten(-3, -2)

    def read_keys(self, blocks: Tensor) -> Tensor:
        """Keys of whole blocks [R, n] as slots: [R, H_kv, n P, D]."""
        return self.read_keys_transposed(blocks).transpose(-1, -2).flatten(2, 3)

    def read_values(self, blocks: Tensor, *, reuse: bool = False) -> Tensor:
        """Values of whole blocks [R, n] as slots: [R, H_kv, n P, D].

        Args:
            blocks: The blocks.
            reuse: The copy may be overwritten by the next that is read so.
        """
        size, dim = self.block_size, self.head_dim
        runs = self._gather(blocks, size * dim, size * dim, "values" if reuse else None)
        if self.packing == "vec":
            return runs.view(*runs.shape[:2], -1, dim)
        values = runs.unflatten(-1, self.values.shape[2:])  # [R, H_kv, n, D/16, P/2, 16, 2]
        return values.permute(0, 1, 2, 4, 6, 3, 5).flatten(-2).flatten(2, 4)

    def write_blocks(self, blocks: Tensor, keys: Tensor, values: Tensor) -> None:
        """Write whole blocks [R, n] from keys and values as slots, [R, H_kv, n P, D]."""
        shape = (blocks.shape[1], self.block_size)
        keys = keys.unflatten(2, shape).transpose(1, 2)  # [R, n, H_kv, P, D]
        values = values.unflatten(2, shape).transpose(1, 2)
        if self.packing == "vec":
            self.keys[blocks] = keys.transpose(-1, -2)
            self.values[blocks] = values
            return
        size, dim = keys.shape[-2:]
        split = keys.unflatten(-1, (dim // 2, 2)).unflatten(-3, (size // 16, 16))
        self.keys[blocks] = split.transpose(-2, -3)
        paired = values.unflatten(-1, (dim // 16, 16)).unflatten(-3, (size // 2, 2))
        self.values[blocks] = paired.permute(0, 1, 2, 5, 3, 6, 4)

    def read_numbers(self, blocks: Tensor) -> Tensor:
        """Whole blocks [R, n] as plain numbers, [R, H_kv, n P D / 2 or n 2 P D] float32."""
        return self._gather(blocks, 0, self.runs.shape[-1]).view(torch.float32).flatten(2)

    def write_numbers(self, blocks: Tensor, numbers: Tensor) -> None:
        """Write numbers [R, H_kv, X] float32 into blocks [R, n], which have room for them."""
        run = self.runs.shape[-1] * self.runs.element_size() // 4
        whole = numbers.new_zeros(*numbers.shape[:2], blocks.shape[1] * run)
        whole[..., : numbers.shape[-1]] = numbers
        runs = whole.view(self.runs.dtype).unflatten(-1, (blocks.shape[1], -1))
        self.runs[blocks] = runs.transpose(1, 2)

    def clear(self, blocks: Tensor) -> None:
        """Set keys and values of blocks [X] to zero."""
        self.runs[blocks] = 0

    def _gather(self, blocks: Tensor, first: int, size: int, scratch: str | None = None) -> Tensor:
        """Copy numbers [first, first + size) of the runs of blocks [R, n]: [R, H_kv, n, size]."""
        windows, index = self._windows(blocks, first, size)
        if scratch is None:
            copied = windows.index_select(0, index.flatten())
        else:
            copied = self.scratch.take(scratch, (index.numel(), size), self.runs.dtype)
            torch.index_select(windows, 0, index.flatten(), out=copied)
        return copied.view(*index.shape, size)

    def _windows(self, blocks: Tensor, first: int, size: int) -> tuple[Tensor, Tensor]:
        """A view with numbers [first, first + size) of every run, and the rows of some blocks.

        Runs of a page lie one behind the other, and pages further apart. With a row wherever a
        run may begin, one index_select copies runs whole, in the order asked for; indexing by
        block and head takes three times as long.

        Returns:
            [X, size], whose rows overlap; and [R, H_kv, n] indices of rows, for blocks [R, n].
        """
        runs = self.runs
        unit = gcd(runs.stride(0), runs.stride(1))
        page, head = runs.stride(0) // unit, runs.stride(1) // unit
        count = (runs.shape[0] - 1) * page + (runs.shape[1] - 1) * head + 1
        windows = runs.as_strided((count, size), (unit, 1), runs.storage_offset() + first)
        heads = torch.arange(runs.shape[1]) * head
        return windows, blocks[:, None] * page + heads[:, None]

    def begin(self, block: Tensor, offset: Tensor, fresh: Tensor) -> None:
        """Start the policy state of new tokens [M], in the same slot of every head.

        Args:
            block: [M] their blocks.
            offset: [M] their offsets.
            fresh: [M, 2, 1] int32, see `fresh_state`.
        """
        self.state[block, :, :, offset] = fresh

    def move(self, moves: Moves) -> None:
        """Copy cells with their policy state."""
        source, target, _ = moves
        for cache, index in ((self.keys, self._key_index), (self.values, self._value_index)):
            cache[index(target)] = cache[index(source)]
        for state in (self.positions, self.accumulated):
            state[target] = state[source]

    def _key_index(self, cells: Cells) -> tuple[Tensor | slice, ...]:
        block, head, offset = cells
        if self.packing == "vec":
            return block, head, slice(None), offset
        return block, head, offset // 16, slice(None), offset % 16

    def _value_index(self, cells: Cells) -> tuple[Tensor | slice, ...]:
        block, head, offset = cells
        if self.packing == "vec":
            return block, head, offset
        return block, head, slice(None), offset // 2, slice(None), offset % 2


def fill_holes(blocks: Tensor, victims: Tensor, retained: int, block_size: int) -> Moves:
    """Move surviving slots at or above `retained` into the victims' slots below it.

    Every head has as many survivors above as victims below, and both come in the same
    order of rows and heads, so they pair up one to one.

    Args:
        blocks: [R, n] blocks of the rows.
        victims: [R, H_kv, S] bool, S - retained of them per row and head.
        retained: Slots that stay occupied, [0, retained).
        block_size: P.
    """
    row, head, hole = victims[..., :retained].nonzero(as_tuple=True)
    _, _, above = (~victims[..., retained:]).nonzero(as_tuple=True)
    above = above + retained
    return Moves(
        source=Cells(blocks[row, above // block_size], head, above % block_size),
        target=Cells(blocks[row, hole // block_size], head, hole % block_size),
        dropped=victims.sum(dim=(1, 2)).tolist(),
    )


def fresh_state(positions: Tensor) -> Tensor:
    """Policy state of new tokens at positions [M]: [M, 2, 1] int32, statistics of zero."""
    return torch.stack([positions.int(), torch.zeros_like(positions, dtype=torch.int32)], 1)[
        :, :, None
    ]


def rows_of(state: Tensor, blocks: Tensor, num_slots: int) -> Tensor:
    """Policy state of rows: [N, H_kv, P] at blocks [R, n] as [R, H_kv, num_slots]."""
    return state[blocks].transpose(1, 2).flatten(2)[..., :num_slots]


def put_rows(state: Tensor, blocks: Tensor, rows: Tensor) -> None:
    """Write policy state of rows [R, H_kv, S] back; slots past S keep what they had."""
    whole = state[blocks].transpose(1, 2).flatten(2)  # [R, H_kv, n * P], a copy
    whole[..., : rows.shape[-1]] = rows
    state[blocks] = whole.unflatten(2, (blocks.shape[1], state.shape[-1])).transpose(1, 2)


def _shapes(packing: str, size: int, dim: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of one head's K and V inside a block."""
    if packing == "vec":
        return (dim, size), (size, dim)
    return (size // 16, dim // 2, 16, 2), (dim // 16, size // 2, 16, 2)


def _flat(cache: Tensor) -> Tensor:
    """View a cache and the tail of its last page as float32 numbers, one behind the other."""
    item = cache.element_size()
    size = cache.shape[0] * cache.stride(0) * item // 4
    return torch.empty(0).set_(
        cache.untyped_storage(), cache.storage_offset() * item // 4, (size,), (1,)
    )


def _tail(cache: Tensor, dtype: torch.dtype) -> Tensor:
    """View the two 4-byte state arrays behind every page's K and V: [N, 2, H_kv, P]."""
    num_blocks, kv_heads, block_size, width = cache.shape
    cells, item = kv_heads * block_size, cache.element_size()
    offset = cache.storage_offset() * item + cells * width * item
    view = torch.empty(0, dtype=dtype)
    return view.set_(
        cache.untyped_storage(),
        offset // 4,
        (num_blocks, 2, kv_heads, block_size),
        (cache.stride(0) * item // 4, cells, block_size, 1),
    )
