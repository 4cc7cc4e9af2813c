"""Bounds of the optimum: always on their side, and close on attention that drifts."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fixtures.attention import Unit, drifting_attention, units
from kvpolicy import Occupancy
from kvpolicy_sim.oracle import (
    Problem,
    belady,
    bound_at,
    clairvoyant,
    exact,
    solve,
    upper_bound,
)

ROUNDING = 1e-12

LAWS = [Occupancy(64), Occupancy(64, 4), Occupancy(256, 16)]


def prices_for(problem: Problem, seed: int, scale: float) -> np.ndarray:
    """Draw prices that mean nothing, negative ones among them."""
    return np.random.default_rng(seed).normal(size=problem.num_evictions) * scale


@given(unit=units(most_tokens=40), seed=st.integers(0, 99), scale=st.sampled_from([0, 0.1, 9.0]))
def test_any_prices_bound_the_optimum_from_both_sides(unit: Unit, seed: int, scale: float) -> None:
    """Proves that no prices, however wrong, give a wrong bound."""
    problem = Problem.of(*unit)
    best, prices = exact(problem).mass, prices_for(problem, seed, scale)
    assert bound_at(problem, prices).mass >= best - ROUNDING
    assert clairvoyant(problem, prices).mass <= best + ROUNDING


@given(unit=units(most_tokens=40), group=st.integers(1, 50), iterations=st.integers(0, 30))
def test_upper_bound_is_never_below_the_optimum(unit: Unit, group: int, iterations: int) -> None:
    """Proves the bound for every way of starting and any number of steps."""
    problem = Problem.of(*unit)
    bound = upper_bound(problem, group=group, iterations=iterations)
    assert bound.mass >= exact(problem).mass - ROUNDING
    assert bound.mass == pytest.approx(bound_at(problem, bound.prices).mass, abs=ROUNDING)


@given(unit=units(most_tokens=40), seed=st.integers(0, 99))
def test_policies_that_know_the_future_follow_the_law(unit: Unit, seed: int) -> None:
    """Proves that as many leave as must, each after it was seen."""
    problem = Problem.of(*unit)
    for _, evicted_at in (clairvoyant(problem, prices_for(problem, seed, 0.1)), belady(problem)):
        for n in range(problem.tokens + 1):
            gone = np.flatnonzero((evicted_at > 0) & (evicted_at <= n))
            assert len(gone) == unit.law.evicted(n)
        assert np.all((evicted_at == 0) | (evicted_at > np.arange(problem.tokens)))


@given(unit=units(most_tokens=40), is_exact=st.booleans())
def test_lower_never_exceeds_upper(unit: Unit, is_exact: bool) -> None:
    """Proves the order of the two, whatever the method."""
    problem = Problem.of(*unit)
    optimum = solve(problem, exact_up_to=np.inf if is_exact else -1)
    best = exact(problem)
    assert optimum.method == ("exact" if is_exact else "bounds")
    assert optimum.lower <= optimum.upper
    assert optimum.lower - ROUNDING <= best.mass <= optimum.upper + ROUNDING
    if is_exact:
        assert optimum.upper - optimum.lower <= ROUNDING
        assert optimum.evicted_at.tolist() == best.evicted_at.tolist()


@pytest.mark.parametrize("law", LAWS, ids=str)
@pytest.mark.parametrize("tokens", [512, 1024])
def test_bounds_are_close_on_drifting_topics(tokens: int, law: Occupancy) -> None:
    """Proves that both bounds are within 0.2 % of the optimum, and that more steps help."""
    problem = Problem.of(drifting_attention(tokens), law)
    best, few, many = exact(problem).mass, *(upper_bound(problem, iterations=i) for i in (0, 100))
    assert best <= many.mass <= best * 1.002
    assert many.mass < few.mass < best * 1.02
    assert best * 0.998 <= clairvoyant(problem, many.prices).mass <= best


@pytest.mark.parametrize("law", LAWS, ids=str)
def test_solve_stays_close_when_exactness_is_out_of_reach(law: Occupancy) -> None:
    """Proves that even the least time that can be asked for leaves half a percent open."""
    optimum = solve(Problem.of(drifting_attention(1024), law), exact_up_to=-1)
    assert optimum.lower < optimum.upper < optimum.lower * 1.005


def test_among_equals_the_oldest_leave() -> None:
    """Proves that ties are settled as policies settle them, in both that know the future."""
    problem = Problem.of(np.eye(9), Occupancy(4, 2))
    prices = np.zeros(problem.num_evictions)
    assert belady(problem).evicted_at.tolist() == [6, 6, 8, 8, 0, 0, 0, 0, 0]
    assert clairvoyant(problem, prices).evicted_at.tolist() == [6, 6, 8, 8, 0, 0, 0, 0, 0]


def test_among_equal_gains_the_least_loss_goes() -> None:
    """Proves that a useless token leaves before one whose use is just worth its slot."""
    attention = np.diag([1.0, 1.0, 1.0, 1.0, 0.5])
    attention[4, 0] = 0.5
    problem = Problem.of(attention, Occupancy(2))
    solution = clairvoyant(problem, np.array([0.0, 0.5]))
    assert solution.mass == 1.0
    assert solution.evicted_at.tolist() == [5, 3, 4, 0, 0]


def test_the_best_prices_make_the_clairvoyant_policy_nearly_optimal() -> None:
    """Proves that prices carry nearly all that the policy has to know."""
    problem = Problem.of(drifting_attention(1024), Occupancy(64))
    prices = upper_bound(problem, group=1, iterations=0)
    assert prices.mass == pytest.approx(exact(problem).mass, abs=ROUNDING)
    assert clairvoyant(problem, prices.prices).mass > 0.9995 * prices.mass


def test_belady_is_not_optimal() -> None:
    """Proves what the documentation says of evicting by the least attention to come."""
    problem = Problem.of(drifting_attention(1024), Occupancy(64))
    assert belady(problem).mass < 0.96 * exact(problem).mass


def example() -> Problem:
    """The example of docs/explanation/oracle.md."""
    attention = np.diag([1.0, 1.0, 1.0, 0.32, 0.55])
    attention[3, :3] = 0.15, 0.28, 0.25
    attention[4, :4] = 0.15, 0.00, 0.25, 0.05
    return Problem.of(attention, Occupancy(2))


def test_worked_example_of_the_documentation() -> None:
    """Proves its numbers: losses, what Belady's rule and the optimum evict, and the bounds."""
    problem = example()
    assert problem.losses().row(0) == pytest.approx([0.30, 0.28, 0.50])
    assert problem.losses().row(1) == pytest.approx([0.15, 0.00, 0.25, 0.05])
    assert belady(problem).evicted_at.tolist() == [5, 3, 0, 4, 0]
    assert belady(problem).mass == pytest.approx(1 - 0.33 / 3)
    assert exact(problem).evicted_at.tolist() == [3, 4, 5, 0, 0]
    assert exact(problem).mass == pytest.approx(1 - 0.30 / 3)
    assert bound_at(problem, np.array([0.30, 0.00])).mass == pytest.approx(1 - 0.28 / 3)
    assert bound_at(problem, np.array([0.30, 0.02])).mass == pytest.approx(1 - 0.30 / 3)
