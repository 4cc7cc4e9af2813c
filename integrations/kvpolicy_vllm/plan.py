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

import torch
from torch import Tensor

from kvpolicy import CachePolicy, EvictionPolicy, Occupancy
from kvpolicy.memory.policy import MemoryPolicy, SlotMemoryPolicy
from kvpolicy.policies.infini import Infini
from kvpolicy_vllm.allotment import Allotment, memory_policy
from kvpolicy_vllm.book import Account
from kvpolicy_vllm.pages import fresh_state

MAX_READ = 1 << 14
"""Slots of rows whose keys and values are copied together, to be read."""

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
    def allotment(self) -> Allotment:
        """What its blocks hold."""
        return self.account.allotment

    @property
    def law(self) -> Occupancy:
        """The occupancy law of its blocks."""
        return self.allotment.law

    @property
    def is_kept(self) -> bool:
        """Whether all of its tokens are of a prompt that is never evicted from."""
        return self.total <= self.allotment.kept

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
        """Token slots that the last token attends to."""
        return self.law.held(self.total - 1) + 1

    @property
    def surplus(self) -> int:
        """Token slots that an eviction drops after the last token; 0 if none is due."""
        return self.law.surplus(self.total)

    @property
    def is_due(self) -> bool:
        """Whether an eviction follows the last token."""
        return self.surplus > 0

    @property
    def memory(self) -> MemoryPolicy | None:
        """Its policy if that keeps a memory."""
        return memory_policy(self.policy)

    @property
    def stays_in_place(self) -> bool:
        """Whether the row's slots stay as they are, but for those of its new tokens."""
        if self.is_kept:
            return True
        policy, due = self.policy, self.law.next_due(self.seen)
        if due is not None and due < self.total:
            return False
        if not isinstance(policy, EvictionPolicy):
            return True
        if policy.observes_every_token:
            return False
        if policy.rope == "reindex" and self.law.evicted(self.total - 1) > 0:
            return False
        if self.memory is not None:
            return self._only_reads(self.memory)
        return self.num_tokens == 1 or "accumulated" not in policy.needs

    def _only_reads(self, memory: MemoryPolicy) -> bool:
        """Whether the row reads a memory that was written before and does not change."""
        if self.num_tokens > 1 or self.seen == 0 or self.is_due:
            return False
        if self._is_boundary(memory):
            return False
        if isinstance(memory, SlotMemoryPolicy):
            return True
        # Other ways of reading are walked: here they are taken apart, around vLLM's kernel.
        return type(memory).attend is Infini.attend and not memory.needs

    def _is_boundary(self, memory: MemoryPolicy) -> bool:
        """Whether the policy rewrites its memory after the last token."""
        try:
            return memory.next_boundary(self.seen) == self.total
        except Exception:  # fails again where the row is walked, and is contained there
            return True

    @property
    def has_slot_memory(self) -> bool:
        """Whether memory slots are attended in one softmax with its tokens."""
        return self.allotment.cells > 0


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
        due: Indices, among `rows`, of those that evict now, by slots visible and to be dropped.
        written: Like `blocks`, but for those that hold nothing but a prompt that is kept: they
            may be shared, and the null block stands for them.
    """

    policy: EvictionPolicy
    rows: list[Row]
    last_tokens: Tensor
    blocks: Tensor
    visible: Tensor
    totals: Tensor
    due: list[list[int]]
    written: Tensor

    @property
    def prompts(self) -> list[int]:
        """Tokens of each row's prompt if that is kept."""
        return [row.allotment.kept for row in self.rows]


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


@dataclass(frozen=True)
class Plan:
    """Everything about one forward that is the same in all layers.

    Attributes:
        num_tokens: Tokens of the batch.
        entered: [X] blocks that rows use for the first time.
        placement: Tokens of rows whose slots stay as they are.
        in_place: Those of them that vLLM's kernel attends.
        decisions: Rows attended in place that observe or evict.
        recollections: Rows that read a memory.
        walks: All other rows.
    """

    num_tokens: int
    entered: Tensor
    placement: Placement | None
    in_place: InPlace | None
    decisions: list[Decision]
    recollections: list[Recollection]
    walks: list[Walk]

    @property
    def parts(self) -> list[Decision | Recollection | Walk]:
        """What asks policies: rows of one policy each."""
        return [*self.decisions, *self.recollections, *self.walks]


def make_plan(rows: list[Row], block_table: Tensor, block_size: int, num_tokens: int) -> Plan:
    """Sort the rows of a batch into what is done with them.

    Args:
        rows: Rows with at least one token, in batch order.
        block_table: [rows of the batch, n] int32 physical blocks.
        block_size: Slots of a block.
        num_tokens: Tokens of the batch.
    """
    rows = [part for row in rows for part in _apart(row)]
    staying = [row for row in rows if row.stays_in_place]
    walking = [row for row in rows if not row.stays_in_place]
    attending = [row for row in staying if not row.has_slot_memory]
    return Plan(
        num_tokens=num_tokens,
        entered=_entered(rows, block_table, block_size),
        placement=_placement(staying, block_table, block_size, num_tokens) if staying else None,
        in_place=_in_place(attending, block_table, num_tokens) if attending else None,
        decisions=_decisions(attending, block_table, block_size),
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


def _placement(rows: list[Row], block_table: Tensor, block_size: int, num_tokens: int) -> Placement:
    """Where the rows' tokens go: behind their memory and the slots they hold."""
    owner, within, tokens = _tokens(rows)
    first = torch.tensor([row.law.state_slots + row.law.held(row.seen) for row in rows])
    seen = torch.tensor([row.seen for row in rows])
    table = block_table[torch.tensor([row.index for row in rows])]
    slot = first[owner] + within
    block, offset = table[owner, slot // block_size].long(), slot % block_size
    return Placement(
        tokens=None if len(tokens) == num_tokens else tokens,
        slots=block * block_size + offset,
        block=block,
        offset=offset,
        fresh=fresh_state(seen[owner] + within),
    )


def _in_place(rows: list[Row], block_table: Tensor, num_tokens: int) -> InPlace:
    _, _, tokens = _tokens(rows)
    ends = torch.tensor([row.num_tokens for row in rows], dtype=torch.int32).cumsum(0)
    index = torch.tensor([row.index for row in rows])
    behind = torch.tensor([row.allotment.state_blocks for row in rows])
    return InPlace(
        rows=rows,
        tokens=None if len(tokens) == num_tokens else tokens,
        query_start_loc=torch.cat([torch.zeros(1, dtype=torch.int32), ends.int()]),
        seq_lens=torch.tensor([row.visible for row in rows], dtype=torch.int32),
        block_table=_shifted(block_table[index], behind),
    )


def _tokens(rows: list[Row]) -> tuple[Tensor, Tensor, Tensor]:
    """Of every token of the rows: its row, its place in the row, its index in the batch; [T']."""
    counts = torch.tensor([row.num_tokens for row in rows])
    starts = torch.tensor([row.first_token for row in rows])
    ends = counts.cumsum(0)
    owner = torch.repeat_interleave(torch.arange(len(rows)), counts)
    within = torch.arange(int(ends[-1])) - (ends - counts)[owner]
    return owner, within, starts[owner] + within


def _shifted(table: Tensor, count: Tensor) -> Tensor:
    """Block table [R, n] without the first `count` [R] blocks of each row."""
    if not bool(count.any()):
        return table
    columns = torch.arange(table.shape[1]) + count[:, None]
    return table.gather(1, columns.clamp(max=table.shape[1] - 1))


def _decisions(rows: list[Row], block_table: Tensor, block_size: int) -> list[Decision]:
    """Group rows by policy where something is observed or evicted."""
    groups: dict[EvictionPolicy, list[Row]] = {}
    for row in rows:
        policy = row.policy
        if (
            isinstance(policy, EvictionPolicy)
            and not row.is_kept
            and ("accumulated" in policy.needs or row.is_due)
        ):
            groups.setdefault(policy, []).append(row)
    decisions: list[Decision] = []
    for policy, members in groups.items():
        blocks = _own_blocks(members, block_table, block_size)
        decisions.append(
            Decision(
                policy=policy,
                rows=members,
                last_tokens=torch.tensor([row.last_token for row in members]),
                blocks=blocks,
                visible=torch.tensor([row.visible for row in members]),
                totals=torch.tensor([row.total for row in members]),
                due=_due_together(members),
                written=_without_prompts(members, blocks, block_size),
            )
        )
    return decisions


def _due_together(rows: list[Row]) -> list[list[int]]:
    """Indices of rows that evict now, by the slots that they show and drop."""
    groups: dict[tuple[int, int], list[int]] = {}
    for index, row in enumerate(rows):
        if surplus := row.surplus:
            groups.setdefault((row.visible, surplus), []).append(index)
    return list(groups.values())


def _without_prompts(rows: list[Row], blocks: Tensor, block_size: int) -> Tensor:
    """Blocks [R, n] with the null block for those that only hold a prompt that is kept."""
    shared = torch.tensor([row.allotment.kept // block_size for row in rows])
    if not bool(shared.any()):
        return blocks
    return blocks.where(torch.arange(blocks.shape[1]) >= shared[:, None], NULL_BLOCK)


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
