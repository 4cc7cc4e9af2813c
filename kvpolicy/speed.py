"""How long a policy's own work takes, beside built-in policies at the same budget.

One request decodes through one attention layer of the core. Policies take turns, so that a slow
moment of the machine meets all of them.

Axes: H query heads, H_kv KV heads, D head dimension.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from kvpolicy.attention import AttentionLayer
from kvpolicy.engine import step
from kvpolicy.lookahead import extend
from kvpolicy.policy import CachePolicy
from kvpolicy.rotary import Rotary
from kvpolicy.slots import Slots

KV_HEADS, GROUP, HEAD_DIM = 8, 4, 128
"""A layer of Llama-3-8B."""

TOKENS = 192
"""Tokens of a round: several evictions at the default interval."""


@dataclass(frozen=True)
class Speed:
    """Medians over rounds, per token of one layer.

    Attributes:
        policy: The policy.
        policy_seconds: Observing, scoring and evicting.
        step_seconds: The whole step, attention included.
    """

    policy: CachePolicy
    policy_seconds: float
    step_seconds: float


def measure(
    policies: Sequence[CachePolicy],
    *,
    rounds: int = 3,
    advance: Callable[[float], object] = lambda _: None,
) -> list[Speed]:
    """Measure policies in alternation, each on a cache that is full from the start.

    Args:
        policies: What to measure.
        rounds: Rounds of each, `TOKENS` tokens long.
        advance: Told after every round of a policy.
    """
    runners = [_Runner(policy) for policy in policies]
    for _ in range(rounds):
        for runner in runners:
            runner.run()
            advance(1)
    return [runner.speed() for runner in runners]


class _Runner:
    """One policy's layer and request."""

    def __init__(self, policy: CachePolicy) -> None:
        self.policy = policy
        self.layer = AttentionLayer(policy, 0, HEAD_DIM**-0.5, Rotary.from_theta(1e4, HEAD_DIM))
        self._generator = torch.Generator().manual_seed(0)
        self._slots: Slots | None = None
        self._rounds: list[tuple[float, float]] = []

    def run(self) -> None:
        """Decode a round of tokens."""
        if self._slots is None:
            self._slots = self._filled()
        inputs = self._draw(TOKENS)
        self.layer.stopwatch.seconds = 0.0
        began = time.perf_counter()
        for n in range(TOKENS):
            step(self.layer, self._slots, *(x[:, :, n] for x in inputs))
        taken = time.perf_counter() - began
        self._rounds.append((self.layer.stopwatch.seconds / TOKENS, taken / TOKENS))

    def speed(self) -> Speed:
        """Medians of the rounds."""
        own, whole = (statistics.median(x) for x in zip(*self._rounds, strict=True))
        return Speed(self.policy, own, whole)

    def _filled(self) -> Slots:
        """A request that has filled its budget."""
        inputs = self._draw(self.policy.occupancy.token_capacity or TOKENS)
        slots = self.layer.new_slots(*inputs, prompts=[1])
        extend(self.layer, slots, *inputs)
        return slots

    def _draw(self, tokens: int) -> list[torch.Tensor]:
        """Random queries [1, H, T, D], keys and values [1, H_kv, T, D]."""
        heads = (KV_HEADS * GROUP, KV_HEADS, KV_HEADS)
        return [
            torch.randn(1, count, tokens, HEAD_DIM, generator=self._generator) for count in heads
        ]
