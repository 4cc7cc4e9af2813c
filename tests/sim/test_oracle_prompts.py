"""The offline optimum where prompts are set apart: against every choice, and between its bounds."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fixtures.attention import drifting_attention, units
from kvpolicy import Occupancy
from kvpolicy_sim.oracle import Problem, belady, bound_at, exact, upper_bound
from kvpolicy_sim.oracle.exact import assign_tokens
from oracles.optimum import most_left, retained_mass


def leaving(law: Occupancy, tokens: int) -> dict[int, int]:
    """How many tokens leave at the evictions that a query feels."""
    return {n: law.surplus(n) for n in range(1, tokens) if law.is_due(n)}


@given(
    unit=units(most_tokens=9, most_retained=3),
    mode=st.sampled_from(["bulk", "keep"]),
    data=st.data(),
)
@settings(max_examples=150)
def test_nothing_that_can_be_chosen_retains_more(unit, mode, data) -> None:
    """Proves optimality by every choice: of a bulk prompt at its end, and behind a kept one."""
    tokens = len(unit.attention)
    prompt = data.draw(st.integers(0, tokens - 1))
    unsettled = Occupancy(unit.law.retained, unit.law.interval, prompts=mode)
    law = unsettled.of_prompt(prompt)
    assert law.retained is not None
    kept = prompt if mode == "keep" else 0
    counted = prompt if mode == "bulk" and prompt > law.retained else law.retained
    counted = counted if counted < tokens else 0
    found = exact(Problem.of(unit.attention, unsettled, prompt))
    best = most_left(unit.attention, leaving(law, tokens), counted, kept)
    assert found.mass == pytest.approx(best, abs=1e-12)
    seen = retained_mass(unit.attention, counted, found.evicted_at)
    assert found.mass == pytest.approx(seen, abs=1e-12)
    assert not found.evicted_at[:kept].any()
    for n in range(tokens + 1):
        gone = (found.evicted_at > 0) & (found.evicted_at <= n)
        assert gone.sum() == law.evicted(n)


@pytest.mark.parametrize("mode", ["bulk", "keep"])
def test_bounds_hold_the_optimum_between_them(mode) -> None:
    """Proves prices where evictions differ in size: the bound is never below, nor far above."""
    law = Occupancy(32, 4, prompts=mode)
    problem = Problem.of(drifting_attention(512), law, 300)
    left_at, prices = assign_tokens(problem)
    best = problem.mass(problem.lost(left_at))
    assert bound_at(problem, prices).mass == pytest.approx(best, abs=1e-12)
    assert best - 1e-12 <= upper_bound(problem).mass < best + 0.01
    assert belady(problem).mass < best + 1e-12


@pytest.mark.parametrize("mode", ["bulk", "keep"])
@pytest.mark.parametrize("size", [1, 7, 64])
def test_blocks_of_rows_give_the_same_problem(mode, size) -> None:
    """Proves that blocks may end before, at or behind a prompt's end."""
    attention, law = drifting_attention(96), Occupancy(10, 3, prompts=mode)
    whole, pieces = Problem.of(attention, law, 40), Problem(96, law, 40)
    for first in range(0, 96, size):
        last = min(first + size, 96)
        pieces.add_rows(first, attention[first:last, :last])
    np.testing.assert_allclose(pieces.losses().values, whole.losses().values, atol=1e-12)
    assert pieces.mass(0.0) == pytest.approx(whole.mass(0.0), abs=1e-12)


def test_a_prompt_that_is_all_there_is_leaves_nothing_to_decide() -> None:
    """Proves that a problem without a token that may leave is named."""
    with pytest.raises(ValueError, match="at least one token: got 5, 5 of them kept"):
        Problem(5, Occupancy(2, prompts="keep"), 5)
