"""Float64 oracle of one attention layer under a retention policy.

Written from the definition alone, one token at a time, sharing no code with the
engine. It trades speed for obviousness: whoever doubts a policy reads it here.

Axes: H query heads, H_kv KV heads, G query heads per KV head, T tokens of the
sequence, S slots held, D head_dim. Slots stay in ascending position order.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]
Positions = tuple[int, ...]
Retained = tuple[Positions, ...]
"""Positions held by each KV head, ascending."""

NEAR_TIE = 1e-3
"""Relative score difference below which two hosts may legally disagree."""

RESOLUTION = 1e-35
"""Scores this small count as equal: a float32 host underflows near 1e-38."""


@dataclass(frozen=True, kw_only=True)
class Spec:
    """What a spec string says, with every default filled in."""

    name: str
    budget: int | None = None
    interval: int = 1
    sinks: int = 0
    recent: int = 0
    protect: tuple[tuple[int, int], ...] = ()
    scope: str = "layer"
    group_pool: str = "mean"
    score: str = "sum"
    decay: float = 1.0
    seed: int = 0
    rope: str = "keep"

    @property
    def is_exact(self) -> bool:
        """Whether scores are integers, so that rounding excuses no difference."""
        return self.name not in ("h2o", "tova")


COMMON = {"budget", "interval", "prefill", "protect", "rope", "rope_beyond"}
SCORED = COMMON | {"sinks", "recent", "scope", "group_pool"}
KEYS = {
    "full": {"prefill", "rope", "rope_beyond"},
    "window": COMMON,
    "sinks": COMMON | {"sinks"},
    "h2o": SCORED | {"score", "decay"},
    "tova": SCORED,
    "random": COMMON | {"sinks", "recent", "seed"},
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "sinks": {"sinks": 4},
    "h2o": {"recent": 0.5, "scope": "head"},
    "random": {"scope": "head"},
}
CHOICES = {
    "scope": {"head", "layer"},
    "group_pool": {"mean", "max", "sum"},
    "score": {"sum", "mean", "relative"},
    "rope": {"keep", "reindex"},
    "prefill": {"stream"},
}


def parse(text: str) -> Spec:
    """Read a spec such as `h2o:budget=16,recent=0.5,protect=(0:2,5:6)`."""
    name, _, rest = text.partition(":")
    given = dict(_read_pair(name, pair) for pair in _split_outside_parentheses(rest))
    values = DEFAULTS.get(name, {}) | given
    if values.get("scope", "layer") == "layer" and "group_pool" in given:
        raise ValueError(f"{text}: scope=layer is the mean over all query heads; drop group_pool")
    values.pop("prefill", None)
    values.pop("rope_beyond", None)
    if name == "full":
        return Spec(name=name, **values)
    if "budget" not in given:
        raise ValueError(f"{text}: a budget is required")
    budget = values["budget"]
    values["recent"] = _count(values.get("recent", 0), budget)
    values.setdefault("interval", max(1, budget // 16))
    return _checked(Spec(name=name, **values))


def _split_outside_parentheses(text: str) -> list[str]:
    return re.split(r",(?![^(]*\))", text) if text else []


def _read_pair(name: str, pair: str) -> tuple[str, Any]:
    key, _, word = pair.partition("=")
    if name not in KEYS:
        raise ValueError(f"the oracle knows {sorted(KEYS)}; got {name!r}")
    if key not in KEYS[name]:
        raise ValueError(f"{name} takes {sorted(KEYS[name])}; got {key!r}")
    if key in CHOICES and word not in CHOICES[key]:
        raise ValueError(f"{name}: {key} is one of {sorted(CHOICES[key])} here; got {word!r}")
    return key, _read_value(word)


def _read_value(word: str) -> Any:
    if word.startswith("("):
        spans = (span.split(":") for span in word[1:-1].split(","))
        return tuple((int(start), int(stop)) for start, stop in spans)
    for read in (int, float):
        try:
            return read(word)
        except ValueError:
            continue
    return word


def _count(tokens: int | float, budget: int) -> int:
    """Turn `recent` into tokens: an int is a count, a float a share of the budget."""
    return tokens if isinstance(tokens, int) else math.floor(tokens * budget)


def _checked(spec: Spec) -> Spec:
    assert spec.budget is not None
    pinned = set(range(spec.sinks)).union(*(range(*span) for span in spec.protect))
    if spec.budget < 1 or spec.interval < 1:
        raise ValueError(f"budget and interval are at least 1: got {spec}")
    if spec.name == "sinks" and spec.budget <= spec.sinks:
        raise ValueError(f"budget must exceed sinks: got {spec}")
    if len(pinned) + spec.recent > spec.budget:
        raise ValueError(f"more protected tokens than budget: got {spec}")
    return spec


def token_slots(num_tokens: int, spec: Spec) -> int:
    """Token slots held after `num_tokens` tokens: the occupancy law."""
    if spec.budget is None or num_tokens < spec.budget + spec.interval:
        return num_tokens
    return spec.budget + (num_tokens - spec.budget) % spec.interval


def rotate(x: Array, positions: ArrayLike, theta: float) -> Array:
    """Apply RoPE in the half-split ("rotate_half") convention.

    Args:
        x: un-rotated vectors, [..., D].
        positions: one position per vector, broadcastable to x's shape without D.
        theta: base of the geometric frequencies.
    """
    half = x.shape[-1] // 2
    frequencies = theta ** (-np.arange(half) / half)  # [D/2]
    angles = np.asarray(positions, np.float64)[..., None] * frequencies  # [..., D/2]
    cos, sin = np.cos(angles), np.sin(angles)
    first, second = x[..., :half], x[..., half:]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def softmax(logits: Array) -> Array:
    """Normalise over the last axis."""
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


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


def relative_gap(high: float, low: float) -> float:
    """Return how far `high` lies above `low`, relative to the larger magnitude."""
    return (high - low) / max(abs(high), abs(low), RESOLUTION)


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
    they are used as given. `scale` defaults to 1 / sqrt(D).
    """

    spec: Spec
    layer: int = 0
    scale: float | None = None
    theta: float | None = None
    num_tokens: int = field(default=0, init=False)
    near_ties: int = field(default=0, init=False)
    evictions: list[Eviction] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        if self.spec.rope == "reindex" and self.theta is None:
            raise ValueError("rope=reindex needs un-rotated keys and theta")

    @property
    def retained(self) -> Retained:
        """Positions held now, per KV head."""
        return tuple(tuple(row) for row in self.positions.tolist())

    @property
    def min_margin(self) -> float:
        """The closest decision so far."""
        return min((eviction.margin for eviction in self.evictions), default=math.inf)

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
        weights = self._attend(q)  # [H_kv, G, S]
        outputs = (weights @ self.values).reshape(q.shape)
        self._observe(weights)
        host = None if host_retained is None else [set(map(int, row)) for row in host_retained]
        self._evict(host)
        return outputs

    def _append(self, k: Array, v: Array) -> None:
        num_kv_heads, head_dim = k.shape
        if self.num_tokens == 0:
            self.positions = np.empty((num_kv_heads, 0), np.int64)
            self.accumulated = np.empty((num_kv_heads, 0))
            self.keys = np.empty((num_kv_heads, 0, head_dim))
            self.values = np.empty((num_kv_heads, 0, v.shape[-1]))
        column = np.full((num_kv_heads, 1), self.num_tokens)
        self.positions = np.concatenate([self.positions, column], axis=1)
        self.accumulated = np.concatenate([self.accumulated, np.zeros_like(column)], axis=1)
        self.keys = np.concatenate([self.keys, k[:, None]], axis=1)
        self.values = np.concatenate([self.values, v[:, None]], axis=1)
        self.num_tokens += 1

    def _attend(self, q: Array) -> Array:
        """Return the attention weights of queries [H, D] as [H_kv, G, S]."""
        num_kv_heads, num_slots, head_dim = self.keys.shape
        scale = head_dim**-0.5 if self.scale is None else self.scale
        keys = self.keys
        if self.theta is not None:
            ranks = np.broadcast_to(np.arange(num_slots), self.positions.shape)
            angles = ranks if self.spec.rope == "reindex" else self.positions  # [H_kv, S]
            keys, q = rotate(keys, angles, self.theta), rotate(q, angles[0, -1], self.theta)
        groups = q.reshape(num_kv_heads, -1, head_dim)  # [H_kv, G, D]
        return softmax(groups @ keys.transpose(0, 2, 1) * scale)

    def _observe(self, weights: Array) -> None:
        self.last_row = pool(weights, self.spec)  # [H_kv, S]
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
            case "random":
                rows = enumerate(self.positions.tolist())
                hashes = [[self._random(head, p) for p in row] for head, row in rows]
                return np.array(hashes, np.uint64)
            case _:
                return self.positions

    def _random(self, kv_head: int, position: int) -> int:
        return random_score(self.spec.seed, self.layer, kv_head, self.num_tokens, position)

    def _is_protected(self) -> NDArray[np.bool_]:
        """Mark sinks, recent tokens and pinned spans, [H_kv, S]."""
        is_protected = self.positions < self.spec.sinks
        is_protected |= self.positions >= self.num_tokens - self.spec.recent
        for start, stop in self.spec.protect:
            is_protected |= (self.positions >= start) & (self.positions < stop)
        return is_protected

    def _evict(self, theirs: list[set[int]] | None) -> None:
        num_evicted = self.positions.shape[1] - token_slots(self.num_tokens, self.spec)
        if num_evicted:
            self._keep(self._decide(num_evicted, theirs))
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

    `outputs` is [H, T, D]; `retained[n - 1]` is what is held after n tokens.
    """

    outputs: Array
    retained: list[Retained]
    evictions: list[Eviction]
    near_ties: int

    @property
    def min_margin(self) -> float:
        """The closest decision of the run."""
        return min((eviction.margin for eviction in self.evictions), default=math.inf)


def replay_layer(
    spec: Spec | str,
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    *,
    layer: int = 0,
    scale: float | None = None,
    theta: float | None = None,
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
        host_retained: per token, the host's sets to follow at near-ties, or None.
    """
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    oracle = LayerOracle(parse(spec) if isinstance(spec, str) else spec, layer, scale, theta)
    outputs: list[Array] = []
    retained: list[Retained] = []
    for t in range(q.shape[1]):
        host = host_retained[t] if host_retained is not None else None
        outputs.append(oracle.step(q[:, t], k[:, t], v[:, t], host_retained=host))
        retained.append(oracle.retained)
    return LayerRun(np.stack(outputs, axis=1), retained, oracle.evictions, oracle.near_ties)
