"""The exact optimum against every choice, a linear program and another assignment solver."""

import numpy as np
import pytest
from hypothesis import given, settings
from scipy.optimize import linear_sum_assignment

from fixtures.attention import Unit, drifting_attention, units
from kvpolicy import Occupancy
from kvpolicy_sim.oracle import Problem, bound_at, exact
from kvpolicy_sim.oracle.exact import assign_tokens
from oracles.optimum import linear_program, most_retained, retained_mass


@given(unit=units(most_tokens=8, most_retained=3))
@settings(max_examples=200)
def test_nothing_that_can_be_chosen_retains_more(unit: Unit) -> None:
    """Proves optimality by trying every choice at every eviction."""
    attention, law = unit
    if law.retained >= len(attention):
        law = Occupancy(len(attention) - 1, law.interval)
    best = most_retained(attention, law.retained, law.interval)
    assert exact(Problem.of(attention, law)).mass == pytest.approx(best, abs=1e-12)


@pytest.mark.parametrize("interval", [1, 2, 3])
@pytest.mark.parametrize(("tokens", "retained"), [(24, 2), (40, 5), (64, 8), (64, 20)])
def test_optimum_is_that_of_a_linear_program(tokens: int, retained: int, interval: int) -> None:
    """Proves optimality against slots that flow from token to token, query by query."""
    attention = drifting_attention(tokens)
    mass = exact(Problem.of(attention, Occupancy(retained, interval))).mass
    assert mass == pytest.approx(linear_program(attention, retained, interval), abs=1e-8)


@pytest.mark.parametrize(("retained", "interval"), [(16, 1), (48, 5), (64, 4), (0, 24)])
def test_optimum_is_that_of_a_general_solver(retained: int, interval: int) -> None:
    """Proves the grouped search against scipy's, which has a row for each leaving token."""
    problem = Problem.of(drifting_attention(300), Occupancy(retained, interval))
    losses = problem.losses()
    costs = np.full((len(losses.due), losses.due[-1]), 1e6)
    for e, due in enumerate(losses.due):
        costs[e, :due] = losses.row(e)
    costs = costs.repeat(interval, axis=0)
    mass = problem.mass(float(costs[linear_sum_assignment(costs)].sum()))
    assert exact(problem).mass == pytest.approx(mass, abs=1e-12)


@given(unit=units(most_tokens=60))
def test_evictions_follow_the_law(unit: Unit) -> None:
    """Proves that tokens leave when and as many as they must, none before it was seen."""
    problem = Problem.of(*unit)
    mass, evicted_at = exact(problem)
    for n in range(problem.tokens + 1):
        gone = np.flatnonzero((evicted_at > 0) & (evicted_at <= n))
        assert len(gone) == unit.law.evicted(n)
    assert np.all((evicted_at == 0) | (evicted_at > np.arange(problem.tokens)))
    if unit.law.retained < problem.tokens:
        seen = retained_mass(unit.attention, unit.law.retained, evicted_at)
        assert mass == pytest.approx(seen, abs=1e-12)


@given(unit=units(most_tokens=60))
def test_prices_prove_the_optimum(unit: Unit) -> None:
    """Proves that the search ends with prices whose bound is the optimum itself."""
    problem = Problem.of(*unit)
    left_at, prices = assign_tokens(problem)
    bound = bound_at(problem, prices).mass
    assert bound == pytest.approx(problem.mass(problem.lost(left_at)), abs=1e-12)


def test_prices_prove_the_optimum_of_a_long_sequence() -> None:
    """Proves that rounding does not add up over a thousand evictions."""
    problem = Problem.of(drifting_attention(1024), Occupancy(64))
    left_at, prices = assign_tokens(problem)
    bound = bound_at(problem, prices).mass
    assert bound == pytest.approx(problem.mass(problem.lost(left_at)), abs=1e-12)


@pytest.mark.parametrize("law", [Occupancy(None), Occupancy(9), Occupancy(4, 9)])
def test_nothing_leaves_where_nothing_has_to(law: Occupancy) -> None:
    """Proves the cases without an eviction."""
    mass, evicted_at = exact(Problem.of(np.eye(8), law))
    assert mass == 1.0
    assert evicted_at.tolist() == [0] * 8


def test_last_eviction_costs_nothing_but_happens() -> None:
    """Proves that what is evicted after the last query counts as evicted."""
    mass, evicted_at = exact(Problem.of(np.eye(6), Occupancy(3, 3)))
    assert mass == 1.0
    assert evicted_at.tolist() == [6, 6, 6, 0, 0, 0]
