"""The occupancy law: how many slots a request holds after n tokens, and in which blocks.

Everything here is integer arithmetic on the number of tokens, so that no neighbour, chunk
border or clock can change what is held. The formulas use only operators that Python ints,
numpy arrays and torch tensors share, so one definition serves schedulers and kernels.
"""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Occupancy:
    """Token slots held by one KV head of one layer, as a function of the tokens seen.

    With R = ``retained`` token slots kept after an eviction, ``held(n)`` is n while
    n < R + interval, then R + ((n - R) mod interval): a sawtooth between R and
    R + interval - 1, which touches ``capacity`` = R + interval only inside a step.

    Attributes:
        retained: Token slots left by an eviction; None keeps every token.
        interval: Tokens between two evictions.
        state_slots: Slots reserved from the start for policy state (inside the budget).
    """

    retained: int | None
    interval: int = 1
    state_slots: int = 0

    @property
    def token_capacity(self) -> int | None:
        """Most token slots ever occupied; None when unbounded."""
        return None if self.retained is None else self.retained + self.interval

    @property
    def capacity(self) -> int | None:
        """Most slots ever occupied, reserved ones included; None when unbounded."""
        tokens = self.token_capacity
        return None if tokens is None else tokens + self.state_slots

    def evicted(self, n: Any) -> Any:
        """Tokens evicted once n tokens were processed (int or integer tensor)."""
        if self.retained is None:
            return n * 0
        return (n >= self.retained) * ((n - self.retained) // self.interval * self.interval)

    def held(self, n: Any) -> Any:
        """Token slots held once n tokens were processed (int or integer tensor)."""
        return n - self.evicted(n)

    def evictions(self, n: int) -> int:
        """Number of evictions among the first n tokens."""
        return self.evicted(n) // self.interval

    def is_due(self, n: int) -> bool:
        """Whether an eviction follows the attention of the n-th token."""
        return n > 0 and self.evicted(n) != self.evicted(n - 1)

    def next_due(self, n: int) -> int | None:
        """Smallest m > n at which an eviction is due; None if there never is one."""
        if self.retained is None:
            return None
        first = self.retained + self.interval
        return first if n < first else n + self.interval - (n - self.retained) % self.interval

    def num_blocks(self, n: int, block_size: int) -> int:
        """Blocks of `block_size` slots that n tokens occupy at their peak, rounded up."""
        slots = n + self.state_slots
        if self.capacity is not None:
            slots = min(slots, self.capacity)
        return -(-slots // block_size)
