"""Plans one forward: which rows are attended in place, which are walked, who evicts.

The plan is made once per step and shared by all layers. A row is attended in place by vLLM's
own kernel when no eviction falls inside its tokens and no weights but the newest token's
matter: all decoding rows, and prompts up to the next eviction where nothing accumulates. Other
rows are walked by the core's look-ahead over a dense copy of their slots.

Rows with a memory are walked wherever the memory changes, and over prompts. Between two
evictions a decoding row only reads it: memory slots in one softmax with the tokens, without
vLLM's kernel, and a memory of numbers after that kernel.

Axes: R rows, n blocks per row, T tokens of the batch.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from kvpolicy import CachePolicy
from kvpolicy.memory.policy import MemoryPolicy
from kvpolicy_vllm.allotment import Allotment
from kvpolicy_vllm.pages import fresh_state
from kvpolicy_vllm.parts import (
    MAX_READ,
    NULL_BLOCK,
    Decision,
    InPlace,
    Observation,
    Part,
    Placement,
    Recollection,
    Walk,
    without_prompts,
)
from kvpolicy_vllm.rows import Row

_Kind = TypeVar("_Kind", bound=Observation)


@dataclass(frozen=True)
class Plan:
    """Everything about one forward that is the same in all layers.

    Attributes:
        num_tokens: Tokens of the batch.
        entered: [X] blocks that rows use for the first time.
        placement: Tokens of rows whose slots stay as they are.
        in_place: Those of them that vLLM's kernel attends.
        decisions: Rows attended in place that evict.
        observations: Rows attended in place that observe, and evict nothing.
        recollections: Rows that read a memory.
        walks: All other rows.
    """

    num_tokens: int
    entered: Tensor
    placement: Placement | None
    in_place: InPlace | None
    decisions: list[Decision]
    observations: list[Observation]
    recollections: list[Recollection]
    walks: list[Walk]

    @property
    def parts(self) -> list[Part]:
        """What asks policies: rows of one policy each."""
        return [*self.decisions, *self.observations, *self.recollections, *self.walks]


def make_plan(rows: list[Row], block_table: Tensor, block_size: int, num_tokens: int) -> Plan:
    """Sort the rows of a batch into what is done with them.

    Args:
        rows: Rows with at least one token, in batch order.
        block_table: [rows of the batch, n] int32 physical blocks.
        block_size: Slots of a block.
        num_tokens: Tokens of the batch.
    """
    rows = [part for row in rows for part in _apart(row)]
    staying: list[Row] = []
    walking: list[Row] = []
    for row in rows:
        (staying if row.stays_in_place else walking).append(row)
    attending = [row for row in staying if not row.has_slot_memory]
    new = _new_tokens(staying, num_tokens)
    attended = new if len(attending) == len(staying) else _new_tokens(attending, num_tokens)
    return Plan(
        num_tokens=num_tokens,
        entered=_entered(rows, block_table, block_size),
        placement=_placement(staying, new, block_table, block_size) if staying else None,
        in_place=_in_place(attending, attended, block_table) if attending else None,
        decisions=_decisions(attending, block_table, block_size),
        observations=_observations(attending, block_table, block_size),
        recollections=_recollections(staying, block_table, block_size),
        walks=_walks(walking, block_table, block_size),
    )


def _apart(row: Row) -> list[Row]:
    """A row in two where it goes past a prompt that is kept.

    Blocks of the prompt may be read by other rows of the same forward, which find them in the
    prefix cache, so that its tokens are placed before anything is attended.
    """
    count = row.allotment.kept - row.seen
    if not 0 < count < row.num_tokens:
        return [row]
    return [
        replace(row, num_tokens=count),
        replace(
            row,
            first_token=row.first_token + count,
            num_tokens=row.num_tokens - count,
            seen=row.seen + count,
        ),
    ]


def _entered(rows: list[Row], block_table: Tensor, block_size: int) -> Tensor:
    """Blocks [X] of the rows' memories and tokens that they did not use before."""
    parts = [block_table.new_empty(0)]
    for row in rows:
        before = row.law.num_blocks(row.seen, block_size) if row.seen else 0
        after = row.law.num_blocks(row.total, block_size)
        if before < after:
            parts.append(block_table[row.index, before:after])
    return torch.cat(parts).long()


class NewTokens(NamedTuple):
    """The tokens of some rows, T' of them.

    Attributes:
        rows: [R] rows of the batch.
        ends: [R] tokens up to the end of each row.
        owner: [T'] which of the rows a token belongs to.
        within: [T'] its place among the row's tokens.
        tokens: [T'] its index in the batch; None when they are the whole batch.
    """

    rows: Tensor
    ends: Tensor
    owner: Tensor
    within: Tensor
    tokens: Tensor | None


def _new_tokens(rows: list[Row], num_tokens: int) -> NewTokens:
    """Lay out the tokens of rows in a batch of `num_tokens`."""
    table = [(row.index, row.first_token, row.num_tokens) for row in rows]
    index, starts, counts = torch.tensor(table, dtype=torch.int64).view(-1, 3).unbind(1)
    ends = counts.cumsum(0)
    owner = torch.repeat_interleave(counts)
    within = torch.arange(len(owner)) - (ends - counts)[owner]
    is_whole = len(owner) == num_tokens
    return NewTokens(index, ends, owner, within, None if is_whole else starts[owner] + within)


def _placement(rows: list[Row], new: NewTokens, block_table: Tensor, block_size: int) -> Placement:
    """Where the rows' tokens go: behind their memory and the slots they hold."""
    table = [(row.seen, row.law.state_slots + row.law.held(row.seen)) for row in rows]
    seen, first = torch.tensor(table).unbind(1)
    slot = first[new.owner] + new.within
    block, offset = block_table[new.rows[new.owner], slot // block_size].long(), slot % block_size
    return Placement(
        tokens=new.tokens,
        slots=block * block_size + offset,
        block=block,
        offset=offset,
        fresh=fresh_state(seen[new.owner] + new.within),
    )


def _in_place(rows: list[Row], new: NewTokens, block_table: Tensor) -> InPlace:
    table = [(row.visible, row.allotment.state_blocks) for row in rows]
    visible, behind = torch.tensor(table, dtype=torch.int32).unbind(1)
    return InPlace(
        rows=rows,
        tokens=new.tokens,
        query_start_loc=pad(new.ends.int(), (1, 0)),
        seq_lens=visible.contiguous(),
        block_table=_shifted(block_table[new.rows], behind),
    )


def _shifted(table: Tensor, count: Tensor) -> Tensor:
    """Block table [R, n] without the first `count` [R] blocks of each row."""
    if not bool(count.any()):
        return table
    columns = torch.arange(table.shape[1]) + count[:, None]
    return table.gather(1, columns.clamp(max=table.shape[1] - 1))


def _decisions(rows: list[Row], block_table: Tensor, block_size: int) -> list[Decision]:
    """Group rows by policy where something is evicted."""
    due = [row for row in rows if row.is_due]
    return _by_policy(Decision, due, block_table, block_size)


def _observations(rows: list[Row], block_table: Tensor, block_size: int) -> list[Observation]:
    """Group rows by policy where something is observed and nothing evicted."""
    observing = [row for row in rows if row.observes and not row.is_due]
    return _by_policy(Observation, observing, block_table, block_size)


def _by_policy(
    kind: type[_Kind], rows: list[Row], block_table: Tensor, block_size: int
) -> list[_Kind]:
    """Parts of a kind, one for each policy that evicts; rows inside a kept prompt have none."""
    groups: dict[CachePolicy, list[Row]] = {}
    for row in rows:
        policy = row.policy
        if policy.evicts and not row.is_kept:
            groups.setdefault(policy, []).append(row)
    parts: list[_Kind] = []
    for policy, members in groups.items():
        blocks = _own_blocks(members, block_table, block_size)
        parts.append(
            kind(
                policy=policy,
                rows=members,
                last_tokens=torch.tensor([row.last_token for row in members]),
                blocks=blocks,
                visible=torch.tensor([row.visible for row in members]),
                written=without_prompts(members, blocks, block_size),
            )
        )
    return parts


def _recollections(rows: list[Row], block_table: Tensor, block_size: int) -> list[Recollection]:
    """Group rows by policy where a memory is read."""
    groups: dict[MemoryPolicy, list[Row]] = {}
    for row in rows:
        policy = row.memory
        # Numbers of a row that nothing was evicted of are no answer yet.
        if policy is not None and (row.has_slot_memory or row.law.evicted(row.seen) > 0):
            groups.setdefault(policy, []).append(row)
    parts: list[Recollection] = []
    for policy, members in groups.items():
        most = max(row.law.state_slots + row.visible for row in members)
        step = max(1, MAX_READ // most)
        chunks = (members[first : first + step] for first in range(0, len(members), step))
        parts += [_recollection(policy, rows, block_table, block_size) for rows in chunks]
    return parts


def _recollection(
    policy: MemoryPolicy, rows: list[Row], block_table: Tensor, block_size: int
) -> Recollection:
    return Recollection(
        policy=policy,
        rows=rows,
        tokens=torch.tensor([row.last_token for row in rows]),
        blocks=_own_blocks(rows, block_table, block_size),
        allotment=rows[0].allotment,
        visible=torch.tensor([row.visible for row in rows]),
        seen=torch.tensor([row.seen for row in rows]),
    )


def _own_blocks(rows: list[Row], block_table: Tensor, block_size: int) -> Tensor:
    """Blocks [R, n] of the rows' memories and visible slots, then the null block."""
    counts = [-(-(row.law.state_slots + row.visible) // block_size) for row in rows]
    index = torch.tensor([row.index for row in rows])
    blocks = block_table[index, : max(counts)].long()
    # Entries past a row's own blocks may be another request's: write to the null block.
    blocks[torch.arange(max(counts)) >= torch.tensor(counts)[:, None]] = NULL_BLOCK
    return blocks


def _walks(rows: list[Row], block_table: Tensor, block_size: int) -> list[Walk]:
    """Group rows that are equal in policy, allotment, tokens seen and new tokens."""
    groups: dict[tuple[CachePolicy, Allotment, int, int], list[Row]] = {}
    for row in rows:
        key = (row.policy, row.allotment, row.seen, row.num_tokens)
        groups.setdefault(key, []).append(row)
    walks: list[Walk] = []
    for (policy, allotment, seen, count), members in groups.items():
        # A prompt that ends within the tokens leaves more blocks behind than it needs.
        num_blocks = max(allotment.law.num_blocks(n, block_size) for n in (seen, seen + count))
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
