"""Policies that know the future: one that is nearly optimal, and one that is thought to be."""

from collections.abc import Callable

import numpy as np

from kvpolicy_sim.oracle.problem import Losses, Problem, Solution


def clairvoyant(problem: Problem, prices: np.ndarray) -> Solution:
    """Evict the tokens that gain least by staying until the best later moment to leave.

    What a token gains is the attention that it gets until then, less what the price of leaving
    falls by: that is what its slot would have been worth to others. With the prices of
    `upper_bound` this is nearly optimal.

    Args:
        problem: The problem.
        prices: [E], what a slot is worth from each eviction on.
    """
    return problem.solution(leave_by_price(problem, prices))


def belady(problem: Problem) -> Solution:
    """Evict the tokens with the least attention still to come, after Belady's rule.

    Not optimal here: it holds tokens for a distant use while their slots could serve many others.
    """
    losses = problem.losses()
    return problem.solution(_leave_lowest(problem, losses.row))


def leave_by_price(problem: Problem, prices: np.ndarray) -> np.ndarray:
    """The eviction at which each token leaves under `clairvoyant`, -1 for none; [T]."""
    losses = problem.losses()
    # What tokens that outlive an eviction lose at best, less the price that they get for it.
    later = Losses(np.zeros_like(losses.values), losses.starts, losses.due)
    for e in range(problem.num_evictions - 2, -1, -1):
        width, after = losses.due[e], e + 1
        leaving_then = losses.row(after)[:width] - prices[after]
        np.minimum(later.row(after)[:width], leaving_then, out=later.row(e))
    return _leave_lowest(problem, lambda e: losses.row(e) - later.row(e))


def _leave_lowest(problem: Problem, gains: Callable[[int], np.ndarray]) -> np.ndarray:
    """Let those leave who gain least; of equals those who lose least, then the oldest."""
    left_at = np.full(problem.tokens, -1, np.int64)
    for e, (due, count) in enumerate(zip(problem.due, problem.counts, strict=True)):
        held = np.flatnonzero(left_at[:due] < 0)
        order = np.lexsort((problem.losses().row(e)[held], gains(e)[held]))
        left_at[held[order[:count]]] = e
    return left_at
