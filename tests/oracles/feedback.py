"""Float64 oracle of TransformerFAM's memory with the model's own weights.

Axes as in `oracles.slots`; F memory rows.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from oracles.arithmetic import Array, rotate, softmax
from oracles.decoder import Decoder
from oracles.slots import Answer, Query, Slot, SlotMemory, Tokens
from oracles.specs import Spec


@dataclass
class FeedbackRows(SlotMemory):
    """TransformerFAM's rows of hidden states, algorithm 2, in one layer."""

    decoder: Decoder
    rows: Array
    """[F, hidden]: as they were at the last boundary, at first those of the model."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.num_updates = 0
        self._project(self._places(-1))

    def slot_logits(self, head: int, query: Query) -> Array:
        return self.token_logits(query, np.stack([slot.key for slot in self.heads[head]]))

    def absorb(self, head: int, query: Query, evicted: Tokens, answer: Answer) -> None:
        """Rows have read the tokens when their block was complete."""

    def reflect(self, num_tokens: int, tokens: Sequence[Tokens]) -> None:
        block = self.spec.block
        behind = num_tokens - self.spec.sinks
        if behind < block or behind % block:
            return
        here, before = self._places(num_tokens - 1), self._places(num_tokens - 1 - block)
        if self.spec.query == "current":
            asked_at = here
        else:
            asked_at = before if self.num_updates else self._places(-1)
        queries = self.decoder.project(self.rows)[0]  # [F, H, D]
        group = queries.shape[1] // self.num_kv_heads
        attended = np.empty_like(queries)
        for index in range(queries.shape[1]):
            head = index // group
            newest = tokens[head].take(tokens[head].positions >= num_tokens - block)
            keys = np.stack([slot.key for slot in self.heads[head]] + list(newest.keys))
            values = np.stack([slot.value for slot in self.heads[head]] + list(newest.values))
            asked = rotate(queries[:, index], asked_at, self.theta)
            attended[:, index] = softmax(asked @ keys.T * self.scale) @ values
        self.rows = self.decoder.finish(attended, self.rows if self.num_updates else 0.0)
        self.num_updates += 1
        self._project(here)

    def _project(self, places: NDArray[np.int64]) -> None:
        """Write the slots that tokens attend to."""
        _, keys, values = self.decoder.project(self.rows)  # [F, H_kv, D]
        for head in range(self.num_kv_heads):
            rotated = rotate(keys[:, head], places, self.theta)
            self.heads[head] = [Slot(*pair) for pair in zip(rotated, values[:, head], strict=True)]

    def _places(self, last: int) -> NDArray[np.int64]:
        """F positions up to `last`."""
        return np.arange(last - len(self.rows) + 1, last + 1)


def first_rows(decoders: Sequence[Decoder], row: Array, spec: Spec, theta: float) -> list[Array]:
    """Rows before any token, in each layer: one hidden state repeated, taken through the layers.

    Within a layer each row attends to all rows, at positions -F..-1.
    """
    rows = np.tile(row, (spec.state_slots, 1))
    places = np.arange(-spec.state_slots, 0)
    found = []
    for decoder in decoders:
        found.append(rows)
        queries, keys, values = decoder.project(rows)
        attended = np.empty_like(queries)
        for index in range(decoder.num_query_heads):
            head = index * decoder.num_kv_heads // decoder.num_query_heads
            q, k = (rotate(x, places, theta) for x in (queries[:, index], keys[:, head]))
            attended[:, index] = softmax(q @ k.T / math.sqrt(q.shape[1])) @ values[:, head]
        rows = decoder.finish(attended, rows)
    return found
