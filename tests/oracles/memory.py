"""Float64 oracles of what policies keep beside tokens, written from the definition.

Axes as in `oracles.slots`; E evicted tokens, c tokens of a group, F memory rows.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from oracles.arithmetic import Array, log_sum_exp, relative_gap, rotate, softmax
from oracles.compressive import Compressive
from oracles.decoder import Decoder
from oracles.feedback import FeedbackRows
from oracles.slots import Answer, Memory, Query, Slot, SlotMemory, Tokens
from oracles.specs import Spec


@dataclass
class Centroids(SlotMemory):
    """Centroids of like raw keys; slots of `fam` stand one behind the other."""

    def slot_logits(self, head: int, query: Query) -> Array:
        last = query.evicted + self.spec.sinks - 1
        logits = []
        for index, slot in enumerate(self.heads[head]):
            back = 0 if self.spec.name == "centroid" else self.spec.state_slots - 1 - index
            key = rotate(slot.key, last - back, self.theta)
            bias = math.log(slot.mass) if self.spec.bias == "log" else 0.0
            logits.append(query.rotated @ key * self.scale + bias)
        return np.stack(logits, axis=1)

    def absorb(self, head: int, query: Query, evicted: Tokens, answer: Answer) -> None:
        slots = list(self.heads[head])
        pairs = list(zip(evicted.raw_keys, evicted.values, strict=True))
        room = self.spec.state_slots - len(slots)
        slots += [Slot(key, value) for key, value in pairs[:room]]
        joined: list[list[tuple[Array, Array]]] = [[] for _ in slots]
        for key, value in pairs[room:]:
            joined[self._nearest(key, slots)].append((key, value))
        self.heads[head] = [
            self._moved(slot, members) for slot, members in zip(slots, joined, strict=True)
        ]

    def _nearest(self, key: Array, slots: list[Slot]) -> int:
        """The slot with the largest product; ties: the lowest slot."""
        products = [float(key @ slot.key) for slot in slots]
        best = products.index(max(products))
        others = products[:best] + products[best + 1 :]
        if others:
            self.margins.append(relative_gap(products[best], max(others)))
        return best

    def _moved(self, slot: Slot, members: list[tuple[Array, Array]]) -> Slot:
        mass = slot.mass + len(members)
        key = slot.mass * slot.key + sum(key for key, _ in members)
        value = slot.mass * slot.value + sum(value for _, value in members)
        return Slot(key / mass, value / mass, mass=mass)


def elu_plus_one(x: Array) -> Array:
    """Infini-attention's feature map sigma."""
    return np.where(x > 0, x + 1, np.exp(np.minimum(x, 0)))


@dataclass
class Infini(Memory):
    """Infini-attention's matrix and normaliser per KV head, and how they are mixed in."""

    gates: Array | None = None
    """[H_kv, G] of trained gates, already in 0..1."""

    def __post_init__(self) -> None:
        self.matrices: list[Array | None] = [None] * self.num_kv_heads
        self.norms: list[Array | None] = [None] * self.num_kv_heads
        self.samples: list[list[tuple[Array, Array]]] = [[] for _ in range(self.num_kv_heads)]

    def attend(self, head: int, query: Query, tokens: Tokens) -> Answer:
        logits = self.token_logits(query, tokens.keys)
        weights = softmax(logits)
        local = weights @ tokens.values
        matrix, norm, outputs = self.matrices[head], self.norms[head], local
        if matrix is not None and norm is not None:
            asked = elu_plus_one(query.raw)  # [G, D]
            recalled = asked @ matrix / (asked @ norm)[:, None]
            share = self._share(head, asked @ norm, log_sum_exp(logits))[:, None]
            outputs = share * recalled + (1 - share) * local
        return Answer(outputs, weights, log_sum_exp(logits))

    def _share(self, head: int, mass: Array, local: Array) -> Array:
        """Weight of what is recalled, per query head."""
        if self.spec.gate == "calibrated":
            return 1 / (1 + np.exp(local - self._log_mass(head, np.log(mass))))
        if self.gates is not None:
            return self.gates[head]
        return np.full_like(mass, float(self.spec.gate))

    def _log_mass(self, head: int, x: Array) -> Array:
        """A line through the samples of each query head, its slope drawn towards one."""
        xs, ys = (np.stack(column) for column in zip(*self.samples[head], strict=True))
        off_x, off_y = xs - xs.mean(axis=0), ys - ys.mean(axis=0)
        slope = ((off_x * off_y).sum(axis=0) + 1) / ((off_x**2).sum(axis=0) + 1)
        return ys.mean(axis=0) + slope * (x - xs.mean(axis=0))

    def absorb(self, head: int, query: Query, evicted: Tokens, answer: Answer) -> None:
        keys = elu_plus_one(evicted.raw_keys)  # [E, D]
        stored, norm = evicted.values, keys.sum(axis=0)
        before, norm_before = self.matrices[head], self.norms[head]
        if before is None or norm_before is None:
            self.matrices[head], self.norms[head] = keys.T @ stored, norm
        else:
            if self.spec.update == "delta":
                stored = stored - keys @ before / (keys @ norm_before)[:, None]
            self.matrices[head], self.norms[head] = before + keys.T @ stored, norm_before + norm
        x = np.log(elu_plus_one(query.raw) @ norm)
        self.samples[head].append((x, log_sum_exp(self.token_logits(query, evicted.keys))))


@dataclass(frozen=True)
class Given:
    """What a layer's memory is given beside tokens.

    `parameters` are the tensors of the file that a spec names, of all layers: "beta"
    [layers, H], or "keys" and "values" [layers, H_kv, c, D, D]. `decoder` and `rows` [F, hidden],
    its first memory rows, are for fam:level=model.
    """

    parameters: Mapping[str, Array] = field(default_factory=dict)
    decoder: Decoder | None = None
    rows: Array | None = None


def make_memory(
    spec: Spec, layer: int, num_kv_heads: int, scale: float, theta: float, given: Given
) -> Memory:
    """Make the memory of a spec that has one."""
    common = (spec, num_kv_heads, scale, theta)
    parameters = {name: np.asarray(x[layer]) for name, x in given.parameters.items()}
    match spec.name:
        case "compressive":
            return Compressive(*common, kernels=parameters)
        case "fam" if spec.level == "model":
            assert given.decoder is not None, "it needs the weights"
            assert given.rows is not None, "it needs the model's first rows"
            return FeedbackRows(*common, decoder=given.decoder, rows=given.rows)
        case "centroid" | "fam":
            return Centroids(*common)
        case _:
            beta = parameters.get("beta")
            gates = None if beta is None else 1 / (1 + np.exp(-beta.reshape(num_kv_heads, -1)))
            return Infini(*common, gates=gates)
