"""Float64 oracle of the Compressive Transformer's memory: a FIFO of pooled groups.

Axes as in `oracles.slots`; c tokens of a group.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from oracles.arithmetic import Array, log_sum_exp, relative_gap, rotate
from oracles.slots import Answer, Query, Slot, SlotMemory, Tokens


@dataclass
class Compressive(SlotMemory):
    """A FIFO of pooled groups; the list of a head's slots is in order of age."""

    kernels: Mapping[str, Array] = field(default_factory=dict)
    """Of this layer, for fn=conv: "keys" and "values", [H_kv, c, D, D]."""

    def slot_logits(self, head: int, query: Query) -> Array:
        keys = np.stack([slot.key for slot in self.heads[head]])
        return self.token_logits(query, keys) + [slot.bias for slot in self.heads[head]]

    def absorb(self, head: int, query: Query, evicted: Tokens, answer: Answer) -> None:
        if self.spec.fn == "most-used":
            fresh = self._most_used(query.position + 1, evicted)
        else:
            fresh = self._pooled(head, query, evicted, answer)
        self.heads[head] = (self.heads[head] + fresh)[-self.spec.state_slots :]

    def _most_used(self, num_tokens: int, evicted: Tokens) -> list[Slot]:
        """The 1 in c that received most attention per step; ties: the newest."""
        count = len(evicted.positions) // self.spec.rate
        use = evicted.use / (num_tokens - evicted.positions)
        order = sorted(range(len(use)), key=lambda j: (use[j], evicted.positions[j]))
        if count < len(use):
            self.margins.append(relative_gap(use[order[-count]], use[order[-count - 1]]))
        return [Slot(evicted.keys[j], evicted.values[j]) for j in sorted(order[-count:])]

    def _pooled(self, head: int, query: Query, evicted: Tokens, answer: Answer) -> list[Slot]:
        number = (evicted.positions - self.spec.sinks) // self.spec.rate
        groups = [evicted.take(number == index) for index in np.unique(number)]
        assert all(len(group.positions) == self.spec.rate for group in groups), "whole groups"
        taps = None
        if self.spec.fn == "conv" and self.spec.weights is None:
            taps = self._fitted_taps(query, groups, answer)
        alike = [group for group in groups if self._is_alike(group)]
        return [self._slot(head, query, group, taps, answer) for group in alike]

    def _is_alike(self, group: Tokens) -> bool:
        least = self.spec.min_similarity
        if least == -1.0:
            return True
        mean = group.raw_keys.mean(axis=0)
        cosines = [x @ mean / np.linalg.norm(x) / np.linalg.norm(mean) for x in group.raw_keys]
        similarity = float(np.mean(cosines))
        self.margins.append(abs(similarity - least) / max(abs(similarity), abs(least)))
        return similarity >= least

    def _slot(
        self, head: int, query: Query, group: Tokens, taps: Array | None, answer: Answer
    ) -> Slot:
        bias = math.log(self.spec.rate) if self.spec.bias == "log" else 0.0
        match self.spec.fn:
            case "mean":
                raw_key, value = group.raw_keys.mean(axis=0), group.values.mean(axis=0)
            case "max":
                raw_key, value = group.raw_keys.max(axis=0), group.values.max(axis=0)
            case "conv" if taps is not None:
                raw_key, value = taps @ group.raw_keys, taps @ group.values
            case "conv":
                raw_key = self._convolved(group.raw_keys, self.kernels["keys"][head])
                value = self._convolved(group.values, self.kernels["values"][head])
            case _:
                return self._preserving(query, group, answer)
        return Slot(self._placed(raw_key, group), value, bias)

    def _placed(self, raw_key: Array, group: Tokens) -> Array:
        """The key rotated at the group's mean position."""
        return rotate(raw_key, group.positions.mean(), self.theta)

    def _convolved(self, vectors: Array, kernel: Array) -> Array:
        """Sum over j and d of vectors[j, d] kernel[j, d, e]."""
        return sum((x @ w for x, w in zip(vectors, kernel, strict=True)), np.zeros(kernel.shape[2]))

    def _fitted_taps(self, query: Query, groups: list[Tokens], answer: Answer) -> Array:
        """Taps [c] that give the newest token's reading of all groups back, near 1 / c.

        One least-squares system: a block of rows for each group and query head, and the ridge.
        """
        rate = self.spec.rate
        rows, targets, gram = [], [], np.zeros((rate, rate))
        for group in groups:
            weights = np.exp(self.token_logits(query, group.keys) - answer.log_mass[:, None])
            for received in weights:  # [c], of one query head
                share = received.sum()
                rows.append(share * group.values.T)  # [D, c]
                targets.append(received @ group.values)
                gram += share**2 * group.values @ group.values.T
        pull = 0.01 * np.diag(gram).mean()
        rows.append(math.sqrt(pull) * np.eye(rate))
        targets.append(np.full(rate, math.sqrt(pull) / rate))
        return np.linalg.lstsq(np.concatenate(rows), np.concatenate(targets), rcond=None)[0]

    def _preserving(self, query: Query, group: Tokens, answer: Answer) -> Slot:
        """A slot that answers the newest token's query heads as the group does.

        Rotated keys and values are mixed as that token attends to them; the bias makes up for
        what the mixed key misses of each query head's log-mass, on average.
        """
        logits = self.token_logits(query, group.keys)  # [G, c]
        received = np.exp(logits - answer.log_mass[:, None]).sum(axis=0)  # [c]
        share = received / received.sum()
        key, value = share @ group.keys, share @ group.values
        missed = log_sum_exp(logits) - self.token_logits(query, key[None])[:, 0]  # [G]
        return Slot(key, value, float(missed.mean()))
