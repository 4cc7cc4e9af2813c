"""Gates of Infini-attention that suit a trace, in closed form.

With A the attention inside a segment, M what the memory recalls, and o the output of full
attention, a query head's constant gate g gives g M + (1 - g) A. Its squared error against o,
summed over the steps after the first segment, is a parabola in g with its least value at
<o - A, M - A> / |M - A|^2; a layer's output is its heads' side by side, so that every head has
its own. What the gate is fitted to does not depend on gates: M and A come from keys and values
alone.

Axes: H_kv KV heads, G query heads per KV head, n tokens of a segment, D head dimension.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvpolicy import UnsupportedError
from kvpolicy.memory.linear import LinearMemory, recall, store
from kvpolicy.memory.state import Shape
from kvpolicy.policies.infini import Infini
from kvpolicy.rotary import Rotary
from kvpolicy.trace import Header, Trace
from kvpolicy_sim.dense import attend
from kvpolicy_sim.fit import LayerFit, Losses
from kvpolicy_sim.inputs import LayerInputs

HELD_OUT = 0.25
"""Last part of each sequence on which gates fitted to the rest are judged, at least a segment."""

BOUND = 16.0
"""Largest |logit| of a gate: sigmoid(-16) is 1e-7."""


@dataclass(frozen=True)
class Parabola:
    """Squared error as a function of the gate, per head [H_kv, G] float64.

    Attributes:
        constant: Of a closed gate, |o - A|^2.
        linear: <o - A, M - A>.
        square: |M - A|^2.
        target: |o|^2, what errors are relative to.
    """

    constant: Tensor
    linear: Tensor
    square: Tensor
    target: Tensor

    def __add__(self, other: "Parabola") -> "Parabola":
        return Parabola(
            self.constant + other.constant,
            self.linear + other.linear,
            self.square + other.square,
            self.target + other.target,
        )

    @property
    def gate(self) -> Tensor:
        """The best gate in [0, 1]; closed where nothing tells."""
        return (self.linear / self.square.clamp(min=1e-300)).clamp(0, 1)

    def losses(self, gate: Tensor) -> Losses:
        """Relative error of closed gates and of these, over all heads."""
        open_ = self.constant - 2 * gate * self.linear + gate**2 * self.square
        total = float(self.target.sum().clamp(min=1e-300))
        return Losses(float(self.constant.sum()) / total, float(open_.sum()) / total)


class GateFitter:
    """Fits the gates of a trace's layers."""

    def __init__(
        self, trace: Trace, policy: Infini, sequences: Sequence[int], rotary: Rotary
    ) -> None:
        self.trace, self.policy, self.rotary = trace, policy, rotary
        self.sequences = sequences
        longest = max(trace.sequences[index].tokens for index in sequences)
        if longest <= 2 * policy.segment:
            raise UnsupportedError(
                f"{policy}: the longest sequence has {longest} tokens, so that no query follows a "
                "segment that has ended, or none but those held out; capture more than "
                f"{2 * policy.segment} tokens, or lower segment"
            )

    def run(self, layer: int) -> tuple[LayerFit, dict[str, Tensor]]:
        """Fit the gates of a layer's query heads."""
        early = late = None
        for sequence in self.sequences:
            inputs = LayerInputs.load(self.trace, sequence, layer, outputs=True)
            border = self._border(inputs.tokens)
            for first, found in self._segments(inputs):
                if first < border:
                    early = found if early is None else early + found
                else:
                    late = found if late is None else late + found
        assert early is not None, "a sequence is longer than two segments"
        assert late is not None, "every sequence with a border has a segment behind it"
        whole = early + late
        gate = whole.gate
        made = LayerFit(layer, whole.losses(gate), late.losses(early.gate))
        return made, {"beta": gate.flatten().logit().clamp(-BOUND, BOUND).float()}

    def blank(self, header: Header) -> dict[str, Tensor]:
        """Closed gates of the whole model."""
        return {"beta": torch.full((header.num_layers, header.num_query_heads), -BOUND)}

    def place(self, header: Header) -> Sequence[int]:
        """The query heads of the KV heads recorded."""
        group = header.group
        return [head * group + g for head in header.kv_heads for g in range(group)]

    def _border(self, tokens: int) -> int:
        """First token of a sequence from which segments are held out; the last one always is."""
        last = (tokens - 1) // self.policy.segment * self.policy.segment
        return min(round(tokens * (1 - HELD_OUT)), last)

    def _segments(self, inputs: LayerInputs) -> Iterator[tuple[int, Parabola]]:
        """Errors in every segment but the first, by its first token."""
        assert inputs.outputs is not None, "asked for"
        queries, keys, values = inputs.queries, inputs.keys, inputs.values
        shape = Shape.of(queries.flatten(0, 1)[None], keys[None], values[None])
        memory, places = LinearMemory.empty(shape), torch.arange(inputs.tokens)
        for first in range(0, inputs.tokens, self.policy.segment):
            part = slice(first, min(first + self.policy.segment, inputs.tokens))
            asked, within = queries[:, :, part], places[: part.stop - first]
            if first > 0:
                found = attend(asked.flatten(0, 1), keys[:, part], values[:, part], within, 1.0)
                assert found.out is not None, "asked for"
                raw = self.rotary.shift(asked / inputs.scale, -places[part])
                local = found.out.view(*asked.shape[:3], -1)
                recalled = recall(memory, raw[None]).output[0]
                yield first, _parabola(inputs.outputs[:, :, part], local, recalled)
            turned = self.rotary.shift(keys[:, part], -places[part])
            delta = self.policy.update == "delta"
            memory = store(memory, turned[None], values[None, :, part], delta=delta)


def _parabola(ideal: Tensor, local: Tensor, recalled: Tensor) -> Parabola:
    """Sums over the tokens of outputs [H_kv, G, n, D]."""
    ideal, local, recalled = ideal.double(), local.double(), recalled.double()
    missing, offered = ideal - local, recalled - local
    return Parabola(
        *(
            (x * y).sum(dim=(2, 3))
            for x, y in (
                (missing, missing),
                (missing, offered),
                (offered, offered),
                (ideal, ideal),
            )
        )
    )
