"""Memories in vLLM's pages: made, read and written.

Memory slots lie in the first cells of a request, their positions and masses where tokens have
position and statistic. Other memories are float32 numbers that fill the first blocks.

Axes: R rows, n blocks per row, H_kv KV heads, G query heads per KV head, M memory slots,
D head dimension.
"""

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from kvpolicy import PolicyError
from kvpolicy.attention import AttentionLayer
from kvpolicy.memory.policy import MemoryPolicy
from kvpolicy.memory.state import Memory, Passage, Setting, Shape, SlotMemory
from kvpolicy_vllm.allotment import Allotment
from kvpolicy_vllm.pages import Pages, rows_of


@dataclass(frozen=True)
class PagedMemory:
    """The memories of one policy's requests in one layer.

    Attributes:
        layer: The attention layer under the policy.
        policy: The policy.
        pages: The layer's pages.
        allotment: Where in a request's blocks its memory lies.
        group: G.
    """

    layer: AttentionLayer
    policy: MemoryPolicy
    pages: Pages
    allotment: Allotment
    group: int

    def empty(self, num_rows: int) -> Memory:
        """Memories of rows that have seen nothing; what their pages hold does not matter."""
        pages = self.pages
        shape = Shape(
            rows=num_rows,
            kv_heads=pages.positions.shape[1],
            group=self.group,
            head_dim=pages.head_dim,
            value_dim=pages.head_dim,
            dtype=pages.runs.dtype,
            device=pages.runs.device,
        )
        return self.policy.new_memory(shape, self.layer.setting)

    def load(self, blocks: Tensor) -> Memory:
        """Copy of the memories of rows with blocks [R, n]."""
        state_blocks = self.allotment.state_blocks
        if state_blocks:
            return _from_numbers(self.empty(0), self.pages.read_numbers(blocks[:, :state_blocks]))
        blocks = blocks[:, : -(-self.allotment.cells // self.pages.block_size)]
        keys, values = self.pages.read_keys(blocks), self.pages.read_values(blocks)
        return self.slots(blocks, keys, values)

    def slots(self, blocks: Tensor, keys: Tensor, values: Tensor) -> SlotMemory:
        """Memory slots among cells that were read.

        Args:
            blocks: [R, n].
            keys: [R, H_kv, at least M, D], not copied.
            values: [R, H_kv, at least M, D], not copied.
        """
        count = self.allotment.cells
        return SlotMemory(
            keys=keys[:, :, :count],
            values=values[:, :, :count],
            positions=rows_of(self.pages.positions, blocks, count).long(),
            mass=rows_of(self.pages.accumulated, blocks, count),
        )

    def store_numbers(self, blocks: Tensor, memory: Memory) -> None:
        """Write memories of numbers into the first blocks of rows [R, n]."""
        numbers = torch.cat([x.flatten(2) for x in memory.tensors()], dim=-1)
        self.pages.write_numbers(blocks[:, : self.allotment.state_blocks], numbers)


def rehearse(policy: MemoryPolicy, setting: Setting, shape: Shape) -> None:
    """Let a policy make a memory and absorb one eviction of zeros.

    A file of parameters that does not fit the model shows here, not in the middle of a request.

    Raises:
        PolicyError: The policy's parameters or its memory do not fit.
    """
    memory, law = policy.new_memory(shape, setting), policy.occupancy
    if not isinstance(memory, SlotMemory):
        _require_numbers(policy, memory, shape)
    num_tokens, heads = law.interval, (shape.rows, shape.kv_heads)
    vectors = torch.zeros(*heads, num_tokens, shape.head_dim)
    passage = Passage(
        rotated_keys=vectors,
        values=vectors,
        positions=torch.arange(num_tokens).expand(*heads, -1),
        accumulated=vectors[..., 0],
        n=torch.full((shape.rows, 1, 1), num_tokens + (law.retained or 0)),
        query=torch.zeros(*heads, shape.group, shape.head_dim),
        lse=torch.zeros(*heads, shape.group),
        setting=setting,
    )
    policy.absorb(memory, passage)


def _require_numbers(policy: MemoryPolicy, memory: Memory, shape: Shape) -> None:
    """Refuse memories that are not so many float32 numbers per row and head."""
    expected = policy.memory_floats(shape.head_dim, shape.group)
    heads, tensors = (shape.rows, shape.kv_heads), memory.tensors()
    fits = all(x.dtype == torch.float32 and x.shape[:2] == heads for x in tensors)
    found = sum(prod(x.shape[2:]) for x in tensors)
    if not fits or found != expected:
        raise PolicyError(
            f"{policy}: its memory must be float32 tensors [B, H_kv, ...] with memory_floats() = "
            f"{expected} numbers per head, got {[(tuple(x.shape), x.dtype) for x in tensors]}"
        )


def _from_numbers(empty: Memory, numbers: Tensor) -> Memory:
    """Take numbers [R, H_kv, ...] apart into a memory's tensors, shaped like those of no rows."""
    shapes = [x.shape[2:] for x in empty.tensors()]
    first, tensors = 0, list[Tensor]()
    for shape in shapes:
        last = first + prod(shape)
        tensors.append(numbers[..., first:last].unflatten(-1, shape))
        first = last
    return type(empty)(*tensors)
