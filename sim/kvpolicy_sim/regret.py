"""How far policies stay below the offline optimum, on heads of a replayed layer.

Axes: H_kv KV heads, G query heads per KV head, T tokens, n rows of a block.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace

import numpy as np
import torch

from kvpolicy import CachePolicy, EvictionPolicy, Occupancy
from kvpolicy_sim.inputs import BLOCK, LayerInputs
from kvpolicy_sim.layerwise import PolicyOutcome
from kvpolicy_sim.oracle import Optimum, Problem, solve
from kvpolicy_sim.result import Regret
from kvpolicy_sim.statistics import uncounted_steps

HEAD_TOKENS = 1 << 15
"""Tokens times heads of a layer that are solved: longer sequences get fewer heads."""


def measure_regret(
    inputs: LayerInputs, outcomes: Mapping[CachePolicy, PolicyOutcome]
) -> dict[CachePolicy, Regret]:
    """Bound the optimum for every budget, interval and scope among the policies.

    Under ``scope=head`` it is solved per KV head, under ``scope=layer`` for the mean of all. A
    memory is left out on both sides: the optimum is that of the token slots. Under
    ``protect=prompt`` the optimum keeps the prompt too.

    Args:
        inputs: The layer, with every query.
        outcomes: What the policies did to it.
    """
    num_heads = len(inputs.kv_heads)
    count = max(1, min(num_heads, HEAD_TOKENS // inputs.tokens))
    chosen = [num_heads * i // count for i in range(count)]
    found: dict[CachePolicy, Regret] = {}
    for is_layer in (False, True):
        units = [slice(0, num_heads)] if is_layer else [slice(head, head + 1) for head in chosen]
        members = {policy: policy.of_layer(inputs.layer) for policy in outcomes}
        policies = {
            policy: replace(member.occupancy, state_slots=0)
            for policy, member in members.items()
            if isinstance(member, EvictionPolicy)
            and member.scope_is_layer == is_layer
            and inputs.law(policy).evicted(inputs.tokens)
        }
        optima = [_optima(inputs, unit, set(policies.values())) for unit in units if policies]
        for policy, law in policies.items():
            uncounted = uncounted_steps(inputs.law(policy))
            mass = outcomes[policy].retained_mass[..., uncounted:]
            found[policy] = Regret(
                mass=np.array([mass[unit].mean(dtype=np.float64) for unit in units]),
                lower=np.array([optimum[law].lower for optimum in optima]),
                upper=np.array([optimum[law].upper for optimum in optima]),
            )
    return found


def _optima(inputs: LayerInputs, unit: slice, laws: set[Occupancy]) -> dict[Occupancy, Optimum]:
    """Solve one unit under every law; the attention is computed once."""
    problems = {law: Problem(inputs.tokens, law, inputs.prompt) for law in laws}
    for first, rows in _attention(inputs, unit):
        for problem in problems.values():
            problem.add_rows(first, rows)
    return {law: solve(problem) for law, problem in problems.items()}


def _attention(inputs: LayerInputs, unit: slice) -> Iterator[tuple[int, np.ndarray]]:
    """Full attention, the mean over a unit's query heads, in blocks of rows [n, T']."""
    for first in range(0, inputs.tokens, BLOCK):
        last = min(first + BLOCK, inputs.tokens)
        logits = torch.bmm(
            inputs.queries[unit, :, first:last].flatten(1, 2),
            inputs.keys[unit, :last].transpose(1, 2),
        ).view(-1, last - first, last)
        future = torch.arange(last) > torch.arange(first, last)[:, None]
        weights = logits.masked_fill_(future, -torch.inf).softmax(dim=-1)
        yield first, weights.mean(dim=0).numpy()
