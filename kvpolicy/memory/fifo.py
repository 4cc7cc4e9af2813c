"""A FIFO of memory slots that hold groups of evicted tokens.

Axes as in `kvpolicy.memory.state`; N new slots.
"""

import torch
from torch import Tensor

from kvpolicy.memory.state import SlotMemory


def push(memory: SlotMemory, new: SlotMemory) -> SlotMemory:
    """Put new slots into empty ones first, then in the place of the oldest.

    Args:
        memory: With M slots.
        new: N slots, oldest first; those with zero mass stay outside.
    """
    num_slots = memory.mass.shape[-1]
    is_filled = memory.mass > 0
    free_first = memory.positions.masked_fill(~is_filled, -1).argsort(dim=-1, stable=True)
    enters = new.mass > 0
    rank = enters.cumsum(dim=-1) - 1  # [B, H_kv, N] among those that enter
    overflow = (enters.sum(dim=-1, keepdim=True) - num_slots).clamp(min=0)
    enters = enters & (rank >= overflow)  # the oldest of too many are lost at once
    target = free_first.gather(-1, (rank - overflow).clamp(min=0))
    target = target.masked_fill(~enters, num_slots)  # a slot beyond, cut off below
    return SlotMemory(
        *(
            _scatter(old, value, target)
            for old, value in zip(memory.tensors(), new.tensors(), strict=True)
        )
    )


def _scatter(old: Tensor, new: Tensor, target: Tensor) -> Tensor:
    wide = torch.cat([old, old.new_zeros(*old.shape[:2], 1, *old.shape[3:])], dim=2)
    index = target if new.dim() == 3 else target[..., None].expand_as(new)
    return wide.scatter(2, index, new.to(old.dtype))[:, :, : old.shape[2]]
