"""The occupancy law: how many slots a request holds after n tokens, and in which blocks.

Everything here is integer arithmetic on the number of tokens, so that no neighbour, chunk
border or clock can change what is held. The formulas use only operators that Python ints,
numpy arrays and torch tensors share, so one definition serves schedulers and kernels.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

Prompts = Literal["stream", "bulk", "keep"]
"""What a law makes of a prompt: tokens like others, one eviction at its end, or never evicted."""

N = TypeVar("N", bound=Any)
"""An integer, or an array or tensor of them."""


@dataclass(frozen=True)
class Occupancy:
    """Token slots held by one KV head of one layer, as a function of the tokens seen.

    With R = ``retained`` token slots kept after an eviction, ``held(n)`` is n while
    n < R + interval, then R + ((n - R) mod interval): a sawtooth between R and
    R + interval - 1, which touches ``capacity`` = R + interval only inside a step.

    The length P of a prompt enters where ``prompts`` says so, and `of_prompt` settles the law of
    one request. ``bulk``: n slots while n < P, then R + ((n - P) mod interval), so that the
    eviction at the prompt's end drops P - R tokens at once; prompts of at most R tokens are no
    special case. ``keep``: the P tokens stay, and the sawtooth counts the tokens behind them.

    Attributes:
        retained: Token slots left by an eviction; None keeps every token.
        interval: Tokens between two evictions.
        state_slots: Slots reserved from the start for policy state (inside the budget).
        prompts: How prompts are treated.
        prompt_tokens: P of a settled law of ``bulk``.
    """

    retained: int | None
    interval: int = 1
    state_slots: int = 0
    prompts: Prompts = "stream"
    prompt_tokens: int | None = None

    def of_prompt(self, prompt_tokens: int) -> "Occupancy":
        """The law of a request whose prompt has this many tokens."""
        if self.retained is None or self.prompts == "stream":
            return self
        if self.prompts == "keep":
            return Occupancy(self.retained + prompt_tokens, self.interval, self.state_slots)
        if prompt_tokens <= self.retained:
            return Occupancy(self.retained, self.interval, self.state_slots)
        return replace(self, prompt_tokens=prompt_tokens)

    @property
    def needs_prompt(self) -> bool:
        """Whether a prompt's length has to settle the law first."""
        return self.retained is not None and self.prompts != "stream" and not self.prompt_tokens

    @property
    def _origin(self) -> int:
        """Tokens from which on every interval-th one is followed by an eviction."""
        assert self.retained is not None, "asked for where something is evicted"
        assert not self.needs_prompt, "of_prompt settles the law"
        return self.prompt_tokens or self.retained

    @property
    def token_capacity(self) -> int | None:
        """Most token slots ever occupied behind a prompt; None when unbounded."""
        return None if self.retained is None else self.retained + self.interval

    @property
    def capacity(self) -> int | None:
        """Most slots ever occupied, reserved ones included; None when unbounded."""
        tokens = self.token_capacity
        return None if tokens is None else tokens + self.state_slots

    def limit(self, n: int) -> int | None:
        """Most token slots occupied from n tokens on; None when unbounded."""
        if self.token_capacity is None:
            return None
        assert not self.needs_prompt, "of_prompt settles the law"
        prompt = self.prompt_tokens or 0
        return max(prompt, self.token_capacity) if n < prompt else self.token_capacity

    def evicted(self, n: N) -> N:
        """Tokens evicted once n tokens were processed (int or integer tensor)."""
        if self.retained is None:
            return n * 0
        origin = self._origin
        return (n >= origin) * (n - self.retained - (n - origin) % self.interval)

    def held(self, n: N) -> N:
        """Token slots held once n tokens were processed (int or integer tensor)."""
        return n - self.evicted(n)

    def surplus(self, n: int) -> int:
        """Token slots dropped by the eviction after the n-th token; 0 if none is due."""
        return self.evicted(n) - self.evicted(n - 1) if n > 0 else 0

    def evictions(self, n: int) -> int:
        """Number of evictions among the first n tokens."""
        if self.retained is None or n < self._origin:
            return 0
        return (n - self._origin) // self.interval + (self._origin > self.retained)

    def is_due(self, n: int) -> bool:
        """Whether an eviction follows the attention of the n-th token."""
        return self.surplus(n) > 0

    def next_due(self, n: int) -> int | None:
        """Smallest m > n at which an eviction is due; None if there never is one."""
        if self.retained is None:
            return None
        origin = self._origin
        first = origin if origin > self.retained else origin + self.interval
        return first if n < first else n + self.interval - (n - origin) % self.interval

    def window_age(self, n: int, window: int) -> int:
        """How far the n-th token is into the last `window` tokens before the eviction to come.

        It is 1 at the first of them and below 1 before it. A window never reaches back behind
        the eviction before, so that all its tokens see the same slots.
        """
        due = self.next_due(n - 1)
        assert due is not None, "asked for where something is evicted"
        before = due - self.interval if due > (self.next_due(0) or 0) else 0
        return n - max(before, due - window)

    def num_blocks(self, n: int, block_size: int) -> int:
        """Blocks of `block_size` slots that a request needs for its first n tokens, rounded up.

        Those of a ``bulk`` prompt that later tokens do not need are free once it is over. While
        the prompt's length is not known, all n tokens may be prompt.
        """
        slots = n
        if self.token_capacity is not None and not self.needs_prompt:
            is_prompt = n <= (self.prompt_tokens or 0)
            slots = n if is_prompt else min(n, self.token_capacity)
        return -(-(slots + self.state_slots) // block_size)
