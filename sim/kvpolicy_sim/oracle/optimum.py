"""The optimum of a decision unit: exact where that takes seconds, else between two bounds."""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from kvpolicy_sim.oracle.bound import bound_at, upper_bound
from kvpolicy_sim.oracle.clairvoyant import clairvoyant
from kvpolicy_sim.oracle.exact import assign_tokens
from kvpolicy_sim.oracle.problem import Problem

EXACT_UP_TO = 2 * 10**10
"""E * T^2 of the largest problems that are solved exactly, in one to three seconds."""

_LEAST_GROUPS = 64


@dataclass(frozen=True)
class Optimum:
    """The largest retained mass that evictions under an occupancy law can have.

    Attributes:
        lower: Retained mass of `evicted_at`.
        upper: What nothing exceeds; equal to `lower`, but for rounding, where `method` is exact.
        evicted_at: [T] int64, tokens seen when a token was evicted; 0 if it never was.
        method: How it was found.
    """

    lower: float
    upper: float
    evicted_at: np.ndarray
    method: Literal["exact", "bounds"]


def solve(problem: Problem, *, exact_up_to: float = EXACT_UP_TO) -> Optimum:
    """Find the optimum, or bounds that usually lie less than 0.2 % apart.

    Args:
        problem: The problem.
        exact_up_to: E * T^2, to which time is proportional, of the largest problem that is solved
            exactly. E is the number of evictions.
    """
    size = problem.num_evictions * problem.tokens**2
    if size <= exact_up_to:
        left_at, prices = assign_tokens(problem)
        solution, bound, method = problem.solution(left_at), bound_at(problem, prices), "exact"
    else:
        # As many evictions at once as bring the size down to the limit, within reason.
        wanted = math.ceil(size / max(exact_up_to, 1))
        group = max(2, min(wanted, problem.num_evictions // _LEAST_GROUPS))
        bound = upper_bound(problem, group=group)
        solution, method = clairvoyant(problem, bound.prices), "bounds"
    return Optimum(solution.mass, max(solution.mass, bound.mass), solution.evicted_at, method)
