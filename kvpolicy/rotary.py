"""Rotary position embeddings, as far as retention needs them: turning a query.

A rotated key is never rotated again: repeated in-place rotation drifts (40 % error in fp16
after 4,096 shifts). Attending at cache ranks only changes the distance between query and
key, so it is the query that is turned, afresh at every step.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rotary:
    """RoPE with the half-split layout: dimension i pairs with i + rotary_dim / 2.

    Attributes:
        inverse_frequencies: [rotary_dim / 2] float32, radians per position.
    """

    inverse_frequencies: Tensor

    @classmethod
    def from_theta(cls, theta: float, rotary_dim: int) -> "Rotary":
        """Plain RoPE (arXiv 2104.09864, equation 15) without scaling."""
        exponents = torch.arange(0, rotary_dim, 2, dtype=torch.float32) / rotary_dim
        return cls(1.0 / theta**exponents)

    def shift(self, x: Tensor, offsets: Tensor) -> Tensor:
        """Move rotated vectors by `offsets` positions.

        Args:
            x: [..., T, D] float32, rotated at positions p; dimensions past rotary_dim stay.
            offsets: [T] or broadcastable to [..., T], positions to add to p.
        """
        half = self.inverse_frequencies.numel()
        angles = offsets.double()[..., None] * self.inverse_frequencies.to(x.device).double()
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        first, second, rest = x.split([half, half, x.shape[-1] - 2 * half], dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)
