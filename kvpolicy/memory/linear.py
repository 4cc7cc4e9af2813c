"""Linear-attention memory: a matrix that associates keys with values (Infini-attention).

With sigma(x) = ELU(x) + 1 it holds M = sum sigma(k) v^T and z = sum sigma(k), over keys before
rotation, and answers sigma(q) M / (sigma(q) z): arXiv 2404.07143, equations 7 to 9.

Axes as in `kvpolicy.memory.state`.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from kvpolicy.memory.state import Memory, Shape


@dataclass(frozen=True)
class LinearMemory(Memory):
    """Fixed-size state of B rows, float32.

    Attributes:
        matrix: [B, H_kv, D, D_v], M.
        normaliser: [B, H_kv, D], z.
        fits: [B, H_kv, G, 5], running statistics of (log(sigma(q) z), true log-mass) over the
            segments seen: count, both means, sum of squared deviations of the first, sum of
            products of deviations.
    """

    matrix: Tensor
    normaliser: Tensor
    fits: Tensor

    @classmethod
    def empty(cls, shape: Shape) -> "LinearMemory":
        """Nothing stored."""
        size, device, dtype = (shape.rows, shape.kv_heads), shape.device, torch.float32
        return cls(
            matrix=torch.zeros(*size, shape.head_dim, shape.value_dim, device=device, dtype=dtype),
            normaliser=torch.zeros(*size, shape.head_dim, device=device, dtype=dtype),
            fits=torch.zeros(*size, shape.group, 5, device=device, dtype=dtype),
        )


class Recalled(NamedTuple):
    """What a memory answers.

    Attributes:
        output: [B, H_kv, G, Q, D_v] float32; meaningless where `mass` is zero.
        mass: [B, H_kv, G, Q] float32, sigma(q) z; zero for an empty memory.
    """

    output: Tensor
    mass: Tensor


def features(x: Tensor) -> Tensor:
    """Sigma: ELU + 1, positive."""
    return torch.where(x > 0, x + 1, x.clamp(max=0).exp())  # ELU's own -1 + 1 would lose digits


def recall(memory: LinearMemory, queries: Tensor) -> Recalled:
    """Answer queries [B, H_kv, G, Q, D], before rotation and scaling."""
    group, num_queries = queries.shape[2:4]
    asked = features(queries).flatten(2, 3)  # one matrix serves a KV head's queries
    mass = asked @ memory.normaliser[..., None]  # [B, H_kv, G Q, 1]
    output = asked @ memory.matrix / mass.clamp(min=torch.finfo(mass.dtype).tiny)
    grouped = (group, num_queries)
    return Recalled(output.unflatten(2, grouped), mass[..., 0].unflatten(2, grouped))


def store(memory: LinearMemory, keys: Tensor, values: Tensor, *, delta: bool) -> LinearMemory:
    """Add a segment of keys and values [B, H_kv, E, D], keys before rotation.

    Args:
        memory: Before the segment; stays as it is.
        keys: Keys.
        values: Values.
        delta: Store only what the memory does not answer already.
    """
    stored = features(keys)
    if delta:
        known = recall(memory, keys[:, :, None])
        # The first segment finds an empty memory, whose answer is nothing.
        answer = known.output.masked_fill((known.mass == 0)[..., None], 0)[:, :, 0]
        values = values - answer
    return LinearMemory(
        matrix=memory.matrix + stored.transpose(-1, -2) @ values,
        normaliser=memory.normaliser + stored.sum(dim=2),
        fits=memory.fits,
    )


def observe_mass(fits: Tensor, mass: Tensor, log_mass: Tensor) -> Tensor:
    """Add one segment's sample to the running statistics [B, H_kv, G, 5] (Welford).

    Args:
        fits: Before.
        mass: [B, H_kv, G] sigma(q) z of the segment alone.
        log_mass: [B, H_kv, G] log-sum-exp of the same query over the segment.
    """
    x, y = mass.clamp(min=torch.finfo(mass.dtype).tiny).log(), log_mass
    count, mean_x, mean_y, square, product = fits.unbind(dim=-1)
    count = count + 1
    dx = x - mean_x
    mean_x, mean_y_new = mean_x + dx / count, mean_y + (y - mean_y) / count
    square = square + dx * (x - mean_x)
    product = product + dx * (y - mean_y_new)
    return torch.stack([count, mean_x, mean_y_new, square, product], dim=-1)


def calibrated_log_mass(fits: Tensor, mass: Tensor) -> Tensor:
    """Estimate log-mass in the units of attention logits; [B, H_kv, G, Q], -inf where empty.

    L ~ a log(sigma(q) z) + c by ridge regression towards a = 1, on the segments seen.
    """
    count, mean_x, mean_y, square, product = (x[..., None] for x in fits.unbind(dim=-1))
    slope = (product + 1) / (square + 1)
    estimate = mean_y + slope * (mass.clamp(min=torch.finfo(mass.dtype).tiny).log() - mean_x)
    return estimate.masked_fill((count == 0) | (mass == 0), -torch.inf)
