"""The offline optimum of retained attention mass: what no retention policy can exceed.

problem = Problem(tokens, policy.occupancy, prompt_tokens)
problem.add_rows(0, attention)
optimum = solve(problem)
"""

from kvpolicy_sim.oracle.bound import Bound, bound_at, upper_bound
from kvpolicy_sim.oracle.clairvoyant import belady, clairvoyant
from kvpolicy_sim.oracle.exact import exact
from kvpolicy_sim.oracle.optimum import Optimum, solve
from kvpolicy_sim.oracle.problem import Problem, Solution

__all__ = [
    "Bound",
    "Optimum",
    "Problem",
    "Solution",
    "belady",
    "bound_at",
    "clairvoyant",
    "exact",
    "solve",
    "upper_bound",
]
