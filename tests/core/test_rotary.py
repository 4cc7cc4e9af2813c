"""Turning queries: composition, equality with rotation from scratch, no drift."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvpolicy.rotary import Rotary
from oracles.dense import rotate
from strategies import SEEDS

THETA = 1e4
POSITIONS = st.integers(-(10**5), 10**6)


def vectors(seed: int, *shape: int) -> torch.Tensor:
    """Draw vectors."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator)


def in_float64(theta: float, dim: int) -> Rotary:
    """RoPE with frequencies that were not rounded to float32."""
    return Rotary(1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float64) / dim))


@given(seed=SEEDS, p=POSITIONS, offset=POSITIONS)
def test_shift_equals_rotation_from_scratch(seed: int, p: int, offset: int) -> None:
    """Proves that moving by an offset gives what rotating at the sum would have given."""
    x = vectors(seed, 3, 8).double()
    at_p = torch.from_numpy(rotate(x.numpy(), p, THETA))
    moved = in_float64(THETA, 8).shift(at_p, torch.tensor([offset] * 3))
    np.testing.assert_allclose(moved.numpy(), rotate(x.numpy(), p + offset, THETA), atol=1e-9)


@given(seed=SEEDS, first=POSITIONS, second=POSITIONS)
def test_shifts_compose(seed: int, first: int, second: int) -> None:
    """Proves that two moves are one move by their sum, and that there is a way back."""
    rope, x = in_float64(THETA, 8), vectors(seed, 3, 8).double()
    a, b = torch.tensor([first] * 3), torch.tensor([second] * 3)
    torch.testing.assert_close(rope.shift(rope.shift(x, a), b), rope.shift(x, a + b))
    torch.testing.assert_close(rope.shift(rope.shift(x, a), -a), x)


@given(seed=SEEDS, offset=st.integers(-100_000, 0))
def test_float32_queries_lose_nothing_far_back(seed: int, offset: int) -> None:
    """Proves that angles are computed in float64: one turn costs one rounding, at any length."""
    x = vectors(seed, 5, 8)
    rope = Rotary.from_theta(THETA, 8)
    exact = Rotary(rope.inverse_frequencies.double()).shift(x.double(), torch.tensor([offset] * 5))
    moved = rope.shift(x, torch.tensor([offset] * 5))
    torch.testing.assert_close(moved.double(), exact, rtol=0, atol=2e-6)


def test_turning_the_query_equals_moving_the_keys() -> None:
    """Proves rope=reindex's idea: logits depend on the distance between query and key only."""
    rope = in_float64(THETA, 8)
    q, k = vectors(0, 1, 8).double(), vectors(1, 4, 8).double()
    ones = torch.ones(4, dtype=torch.int64)
    turned = rope.shift(q, -7 * ones[:1]) @ k.T
    torch.testing.assert_close(turned, q @ rope.shift(k, 7 * ones).T)


def test_offsets_broadcast_over_heads_and_rows() -> None:
    """Proves the shapes that engine and look-ahead use: [B, 1, 1] and [Q]."""
    rope, x = Rotary.from_theta(THETA, 8), vectors(0, 2, 3, 4, 8)
    by_row = rope.shift(x, torch.tensor([5, 9])[:, None, None])
    by_query = rope.shift(x, torch.tensor([0, 1, 2, 3]))
    torch.testing.assert_close(by_row[1], rope.shift(x[1], torch.full((3, 4), 9)))
    torch.testing.assert_close(by_query[:, :, 2], rope.shift(x[:, :, 2], torch.full((2, 3), 2)))


def test_dimensions_past_the_rotated_ones_stay() -> None:
    """Proves partial rotary embeddings."""
    rope, x = Rotary.from_theta(THETA, 4), vectors(0, 2, 8)
    moved = rope.shift(x, torch.tensor([3, 4]))
    assert torch.equal(moved[:, 4:], x[:, 4:])
    assert not torch.equal(moved[:, :4], x[:, :4])


@pytest.mark.parametrize("theta", [1e4, 5e5])
def test_frequencies_are_those_of_the_paper(theta: float) -> None:
    """Proves theta ** (-2i / d)."""
    expected = [theta ** (-2 * i / 16) for i in range(8)]
    assert Rotary.from_theta(theta, 16).inverse_frequencies.tolist() == pytest.approx(expected)
