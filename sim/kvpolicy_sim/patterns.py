"""What synthetic attention looks like: queries and keys with planted logits.

Every logit is a sum of three parts: what a pattern plants, a preference for recent tokens, and
noise. Each part lives in dimensions of its own, turned by a random rotation per head, so that
nothing but the logits shows what was planted.

Axes: T tokens, n tokens of a block, G query heads per KV head, D head dimension, F features
(dimensions of what a pattern plants).
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 512
"""Tokens drawn at once; part of what a seed means."""

LEAST_HEAD_DIM = 32
SINKS = 4
SINK_SHARE = 0.5
NEEDLE_SHARE = 0.6
NEEDLE = 8
"""Tokens of the needle."""

_FREQUENCIES = tuple(0.7 / 2.5**i for i in range(9))
"""Radians per token of what makes tokens prefer recent ones."""

_RECENCY = len(_FREQUENCIES) * math.log(2.5)
"""Logit of a token for itself, above that of distant ones.

The frequencies are a geometric series, so this much makes weight fall as 1 / distance: every
doubling of the distance has equal weight, which no context length changes.
"""

_NOISE = 0.7
"""Standard deviation of the logits' noise."""

_TOPIC = 8.0
"""Logit of what belongs most to the topic at hand."""

_TOPIC_DIMS = 16
"""Most dimensions of topics: more than that changes little."""

_LIVE_TOPICS = 4
_NEW_TOPIC = 0.35
"""Chance that a stretch of text has a topic that was never there."""

_NOISE_DIMS = 6
"""Least dimensions of noise."""

_HEAVIEST = 8.0
"""Largest logit of a heavy hitter."""


@dataclass(frozen=True)
class Planted:
    """What a pattern plants in one head: logits are `queries @ keys.T`.

    Attributes:
        keys: [T, F].
        queries: [T, F].
        value_scale: [T], factor on the values.
        recency: Factor on the preference for recent tokens.
    """

    keys: Tensor
    queries: Tensor
    value_scale: Tensor
    recency: float = 1.0


@dataclass(frozen=True)
class Ground:
    """Where a pattern is planted.

    Attributes:
        tokens: T.
        room: Most features.
        text: Draws what all heads of a trace see alike, such as topics.
        head: Draws what differs between heads.
    """

    tokens: int
    room: int
    text: torch.Generator
    head: torch.Generator


@dataclass(frozen=True)
class Block:
    """Consecutive tokens of one KV head, float32.

    Attributes:
        q: [G, n, D].
        k: [n, D].
        v: [n, D].
    """

    q: Tensor
    k: Tensor
    v: Tensor


class Head:
    """One KV head and its group, drawn block by block.

    Args:
        pattern: A name of `PATTERNS`.
        tokens: T.
        group: G.
        head_dim: D.
        seed: Of the trace: the same text for all heads.
        layer: Index of the layer; with `kv_head` it makes the head differ from others.
        kv_head: Index of the KV head.
    """

    def __init__(
        self,
        pattern: str,
        *,
        tokens: int,
        group: int,
        head_dim: int,
        seed: int,
        layer: int,
        kv_head: int,
    ) -> None:
        self._draw = generator(seed, layer + 1, kv_head)
        self._tokens, self._group, self._dim = tokens, group, head_dim
        room = head_dim - 2 * len(_FREQUENCIES) - _NOISE_DIMS
        self._planted = PATTERNS[pattern](Ground(tokens, room, generator(seed), self._draw))
        normal = torch.randn(head_dim, head_dim, generator=self._draw)
        self._rotation = torch.linalg.qr(normal).Q
        # Query heads of a group follow the pattern more and less closely.
        self._gains = 0.95 + 0.1 * torch.rand(group, 1, 1, generator=self._draw)

    def blocks(self) -> Iterator[Block]:
        """All tokens in order, `BLOCK` at a time."""
        for begin in range(0, self._tokens, BLOCK):
            yield self._block(torch.arange(begin, min(begin + BLOCK, self._tokens)))

    def _block(self, positions: Tensor) -> Block:
        tokens, planted = slice(int(positions[0]), int(positions[-1]) + 1), self._planted
        waves = _waves(positions)  # [n, 2 * len(_FREQUENCIES)]
        noise_dims = self._dim - waves.shape[1] - planted.keys.shape[1]
        spread = (_NOISE**2 / noise_dims) ** 0.25
        noise = self._normal(1 + self._group, len(positions), noise_dims) * spread
        keys = torch.cat([waves, planted.keys[tokens], noise[0]], dim=-1)
        wanted = torch.cat([waves * planted.recency, planted.queries[tokens]], dim=-1)
        queries = torch.cat([wanted * self._gains, noise[1:]], dim=-1)  # [G, n, D]
        scale = self._dim**0.25  # queries and keys share the root of D that logits are divided by
        values = self._normal(len(positions), self._dim) * planted.value_scale[tokens, None]
        return Block(q=queries @ self._rotation * scale, k=keys @ self._rotation * scale, v=values)

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self._draw)


def generator(*parts: int) -> torch.Generator:
    """A generator of its own for every tuple of small numbers."""
    state = 0
    for part in parts:
        # Multiplying by an odd constant spreads neighbouring numbers over all 64 bits.
        state = (state ^ (part + 1)) * 0x9E3779B97F4A7C15 & (1 << 63) - 1
    return torch.Generator().manual_seed(state)


def needle_span(tokens: int, seed: int) -> tuple[int, int]:
    """First and past-the-last position of the needle."""
    return _needle_span(tokens, generator(seed))


def question_length(tokens: int) -> int:
    """Tokens at the end that ask for the needle."""
    return max(NEEDLE, tokens // 32)


def _sink(ground: Ground) -> Planted:
    """Much weight on the first tokens, whatever the context, and recency."""
    keys = torch.zeros(ground.tokens, 1)
    keys[:SINKS] = 1.0
    scale = torch.ones(ground.tokens)
    scale[:SINKS] = 0.1  # models give sinks small values, so that they carry little
    return Planted(keys, _odds(ground.tokens, SINK_SHARE, SINKS), scale)


def _heavy(ground: Ground) -> Planted:
    """A few tokens of lasting weight: the k-th heaviest of n weighs n / k (Zipf), and recency."""
    logits = -torch.rand(ground.tokens, generator=ground.head).clamp(min=math.exp(-_HEAVIEST)).log()
    return Planted(logits[:, None], torch.ones(ground.tokens, 1), torch.ones(ground.tokens))


def _drift(ground: Ground) -> Planted:
    """Topics that come, go and often return: what was of no use for long is needed again.

    A topic holds its tokens together only while it lasts, so that what gathered weight for long,
    or has it now, says little about what comes back.
    """
    topics = _topics(ground)  # [T, F]
    belonging = 0.5 + 0.5 * torch.rand(ground.tokens, 1, generator=ground.head)
    return Planted(topics * belonging, topics * _TOPIC, torch.ones(ground.tokens), recency=0.5)


def _needle(ground: Ground) -> Planted:
    """A span that nothing attends to until the last queries, which attend to little else."""
    begin, end = _needle_span(ground.tokens, ground.text)
    keys = torch.zeros(ground.tokens, 1)
    keys[begin:end] = 1.0
    queries = _odds(ground.tokens, NEEDLE_SHARE, NEEDLE)
    queries[: ground.tokens - question_length(ground.tokens)] = 0.0
    return Planted(keys, queries, torch.ones(ground.tokens))


Plant = Callable[[Ground], Planted]

PATTERNS: dict[str, Plant] = {
    "sink": _sink,
    "heavy": _heavy,
    "drift": _drift,
    "needle": _needle,
}


def _needle_span(tokens: int, text: torch.Generator) -> tuple[int, int]:
    begin = round(tokens * (0.15 + 0.45 * float(torch.rand((), generator=text))))
    return begin, begin + NEEDLE


def _odds(tokens: int, share: float, count: int) -> Tensor:
    """Logits [T, 1] that give `count` tokens a share of every row's weight."""
    waves = _waves(torch.arange(tokens))
    by_distance = (waves @ waves[0] + _NOISE**2 / 2).exp()  # [T], expected weight
    others = by_distance.cumsum(dim=0)
    return (share / (1 - share) * others / count).log()[:, None]


def _topics(ground: Ground) -> Tensor:
    """The topic of every token, a unit vector, [T, F]: stretches of 32 to 128 tokens."""
    dims, text = min(_TOPIC_DIMS, ground.room), ground.text
    topics = torch.empty(ground.tokens, dims)
    live: list[Tensor] = []  # the newest last; older ones are gone for good
    begin = 0
    while begin < ground.tokens:
        is_new = len(live) < 2 or float(torch.rand((), generator=text)) < _NEW_TOPIC
        if is_new:
            vector = torch.randn(dims, generator=text)
            live = [*live, vector / vector.norm()][-_LIVE_TOPICS:]
        else:
            live.append(live.pop(int(torch.randint(len(live) - 1, (), generator=text))))
        end = begin + int(torch.randint(32, 129, (), generator=text))
        topics[begin:end] = live[-1]
        begin = end
    return topics


def _waves(positions: Tensor) -> Tensor:
    """Features whose products fall with the distance of two positions, as those of RoPE do."""
    angles = positions.double()[:, None] * torch.tensor(_FREQUENCIES, dtype=torch.float64)
    amplitude = math.sqrt(_RECENCY / len(_FREQUENCIES))
    return torch.cat([angles.cos(), angles.sin()], dim=-1).float() * amplitude
