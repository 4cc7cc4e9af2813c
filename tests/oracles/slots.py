"""What every memory of the float64 oracle is asked, and memories that are slots.

A memory is asked by every query before it changes: tokens that a step evicts are absorbed
after that step's attention. Keys are rotated (RoPE, half-split) where they are attended, and
"raw" before that. Slow on purpose: lists of slots, loops over heads, nothing updated in place.

Axes: H_kv KV heads, G query heads per KV head, S token slots, M memory slots, D head_dim.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from oracles.arithmetic import Array, log_sum_exp, softmax
from oracles.specs import Spec


@dataclass(frozen=True)
class Tokens:
    """Tokens of one KV head, oldest first: positions [S], keys and values [S, D], use [S].

    `use` is the attention that each received since it was written, mean over query heads.
    """

    positions: NDArray[np.int64]
    raw_keys: Array
    keys: Array
    values: Array
    use: Array

    def take(self, chosen: NDArray[np.bool_]) -> "Tokens":
        """Give some of them."""
        return Tokens(
            self.positions[chosen],
            self.raw_keys[chosen],
            self.keys[chosen],
            self.values[chosen],
            self.use[chosen],
        )


@dataclass(frozen=True)
class Query:
    """The newest token's queries of one KV head, raw and rotated [G, D].

    `evicted` counts the tokens that were gone before this query.
    """

    raw: Array
    rotated: Array
    position: int
    evicted: int


@dataclass(frozen=True)
class Answer:
    """Outputs [G, D], weights of the tokens [G, S], and L, log-sum-exp of all logits [G]."""

    outputs: Array
    weights: Array
    log_mass: Array


@dataclass
class Memory(ABC):
    """Of one layer, with a state per KV head that `heads` holds.

    `margins` notes every discrete choice: how far the chosen was from the next best.
    """

    spec: Spec
    num_kv_heads: int
    scale: float
    theta: float
    margins: list[float] = field(default_factory=list, init=False)

    @abstractmethod
    def attend(self, head: int, query: Query, tokens: Tokens) -> Answer:
        """Attend to tokens and memory."""

    def reflect(self, num_tokens: int, tokens: Sequence[Tokens]) -> None:
        """Look at all tokens held, per KV head, after each attention, before the eviction."""
        del num_tokens, tokens  # most memories do not look

    @abstractmethod
    def absorb(self, head: int, query: Query, evicted: Tokens, answer: Answer) -> None:
        """Take in what leaves one KV head."""

    def token_logits(self, query: Query, keys: Array) -> Array:
        """Logits of the rotated queries over rotated keys [S, D]; [G, S]."""
        return query.rotated @ keys.T * self.scale


@dataclass(frozen=True)
class Slot:
    """A memory slot: its key, raw or rotated as its memory says, value, bias and mass."""

    key: Array
    value: Array
    bias: float = 0.0
    mass: float = 1.0


@dataclass
class SlotMemory(Memory):
    """Memory slots, attended in one softmax with the tokens."""

    def __post_init__(self) -> None:
        self.heads: list[list[Slot]] = [[] for _ in range(self.num_kv_heads)]

    @abstractmethod
    def slot_logits(self, head: int, query: Query) -> Array:
        """Logits over the filled slots of one KV head, biases included; [G, M]."""

    def attend(self, head: int, query: Query, tokens: Tokens) -> Answer:
        logits = self.token_logits(query, tokens.keys)
        num_slots = len(self.heads[head])
        if num_slots:
            logits = np.concatenate([self.slot_logits(head, query), logits], axis=1)
        weights = softmax(logits)
        values = np.stack([slot.value for slot in self.heads[head]] + list(tokens.values))
        return Answer(weights @ values, weights[:, num_slots:], log_sum_exp(logits))
