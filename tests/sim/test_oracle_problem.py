"""The oracle's problem: what it sums up, and what it refuses."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fixtures.attention import Unit, units
from kvpolicy import Occupancy
from kvpolicy_sim.oracle import Problem
from oracles.optimum import retained_mass


def dues(law: Occupancy, tokens: int) -> list[int]:
    """The evictions that a query feels."""
    return [n for n in range(1, tokens) if law.is_due(n)]


@given(unit=units(), seed=st.integers(0, 99))
def test_mass_is_what_queries_still_see(unit: Unit, seed: int) -> None:
    """Proves the aggregated mass of any evictions against the definition, query by query."""
    problem = Problem.of(*unit)
    tokens, generator = problem.tokens, np.random.default_rng(seed)
    left_at = np.full(tokens, -1)
    for e, due in enumerate(dues(unit.law, tokens)):
        held = np.flatnonzero(left_at[:due] < 0)
        left_at[generator.choice(held, unit.law.interval, replace=False)] = e
    solution = problem.solution(left_at)
    counted_from = unit.law.retained if unit.law.retained < tokens else 0
    expected = retained_mass(unit.attention, counted_from, solution.evicted_at)
    assert solution.mass == pytest.approx(expected, abs=1e-12)


@given(unit=units())
def test_losses_are_the_attention_still_to_come(unit: Unit) -> None:
    """Proves every loss against a sum over later queries."""
    losses = Problem.of(*unit).losses()
    attention = unit.attention.astype(np.float64)
    assert losses.due.tolist() == dues(unit.law, len(attention))
    for e, due in enumerate(losses.due):
        np.testing.assert_allclose(losses.row(e), attention[due:, :due].sum(axis=0), atol=1e-12)


@given(unit=units(), sizes=st.lists(st.integers(0, 9), min_size=1), is_cut=st.booleans())
def test_blocks_of_rows_give_the_same_problem(unit: Unit, sizes: list[int], is_cut: bool) -> None:
    """Proves that neither the blocks in which rows come nor the columns of the future matter."""
    whole, pieces = Problem.of(*unit), Problem(len(unit.attention), unit.law)
    first = turn = 0
    while first < whole.tokens:
        last = min(whole.tokens, first + sizes[turn % len(sizes)] + (turn >= len(sizes)))
        pieces.add_rows(first, unit.attention[first:last, : last if is_cut else None])
        first, turn = last, turn + 1
    np.testing.assert_allclose(pieces.losses().values, whole.losses().values, atol=1e-12)
    assert pieces.mass(0.0) == pytest.approx(whole.mass(0.0), abs=1e-12)


def test_a_law_that_evicts_nothing_averages_all_queries() -> None:
    """Proves what is counted where no query comes after more tokens than the budget."""
    attention = np.diag([0.5, 1.0, 1.0, 1.0])
    assert Problem.of(attention, Occupancy(None)).mass(0.0) == pytest.approx(3.5 / 4)
    assert Problem.of(attention, Occupancy(4)).mass(0.0) == pytest.approx(3.5 / 4)
    assert Problem.of(attention, Occupancy(3)).mass(0.0) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("first", "rows", "message"),
    [
        (2, np.eye(4)[2:], r"rows \[2, 4\) do not follow the 1 of 4 added"),
        (1, np.tril(np.ones((4, 4))), r"rows \[1, 5\) do not follow the 1 of 4 added"),
        (1, np.zeros((2, 2)), r"rows \[1, 3\) need 3 to 4 columns: got 2"),
        (1, np.zeros((2, 5)), r"rows \[1, 3\) need 3 to 4 columns: got 5"),
        (1, -np.eye(4)[1:2], r"rows \[1, 2\) have values that are negative or not finite"),
        (1, np.full((1, 4), np.inf), r"rows \[1, 2\) have values that are negative or not"),
        (1, np.full((1, 4), np.nan), r"rows \[1, 2\) have values that are negative or not"),
        (1, np.eye(4)[2:3], r"rows \[1, 2\) attend to later tokens"),
    ],
)
def test_impossible_rows_are_refused(first: int, rows: np.ndarray, message: str) -> None:
    """Proves that rows which cannot be attention are named, and that none of them is added."""
    problem = Problem(4, Occupancy(1))
    problem.add_rows(0, np.eye(4)[:1])
    with pytest.raises(ValueError, match=message):
        problem.add_rows(first, rows)
    problem.add_rows(1, np.eye(4)[1:])
    assert problem.mass(0.0) == pytest.approx(1.0)


def test_missing_rows_and_tokens_are_named() -> None:
    """Proves that a problem without all its rows is not solved."""
    with pytest.raises(ValueError, match="at least one token: got 0"):
        Problem(0, Occupancy(1))
    problem = Problem(4, Occupancy(1))
    problem.add_rows(0, np.eye(4)[:3])
    with pytest.raises(ValueError, match="only 3 of 4 rows were added"):
        problem.losses()
    with pytest.raises(ValueError, match="only 3 of 4 rows were added"):
        problem.mass(0.0)
