"""Random eviction: the floor that every policy must beat."""

from typing import TYPE_CHECKING, ClassVar

from kvpolicy.policy import EvictionPolicy, View

if TYPE_CHECKING:
    from torch import Tensor


class Random(EvictionPolicy):
    """Evict at random, reproducibly, per KV head.

    The score of position p at the eviction after token n is splitmix64 (Steele, Lea and
    Flood 2014) chained over (seed, layer, kv_head, n, p), as an unsigned 64-bit integer: no
    request identity and no generator state, so every host draws the same tokens.

    Attributes:
        seed: First link of the chain.
    """

    name: ClassVar[str] = "random"
    paper: ClassVar[str] = "splitmix64: Steele et al. 2014, doi 10.1145/2660193.2660195"

    seed: int = 0

    def score(self, view: View) -> "Tensor":
        """Rate a slot by the hash of its identity."""
        state = splitmix64(view.n * 0 + self.seed)
        for value in (view.layer, view.kv_heads, view.n, view.positions):
            state = splitmix64(state ^ value)
        return state ^ _SIGN


_SIGN = -(1 << 63)


def splitmix64(x: "Tensor") -> "Tensor":
    """The splitmix64 finaliser on int64 tensors, which wrap like the unsigned 64-bit words."""
    x = x + _word(0x9E3779B97F4A7C15)
    x = (x ^ _shift(x, 30)) * _word(0xBF58476D1CE4E5B9)
    x = (x ^ _shift(x, 27)) * _word(0x94D049BB133111EB)
    return x ^ _shift(x, 31)


def _word(value: int) -> int:
    """The int64 with the bits of an unsigned 64-bit constant."""
    return value - (1 << 64)


def _shift(x: "Tensor", bits: int) -> "Tensor":
    """Logical right shift: int64 shifts arithmetically, so drop the copied sign bits."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
