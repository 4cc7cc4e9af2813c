"""What a plan is made of: rows of one forward by what is done with them.

Axes: R rows, n blocks per row, T tokens of the batch.
"""

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Self

import torch
from torch import Tensor

from kvpolicy import CachePolicy, EvictionPolicy
from kvpolicy.memory.policy import MemoryPolicy
from kvpolicy_vllm.allotment import Allotment
from kvpolicy_vllm.pages import Moves
from kvpolicy_vllm.rows import Row

NULL_BLOCK = 0
"""vLLM's placeholder block: rows of warm-up begin with it, and nobody reads it."""

MAX_READ = 1 << 14
"""Slots of rows whose keys and values are copied together, to be read."""


@dataclass(frozen=True)
class Placement:
    """New tokens that are appended to the slots of their rows.

    Attributes:
        tokens: [T'] indices of the tokens in the batch; None when they are the whole batch.
        slots: [T'] physical slot that receives each token.
        block: [T'] the slot's block.
        offset: [T'] the slot's offset within the block.
        fresh: [T', 2, 1] the slot's policy state.
    """

    tokens: Tensor | None
    slots: Tensor
    block: Tensor
    offset: Tensor
    fresh: Tensor


@dataclass(frozen=True)
class InPlace:
    """Rows whose new tokens are attended by vLLM's kernel.

    Attributes:
        rows: The rows, in batch order.
        tokens: [T'] indices of their tokens; None when they are the whole batch.
        query_start_loc: [R + 1] int32, as the kernel wants it.
        seq_lens: [R] int32 slots that the last token of each row attends to.
        block_table: [R, n] int32, from the first block with tokens on.
    """

    rows: list[Row]
    tokens: Tensor | None
    query_start_loc: Tensor
    seq_lens: Tensor
    block_table: Tensor


@dataclass
class Eviction:
    """Rows of a decision that evict now, and show and drop equally many slots.

    Attributes:
        rows: The rows.
        index: [R'] their places among the decision's rows.
        blocks: [R', n] blocks that hold visible slots.
        visible: [R'] slots that the newest token attends to, all equal.
        totals: [R'] tokens seen.
        moves: What all layers move, if the policy keeps the first and the newest tokens wherever
            it is asked; None until the first layer has been.
    """

    rows: list[Row]
    index: Tensor
    blocks: Tensor
    visible: Tensor
    totals: Tensor
    moves: Moves | None = None

    @property
    def capacity(self) -> int:
        """Slots that each row shows."""
        return self.rows[0].visible

    @property
    def surplus(self) -> int:
        """Slots that each row drops per KV head."""
        return self.rows[0].surplus

    @property
    def prompts(self) -> list[int]:
        """Tokens of each row's prompt if that is kept."""
        return [row.allotment.kept for row in self.rows]


@dataclass(frozen=True)
class Observation:
    """Rows of one policy, attended in place, whose newest token's attention counts.

    Attributes:
        policy: Their policy; that of a layer once `of_layer` has been asked.
        rows: The rows.
        last_tokens: [R] index of each row's newest token in the batch.
        blocks: [R, n] blocks that hold visible slots.
        visible: [R] slots that the newest token attends to.
        written: Like `blocks`, but for those that hold nothing but a prompt that is kept: they
            may be shared, and the null block stands for them.
    """

    policy: CachePolicy
    rows: list[Row]
    last_tokens: Tensor
    blocks: Tensor
    visible: Tensor
    written: Tensor
    _of_members: dict[CachePolicy, Self] = field(init=False, default_factory=dict)

    def of_layer(self, layer: int) -> Self:
        """The same rows under the policy that rules a layer; layers of one policy share it."""
        member = self.policy.of_layer(layer)
        if member is self.policy:
            return self
        if member not in self._of_members:
            self._of_members[member] = replace(self, policy=member)
        return self._of_members[member]

    @property
    def eviction(self) -> EvictionPolicy:
        """The policy of a layer."""
        assert isinstance(self.policy, EvictionPolicy), "others decide nothing"
        return self.policy

    @cached_property
    def fading(self) -> Tensor:
        """Factor on each row's statistic as it was before the newest token; [R] float32."""
        rule = self.eviction.accumulation
        if rule.window is None:
            return torch.full((len(self.rows),), rule.decay)
        ages = torch.tensor([row.law.window_age(row.total, rule.window) for row in self.rows])
        return rule.decay * (ages > 1)

    @cached_property
    def gain(self) -> Tensor:
        """Factor on each newest token's weights before they are added; [R] float32."""
        is_relative = self.eviction.accumulation.relative
        return self.visible.float() if is_relative else torch.ones(len(self.rows))

    @cached_property
    def terms(self) -> list[tuple[int, float, float]]:
        """What each row's newest token sees, its fading and its gain."""
        columns = self.visible.tolist(), self.fading.tolist(), self.gain.tolist()
        return list(zip(*columns, strict=True))


@dataclass(frozen=True)
class Decision(Observation):
    """Such rows that evict now, whether their newest token's attention counts or not."""

    @cached_property
    def evictions(self) -> list[Eviction]:
        """The rows, no more at once than may have their keys or values copied."""
        groups: dict[tuple[int, int], list[int]] = {}
        for index, row in enumerate(self.rows):
            groups.setdefault((row.visible, row.surplus), []).append(index)
        reads = {"keys", "values"} & set(self.policy.needs)
        parts: list[Eviction] = []
        for (visible, _), members in groups.items():
            step = max(1, MAX_READ // visible) if reads else len(members)
            chunks = (members[first : first + step] for first in range(0, len(members), step))
            parts += [self._eviction(chunk) for chunk in chunks]
        return parts

    def _eviction(self, members: list[int]) -> Eviction:
        index = torch.tensor(members)
        rows = [self.rows[each] for each in members]
        return Eviction(
            rows=rows,
            index=index,
            blocks=self.blocks[index],
            visible=self.visible[index],
            totals=torch.tensor([row.total for row in rows]),
        )


@dataclass(frozen=True)
class Recollection:
    """Rows of one policy whose newest token reads their memory.

    Attributes:
        policy: Their policy.
        rows: The rows, one new token each.
        tokens: [R] index of each row's token in the batch.
        blocks: [R, n] blocks of the memory and of visible slots.
        allotment: What their blocks hold.
        visible: [R] token slots that the token attends to.
        seen: [R] tokens seen before it, which is its position.
    """

    policy: MemoryPolicy
    rows: list[Row]
    tokens: Tensor
    blocks: Tensor
    allotment: Allotment
    visible: Tensor
    seen: Tensor


@dataclass(frozen=True)
class Walk:
    """Rows of one policy that advance in lockstep over a dense copy of their slots.

    Attributes:
        policy: Their policy.
        rows: The rows, equal in allotment, in tokens seen and in number of new tokens.
        tokens: [R, Q] indices of their tokens in the batch.
        blocks: [R, n] all blocks that they use.
    """

    policy: CachePolicy
    rows: list[Row]
    tokens: Tensor
    blocks: Tensor

    @property
    def token_blocks(self) -> Tensor:
        """Those with cells of the cache, memory slots among them: no blocks of numbers."""
        return self.blocks[:, self.rows[0].allotment.state_blocks :]


Part = Decision | Observation | Recollection | Walk
"""Rows of one policy that is asked about them."""


def without_prompts(rows: list[Row], blocks: Tensor, block_size: int) -> Tensor:
    """Blocks [R, n] with the null block for those that only hold a prompt that is kept."""
    shared = torch.tensor([row.allotment.kept // block_size for row in rows])
    if not bool(shared.any()):
        return blocks
    return blocks.where(torch.arange(blocks.shape[1]) >= shared[:, None], NULL_BLOCK)
