"""A decoder layer's own weights, as far as a memory may use them."""

from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from torch import Tensor


class Projected(NamedTuple):
    """Hidden states as queries, keys and values, before rotation.

    Attributes:
        q: [B, H, F, D].
        k: [B, H_kv, F, D].
        v: [B, H_kv, F, D].
    """

    q: "Tensor"
    k: "Tensor"
    v: "Tensor"


class Decoder(Protocol):
    """One pre-norm decoder layer, taken apart: all of it but the attention itself."""

    def project(self, hidden: "Tensor") -> Projected:
        """Normalise hidden states [B, F, d_model] and project them."""
        ...

    def finish(self, attended: "Tensor", residual: "Tensor | None") -> "Tensor":
        """Give FF(PreLN(A)) + A for A = W_O attended + residual; [B, F, d_model].

        Args:
            attended: [B, H, F, D].
            residual: [B, F, d_model], or None for zero.
        """
        ...

    def start(self, num_rows: int) -> "Tensor":
        """First states of so many memory rows in this layer, [num_rows, d_model]."""
        ...
