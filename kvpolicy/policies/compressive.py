"""Compressive memory: tokens that leave the window are pooled into a FIFO of fewer slots."""

import math
from typing import TYPE_CHECKING, ClassVar, Literal

from kvpolicy.errors import PolicyError
from kvpolicy.memory.policy import PARAMETER_SUFFIX, SlotMemoryPolicy, memory_slots
from kvpolicy.occupancy import Occupancy

if TYPE_CHECKING:
    from kvpolicy.memory.state import Memory, Passage, Setting, Shape, SlotMemory


class Compressive(SlotMemoryPolicy):
    """Keep the newest tokens, and `rate` older ones a slot beyond them (Compressive Transformer).

    The budget is a window of recent tokens and a compressed FIFO. Every `rate` consecutive
    tokens that leave the window become one slot (Rae et al. 2019, section 3.1: a function
    f_c from n_s activations to n_s / c); the FIFO's oldest slots are overwritten. Groups are
    counted by absolute index, (position - sinks) // rate, whatever the chunking.

    `fn`: ``mean`` and ``max`` pool elementwise, ``most-used`` keeps the tokens that received
    most attention per step in the window, 1 in `rate` of those that leave together. ``conv``
    is a strided convolution of `rate` taps; without `weights` its taps are fitted at each
    eviction, by least squares on the attention output of the newest token's query heads, and
    `weights` names a file of kernels fitted to traces with the attention-reconstruction loss.
    ``attention`` gives each slot the value and the bias that answer the newest token's query
    heads as its tokens would (exactly, for one query head).

    ``bias=log`` adds log(rate) to a slot's logits, so that `rate` equal tokens weigh as before.

    Deviations: keys and values are compressed instead of hidden states, keys before rotation and
    rotated once at the group's mean position (pooling rotated keys blurs fast frequencies).

    Attributes:
        budget: Slots kept per KV head after an eviction, compressed ones included.
        interval: Tokens between two evictions, rounded up to a multiple of `rate`.
        rate: Tokens to a compressed slot, c.
        memory: Compressed slots; a float is a fraction of the budget.
        fn: The compression function.
        weights: File of fitted kernels, for ``fn=conv``.
        min_similarity: Least mean cosine of a group's keys to their mean; groups below it are
            dropped instead of blurred.
        sinks: First tokens that are never evicted nor compressed.
    """

    name: ClassVar[str] = "compressive"
    paper: ClassVar[str] = "Rae et al. 2019, arXiv 1911.05507"

    rate: int = 3
    memory: int | float = 0.5
    fn: Literal["mean", "max", "most-used", "conv", "attention"] = "mean"
    weights: str | None = None
    min_similarity: float = -1.0
    sinks: int = 0

    def __post_init__(self) -> None:
        """Round the interval up to whole groups."""
        if isinstance(self.interval, int):
            object.__setattr__(self, "interval", _round_up(self.interval, self.rate))
        if self.fn == "most-used":  # the only function that looks at attention
            object.__setattr__(self, "needs", ("accumulated",))
        super().__post_init__()

    def validate(self) -> None:
        """Refuse sizes that do not fit together and parameters that would be ignored."""
        if self.rate < 1 or self.sinks < 0:
            raise PolicyError(
                f"compressive: rate must be at least 1 and sinks must not be negative, got "
                f"rate={self.rate}, sinks={self.sinks}"
            )
        if not -1.0 <= self.min_similarity <= 1.0:
            raise PolicyError(
                f"compressive: min_similarity is a cosine in -1..1, got {self.min_similarity}"
            )
        if self.fn == "most-used" and self.min_similarity > -1.0:
            raise PolicyError("compressive: fn=most-used merges nothing; drop min_similarity")
        if self.fn == "most-used" and self.bias == "none":
            raise PolicyError(
                "compressive: tokens of fn=most-used stand for themselves, without a bias; drop "
                "bias=none"
            )
        if self.fn == "attention" and self.bias == "none":
            raise PolicyError("compressive: fn=attention fits each slot's bias; drop bias=none")
        if self.weights is not None and self.fn != "conv":
            raise PolicyError(f"compressive: weights are kernels of fn=conv; got fn={self.fn}")
        if self.weights is not None and not self.weights.endswith(PARAMETER_SUFFIX):
            raise PolicyError(
                f"compressive: weights must be a file that ends in {PARAMETER_SUFFIX}, got "
                f"{self.weights!r}"
            )
        if self.protect:
            raise PolicyError(
                "compressive: groups are consecutive tokens, which protect would break; drop "
                "protect, or use sinks"
            )
        memory_slots(self, self.memory, self.sinks)
        super().validate()

    @property
    def default_interval(self) -> int:
        """At most 6 % above the budget, in whole groups."""
        return _round_up(super().default_interval, self.rate)

    @property
    def occupancy(self) -> Occupancy:
        """Compressed slots are reserved from the start."""
        assert self.interval is not None, "filled in by __post_init__"
        reserved = memory_slots(self, self.memory, self.sinks)
        return Occupancy(self.budget - reserved, self.interval, reserved)

    @property
    def sink_slots(self) -> int:
        """Number of first tokens that are never evicted."""
        return self.sinks

    @property
    def parameter_file(self) -> str | None:
        """Fitted kernels."""
        return self.weights

    def new_memory(self, shape: "Shape", setting: "Setting") -> "SlotMemory":
        """Make empty slots."""
        if self.weights is not None:
            from kvpolicy.memory.pooling import load_kernels

            load_kernels(self.weights, setting, shape.kv_heads, (self.rate, shape.head_dim))
        return super().new_memory(shape, setting)

    def absorb(self, memory: "Memory", passage: "Passage") -> "SlotMemory":
        """Compress the evicted tokens, group by group, and push them."""
        from kvpolicy.memory import pooling
        from kvpolicy.memory.fifo import push
        from kvpolicy.memory.state import slots_of

        return push(slots_of(memory), pooling.compress(self, passage))

    def merged(self, memory: "Memory", row: int, evicted: int) -> float:
        """Tokens in filled slots: `rate` each, or one of fn=most-used."""
        from kvpolicy.memory.state import slots_of

        del evicted
        filled = (slots_of(memory).mass[row] > 0).sum(dim=-1).double().mean().item()
        return filled * (1 if self.fn == "most-used" else self.rate)


def _round_up(number: int, multiple: object) -> int:
    """The next multiple; the number itself while the multiple is not validated yet."""
    if not isinstance(multiple, int) or multiple < 1:
        return number
    return math.ceil(number / multiple) * multiple
