"""vLLM's CPU pages as slots: reading, appending, moving, and the policy state in their tail.

A layer's cache is [N, H_kv, P, 2 D] (blocks, KV heads, slots of a block). Inside a block and
head the first half is K and the second half V, packed as the CPU kernel wants them. Every
page ends in a tail of policy state, one int32 position and one float32 statistic per slot.

Axes: N blocks, P slots of a block, R rows, M moved or written cells, S slots of a row.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Cells(NamedTuple):
    """M cells, one KV head's slot each: block, KV head and offset within the block."""

    block: Tensor
    head: Tensor
    offset: Tensor


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
    """

    keys: Tensor
    values: Tensor
    positions: Tensor
    accumulated: Tensor
    block_size: int
    packing: str

    @classmethod
    def of(cls, cache: Tensor, isa: str) -> "Pages":
        """View a layer's cache [N, H_kv, P, 2 D] under the kernel's instruction set."""
        num_blocks, kv_heads, block_size, width = cache.shape
        head_dim = width // 2
        halves = cache.view(num_blocks, kv_heads, 2, block_size * head_dim)
        packing = "amx" if isa == "amx" else "vec"
        key_shape, value_shape = _shapes(packing, block_size, head_dim)
        return cls(
            keys=halves[:, :, 0].unflatten(-1, key_shape),
            values=halves[:, :, 1].unflatten(-1, value_shape),
            positions=_tail(cache, torch.int32, 0),
            accumulated=_tail(cache, torch.float32, 1),
            block_size=block_size,
            packing=packing,
        )

    def read_keys_transposed(self, blocks: Tensor) -> Tensor:
        """Keys of whole blocks [R, n]: [R, n, H_kv, D, P]."""
        keys = self.keys[blocks]
        if self.packing == "vec":
            return keys
        return keys.permute(0, 1, 2, 4, 6, 3, 5).flatten(-2).flatten(-3, -2)

    def read_values(self, blocks: Tensor) -> Tensor:
        """Values of whole blocks [R, n]: [R, n, H_kv, P, D]."""
        values = self.values[blocks]
        if self.packing == "vec":
            return values
        return values.permute(0, 1, 2, 4, 6, 3, 5).flatten(-2).flatten(-3, -2)

    def write_blocks(self, blocks: Tensor, keys: Tensor, values: Tensor) -> None:
        """Write whole blocks [R, n] from keys and values [R, n, H_kv, P, D]."""
        if self.packing == "vec":
            self.keys[blocks] = keys.transpose(-1, -2)
            self.values[blocks] = values
            return
        size, dim = keys.shape[-2:]
        split = keys.unflatten(-1, (dim // 2, 2)).unflatten(-3, (size // 16, 16))
        self.keys[blocks] = split.transpose(-2, -3)
        paired = values.unflatten(-1, (dim // 16, 16)).unflatten(-3, (size // 2, 2))
        self.values[blocks] = paired.permute(0, 1, 2, 5, 3, 6, 4)

    def begin(self, block: Tensor, offset: Tensor, positions: Tensor) -> None:
        """Start the policy state of new tokens [M], in the same slot of every head."""
        self.positions[block, :, offset] = positions[:, None]
        self.accumulated[block, :, offset] = 0.0

    def move(self, source: Cells, target: Cells) -> None:
        """Copy cells with their policy state; sources and targets are disjoint."""
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


def _tail(cache: Tensor, dtype: torch.dtype, index: int) -> Tensor:
    """View the index-th 4-byte state array behind every page's K and V: [N, H_kv, P]."""
    num_blocks, kv_heads, block_size, width = cache.shape
    cells, item = kv_heads * block_size, cache.element_size()
    offset = cache.storage_offset() * item + cells * width * item + index * cells * 4
    view = torch.empty(0, dtype=dtype)
    return view.set_(
        cache.untyped_storage(),
        offset // 4,
        (num_blocks, kv_heads, block_size),
        (cache.stride(0) * item // 4, block_size, 1),
    )
