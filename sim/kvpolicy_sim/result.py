"""What a replay found out about one policy: measured arrays, and the figures drawn from them.

Axes: H_kv KV heads, G query heads per KV head, T tokens, r rows (tokens with queries).
"""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from kvpolicy import CachePolicy, Ledger, Occupancy
from kvpolicy.footprint import PAGE_STATE_BYTES, peak_slots
from kvpolicy.ledger import check_evicted
from kvpolicy.ledger import mean as _mean
from kvpolicy.policy import EvictionPolicy
from kvpolicy.trace import Header
from kvpolicy.trace import Sequence as TracedSequence
from kvpolicy.trace.header import ITEM_BYTES
from kvpolicy_sim.details import RECALL_AT, Details
from kvpolicy_sim.layerwise import PolicyOutcome
from kvpolicy_sim.statistics import bootstrap_mean, mean_or_none, uncounted_steps

Place = tuple[int, int]
"""Sequence and layer."""


@dataclass(frozen=True)
class LayerResult:
    """Everything about one layer of one sequence."""

    sequence: int
    layer: int
    outcomes: dict[CachePolicy, PolicyOutcome]
    details: dict[CachePolicy, Details]
    optima: dict[CachePolicy, "Regret"]


@dataclass(frozen=True)
class Regret:
    """A policy's retained mass beside the offline optimum, in m units of a layer.

    A unit is a KV head or, under ``scope=layer``, the whole layer.

    Attributes:
        mass: Mean retained mass of the policy over the counted steps; [m].
        lower: Retained mass that a clairvoyant policy reaches; [m].
        upper: Retained mass that no policy exceeds; [m].
    """

    mass: np.ndarray
    lower: np.ndarray
    upper: np.ndarray


@dataclass
class PolicyResult:
    """One policy over all layers and sequences of a replay.

    Attributes:
        policy: The policy.
        header: The trace's header.
        sequences: The sequences replayed, by index.
        outcomes: Per sequence and layer.
        details: Likewise; empty if they were not measured.
        regrets: Likewise; empty without an oracle.
    """

    policy: CachePolicy
    header: Header = field(repr=False)
    sequences: dict[int, TracedSequence] = field(repr=False)
    outcomes: dict[Place, PolicyOutcome] = field(default_factory=dict, repr=False)
    details: dict[Place, Details] = field(default_factory=dict, repr=False)
    regrets: dict[Place, Regret] = field(default_factory=dict, repr=False)

    @property
    def budget(self) -> int | float | None:
        """Slots kept after an eviction, those of a memory included, mean over layers.

        None if a layer keeps all.
        """
        laws = [self.policy.of_layer(layer).occupancy for layer in self._layers]
        kept = [None if x.retained is None else x.retained + x.state_slots for x in laws]
        bounded = [slots for slots in kept if slots is not None]
        return _mean(bounded) if bounded and len(bounded) == len(kept) else None

    @property
    def seconds(self) -> float:
        """Time taken, summed over threads."""
        return sum(outcome.seconds for outcome in self.outcomes.values())

    @property
    def _layers(self) -> list[int]:
        """Layers replayed; those of the trace before there are any."""
        return sorted({layer for _, layer in self.outcomes}) or list(self.header.layers)

    def law(self, sequence: int, layer: int) -> Occupancy:
        """The occupancy law of a sequence in a layer, settled by its prompt."""
        law = self.policy.of_layer(layer).occupancy
        return law.of_prompt(self.sequences[sequence].prompt_len)

    @cached_property
    def _uncounted(self) -> dict[int, int]:
        """First steps of each sequence that do not count; none if no row lies beyond them.

        Where layers differ in their laws, all have to have begun to evict.
        """
        found = {
            sequence: max(uncounted_steps(self.law(sequence, layer)) for layer in self._layers)
            for sequence in self.sequences
        }
        stride = self.header.query_stride
        last_rows = {i: (x.tokens - 1) // stride * stride + 1 for i, x in self.sequences.items()}
        is_any_beyond = any(last_rows[sequence] > steps for sequence, steps in found.items())
        return found if is_any_beyond else dict.fromkeys(found, 0)

    def is_counted(self, sequence: int, steps: np.ndarray) -> np.ndarray:
        """Which steps count, given as tokens seen: those beyond `uncounted_steps`, or all."""
        return steps > self._uncounted[sequence]

    def counted_rows(self, sequence: int) -> np.ndarray:
        """Which rows of a sequence count; [r] bool."""
        tokens = self.sequences[sequence].tokens
        return self.is_counted(sequence, np.arange(0, tokens, self.header.query_stride) + 1)

    def masses(self, sequence: int) -> np.ndarray:
        """Retained mass of the counted rows of a sequence, [layers, H_kv, G, counted]."""
        rows = self.counted_rows(sequence)
        places = sorted(place for place in self.outcomes if place[0] == sequence)
        return np.stack([self.outcomes[place].retained_mass[..., rows] for place in places])

    @property
    def retained_mass(self) -> dict[str, Any]:
        """Mean, 5th percentile and minimum over counted steps and query heads.

        ``interval`` is the 95 % bootstrap interval of the mean over sequences, None of one.
        """
        parts = [self.masses(sequence).ravel() for sequence in self.sequences]
        parts = [part for part in parts if part.size]
        means = [float(part.mean(dtype=np.float64)) for part in parts]
        joined = np.concatenate(parts) if len(parts) > 1 else parts[0]
        return {
            "mean": float(joined.mean(dtype=np.float64)),
            "p5": float(np.percentile(joined, 5, overwrite_input=True)),
            "min": float(joined.min()),
            "interval": bootstrap_mean(means),
        }

    @property
    def head_mass(self) -> np.ndarray:
        """Mean retained mass over counted steps, [layers, H_kv]."""
        total, count = np.zeros(()), 0
        for sequence in self.sequences:
            masses = self.masses(sequence)
            total = total + masses.sum(axis=(2, 3), dtype=np.float64)
            count += masses.shape[2] * masses.shape[3]
        return total / count

    @property
    def output_error(self) -> dict[str, Any]:
        """Mean and 95th percentile of ||o' - o|| / ||o|| over counted steps and layers."""
        errors = [
            outcome.output_error[self.counted_rows(sequence)]
            for (sequence, _), outcome in self.outcomes.items()
            if outcome.output_error is not None
        ]
        if not errors:
            return {"mean": None, "p95": None}
        joined = np.concatenate(errors)
        return {"mean": float(joined.mean()), "p95": float(np.percentile(joined, 95))}

    @property
    def memory_share(self) -> float | None:
        """Mean share of the policy's own attention on its memory; None without one."""
        parts = [
            outcome.memory_share[self.counted_rows(sequence)]
            for (sequence, _), outcome in self.outcomes.items()
            if outcome.memory_share is not None
        ]
        return float(np.concatenate(parts).mean(dtype=np.float64)) if parts else None

    @property
    def lost_mass_by_age(self) -> list[float] | None:
        """Mean attention on evicted tokens of ages 2^b .. 2^(b+1)-1, for b = 0, 1, ..."""
        if not self.details:
            return None
        bins = max(found.lost_by_age.shape[-1] for found in self.details.values())
        total, rows = np.zeros(bins), 0
        for (sequence, _), found in self.details.items():
            counted = found.lost_by_age[:, self.is_counted(sequence, found.steps)]
            total[: counted.shape[-1]] += counted.sum(axis=(0, 1))
            rows += counted.shape[0] * counted.shape[1]
        return (total / max(rows, 1)).tolist()

    @property
    def recall(self) -> dict[str, float | None] | None:
        """Share of the k most attended tokens that were retained, by k."""
        if not self.details:
            return None
        found = {}
        for index, k in enumerate(RECALL_AT):
            rows = [
                d.recall[:, self.is_counted(sequence, d.steps), index].ravel()
                for (sequence, _), d in self.details.items()
            ]
            found[str(k)] = mean_or_none(np.concatenate(rows))
        return found

    @property
    def lifetime(self) -> dict[str, float] | None:
        """Steps that evicted tokens were held, their own included; None if none was evicted."""
        parts: list[np.ndarray] = []
        for outcome in self.outcomes.values():
            head, position = np.nonzero(outcome.evicted_at)
            parts.append(outcome.evicted_at[head, position] - position)
        steps = np.concatenate(parts)
        if not steps.size:
            return None
        p5, median, p95 = np.percentile(steps, (5, 50, 95))
        return {"p5": float(p5), "median": float(median), "p95": float(p95)}

    @property
    def marks(self) -> list[dict[str, Any]]:
        """Per marked span: attention on it that was retained, and its tokens kept at the end."""
        found: dict[str, tuple[list[float], list[float], list[float]]] = {}
        for place, details in self.details.items():
            sequence = self.sequences[place[0]]
            for index, (name, first, last) in enumerate(sequence.marks):
                mass, retained, kept = found.setdefault(name, ([], [], []))
                after = (details.steps > last) & self.is_counted(place[0], details.steps)
                mass.append(float(details.mark_mass[:, after, index].sum()))
                retained.append(float(details.mark_retained[:, after, index].sum()))
                kept.append(float((self.outcomes[place].evicted_at[:, first:last] == 0).mean()))
        return [
            {
                "name": name,
                "retained_mass": sum(retained) / sum(mass) if sum(mass) > 0 else None,
                "kept": float(np.mean(kept)),
            }
            for name, (mass, retained, kept) in found.items()
        ]

    @property
    def regret(self) -> dict[str, float] | None:
        """Share of the optimal retained mass that was missed, between two bounds."""
        if not self.regrets:
            return None
        weights = [
            np.full(len(regret.mass), self.counted_rows(sequence).sum())
            for (sequence, _), regret in self.regrets.items()
        ]
        mass, lower, upper = (
            float(np.average(np.concatenate(parts), weights=np.concatenate(weights)))
            for parts in (
                [getattr(regret, name) for regret in self.regrets.values()]
                for name in ("mass", "lower", "upper")
            )
        )
        return {
            "lower": max(0.0, 1 - mass / lower),
            "upper": max(0.0, 1 - mass / upper),
            "mass": mass,
            "optimum_lower": lower,
            "optimum_upper": upper,
        }

    def ledger(self, sequence: int) -> Ledger:
        """What the policy did to a sequence, counted from what left.

        Raises:
            LedgerError: The tokens evicted are not what the occupancy law demands.
        """
        outcomes = {layer: o for (at, layer), o in self.outcomes.items() if at == sequence}
        laws = {layer: self.law(sequence, layer) for layer in outcomes}
        tokens, heads = self.sequences[sequence].tokens, len(self.header.kv_heads)
        evicted, slots, bytes_held = list[float](), list[float](), 0
        for layer, outcome in outcomes.items():
            evicted.append(_mean((outcome.evicted_at > 0).sum(axis=1).tolist()))
            check_evicted(str(self.policy), tokens, evicted[-1], laws[layer])
            slots.append(tokens - evicted[-1] + laws[layer].state_slots)
            bytes_held += int(slots[-1] * heads * self._slot_bytes(layer)) + outcome.beside_bytes
        return Ledger(
            policy=str(self.policy),
            logical_tokens=tokens,
            retained=tokens - _mean(evicted),
            evicted=_mean(evicted),
            slots_held=_mean(slots),
            blocks_held=0,
            bytes_held=bytes_held,
            bytes_saved=tokens * len(outcomes) * heads * self._cell_bytes - bytes_held,
            evictions=max(law.evictions(tokens) for law in laws.values()),
            policy_seconds=sum(outcome.seconds for outcome in outcomes.values()),
            merged=_mean(outcome.merged for outcome in outcomes.values()),
        )

    def bytes_at_peak(self, sequence: int) -> int:
        """What a sequence took at its fullest moment: what has to be provided for it."""
        tokens, total = self.sequences[sequence].tokens, 0
        for (at, layer), outcome in self.outcomes.items():
            if at == sequence:
                slots = peak_slots(self.law(sequence, layer), tokens)
                total += len(self.header.kv_heads) * slots * self._slot_bytes(layer)
                total += outcome.beside_bytes
        return total

    @property
    def _cell_bytes(self) -> int:
        """Key and value of a token in one KV head."""
        return (self.header.head_dim + self.header.value_dim) * ITEM_BYTES[self.header.dtype]

    def _slot_bytes(self, layer: int) -> int:
        """A cell with its policy state in a layer."""
        is_evictable = isinstance(self.policy.of_layer(layer), EvictionPolicy)
        return self._cell_bytes + (PAGE_STATE_BYTES if is_evictable else 0)

    def as_dict(self, level: str) -> dict[str, Any]:
        """One entry of ``results``, JSON-ready."""
        ledgers = [self.ledger(sequence) for sequence in self.sequences]
        tokens = sum(ledger.logical_tokens for ledger in ledgers)
        regret, peak = self.regret, _mean(map(self.bytes_at_peak, self.sequences))
        layers = len(self._layers)
        return {
            "policy": str(self.policy),
            "budget": self.budget,
            "level": level,
            "retention_ratio": sum(ledger.retained for ledger in ledgers) / tokens,
            "retained_mass": self.retained_mass,
            "output_error": self.output_error,
            "memory_share": self.memory_share,
            "oracle_gap": None if regret is None else regret["upper"],
            "regret": regret,
            "recall": self.recall,
            "lost_mass_by_age": self.lost_mass_by_age,
            "lifetime": self.lifetime,
            "marks": self.marks,
            "head_mass": self.head_mass.tolist(),
            "evicted": _mean(ledger.evicted for ledger in ledgers),
            "merged": _mean(ledger.merged for ledger in ledgers),
            "bytes_kept": _mean(ledger.bytes_held for ledger in ledgers),
            "bytes_at_peak": peak,
            "slot_equivalents": peak / (layers * len(self.header.kv_heads) * self._cell_bytes),
            "ledgers": [ledger.as_dict() for ledger in ledgers],
            "seconds": self.seconds,
            "steps_per_second": tokens / self.seconds if self.seconds else None,
        }
