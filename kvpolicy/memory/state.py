"""What a memory is made of, what it is asked, and what it takes in.

A memory stands beside the token slots of a request's layer. Memory slots are attended like
tokens, at a position and with a logit bias of their own; other memories answer by themselves
and are mixed in. Memories are values: absorbing makes a new one, so that a host which fails
halfway still holds the old one.

Axes: B rows, H query heads, H_kv KV heads, G query heads per KV head, Q queries, S token slots,
M memory slots, E evicted tokens, D head dimension.
"""

from dataclasses import dataclass, fields
from typing import NamedTuple, Self

import torch
from torch import Tensor

from kvpolicy.memory.decoder import Decoder
from kvpolicy.rotary import Rotary


@dataclass(frozen=True)
class Shape:
    """What the memory of some rows has to fit.

    Attributes:
        rows: B.
        kv_heads: H_kv.
        group: G.
        head_dim: D of keys.
        value_dim: D of values.
        dtype: Of the cache's keys and values.
        device: Where they lie.
    """

    rows: int
    kv_heads: int
    group: int
    head_dim: int
    value_dim: int
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, q: Tensor, k: Tensor, v: Tensor) -> "Shape":
        """Read it from queries [B, H, ..., D], keys and values [B, H_kv, ..., D]."""
        return cls(
            rows=k.shape[0],
            kv_heads=k.shape[1],
            group=q.shape[1] // k.shape[1],
            head_dim=k.shape[-1],
            value_dim=v.shape[-1],
            dtype=k.dtype,
            device=k.device,
        )


@dataclass(frozen=True)
class Setting:
    """The attention layer in which a memory stands.

    Attributes:
        layer: Its index in the model.
        scale: Factor on query-key products.
        rotary: The model's rotation.
        first_kv_head: Index in the whole model of the first KV head here.
        decoder: The layer's weights; None where the host has none or no policy asked for them.
        ranks: Processes over which the layer's heads are spread.
    """

    layer: int
    scale: float
    rotary: Rotary
    first_kv_head: int
    decoder: Decoder | None
    ranks: int = 1


@dataclass(frozen=True)
class Memory:
    """State of B rows in one layer; subclasses hold tensors, rows first."""

    def tensors(self) -> list[Tensor]:
        """The tensors, in the order of the fields."""
        return [getattr(self, item.name) for item in fields(self)]

    def rows(self, index: Tensor) -> Self:
        """Copy of some rows."""
        return type(self)(*(x[index] for x in self.tensors()))

    def put_rows(self, index: "Tensor | slice", part: Self) -> None:
        """Write rows back in place, as taken with `rows`."""
        for whole, rows in zip(self.tensors(), part.tensors(), strict=True):
            whole[index] = rows

    @property
    def num_bytes(self) -> int:
        """Bytes of all rows."""
        return sum(x.numel() * x.element_size() for x in self.tensors())


@dataclass(frozen=True)
class SlotMemory(Memory):
    """M memory slots: cells of the cache that no single token owns.

    Attributes:
        keys: [B, H_kv, M, D] in the cache's dtype, in the frame that the policy says.
        values: [B, H_kv, M, D] in the cache's dtype.
        positions: [B, H_kv, M] int64, newest position that a slot stands for.
        mass: [B, H_kv, M] float32, how many tokens a slot counts for; 0 means empty.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor
    mass: Tensor

    @classmethod
    def empty(cls, shape: Shape, num_slots: int) -> "SlotMemory":
        """Slots without content."""
        size, device = (shape.rows, shape.kv_heads, num_slots), shape.device
        return cls(
            keys=torch.zeros(*size, shape.head_dim, dtype=shape.dtype, device=device),
            values=torch.zeros(*size, shape.value_dim, dtype=shape.dtype, device=device),
            positions=torch.zeros(size, dtype=torch.int64, device=device),
            mass=torch.zeros(size, dtype=torch.float32, device=device),
        )


def slots_of(memory: Memory) -> SlotMemory:
    """The memory as slots, for policies that made it so."""
    assert isinstance(memory, SlotMemory), "made by new_memory"
    return memory


@dataclass(frozen=True)
class Passage:
    """Tokens that a memory takes in together, oldest first, and the newest token of the text.

    Attributes:
        rotated_keys: [B, H_kv, E, D] float32 as cached: rotated at their positions.
        values: [B, H_kv, E, D] float32.
        positions: [B, H_kv, E] int64, ascending.
        accumulated: [B, H_kv, E] float32, the statistic kept with each slot.
        n: [B, 1, 1] int64, tokens seen so far.
        query: [B, H_kv, G, D] float32, the newest token's, rotated.
        lse: [B, H_kv, G] float32, log-sum-exp of its logits over all it attended to.
        setting: The layer.
    """

    rotated_keys: Tensor
    values: Tensor
    positions: Tensor
    accumulated: Tensor
    n: Tensor
    query: Tensor
    lse: Tensor
    setting: Setting

    @property
    def keys(self) -> Tensor:
        """Keys before rotation, [B, H_kv, E, D] float32."""
        return self.setting.rotary.shift(self.rotated_keys, -self.positions)

    @property
    def raw_query(self) -> Tensor:
        """The query before rotation, [B, H_kv, G, D]."""
        return self.setting.rotary.shift(self.query, 1 - self.n)

    def logits(self, keys: Tensor) -> Tensor:
        """The newest token's logits over rotated keys [B, H_kv, X, D]; [B, H_kv, G, X]."""
        return self.query * self.setting.scale @ keys.transpose(-1, -2)


@dataclass(frozen=True)
class Question:
    """Queries of rows, and what they see of the tokens that were retained.

    Attributes:
        q: [B, H, Q, D] float32, rotated, not scaled.
        positions: [Q] or [B, 1, Q] int64, of the queries.
        evicted: [Q] or [B, 1, Q] int64, tokens evicted before each query.
        logits: [B, H_kv, G, Q, S] float32 over token slots, -inf where one is not seen.
        values: [B, H_kv, S, D] of the token slots.
        setting: The layer.
    """

    q: Tensor
    positions: Tensor
    evicted: Tensor
    logits: Tensor
    values: Tensor
    setting: Setting


class Attended(NamedTuple):
    """The answer to a question.

    Attributes:
        output: [B, H, Q, D] float32.
        weights: [B, H_kv, G, Q, S] float32, of the token slots; a memory's own are left out.
        lse: [B, H_kv, G, Q] float32, log-sum-exp over all that was attended to.
    """

    output: Tensor
    weights: Tensor
    lse: Tensor
