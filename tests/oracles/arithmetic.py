"""What the float64 oracles calculate with: rotation, softmax, distances between scores."""

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]

NEAR_TIE = 1e-3
"""Relative score difference below which two hosts may legally disagree."""

RESOLUTION = 1e-35
"""Scores this small count as equal: a float32 host underflows near 1e-38."""


def rotate(x: Array, positions: ArrayLike, theta: float) -> Array:
    """Apply RoPE in the half-split ("rotate_half") convention.

    Args:
        x: un-rotated vectors, [..., D].
        positions: one position per vector, broadcastable to x's shape without D.
        theta: base of the geometric frequencies.
    """
    half = x.shape[-1] // 2
    frequencies = theta ** (-np.arange(half) / half)  # [D/2]
    angles = np.asarray(positions, np.float64)[..., None] * frequencies  # [..., D/2]
    cos, sin = np.cos(angles), np.sin(angles)
    first, second = x[..., :half], x[..., half:]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def softmax(logits: Array) -> Array:
    """Normalise over the last axis."""
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def relative_gap(high: float, low: float) -> float:
    """Return how far `high` lies above `low`, relative to the larger magnitude."""
    return (high - low) / max(abs(high), abs(low), RESOLUTION)


def log_sum_exp(logits: Array) -> Array:
    """Return the logarithm of the summed exponentials over the last axis."""
    largest = logits.max(axis=-1)
    return largest + np.log(np.exp(logits - largest[..., None]).sum(axis=-1))
