"""Float64 oracle of one attention layer under a retention policy.

Written from the definition alone, one token at a time, sharing no code with the
engine. It trades speed for obviousness: whoever doubts a policy reads it here.

Axes: H query heads, H_kv KV heads, G query heads per KV head, T tokens of the
sequence, S slots held, D head_dim. Slots stay in ascending position order.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from oracles.arithmetic import NEAR_TIE, Array, relative_gap, rotate, softmax
from oracles.memory import Given, make_memory
from oracles.slots import Memory, Query, Tokens
from oracles.specs import Spec, parse, token_slots

Positions = tuple[int, ...]
Retained = tuple[Positions, ...]
"""Positions held by each KV head, ascending."""


def pool(weights: Array, spec: Spec) -> Array:
    """Reduce attention weights [H_kv, G, S] to one weight per slot [H_kv, S]."""
    if spec.scope == "layer":
        return np.broadcast_to(weights.mean(axis=(0, 1)), (weights.shape[0], weights.shape[2]))
    return {"mean": np.mean, "max": np.max, "sum": np.sum}[spec.group_pool](weights, axis=1)


def splitmix64(x: int) -> int:
    """Return the splitmix64 hash of a 64-bit integer."""
    mask = 2**64 - 1
    x = (x + 0x9E3779B97F4A7C15) & mask
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
    return x ^ (x >> 31)


def random_score(seed: int, layer: int, kv_head: int, num_tokens: int, position: int) -> int:
    """Return `random`'s score of a position at the eviction after `num_tokens` tokens."""
    h = splitmix64(seed)
    for value in (layer, kv_head, num_tokens, position):
        h = splitmix64(h ^ value)
    return h


@dataclass(frozen=True)
class Eviction:
    """One decision: what went, what stayed, and how close it was.

    `kv_head` is None where one decision serves the whole layer. `margin` is the gap
    between the lowest kept unprotected score and the highest evicted one, relative
    to the larger; infinite for exact scores or where nothing unprotected stays.
    """

    num_tokens: int
    kv_head: int | None
    evicted: Positions
    kept: Positions
    margin: float


@dataclass(frozen=True)
class Candidates:
    """The slots of one KV head at an eviction, all arrays [S]."""

    positions: NDArray[np.int64]
    scores: NDArray[Any]
    is_protected: NDArray[np.bool_]

    def lowest(self, count: int) -> set[int]:
        """Positions of the `count` lowest unprotected scores; ties: lowest position."""
        free = ~self.is_protected
        order = np.lexsort((self.positions[free], self.scores[free]))
        assert len(order) >= count, "more protected tokens than budget"
        return set(self.positions[free][order[:count]].tolist())

    def free_scores(self, positions: set[int]) -> list[float]:
        """Scores of those of the given positions that are unprotected."""
        chosen = np.isin(self.positions, list(positions)) & ~self.is_protected
        return [float(score) for score in self.scores[chosen]]


def decision_margin(slots: Candidates, kept: set[int], evicted: set[int]) -> float:
    """Return the relative gap between the lowest kept and the highest evicted score."""
    rivals = slots.free_scores(kept)
    return relative_gap(min(rivals), max(slots.free_scores(evicted))) if rivals else math.inf


def is_near_tie(slots: Candidates, ours: set[int], theirs: set[int]) -> bool:
    """Whether every position kept by one side only scores like those of the other."""
    only_ours, only_theirs = slots.free_scores(ours - theirs), slots.free_scores(theirs - ours)
    protected_survive = len(only_ours) == len(ours - theirs)
    all_are_held = len(only_theirs) == len(theirs - ours)
    if len(ours) != len(theirs) or not (protected_survive and all_are_held):
        return False
    return relative_gap(max(only_ours), min(only_theirs)) < NEAR_TIE


@dataclass
class LayerOracle:
    """One layer of one sequence, fed one token at a time.

    With `theta` it takes un-rotated queries and keys and rotates them itself, by
    position (rope=keep) or by rank among the visible slots (rope=reindex). Without,
    they are used as given; `rotated_by` is then the base by which they were rotated, for
    memories, which need them un-rotated. `scale` defaults to 1 / sqrt(D). The first `prompt`
    tokens are the prompt, which only prefill=bulk and protect=prompt set apart.
    """

    spec: Spec
    layer: int = 0
    scale: float | None = None
    theta: float | None = None
    rotated_by: float | None = None
    given: Given = field(default_factory=Given)
    prompt: int = 0
    memory: Memory | None = field(default=None, init=False)
    num_tokens: int = field(default=0, init=False)
    near_ties: int = field(default=0, init=False)
    evictions: list[Eviction] = field(default_factory=list, init=False)
    rows: list[Array] = field(default_factory=list, init=False)
    """Attention rows [H_kv, S] of the tokens since the last eviction."""

    def __post_init__(self) -> None:
        if self.spec.rope == "reindex" and self.theta is None:
            raise ValueError("rope=reindex needs un-rotated keys and theta")
        if self.spec.has_memory and (self.theta is None) == (self.rotated_by is None):
            raise ValueError("a memory needs either theta or rotated_by")

    @property
    def retained(self) -> Retained:
        """Positions held now, per KV head."""
        return tuple(tuple(row) for row in self.positions.tolist())

    @property
    def min_margin(self) -> float:
        """The closest decision so far, the memory's included."""
        margins = [eviction.margin for eviction in self.evictions]
        margins += [] if self.memory is None else self.memory.margins
        return min(margins, default=math.inf)

    def step(
        self,
        q_t: ArrayLike,
        k_t: ArrayLike,
        v_t: ArrayLike,
        *,
        host_retained: Sequence[Sequence[int]] | None = None,
    ) -> Array:
        """Append one token, attend, observe, and evict if the law says so.

        Args:
            q_t: the token's queries, [H, D].
            k_t: its keys, [H_kv, D].
            v_t: its values, [H_kv, D].
            host_retained: what a host holds after this token, per KV head. At a
                near-tie the oracle continues from it and counts `near_ties`.

        Returns:
            The attention output, [H, D].

        Raises:
            AssertionError: `host_retained` differs by more than a near-tie.
        """
        q, k, v = (np.asarray(x, np.float64) for x in (q_t, k_t, v_t))
        self._append(k, v)
        host = None if host_retained is None else [set(map(int, row)) for row in host_retained]
        if self.memory is not None:
            return self._step_with_memory(self.memory, q, host)
        weights = self._attend(q)  # [H_kv, G, S]
        outputs = (weights @ self.values).reshape(q.shape)
        self._observe(weights)
        self._evict(host)
        return outputs

    def _step_with_memory(self, memory: Memory, q: Array, theirs: list[set[int]] | None) -> Array:
        """Attend to tokens and memory, then evict and let the memory absorb what went."""
        queries, tokens = self._queries(q), self._tokens()
        answers = [memory.attend(h, queries[h], tokens[h]) for h in range(len(queries))]
        self._observe(np.stack([answer.weights for answer in answers]))
        tokens = self._tokens()
        memory.reflect(self.num_tokens, tokens)
        self._evict(theirs)
        for head, kept in enumerate(self.retained):
            gone = ~np.isin(tokens[head].positions, kept)
            if gone.any():
                memory.absorb(head, queries[head], tokens[head].take(gone), answers[head])
        return np.concatenate([answer.outputs for answer in answers])

    def _queries(self, q: Array) -> list[Query]:
        """The newest token's queries [H, D], per KV head."""
        position = self.num_tokens - 1
        evicted = position - token_slots(position, self.spec, self.prompt)
        raw, rotated = self._raw_and_rotated(q, position)
        groups = (x.reshape(len(self.keys), -1, x.shape[-1]) for x in (raw, rotated))
        return [Query(*pair, position, evicted) for pair in zip(*groups, strict=True)]

    def _tokens(self) -> list[Tokens]:
        """Tokens held, per KV head."""
        raw, rotated = self._raw_and_rotated(self.keys, self.positions)
        columns = (self.positions, raw, rotated, self.values, self.accumulated)
        return [Tokens(*row) for row in zip(*columns, strict=True)]

    def _raw_and_rotated(self, x: Array, positions: ArrayLike) -> tuple[Array, Array]:
        if self.theta is not None:
            return x, rotate(x, positions, self.theta)
        assert self.rotated_by is not None, "checked at construction"
        return rotate(x, -np.asarray(positions), self.rotated_by), x

    def _append(self, k: Array, v: Array) -> None:
        num_kv_heads, head_dim = k.shape
        if self.num_tokens == 0:
            self.positions = np.empty((num_kv_heads, 0), np.int64)
            self.accumulated = np.empty((num_kv_heads, 0))
            self.keys = np.empty((num_kv_heads, 0, head_dim))
            self.values = np.empty((num_kv_heads, 0, v.shape[-1]))
            self.memory = self._new_memory(num_kv_heads, head_dim)
        column = np.full((num_kv_heads, 1), self.num_tokens)
        self.positions = np.concatenate([self.positions, column], axis=1)
        self.accumulated = np.concatenate([self.accumulated, np.zeros_like(column)], axis=1)
        self.keys = np.concatenate([self.keys, k[:, None]], axis=1)
        self.values = np.concatenate([self.values, v[:, None]], axis=1)
        self.num_tokens += 1

    def _new_memory(self, num_kv_heads: int, head_dim: int) -> Memory | None:
        theta = self.rotated_by if self.theta is None else self.theta
        if not self.spec.has_memory or theta is None:
            return None
        scale = self._scale(head_dim)
        return make_memory(self.spec, self.layer, num_kv_heads, scale, theta, self.given)

    def _scale(self, head_dim: int) -> float:
        return head_dim**-0.5 if self.scale is None else self.scale

    def _attend(self, q: Array) -> Array:
        """Return the attention weights of queries [H, D] as [H_kv, G, S]."""
        num_kv_heads, num_slots, head_dim = self.keys.shape
        scale, keys = self._scale(head_dim), self.keys
        if self.theta is not None:
            ranks = np.broadcast_to(np.arange(num_slots), self.positions.shape)
            angles = ranks if self.spec.rope == "reindex" else self.positions  # [H_kv, S]
            keys, q = rotate(keys, angles, self.theta), rotate(q, angles[0, -1], self.theta)
        groups = q.reshape(num_kv_heads, -1, head_dim)  # [H_kv, G, D]
        return softmax(groups @ keys.transpose(0, 2, 1) * scale)

    def _observe(self, weights: Array) -> None:
        self.last_row = pool(weights, self.spec)  # [H_kv, S]
        self.rows.append(self.last_row)
        unit = self.last_row.shape[1] if self.spec.score == "relative" else 1
        self.accumulated = self.accumulated * self.spec.decay + self.last_row * unit

    def _scores(self) -> NDArray[Any]:
        """Return one score per slot, higher is kept, [H_kv, S]."""
        match self.spec.name:
            case "h2o" if self.spec.score == "sum":
                return self.accumulated
            case "h2o":
                return self.accumulated / (self.num_tokens - self.positions)
            case "tova":
                return self.last_row
            case "snapkv":
                return self._votes()
            case "knorm":
                return -np.sqrt((self._rotated_keys() ** 2).sum(-1))
            case "keydiff":
                keys = self._rotated_keys()
                directions = keys / np.sqrt((keys**2).sum(-1, keepdims=True))
                first = self.prompt if self.spec.keeps_prompt else 0
                seen = self.positions >= first
                anchor = np.stack(
                    [
                        d[s].mean(axis=0, keepdims=True)
                        for d, s in zip(directions, seen, strict=True)
                    ]
                )
                cosine = (directions * anchor).sum(-1) / np.sqrt((anchor**2).sum(-1))
                return -cosine
            case "random":
                rows = enumerate(self.positions.tolist())
                hashes = [[self._random(head, p) for p in row] for head, row in rows]
                return np.array(hashes, np.uint64)
            case _:
                return self.positions

    def _votes(self) -> Array:
        """Attention given by the last queries since the last eviction, averaged along the text."""
        rows = self.rows[-self.spec.window :]
        pooled = np.full(self.positions.shape, np.inf)  # of the window itself, which stays
        for head, positions in enumerate(self.positions):
            voted = [s for s, p in enumerate(positions) if p < self.num_tokens - self.spec.window]
            votes = [sum(row[head, s] for row in rows if s < row.shape[1]) for s in voted]
            half = self.spec.kernel // 2
            for i, s in enumerate(voted):
                near = [votes[j] for j in range(i - half, i + half + 1) if 0 <= j < len(votes)]
                pooled[head, s] = sum(near) / self.spec.kernel
        return pooled

    def _rotated_keys(self) -> Array:
        """Keys as a cache holds them, [H_kv, S, D]."""
        if self.theta is None:
            return self.keys
        return rotate(self.keys, self.positions, self.theta)

    def _random(self, kv_head: int, position: int) -> int:
        return random_score(self.spec.seed, self.layer, kv_head, self.num_tokens, position)

    def _is_protected(self) -> NDArray[np.bool_]:
        """Mark sinks, recent tokens and pinned spans, [H_kv, S]."""
        is_protected = self.positions < self.spec.sinks
        is_protected |= self.positions >= self.num_tokens - self.spec.recent
        for start, stop in self.spec.protect:
            is_protected |= (self.positions >= start) & (self.positions < stop)
        if self.spec.keeps_prompt:
            is_protected |= self.positions < self.prompt
        return is_protected

    def _evict(self, theirs: list[set[int]] | None) -> None:
        kept = token_slots(self.num_tokens, self.spec, self.prompt)
        num_evicted = self.positions.shape[1] - kept
        if num_evicted:
            self._keep(self._decide(num_evicted, theirs))
            self.rows.clear()
        elif theirs is not None:
            for head, (ours, host) in enumerate(zip(map(set, self.retained), theirs, strict=True)):
                if ours != host:
                    raise AssertionError(self._difference(head, ours, host, "no eviction is due"))

    def _decide(self, num_evicted: int, theirs: list[set[int]] | None) -> list[set[int]]:
        """Return the positions that each KV head keeps."""
        scores, is_protected = self._scores(), self._is_protected()
        num_kv_heads = len(scores)
        is_shared = self.spec.scope == "layer"
        kept: list[set[int]] = []
        for head in range(1 if is_shared else num_kv_heads):
            slots = Candidates(self.positions[head], scores[head], is_protected[head])
            host = None if theirs is None else theirs[head]
            kept.append(self._decide_head(head, slots, num_evicted, host))
        kept = kept * num_kv_heads if is_shared else kept
        if theirs is not None and theirs != kept:
            raise AssertionError(f"layer {self.layer}: heads differ under scope=layer: {theirs}")
        return kept

    def _decide_head(
        self, head: int, slots: Candidates, num_evicted: int, theirs: set[int] | None
    ) -> set[int]:
        held = set(slots.positions.tolist())
        evicted = slots.lowest(num_evicted)
        kept = held - evicted
        margin = math.inf if self.spec.is_exact else decision_margin(slots, kept, evicted)
        if theirs is not None and theirs != kept:
            if self.spec.is_exact or not is_near_tie(slots, kept, theirs):
                raise AssertionError(self._difference(head, kept, theirs, f"margin {margin:.3g}"))
            self.near_ties += 1
            kept, evicted = theirs, held - theirs
        kv_head = None if self.spec.scope == "layer" else head
        gone, stays = tuple(sorted(evicted)), tuple(sorted(kept))
        self.evictions.append(Eviction(self.num_tokens, kv_head, gone, stays, margin))
        return kept

    def _difference(self, head: int, ours: set[int], theirs: set[int], why: str) -> str:
        where = f"layer {self.layer}, KV head {head}, after {self.num_tokens} tokens"
        keeps = f"the oracle alone keeps {sorted(ours - theirs)}, the host {sorted(theirs - ours)}"
        return f"{where}: {keeps} ({why}; a near-tie is < {NEAR_TIE})"

    def _keep(self, kept: list[set[int]]) -> None:
        rows = zip(self.positions, kept, strict=True)
        slots = np.stack([np.flatnonzero(np.isin(row, list(wanted))) for row, wanted in rows])
        self.positions = np.take_along_axis(self.positions, slots, axis=1)
        self.accumulated = np.take_along_axis(self.accumulated, slots, axis=1)
        self.keys = np.take_along_axis(self.keys, slots[..., None], axis=1)
        self.values = np.take_along_axis(self.values, slots[..., None], axis=1)


@dataclass(frozen=True)
class LayerRun:
    """A whole sequence through one layer.

    `outputs` is [H, T, D]; `retained[n - 1]` is what is held after n tokens; `min_margin` is
    the closest decision, the memory's included.
    """

    outputs: Array
    retained: list[Retained]
    evictions: list[Eviction]
    near_ties: int
    min_margin: float


def replay_layer(
    spec: Spec | str,
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    *,
    layer: int = 0,
    scale: float | None = None,
    theta: float | None = None,
    rotated_by: float | None = None,
    given: Given | None = None,
    prompt: int = 0,
    host_retained: Sequence[Sequence[Sequence[int]] | None] | None = None,
) -> LayerRun:
    """Run one sequence through one layer, token by token.

    Args:
        spec: the policy.
        q: queries, [H, T, D].
        k: keys, [H_kv, T, D].
        v: values, [H_kv, T, D].
        layer: index of the layer; only `random` looks at it.
        scale: of the logits; 1 / sqrt(D) by default.
        theta: RoPE base, if q and k are still un-rotated.
        rotated_by: RoPE base by which q and k were rotated, for policies with a memory.
        given: parameters and weights that a memory needs.
        prompt: tokens of the prompt.
        host_retained: per token, the host's sets to follow at near-ties, or None.
    """
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    spec = parse(spec) if isinstance(spec, str) else spec
    oracle = LayerOracle(spec, layer, scale, theta, rotated_by, given or Given(), prompt)
    outputs: list[Array] = []
    retained: list[Retained] = []
    for t in range(q.shape[1]):
        host = host_retained[t] if host_retained is not None else None
        outputs.append(oracle.step(q[:, t], k[:, t], v[:, t], host_retained=host))
        retained.append(oracle.retained)
    columns = np.stack(outputs, axis=1)
    return LayerRun(columns, retained, oracle.evictions, oracle.near_ties, oracle.min_margin)
