"""What no policy can exceed: a Lagrangian bound with a price for leaving at each eviction.

Suppose that a token which leaves at an eviction is paid that eviction's price. Then what is best
for a token no longer depends on the others, and where prices are right, as many choose each
eviction as must leave at it. Whatever the prices: the loss under free choice, less what is paid,
plus the price of all that must leave, is at most the loss of any policy.
"""

from typing import NamedTuple

import numpy as np

from kvpolicy_sim.oracle.clairvoyant import leave_by_price
from kvpolicy_sim.oracle.kernels import assign, relaxed_loss
from kvpolicy_sim.oracle.problem import Losses, Problem

_PATIENCE = 10
"""Steps without a better bound before steps are halved."""


class Bound(NamedTuple):
    """An upper bound of the retained mass.

    Attributes:
        mass: The bound.
        prices: [E] that give it: what a slot is worth from each eviction on, in attention mass.
    """

    mass: float
    prices: np.ndarray


def bound_at(problem: Problem, prices: np.ndarray) -> Bound:
    """The bound that prices give, any prices at all, [E]."""
    return Bound(problem.mass(_relaxed(problem, prices)[0]), prices)


def upper_bound(problem: Problem, *, group: int = 4, iterations: int = 100) -> Bound:
    """Bound the optimum from above.

    Starts from the prices of an easier problem, solved exactly, in which every `group` evictions
    are put off to the last of them; then improves them by Polyak's subgradient steps.

    Args:
        problem: The problem.
        group: Evictions put together at the start: as many times faster, and less precise.
        iterations: Most steps.
    """
    if not problem.num_evictions:
        return Bound(problem.mass(0.0), np.empty(0))
    prices = _prices_of_groups(problem, group)
    return _climb(problem, prices, problem.lost(leave_by_price(problem, prices)), iterations)


def _prices_of_groups(problem: Problem, group: int) -> np.ndarray:
    """Prices of an exact solution of groups of evictions, interpolated."""
    losses, num_evictions = problem.losses(), problem.num_evictions
    last = np.minimum(np.arange(0, num_evictions, group) + group, num_evictions) - 1
    counts = np.add.reduceat(problem.counts, np.arange(0, num_evictions, group))
    prices = assign(Losses(losses.values, losses.starts[last], losses.due[last]), counts)[1]
    # Prices fall to zero after the last eviction; before the first they rise on as they did.
    at = np.concatenate([[-1], last, [num_evictions]])
    before = 2 * prices[0] - prices[min(1, len(prices) - 1)]
    return np.interp(np.arange(num_evictions), at, np.concatenate([[before], prices, [0.0]]))


def _climb(problem: Problem, prices: np.ndarray, target: float, iterations: int) -> Bound:
    """Take subgradient steps towards a loss that some policy has; keep the best bound."""
    highest, best, scale, failures = -np.inf, prices, 1.0, 0
    for _ in range(iterations + 1):
        lost, missing = _relaxed(problem, prices)
        if lost > highest:
            highest, best, failures = lost, prices, 0
        else:
            failures += 1
        norm = float(missing @ missing)
        if norm == 0 or lost >= target:
            break
        if failures == _PATIENCE:
            prices, scale, failures = best, scale / 2, 0
        else:
            prices = prices + scale * (target - lost) / norm * missing
    return Bound(problem.mass(highest), best)


def _relaxed(problem: Problem, prices: np.ndarray) -> tuple[float, np.ndarray]:
    return relaxed_loss(problem.losses(), problem.counts, np.asarray(prices, np.float64))
