"""Content centroids: online k-means over evicted tokens, the winner takes all.

Axes as in `kvpolicy.memory.state`.
"""

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from kvpolicy.memory.state import Passage, SlotMemory


def absorb(memory: SlotMemory, passage: Passage, offsets: Tensor | None) -> SlotMemory:
    """Let every token join the slot whose key answers its own best.

    The first tokens ever fill the empty slots one by one. Every other token j goes to
    argmax_s k_j . k_s over keys before rotation (ties: the lowest slot), compared with the slots
    as they are once the eviction's first tokens have filled what was empty; then every slot
    becomes the mean of all tokens it has taken in.

    Args:
        memory: With M > 0 slots, whose keys are rotated by `offsets` for good.
        passage: The tokens.
        offsets: [M] positions; None if slots hold keys before rotation.
    """
    keys, rotary = passage.keys, passage.setting.rotary
    raw = memory.keys.float()  # [B, H_kv, M, D]
    if offsets is not None:
        raw = rotary.shift(raw, -offsets)  # for comparison only
    owners = assign(raw, memory.mass, keys)  # [B, H_kv, E, M]
    added = owners.transpose(-1, -2)
    mass = memory.mass + owners.sum(dim=2)
    share = 1 / mass.clamp(min=1.0)[..., None]
    before = memory.mass[..., None] * share
    joined = added @ keys
    new_keys = (joined if offsets is None else rotary.shift(joined, offsets)) * share
    is_touched = owners.amax(dim=2) > 0
    newest = (passage.positions[..., None] * owners.long()).amax(dim=2)
    return SlotMemory(
        keys=(memory.keys.float() * before + new_keys).to(memory.keys.dtype),
        values=(memory.values.float() * before + added @ passage.values * share).to(
            memory.values.dtype
        ),
        positions=newest.where(is_touched, memory.positions),
        mass=mass,
    )


def assign(slots: Tensor, mass: Tensor, keys: Tensor) -> Tensor:
    """Which slot each token joins, one-hot: [B, H_kv, E, M] float32.

    Args:
        slots: [B, H_kv, M, D] keys of the slots before rotation.
        mass: [B, H_kv, M], zero where a slot is empty; full slots come first.
        keys: [B, H_kv, E, D] of the tokens before rotation, oldest first.
    """
    num_slots, num_tokens = slots.shape[2], keys.shape[2]
    num_filled = (mass > 0).sum(dim=-1, keepdim=True)  # [B, H_kv, 1]
    seed = num_filled + torch.arange(num_tokens, device=keys.device)  # [B, H_kv, E]
    founds = seed < num_slots
    founders = one_hot(seed.clamp(max=num_slots - 1), num_slots) * founds[..., None]
    founders = founders.to(keys.dtype)
    seeded = slots + founders.transpose(-1, -2) @ keys
    is_filled = (mass > 0) | (founders.amax(dim=2) > 0)
    answers = (keys @ seeded.transpose(-1, -2)).masked_fill(~is_filled[:, :, None], -torch.inf)
    winners = one_hot(answers.argmax(dim=-1), num_slots).to(keys.dtype)
    return torch.where(founds[..., None], founders, winners)
