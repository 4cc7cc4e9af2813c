"""Which policies the compiled walk follows, and how.

A policy class is listed here if the walk decides exactly as its `score` does; anything else,
subclasses included, is replayed through the core's own look-ahead.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from kvpolicy import CachePolicy, EvictionPolicy, Occupancy
from kvpolicy.extras import is_installed
from kvpolicy.memory.policy import MemoryPolicy
from kvpolicy.policies.bswa import BSWA
from kvpolicy.policies.centroid import Centroid
from kvpolicy.policies.compressive import Compressive
from kvpolicy.policies.fam import FAM
from kvpolicy.policies.full import Full
from kvpolicy.policies.h2o import H2O
from kvpolicy.policies.infini import Infini
from kvpolicy.policies.random import Random
from kvpolicy.policies.sinks import Sinks
from kvpolicy.policies.tova import TOVA
from kvpolicy.policies.window import Window

POSITION, RANDOM, LAST_ROW, SUM, MEAN = range(5)
"""What a slot is scored by."""

POOL_MEAN, POOL_MAX, POOL_SUM = range(3)
"""How the weights of query heads are reduced."""

_NEVER = 1 << 60
"""More tokens than any sequence has."""

_WORD = (1 << 64) - 1


class Rule(NamedTuple):
    """How the compiled walk follows a policy in one layer and KV head.

    Attributes:
        score: POSITION, RANDOM, LAST_ROW, SUM or MEAN.
        pool: POOL_MEAN, POOL_MAX or POOL_SUM.
        decay: Factor on the statistic before each token's addition.
        is_relative: Whether weights are measured in multiples of the uniform one.
        sinks: First tokens that are protected.
        recent: Newest tokens that are protected.
        first_due: Tokens seen at the first eviction.
        first_count: Slots that it evicts: what a prompt has too many, under ``prefill=bulk``.
        interval: Slots that later ones evict, and tokens between evictions.
        hash: `random`'s chain over (seed, layer, kv_head).
    """

    score: int
    pool: int
    decay: float
    is_relative: bool
    sinks: int
    recent: int
    first_due: int
    first_count: int
    interval: int
    hash: np.uint64


_SCORES: dict[type[CachePolicy], Callable[..., int]] = {
    Full: lambda _: POSITION,
    Window: lambda _: POSITION,
    Sinks: lambda _: POSITION,
    Random: lambda _: RANDOM,
    TOVA: lambda _: LAST_ROW,
    H2O: lambda policy: SUM if policy.statistic == "sum" else MEAN,
    BSWA: lambda _: POSITION,
    # Without a memory these are windows; with one, the core replays them.
    Centroid: lambda _: POSITION,
    Compressive: lambda _: POSITION,
    FAM: lambda _: POSITION,
    Infini: lambda _: POSITION,
}

_POOLS = {"mean": POOL_MEAN, "max": POOL_MAX, "sum": POOL_SUM}


def is_compiled(policy: CachePolicy) -> bool:
    """Whether the compiled walk follows the policy, and there is a compiler."""
    is_listed = type(policy) in _SCORES and getattr(policy, "rope", "keep") == "keep"
    has_memory = isinstance(policy, MemoryPolicy) and policy.has_memory
    return is_listed and not has_memory and is_installed("numba")


def rule_for(policy: CachePolicy, law: Occupancy, layer: int, kv_head: int) -> Rule:
    """The walk's rule under a settled law; layer and KV head only matter to `random`."""
    score, first_due = _SCORES[type(policy)](policy), law.next_due(0)
    if not isinstance(policy, EvictionPolicy):
        return Rule(score, POOL_MEAN, 1.0, False, 0, 0, _NEVER, 1, 1, np.uint64(0))
    assert first_due is not None, "it evicts"
    accumulation = policy.accumulation
    return Rule(
        score=score,
        pool=POOL_MEAN if policy.scope_is_layer else _POOLS[policy.group_reduction],
        decay=accumulation.decay,
        is_relative=accumulation.relative,
        sinks=policy.sink_slots,
        recent=policy.recent_slots,
        first_due=first_due,
        first_count=law.surplus(first_due),
        interval=law.interval,
        hash=np.uint64(_chain(policy.seed, layer, kv_head) if isinstance(policy, Random) else 0),
    )


def _chain(*values: int) -> int:
    """splitmix64 (Steele, Lea and Flood 2014) chained over integers."""
    state = 0
    for value in values:
        x = ((state ^ value) + 0x9E3779B97F4A7C15) & _WORD
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & _WORD
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB & _WORD
        state = x ^ (x >> 31)
    return state
