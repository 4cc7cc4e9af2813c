"""Rehearsals: small random batches through the core, with everything written down.

This is what ``kvpolicy.testing`` compares: outputs, retained positions and decisions of one
policy, fed token by token or in chunks, alone or in a batch.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cache, lru_cache
from itertools import repeat
from typing import NamedTuple

import torch
from torch import Tensor

from kvpolicy.attention import AttentionLayer
from kvpolicy.engine import due_together, step
from kvpolicy.lookahead import extend
from kvpolicy.occupancy import Occupancy
from kvpolicy.policy import CachePolicy, EvictionPolicy, View
from kvpolicy.ranks import ALONE, Ranks
from kvpolicy.rotary import Rotary
from kvpolicy.selection import protected
from kvpolicy.slots import Slots

HEAD_DIM = 8

Retained = tuple[tuple[int, ...], ...]
"""Positions held by each KV head, ascending."""


@dataclass(frozen=True)
class Case:
    """A small batch of random requests through one attention layer.

    Attributes:
        lengths: Tokens of each row, at least two rows.
        chunks: Sizes of the chunks in which look-ahead runs get their tokens, in rotation.
        kv_heads: KV heads.
        group: Query heads per KV head.
        layer: Index of the layer.
        seed: Of the random queries, keys and values.
        prompts: Tokens of the rows' prompts; rows without one stream everything.
    """

    lengths: tuple[int, ...] = (24, 17)
    chunks: tuple[int, ...] = (5,)
    kv_heads: int = 2
    group: int = 2
    layer: int = 0
    seed: int = 0
    prompts: tuple[int, ...] = ()

    def prompt(self, index: int) -> int:
        """Tokens of a row's prompt; it may go on behind the row's last token."""
        return self.prompts[index] if index < len(self.prompts) else 0

    def alone(self, index: int) -> "Case":
        """Give the case of one of the rows."""
        return replace(self, lengths=(self.lengths[index],), prompts=(self.prompt(index),))

    def rows(self) -> "list[Row]":
        """Draw the rows' inputs; a row depends on the seed and its index only."""
        return [self._row(index, length) for index, length in enumerate(self.lengths)]

    def _row(self, index: int, length: int) -> "Row":
        generator = torch.Generator().manual_seed(1000 * self.seed + index)
        heads = (self.kv_heads * self.group, self.kv_heads, self.kv_heads)
        q, k, v = (
            torch.randn(length, count, HEAD_DIM, generator=generator).transpose(0, 1)
            for count in heads
        )
        return Row(2 * q, k, v)


class Row(NamedTuple):
    """Inputs of one row: q [H, T, D], k and v [H_kv, T, D]."""

    q: Tensor
    k: Tensor
    v: Tensor

    @property
    def length(self) -> int:
        """Tokens."""
        return self.q.shape[1]

    def first(self, length: int) -> "Row":
        """Give the row cut to its first tokens."""
        return Row(*(x[:, :length] for x in self))


class Decision(NamedTuple):
    """One eviction: what the policy saw and answered, which row is meant, how much it dropped."""

    policy: EvictionPolicy
    view: View
    scores: Tensor
    row: int
    surplus: int


@dataclass
class Run:
    """What rows did under a policy.

    Attributes:
        outputs: [H, T, D] of each row.
        retained: Of each row, what is held after n tokens, wherever it was looked at.
        decisions: By row and number of tokens.
    """

    outputs: list[Tensor]
    retained: list[dict[int, Retained]]
    decisions: dict[tuple[int, int], Decision] = field(default_factory=dict)

    def row(self, index: int, heads: slice = slice(None), queries: slice = slice(None)) -> "Run":
        """Take one row, and if asked some KV heads and query heads, out of the run."""
        retained = {n: kept[heads] for n, kept in self.retained[index].items()}
        decisions = {(0, n): made for (row, n), made in self.decisions.items() if row == index}
        return Run([self.outputs[index][queries]], [retained], decisions)


class PlannedFailure(Exception):  # noqa: N818  (raised on purpose)
    """Stands for whatever may go wrong inside score()."""


class Notes:
    """What a spied policy was asked, and when it is to fail."""

    def __init__(self) -> None:
        self.asked: list[tuple[View, Tensor]] = []
        self.calls = 0
        self.fail_at: int | None = None

    def take(self) -> list[tuple[View, Tensor]]:
        """Hand over what was asked since the last time."""
        asked, self.asked = self.asked, []
        return asked


@cache
def _spy_class(cls: type[EvictionPolicy]) -> type[EvictionPolicy]:
    class Spy(cls):
        __module__ = cls.__module__  # a stranger's stays one

        def score(self, view: View) -> Tensor:
            notes: Notes = self.__dict__["_notes"]
            if notes.calls == notes.fail_at:
                raise PlannedFailure
            scores = super().score(view)
            notes.calls += 1
            notes.asked.append((view, scores))
            return scores

    return Spy


def spied(policy: CachePolicy, notes: Notes) -> CachePolicy:
    """Copy of a policy that notes what it is asked."""
    if not isinstance(policy, EvictionPolicy):
        return policy
    spy = object.__new__(_spy_class(type(policy)))
    spy.__dict__.update(policy.__dict__, _notes=notes)
    return spy


class State(NamedTuple):
    """A copy of what storage holds."""

    tokens: list[int]
    evicted: list[int]
    tensors: list[Tensor]

    def equals(self, other: "State") -> bool:
        """Whether nothing changed."""
        return (self.tokens, self.evicted) == (other.tokens, other.evicted) and all(
            torch.equal(ours.nan_to_num(), theirs.nan_to_num())
            for ours, theirs in zip(self.tensors, other.tensors, strict=True)
        )


class Host:
    """The smallest host: feeds rows to the core and records what comes out.

    Attributes:
        rows: Inputs.
        layer: The attention layer.
        notes: What its policy was asked.
        slots: State of the rows.
        run: The record.
    """

    def __init__(
        self,
        policy: CachePolicy,
        case: Case,
        rows: list[Row],
        *,
        first_kv_head: int = 0,
        ranks: Ranks = ALONE,
    ) -> None:
        self.rows = rows
        self.notes = Notes()
        self.layer = AttentionLayer(
            policy=spied(policy.of_layer(case.layer), self.notes),
            index=case.layer,
            scale=HEAD_DIM**-0.5,
            rotary=Rotary.from_theta(1e4, HEAD_DIM),
            first_kv_head=first_kv_head,
            ranks=ranks,
        )
        some_keys = torch.stack([row.k[:, 0] for row in rows])
        some_queries = torch.stack([row.q[:, 0] for row in rows])
        prompts = [case.prompt(index) for index in range(len(rows))]
        self.slots = self.layer.new_slots(some_queries, some_keys, some_keys, prompts)
        self.run = Run([row.q[:, :0] for row in rows], [{} for _ in rows])

    def step(self, rows: list[int]) -> None:
        """Process the next token of some rows."""
        slots = self._take(rows)
        inputs = [Row(*(x[:, n] for x in self.rows[i])) for i, n in self._reached(rows)]
        output = step(self.layer, slots, *map(torch.stack, zip(*inputs, strict=True)))
        self._put(rows, slots)
        due = due_together(slots.laws(self.layer.occupancy), slots.tokens)
        self._record(rows, output[:, :, None], [[rows[i] for i in group] for group, _ in due])

    def extend(self, row: int, size: int) -> None:
        """Process the next tokens of a row at once."""
        slots = self._take([row])
        n = slots.tokens[0]
        output = extend(self.layer, slots, *(x[None, :, n : n + size] for x in self.rows[row]))
        self._put([row], slots)
        self._record([row], output, repeat([row]))

    def is_done(self, row: int) -> bool:
        """Whether a row has no tokens left."""
        return self.slots.tokens[row] == self.rows[row].length

    def law(self, row: int) -> Occupancy:
        """A row's occupancy law."""
        return self.slots.laws(self.layer.occupancy)[row]

    def state(self) -> State:
        """Copy what the slots hold."""
        slots = self.slots
        held = [
            x[row, :, : self.law(row).held(n)].clone()
            for row, n in enumerate(slots.tokens)
            for x in (slots.keys, slots.values, slots.positions, slots.accumulated)
        ]
        beside = [] if slots.memory is None else [x.clone() for x in slots.memory.tensors()]
        return State(list(slots.tokens), list(slots.evicted), held + beside)

    def _reached(self, rows: list[int]) -> list[tuple[int, int]]:
        return [(row, self.slots.tokens[row]) for row in rows]

    def _take(self, rows: list[int]) -> Slots:
        """The storage itself if all rows take part, else a copy of theirs."""
        if len(rows) == len(self.rows):
            return self.slots
        return self.slots.rows(rows, self.slots.capacity)

    def _put(self, rows: list[int], slots: Slots) -> None:
        if slots is not self.slots:
            self.slots.put_rows(rows, slots, self.layer.occupancy)

    def _record(self, rows: list[int], output: Tensor, due: Iterable[list[int]]) -> None:
        """Write down what rows gave, hold, and decided: of each question, its `due` rows."""
        for index, row in enumerate(rows):
            self.run.outputs[row] = torch.cat([self.run.outputs[row], output[index]], dim=1)
            n = self.slots.tokens[row]
            held = self.slots.positions[row, :, : self.law(row).held(n)]
            self.run.retained[row][n] = tuple(map(tuple, held.sort(dim=-1).values.tolist()))
        policy = self.layer.eviction
        for (view, scores), asking in zip(self.notes.take(), due, strict=False):
            assert policy is not None, "it was asked"
            for index, row in enumerate(asking):
                n = int(view.n[index])
                made = Decision(policy, view, scores, index, self.law(row).surplus(n))
                self.run.decisions[row, n] = made


def by_steps(
    policy: CachePolicy, case: Case, rows: list[Row] | None = None, *, first_kv_head: int = 0
) -> Run:
    """Run rows token by token: first what the longer ones have more, then all as one batch."""
    rows = case.rows() if rows is None else rows
    host = Host(policy, case, rows, first_kv_head=first_kv_head)
    together = min(row.length for row in rows)
    for index, row in enumerate(rows):
        for _ in range(row.length - together):
            host.step([index])
    for _ in range(together):
        host.step(list(range(len(rows))))
    return host.run


def by_chunks(policy: CachePolicy, case: Case) -> Run:
    """Run every row by look-ahead, in chunks."""
    host = Host(policy, case, case.rows())
    for row in range(len(host.rows)):
        turn = 0
        while not host.is_done(row):
            host.extend(row, case.chunks[turn % len(case.chunks)])
            turn += 1
    return host.run


@lru_cache(maxsize=64)
def reference(policy: CachePolicy, case: Case) -> Run:
    """Run token by token, remembered for the other checks of the same case."""
    return by_steps(policy, case)


def margin(made: Decision) -> float:
    """Relative gap between the lowest kept and the highest evicted score of a decision.

    Infinite for integer scores, which have no noise, and where nothing unprotected stays.
    """
    return min(margins(made))


def margins(made: Decision) -> list[float]:
    """The margin of every KV head; with scope=layer all have the layer's."""
    scores = made.scores[made.row].double()  # [H_kv, S]
    if not made.scores.is_floating_point():
        return [math.inf] * len(scores)
    if made.policy.scope_is_layer:
        scores = scores.mean(dim=0, keepdim=True).expand_as(scores)
    free = (made.view.valid & ~protected(made.policy, made.view))[made.row]
    surplus, gaps = made.surplus, list[float]()
    for head in range(len(scores)):
        ranked = scores[head][free[head]].sort().values.tolist()
        low, high = ranked[surplus - 1 : surplus + 1] if len(ranked) > surplus else (0.0, math.inf)
        is_finite = math.isfinite(low) and math.isfinite(high)
        apart = (high - low) / max(abs(high), abs(low), 1e-35) if is_finite else math.inf
        gaps.append(0.0 if high == low else apart)
    return gaps
