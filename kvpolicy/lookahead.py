"""The look-ahead routine: many tokens at once, exactly as one by one.

Within a layer the queries, keys and values of a block of tokens are known before its
attention. So the logits of the block against (held slots + block) are one GEMM, and only
softmax, scores and evictions walk the occupancy law's positions in order: between two
evictions the visible set only grows. Policies that look at positions alone are decided
before any attention, and their block is one masked GEMM. Prefill and trace replay share it.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from kvpolicy.attention import AttentionLayer, Kernel, weighted_values, weights_of
from kvpolicy.memory.answers import absorbed, reflected
from kvpolicy.memory.state import Memory, Passage
from kvpolicy.policy import View
from kvpolicy.selection import new_statistic, select_victims
from kvpolicy.slots import Slots, survivors

BLOCK = 128
"""Tokens looked ahead at once: large enough for GEMMs, small beside the budget."""


def extend(layer: AttentionLayer, slots: Slots, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Process Q consecutive tokens of rows that have seen equally many; same as Q steps.

    All blocks are decided before any is stored: if the policy fails, `slots` is unchanged. No
    tokens change nothing.

    Args:
        layer: The attention layer and its policy.
        slots: State of the rows, all with the same `tokens` and law; changed in place.
        q: [B, H, Q, D] queries.
        k: [B, H_kv, Q, D] keys, rotated at the tokens' positions.
        v: [B, H_kv, Q, D] values.

    Returns:
        [B, H, Q, D] in the dtype of q.
    """
    assert len(set(slots.tokens)) == 1, "rows of one call advance in lockstep"
    if q.shape[2] == 0:
        return q.new_empty(*q.shape[:3], v.shape[-1])
    outputs: list[Tensor] = []
    state = slots
    for parts in zip(
        q.split(BLOCK, dim=2), k.split(BLOCK, dim=2), v.split(BLOCK, dim=2), strict=True
    ):
        block = Block(layer, state, *parts)
        outputs.append(block.run())
        state = block.kept()
    slots.put_rows(list(range(q.shape[0])), state, layer.occupancy)
    return torch.cat(outputs, dim=2).to(q.dtype)


@dataclass
class Columns:
    """Candidates of a block: the held slots, then the block's own tokens; S of each.

    Attributes:
        slots: Their keys, values, positions and statistic.
        birth: [S] first query of the block that sees a column; 0 for held slots.
        death: [B, H_kv, S] first query that does not see it any more; the block's size + 1
            for columns that survive it.
    """

    slots: Slots
    birth: Tensor
    death: Tensor

    def visible(self, first: int, last: int) -> Tensor:
        """What queries [first, last) see; [B, H_kv, last - first, S] bool."""
        queries = torch.arange(first, last, device=self.birth.device)[:, None]
        return (queries >= self.birth) & (queries < self.death[:, :, None])


class Block:
    """One block of look-ahead over rows in lockstep.

    Attributes:
        layer: The attention layer and its policy.
        law: The rows' occupancy law.
        seen: Tokens of each row before the block.
        size: Tokens of the block, Q.
        columns: Candidates; their `death` says what was evicted when, once `run` has returned.
        memory: What the policy keeps beside tokens, after what has been decided so far.
    """

    def __init__(
        self, layer: AttentionLayer, slots: Slots, q: Tensor, k: Tensor, v: Tensor
    ) -> None:
        self.layer, self.slots, self.q = layer, slots, q
        self.law, *others = set(slots.laws(layer.occupancy))
        assert not others, "rows of one call have one law: prompts of one length, if it matters"
        self.seen = slots.tokens[0]
        self.size = q.shape[2]
        self.columns = self._join(k, v)
        self.memory = slots.memory

    @cached_property
    def logits(self) -> Tensor:
        """Of the block's queries over all columns; [B, H_kv, G, Q, S] float32."""
        return self.layer.logits(self.q, self.columns.slots.keys, self._evicted_before())

    def run(self) -> Tensor:
        """Decide and attend; [B, H, Q, D] float32."""
        if self.layer.kernel is not None:
            return self._walk_by(self.layer.kernel)
        if self.memory is not None:
            return self._walk_with_memory(self.memory)
        weights = self._walk() if self.layer.needs_weights else self._decide_then_attend()
        return weighted_values(weights, self.columns.slots.values)

    def observed(self, weights: Tensor, first: int, last: int) -> Tensor:
        """What the policy is shown of the weights of queries [first, last), like `weights`."""
        return weights

    def kept(self) -> Slots:
        """What is held after the block."""
        columns = self.columns.slots
        columns.memory = self.memory
        total, held = columns.capacity, self.law.held(self.seen + self.size)
        if held == total:
            return columns
        dead = self.columns.death <= self.size
        return columns.keep(survivors(dead, total, total - held))

    def _join(self, k: Tensor, v: Tensor) -> Columns:
        """Lay the block's tokens beside the held slots."""
        slots, held = self.slots, self.law.held(self.seen)
        batch, kv_heads = k.shape[:2]
        positions = torch.arange(self.seen, self.seen + self.size, device=k.device)
        fresh = positions.expand(batch, kv_heads, -1)
        joined = Slots(
            keys=torch.cat([slots.keys[:, :, :held], k], dim=2),
            values=torch.cat([slots.values[:, :, :held], v], dim=2),
            positions=torch.cat([slots.positions[:, :, :held], fresh], dim=2),
            accumulated=torch.cat(
                [slots.accumulated[:, :, :held], torch.zeros_like(fresh, dtype=torch.float32)],
                dim=2,
            ),
            tokens=[self.seen + self.size] * batch,
            evicted=slots.evicted,
            prompts=slots.prompts,
        )
        birth = (torch.arange(held + self.size, device=k.device) - held).clamp(min=0)
        death = torch.full_like(joined.positions, self.size + 1)
        return Columns(joined, birth, death)

    def _evicted_before(self) -> Tensor:
        """Tokens evicted before each query; [Q]."""
        counts = torch.arange(self.seen, self.seen + self.size, device=self.q.device)
        return self.law.evicted(counts)

    def _segments(self) -> list[tuple[int, int, bool]]:
        """Split the block where slots or memory change: (first, last, evict after last)."""
        segments: list[tuple[int, int, bool]] = []
        first = 0
        policy = self.layer.memory_policy
        while first < self.size:
            due = self.law.next_due(self.seen + first)
            boundary = None if policy is None else policy.next_boundary(self.seen + first)
            ends = [end - self.seen for end in (due, boundary) if end is not None]
            last = min([self.size, *ends])
            segments.append((first, last, due == self.seen + last))
            first = last
        return segments

    def _decide_then_attend(self) -> Tensor:
        """Policies without feedback: all evictions first, then one masked softmax."""
        with self.layer.stopwatch:
            for _, last, due in self._segments():
                if due:
                    self._evict(last, None)
        return self._softmax(0, self.size)

    def _walk(self) -> Tensor:
        """Policies with feedback: softmax, observe and evict from eviction to eviction."""
        parts: list[Tensor] = []
        for first, last, due in self._segments():
            weights = self._softmax(first, last)
            with self.layer.stopwatch:
                self._decide(first, last, weights, due)
            parts.append(weights)
        return torch.cat(parts, dim=3)

    def _walk_by(self, kernel: Kernel) -> Tensor:
        """Let a kernel attend from eviction to eviction, to copies of what is seen in between."""
        outputs: list[Tensor] = []
        columns = self.columns.slots
        for first, last, due in self._segments():
            queries = self.q[:, :, first:last]
            hidden = ~self.columns.visible(last - 1, last)[:, :, 0]  # [B, H_kv, S]
            count = self.law.held(self.seen + first) + last - first
            total = columns.capacity
            seen = columns.keep(survivors(hidden, total, total - count))
            visible = [count] * queries.shape[0]
            output, lse = kernel(queries, seen.keys, seen.values, visible, self.layer.scale)
            outputs.append(output.float())
            with self.layer.stopwatch:
                if self.layer.reads_weights(due=due):
                    weights = weights_of(self._visible_logits(first, last), lse)
                    self._decide(first, last, weights, due)
                elif due:
                    self._evict(last, None)
        return torch.cat(outputs, dim=2)

    def _walk_with_memory(self, memory: Memory) -> Tensor:
        """Policies with a memory: attend, observe and absorb from change to change."""
        outputs: list[Tensor] = []
        evicted, values = self._evicted_before(), self.columns.slots.values
        for first, last, due in self._segments():
            queries = self.q[:, :, first:last]
            attended = self.layer.attend(
                memory,
                queries,
                self._visible_logits(first, last),
                values,
                positions=torch.arange(self.seen + first, self.seen + last, device=queries.device),
                evicted=evicted[first:last],
            )
            outputs.append(attended.output)
            with self.layer.stopwatch:
                newest = queries[:, :, -1], attended.lse[..., -1]
                memory = self._reflect(memory, last, *newest)
                if self.layer.needs_weights:
                    self._decide(first, last, attended.weights, due)
                elif due:
                    self._evict(last, None)
                if due:
                    memory = self._absorb(memory, last, *newest)
        self.memory = memory
        return torch.cat(outputs, dim=2)

    def _reflect(self, memory: Memory, last: int, query: Tensor, lse: Tensor) -> Memory:
        """The memory after the block's first `last` tokens, rewritten at a boundary."""
        policy, n = self.layer.memory_policy, self.seen + last
        assert policy is not None, "it has a memory"
        if policy.next_boundary(n - 1) != n:
            return memory
        positions = self.columns.slots.positions
        newest = (positions >= n - policy.boundary_tokens) & (positions < n)
        passage = self._passage(newest, policy.boundary_tokens, last, query, lse)
        return reflected(policy, memory, passage)

    def _absorb(self, memory: Memory, last: int, query: Tensor, lse: Tensor) -> Memory:
        """The memory with the tokens evicted after the block's first `last` tokens."""
        policy = self.layer.memory_policy
        assert policy is not None, "it has a memory"
        victims = self.columns.death == last
        count = self.law.surplus(self.seen + last)
        return absorbed(policy, memory, self._passage(victims, count, last, query, lse))

    def _passage(
        self, chosen: Tensor, count: int, last: int, query: Tensor, lse: Tensor
    ) -> Passage:
        """Tokens for the memory after the block's first `last` tokens."""
        n = torch.full((self.q.shape[0],), self.seen + last, device=self.q.device)
        return self.layer.passage(self.columns.slots, chosen, count, n=n, query=query, lse=lse)

    def _decide(self, first: int, last: int, weights: Tensor, due: bool) -> None:
        """Show the policy the rows of queries [first, last), then evict if it is due."""
        policy = self.layer.eviction
        pooled = self.layer.pool(self.observed(weights, first, last))  # [B, H_kv, Q', S]
        if policy is not None and policy.observes_every_token:
            self._observe_each(first, pooled)
        elif self.layer.accumulates:
            seen = self._visible_counts(first, last)
            columns = self.columns.slots
            tokens = range(self.seen + first + 1, self.seen + last + 1)
            ages = self.layer.window_ages([self.law] * len(tokens), tokens)
            columns.accumulated = self.layer.fold(columns.accumulated, pooled, seen, ages)
        if due:
            self._evict(last, pooled[:, :, -1])

    def _softmax(self, first: int, last: int) -> Tensor:
        """Attention weights of queries [first, last); [B, H_kv, G, last - first, S]."""
        return self._visible_logits(first, last).softmax(dim=-1)

    def _visible_logits(self, first: int, last: int) -> Tensor:
        """Logits of queries [first, last), -inf over what they do not see."""
        hidden = ~self.columns.visible(first, last)[:, :, None]
        return self.logits[:, :, :, first:last].masked_fill(hidden, -torch.inf)

    def _visible_counts(self, first: int, last: int) -> Tensor:
        """Slots seen by each query: one more than held before it; [Q]."""
        counts = torch.arange(self.seen + first, self.seen + last, device=self.q.device)
        return self.law.held(counts) + 1

    def _observe_each(self, first: int, pooled: Tensor) -> None:
        """Show a policy with its own `observe` every token of a segment."""
        policy, columns = self.layer.eviction, self.columns.slots
        assert policy is not None
        for offset in range(pooled.shape[2]):
            view = self._view(first + offset + 1, pooled[:, :, offset])
            statistic = new_statistic(policy, view)
            columns.accumulated = torch.where(view.valid, statistic, columns.accumulated)

    def _evict(self, last: int, pooled: Tensor | None) -> None:
        """Evict after the block's first `last` tokens."""
        policy = self.layer.eviction
        assert policy is not None, "only policies that evict are ever due"
        surplus = self.law.surplus(self.seen + last)
        view = self._view(last, pooled)
        victims = select_victims(policy, view, surplus, self.layer.ranks)
        self.columns.death.masked_fill_(victims, last)

    def _view(self, last: int, pooled: Tensor | None) -> View:
        """What the policy sees after the block's first `last` tokens."""
        columns = self.columns.slots
        n = torch.full((self.q.shape[0],), self.seen + last, device=self.q.device)
        return self.layer.view(
            positions=columns.positions,
            valid=self.columns.visible(last - 1, last)[:, :, 0],
            n=n,
            visible=self.law.held(n - 1) + 1,
            weights=pooled,
            accumulated=columns.accumulated,
            keys=columns.keys,
            values=columns.values,
            prompts=columns.prompts,
        )
