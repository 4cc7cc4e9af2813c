"""Dense slot storage: the state of requests in one layer, owned by a host.

Axes: B rows, H_kv KV heads, C slots of capacity, D head dimension.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from kvpolicy.memory.state import Memory
from kvpolicy.occupancy import Occupancy

_GROWTH = 64
"""Slots by which storage grows while a policy's capacity is not reached yet."""


@dataclass
class Slots:
    """Keys, values and per-slot policy state of B requests in one layer.

    Slot s of row b is held when s < held(tokens[b]) by the row's own law, which its prompt
    settles; all KV heads of a row hold equally many.

    Attributes:
        keys: [B, H_kv, C, D], as the host cached them.
        values: [B, H_kv, C, D].
        positions: [B, H_kv, C] int64, number of real tokens before the slot's token.
        accumulated: [B, H_kv, C] float32, the policy's statistic of the slot.
        tokens: Tokens seen, per row.
        evicted: Tokens dropped so far, per row, counted where storage lets go of them.
        prompts: Tokens of each row's prompt, for laws that set prompts apart; 0 where a row
            has none and all its tokens stream.
        memory: What the policy keeps beside tokens; None if nothing.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor
    accumulated: Tensor
    tokens: list[int]
    evicted: list[int] = field(default_factory=list)
    prompts: list[int] = field(default_factory=list)
    memory: Memory | None = None

    def __post_init__(self) -> None:
        """Count from zero unless told otherwise."""
        self.evicted = self.evicted or [0] * len(self.tokens)
        self.prompts = self.prompts or [0] * len(self.tokens)

    @classmethod
    def empty(cls, like_keys: Tensor, like_values: Tensor) -> "Slots":
        """Storage without slots for the rows, heads, dtype and device of new K/V."""
        batch, kv_heads = like_keys.shape[:2]
        return cls(
            keys=like_keys.new_empty(batch, kv_heads, 0, like_keys.shape[-1]),
            values=like_values.new_empty(batch, kv_heads, 0, like_values.shape[-1]),
            positions=torch.empty(batch, kv_heads, 0, dtype=torch.int64, device=like_keys.device),
            accumulated=torch.empty(
                batch, kv_heads, 0, dtype=torch.float32, device=like_keys.device
            ),
            tokens=[0] * batch,
        )

    @property
    def capacity(self) -> int:
        """Slots that storage has room for."""
        return self.positions.shape[-1]

    @property
    def num_bytes(self) -> int:
        """Bytes of storage, per-slot policy state and memory included."""
        tensors = (self.keys, self.values, self.positions, self.accumulated)
        beside = 0 if self.memory is None else self.memory.num_bytes
        return beside + sum(t.numel() * t.element_size() for t in tensors)

    def laws(self, occupancy: Occupancy) -> list[Occupancy]:
        """Each row's law, settled by its prompt."""
        return [occupancy.of_prompt(prompt) for prompt in self.prompts]

    def limit(self, occupancy: Occupancy) -> int | None:
        """Most slots that a row will occupy from now on; None when unbounded."""
        limits = [law.limit(n) for law, n in zip(self.laws(occupancy), self.tokens, strict=True)]
        return max((limit for limit in limits if limit is not None), default=None)

    def reserve(self, num_slots: int, limit: int | None) -> None:
        """Make room for `num_slots` slots per row, growing in steps up to `limit`."""
        if num_slots <= self.capacity:
            return
        room = max(num_slots, self.capacity + max(_GROWTH, self.capacity // 4))
        extra = (room if limit is None else max(num_slots, min(room, limit))) - self.capacity
        self.keys = _widen(self.keys, extra)
        self.values = _widen(self.values, extra)
        self.positions = _widen(self.positions, extra)
        self.accumulated = _widen(self.accumulated, extra)

    def rows(self, rows: list[int], num_slots: int) -> "Slots":
        """Copy of some rows' first `num_slots` slots."""
        index = torch.tensor(rows, device=self.keys.device)
        return Slots(
            keys=self.keys[index, :, :num_slots],
            values=self.values[index, :, :num_slots],
            positions=self.positions[index, :, :num_slots],
            accumulated=self.accumulated[index, :, :num_slots],
            tokens=[self.tokens[row] for row in rows],
            evicted=[self.evicted[row] for row in rows],
            prompts=[self.prompts[row] for row in rows],
            memory=None if self.memory is None else self.memory.rows(index),
        )

    def put_rows(self, rows: list[int], part: "Slots", occupancy: Occupancy) -> None:
        """Write back rows taken with `rows`, whatever number of slots they now have.

        Storage that only a prompt needed is given back once no row is within its prompt.
        """
        for row, *counts in zip(rows, part.tokens, part.evicted, part.prompts, strict=True):
            self.tokens[row], self.evicted[row], self.prompts[row] = counts
        limit = self.limit(occupancy)
        self.reserve(part.capacity, limit)
        every_row = rows == list(range(len(self.tokens)))
        index = slice(None) if every_row else torch.tensor(rows, device=self.keys.device)
        for name in ("keys", "values", "positions", "accumulated"):
            getattr(self, name)[index, :, : part.capacity] = getattr(part, name)
        if self.memory is not None and part.memory is not None:
            self.memory.put_rows(index, part.memory)
        if occupancy.prompts != "stream" and limit is not None and self.capacity > limit:
            for name in ("keys", "values", "positions", "accumulated"):
                setattr(self, name, getattr(self, name)[:, :, :limit].clone())

    def append(self, keys: Tensor, values: Tensor, occupancy: Occupancy) -> list[int]:
        """Write one token per row, [B, H_kv, D], into its next slot; return the slots.

        `tokens` is left to the caller, who counts the token once it was attended.
        """
        laws = zip(self.laws(occupancy), self.tokens, strict=True)
        slots = [law.held(n) for law, n in laws]
        self.reserve(max(slots) + 1, self.limit(occupancy))
        device = self.keys.device
        if len(set(slots)) == 1:
            row, slot = slice(None), slots[0]  # a plain copy, several times as fast
        else:
            row, slot = torch.arange(len(slots), device=device), torch.tensor(slots, device=device)
        self.keys[row, :, slot] = keys
        self.values[row, :, slot] = values
        positions = torch.tensor(self.tokens, device=device)
        self.positions[row, :, slot] = positions[:, None].expand(-1, keys.shape[1])
        self.accumulated[row, :, slot] = 0.0
        return slots

    def keep(self, kept: Tensor) -> "Slots":
        """New storage with the slots of `kept`, [B, H_kv, kept] indices, in that order."""
        index = kept[..., None]
        return Slots(
            keys=self.keys.gather(2, index.expand(-1, -1, -1, self.keys.shape[-1])),
            values=self.values.gather(2, index.expand(-1, -1, -1, self.values.shape[-1])),
            positions=self.positions.gather(2, kept),
            accumulated=self.accumulated.gather(2, kept),
            tokens=list(self.tokens),
            evicted=[count + self.capacity - kept.shape[-1] for count in self.evicted],
            prompts=list(self.prompts),
            memory=self.memory,
        )


def survivors(victims: Tensor, held: int, surplus: int) -> Tensor:
    """Indices of the slots that stay, in slot order; [B, H_kv, held - surplus] int64.

    Args:
        victims: [B, H_kv, S] bool with exactly `surplus` marks among the first `held` slots.
        held: Slots held before the eviction.
        surplus: Slots that go.
    """
    order = victims[..., :held].to(torch.uint8).argsort(dim=-1, stable=True)
    return order[..., : held - surplus]


def _widen(x: Tensor, extra: int) -> Tensor:
    wide = x.new_empty(*x.shape[:2], x.shape[2] + extra, *x.shape[3:])
    wide[:, :, : x.shape[2]] = x
    return wide
