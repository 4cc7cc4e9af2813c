"""The offline optimum itself: an assignment of tokens to evictions.

An eviction of I tokens makes I rows of an assignment problem, all alike. The search goes over
evictions instead of rows, of which there are I times fewer.
"""

import numpy as np

from kvpolicy_sim.oracle.kernels import assign
from kvpolicy_sim.oracle.problem import Problem, Solution


def exact(problem: Problem) -> Solution:
    """Evict so that nothing retains more, up to float64 rounding.

    Takes time proportional to E * T^2, where E is the number of evictions.
    """
    return problem.solution(assign_tokens(problem)[0])


def assign_tokens(problem: Problem) -> tuple[np.ndarray, np.ndarray]:
    """The eviction at which each token leaves, [T], -1 for none; and the prices, [E].

    The bound at these prices equals the optimum, which proves that it is one.
    """
    left_at = np.full(problem.tokens, -1, np.int64)
    if not problem.num_evictions:
        return left_at, np.empty(0)
    owner, prices = assign(problem.losses(), problem.counts)
    left_at[: len(owner)] = owner
    return left_at, prices
