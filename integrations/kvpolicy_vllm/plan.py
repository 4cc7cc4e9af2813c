"""Plans one forward: which rows are attended in place, which are walked, who evicts.

The plan is made once per step and shared by all layers. A row is attended in place by vLLM's
own kernel when no eviction falls inside its tokens: all decoding rows, and prompts of
policies without feedback up to the next eviction. Other rows are walked by the core's
look-ahead over a dense copy of their slots.

Axes: R rows, n blocks per row, T tokens of the batch.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kvpolicy import CachePolicy, EvictionPolicy
from kvpolicy_vllm.book import Account

NULL_BLOCK = 0
"""vLLM's placeholder block: rows of warm-up begin with it, and nobody reads it."""


@dataclass(frozen=True)
class Row:
    """One request's share of a forward.

    Attributes:
        index: Row of the batch.
        policy: Its policy.
        first_token: Index of its first token in the batch.
        num_tokens: Tokens in this forward.
        seen: Tokens processed before.
        account: Where to post what was evicted.
    """

    index: int
    policy: CachePolicy
    first_token: int
    num_tokens: int
    seen: int
    account: Account

    @property
    def last_token(self) -> int:
        """Index of its last token in the batch."""
        return self.first_token + self.num_tokens - 1

    @property
    def total(self) -> int:
        """Tokens processed after this forward."""
        return self.seen + self.num_tokens

    @property
    def visible(self) -> int:
        """Slots that the last token attends to."""
        return self.policy.occupancy.held(self.total - 1) + 1

    @property
    def is_due(self) -> bool:
        """Whether an eviction follows the last token."""
        return self.policy.occupancy.is_due(self.total)

    @property
    def fits_in_place(self) -> bool:
        """Whether vLLM's kernel can attend over the row's slots as they are."""
        policy, due = self.policy, self.policy.occupancy.next_due(self.seen)
        if due is not None and due < self.total:
            return False
        if not isinstance(policy, EvictionPolicy):
            return True
        if {"keys", "values"} & set(policy.needs) or policy.observes_every_token:
            return False
        if policy.rope == "reindex" and policy.occupancy.evicted(self.total - 1) > 0:
            return False
        return self.num_tokens == 1 or not policy.needs


@dataclass(frozen=True)
class InPlace:
    """Rows whose new tokens are appended to their slots and attended by vLLM's kernel.

    Attributes:
        rows: The rows, in batch order.
        tokens: [T'] indices of their tokens; None when they are the whole batch.
        slots: [T'] physical slot that receives each token.
        block: [T'] the slot's block.
        offset: [T'] the slot's offset within the block.
        positions: [T'] position of each token.
        query_start_loc: [R + 1] int32, as the kernel wants it.
        seq_lens: [R] int32 slots that the last token of each row attends to.
        block_table: [R, n] int32.
    """

    rows: list[Row]
    tokens: Tensor | None
    slots: Tensor
    block: Tensor
    offset: Tensor
    positions: Tensor
    query_start_loc: Tensor
    seq_lens: Tensor
    block_table: Tensor


@dataclass(frozen=True)
class Decision:
    """Rows of one policy, attended in place, that observe or evict in this forward.

    Attributes:
        policy: Their policy.
        rows: The rows.
        last_tokens: [R] index of each row's newest token in the batch.
        blocks: [R, n] blocks that hold visible slots.
        visible: [R] slots that the newest token attends to.
        totals: [R] tokens seen.
        due: Indices, among `rows`, of those that evict now.
    """

    policy: EvictionPolicy
    rows: list[Row]
    last_tokens: Tensor
    blocks: Tensor
    visible: Tensor
    totals: Tensor
    due: list[int]


@dataclass(frozen=True)
class Walk:
    """Rows of one policy that advance in lockstep over a dense copy of their slots.

    Attributes:
        policy: Their policy.
        rows: The rows, equal in tokens seen and in number of new tokens.
        tokens: [R, Q] indices of their tokens in the batch.
        blocks: [R, n] all blocks that they use.
    """

    policy: CachePolicy
    rows: list[Row]
    tokens: Tensor
    blocks: Tensor


@dataclass(frozen=True)
class Plan:
    """Everything about one forward that is the same in all layers."""

    num_tokens: int
    in_place: InPlace | None
    decisions: list[Decision]
    walks: list[Walk]


def make_plan(rows: list[Row], block_table: Tensor, block_size: int, num_tokens: int) -> Plan:
    """Sort the rows of a batch into what is done with them.

    Args:
        rows: Rows with at least one token, in batch order.
        block_table: [rows of the batch, n] int32 physical blocks.
        block_size: Slots of a block.
        num_tokens: Tokens of the batch.
    """
    staying = [row for row in rows if row.fits_in_place]
    walking = [row for row in rows if not row.fits_in_place]
    return Plan(
        num_tokens=num_tokens,
        in_place=_in_place(staying, block_table, block_size, num_tokens) if staying else None,
        decisions=_decisions(staying, block_table, block_size),
        walks=_walks(walking, block_table, block_size),
    )


def _in_place(rows: list[Row], block_table: Tensor, block_size: int, num_tokens: int) -> InPlace:
    counts = torch.tensor([row.num_tokens for row in rows])
    starts = torch.tensor([row.first_token for row in rows])
    seen = torch.tensor([row.seen for row in rows])
    held = torch.tensor([row.policy.occupancy.held(row.seen) for row in rows])
    table = block_table[torch.tensor([row.index for row in rows])]
    ends = counts.cumsum(0)
    owner = torch.repeat_interleave(torch.arange(len(rows)), counts)  # [T'] row of each token
    within = torch.arange(int(ends[-1])) - (ends - counts)[owner]
    slot = held[owner] + within
    tokens = starts[owner] + within
    block, offset = table[owner, slot // block_size].long(), slot % block_size
    return InPlace(
        rows=rows,
        tokens=None if len(tokens) == num_tokens else tokens,
        slots=block * block_size + offset,
        block=block,
        offset=offset,
        positions=(seen[owner] + within).int(),
        query_start_loc=torch.cat([torch.zeros(1, dtype=torch.int32), ends.int()]),
        seq_lens=(held + counts).int(),
        block_table=table,
    )


def _decisions(rows: list[Row], block_table: Tensor, block_size: int) -> list[Decision]:
    """Group rows by policy where something is observed or evicted."""
    groups: dict[EvictionPolicy, list[Row]] = {}
    for row in rows:
        policy = row.policy
        if isinstance(policy, EvictionPolicy) and ("accumulated" in policy.needs or row.is_due):
            groups.setdefault(policy, []).append(row)
    decisions: list[Decision] = []
    for policy, members in groups.items():
        visible = [row.visible for row in members]
        num_blocks = -(-max(visible) // block_size)
        index = torch.tensor([row.index for row in members])
        blocks = block_table[index, :num_blocks].long()
        own = torch.tensor([-(-count // block_size) for count in visible])
        # Entries past a row's own blocks may be another request's: write to the null block.
        blocks[torch.arange(num_blocks) >= own[:, None]] = NULL_BLOCK
        decisions.append(
            Decision(
                policy=policy,
                rows=members,
                last_tokens=torch.tensor([row.last_token for row in members]),
                blocks=blocks,
                visible=torch.tensor(visible),
                totals=torch.tensor([row.total for row in members]),
                due=[i for i, row in enumerate(members) if row.is_due],
            )
        )
    return decisions


def _walks(rows: list[Row], block_table: Tensor, block_size: int) -> list[Walk]:
    """Group rows that are equal in policy, tokens seen and new tokens."""
    groups: dict[tuple[CachePolicy, int, int], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.policy, row.seen, row.num_tokens), []).append(row)
    walks: list[Walk] = []
    for (policy, seen, count), members in groups.items():
        num_blocks = policy.occupancy.num_blocks(seen + count, block_size)
        index = torch.tensor([row.index for row in members])
        first = torch.tensor([row.first_token for row in members])
        walks.append(
            Walk(
                policy=policy,
                rows=members,
                tokens=first[:, None] + torch.arange(count),
                blocks=block_table[index, :num_blocks].long(),
            )
        )
    return walks
