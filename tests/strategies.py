"""What hypothesis draws in the tests of the core: policies, specs, laws, scores, problems."""

import math
from dataclasses import replace
from typing import Any, Literal, NamedTuple, get_args, get_origin

import torch
from hypothesis import assume
from hypothesis import strategies as st
from torch import Tensor

import kvpolicy
from kvpolicy.policy import Parameter, Protection, parameters
from kvpolicy.registry import BUILT_IN, find
from kvpolicy.rehearsal import Case

SEEDS = st.integers(0, 9999)


# --- policies and specs -----------------------------------------------------------------------


def values(parameter: Parameter) -> st.SearchStrategy[Any]:
    """Draw values of a policy's parameter from its declared kind."""
    if get_origin(parameter.kind) is Literal:
        return st.sampled_from(get_args(parameter.kind))
    if parameter.kind == Protection:
        starts = st.lists(st.integers(0, 9), max_size=2)
        spans = starts.map(lambda found: tuple((start, start + 2) for start in found))
        return st.one_of(st.just("prompt"), spans)
    largest = 64 if parameter.attribute == "budget" else 9
    by_kind = {
        int: st.integers(0, largest),
        float: st.floats(0, 1),
        bool: st.booleans(),
        str: st.sampled_from(["a", "two"]),
    }
    return st.one_of(*(by_kind[kind] for kind in parameter.kinds))


@st.composite
def policies(draw: st.DrawFn) -> kvpolicy.CachePolicy:
    """Draw a built-in policy with any valid values for any of its parameters."""
    cls = find(draw(st.sampled_from(sorted(BUILT_IN))))
    chosen = {}
    for parameter in parameters(cls).values():
        if parameter.is_required or draw(st.booleans()):
            chosen[parameter.attribute] = draw(values(parameter))
    try:
        return cls(**chosen)
    except kvpolicy.PolicyError:
        assume(False)
        raise


HOSTILE_SPECS = st.one_of(
    st.text(),
    st.text(alphabet="(){}:=,.0123456789einfna-+_ \n\t\0h2owindowbudget"),
    st.builds("{}:{}".format, st.sampled_from(sorted(BUILT_IN)), st.text()),
    st.builds(
        "{}:{}={}".format,
        st.sampled_from(sorted(BUILT_IN)),
        st.sampled_from(["budget", "interval", "sinks", "recent", "protect", "seed", "nothing"]),
        st.text() | st.integers().map(str) | st.floats().map(str),
    ),
)


@st.composite
def prompt_specs(draw: st.DrawFn) -> str:
    """Draw a spec of a policy that evicts token by token and sets prompts apart."""
    name = draw(st.sampled_from([*_BY_TOKEN, "snapkv"]))
    parts = [f"budget={draw(st.integers(6, 12))}", f"interval={draw(st.integers(1, 15))}"]
    if name != "snapkv":  # its prompts are always evicted from in bulk
        parts.append(draw(st.sampled_from(_PROMPTS)))
    parts += draw(_OWN_KEYS[name])
    return f"{name}:{','.join(parts)}"


@st.composite
def attended_specs(draw: st.DrawFn, names: tuple[str, ...] = ()) -> str:
    """Draw a spec of any built-in policy that evicts, with small numbers."""
    name = draw(st.sampled_from(names or (*_BY_TOKEN, "bswa")))
    if name == "bswa":
        return draw(_spec("bswa"))
    budget = draw(st.integers(6, 12))
    parts = [f"budget={budget}", f"interval={draw(st.integers(1, 15))}"]
    if draw(st.booleans()):
        parts.append("protect=(3:4)")
    parts += draw(_OWN_KEYS[name])
    return f"{name}:{','.join(parts)}"


def _keys(*, required: bool = False, **choices: list[Any]) -> st.SearchStrategy[list[str]]:
    """Draw some keys, or all if they are required, each with one of its values."""
    options = [
        st.sampled_from([*([] if required else [[]]), *([f"{key}={value}"] for value in found)])
        for key, found in choices.items()
    ]
    return st.tuples(*options).map(lambda found: [part for parts in found for part in parts])


@st.composite
def memory_specs(draw: st.DrawFn) -> str:
    """Draw a spec of any policy that keeps something beside tokens, with small numbers."""
    return draw(_spec(draw(st.sampled_from(["compressive", "centroid", "fam", "infini"]))))


@st.composite
def feedback_specs(draw: st.DrawFn) -> str:
    """Draw a spec of fam:level=model."""
    keys = _keys(slots=[1, 3, 6], segments=[0, 1, 2], block=[1, 3, 5], required=True)
    optional = _keys(sinks=[1, 2], query=["previous"])
    return f"fam:level=model,{','.join(draw(keys) + draw(optional))}"


def _spec(name: str) -> st.SearchStrategy[str]:
    """Draw a spec of blocks or of a memory."""
    return st.tuples(*_BESIDE_TOKENS[name]).map(
        lambda parts: f"{name}:{','.join(item for part in parts for item in part)}"
    )


_BY_TOKEN = ("window", "sinks", "h2o", "tova", "random", "knorm", "keydiff")
_PROMPTS = ["prefill=bulk", "prefill=bulk,protect=(3:4)", "protect=prompt"]
_PROTECTED = {"sinks": [1, 2], "recent": [0, 1, 3, 0.25, 0.4]}
_OWN_KEYS = {
    "window": _keys(),
    "sinks": _keys(sinks=[0, 1, 2]),
    "random": _keys(seed=[1, -5, 2**61]),
    "knorm": _keys(**_PROTECTED),
    "keydiff": _keys(**_PROTECTED),
    "snapkv": st.tuples(
        _keys(window=[1, 3, 4], kernel=[1, 3, 5], required=True), _keys(sinks=[1])
    ).map(lambda keys: keys[0] + keys[1]),
    "tova": st.one_of(
        _keys(**_PROTECTED),
        _keys(**_PROTECTED, group_pool=["max", "sum"]).map(lambda keys: [*keys, "scope=head"]),
    ),
    "h2o": st.one_of(
        _keys(
            **_PROTECTED, score=["mean", "relative"], decay=[0.5, 0.9], group_pool=["max", "sum"]
        ),
        _keys(**_PROTECTED, score=["mean"], decay=[0.9]).map(lambda keys: [*keys, "scope=layer"]),
    ),
}


_BUDGET = _keys(budget=[9, 10, 12, 14], required=True)
_POOLED = {"bias": ["none"], "min_similarity": [0.5, 0.7]}
_FUNCTIONS = st.one_of(
    _keys(**_POOLED),
    _keys(**_POOLED).map(lambda keys: [*keys, "fn=max"]),
    _keys(**_POOLED).map(lambda keys: [*keys, "fn=conv"]),
    _keys(min_similarity=[0.5]).map(lambda keys: [*keys, "fn=attention"]),
    st.just(["fn=most-used"]),
)
_BESIDE_TOKENS = {
    "bswa": (
        _keys(block=[1, 2, 3, 5, 8], segments=[0, 1, 2, 3], required=True),
        _keys(sinks=[1, 2]),
    ),
    "compressive": (
        _BUDGET,
        _keys(interval=[1, 2, 4, 7, 12], rate=[1, 2, 4], memory=[0, 1, 3, 0.25], sinks=[1, 2]),
        _FUNCTIONS,
    ),
    "centroid": (
        _BUDGET,
        _keys(interval=[2, 5, 11], slots=[0, 1, 3, 0.5], sinks=[1, 2], bias=["none"]),
    ),
    "fam": (
        _keys(block=[1, 2, 3, 5], segments=[0, 1, 2], slots=[0, 1, 3, 6], required=True),
        _keys(sinks=[1, 2], bias=["none"]),
    ),
    "infini": (
        _keys(segment=[1, 2, 3, 5, 8], required=True),
        _keys(gate=["0.0", 0.3, 1, "calibrated", "closed"], update=["delta"]),
    ),
}


# --- the law ----------------------------------------------------------------------------------

LAWS = st.builds(
    kvpolicy.Occupancy,
    retained=st.integers(0, 20),
    interval=st.integers(1, 25),
    state_slots=st.integers(0, 4),
)


PROMPT_LAWS = st.builds(
    kvpolicy.Occupancy,
    retained=st.integers(0, 20),
    interval=st.integers(1, 25),
    state_slots=st.integers(0, 4),
    prompts=st.sampled_from(["bulk", "keep"]),
)


# --- selection --------------------------------------------------------------------------------


class Choice(NamedTuple):
    """An eviction to decide, all [B, H_kv, S], and how many go."""

    scores: Tensor
    positions: Tensor
    candidates: Tensor
    count: int


@st.composite
def choices(draw: st.DrawFn) -> Choice:
    """Draw scores with many ties, infinities and extremes, over shuffled positions."""
    batch, kv_heads, slots = (draw(st.integers(1, most)) for most in (2, 3, 9))
    pools = {
        torch.float32: [0.0, -0.0, 1.0, 1.5, -2.0, math.inf, -math.inf, 1e-40, 3e38],
        torch.bfloat16: [0.0, 1.0, -1.0, 2.5],
        torch.float64: [0.0, 1.0, 1.0 + 1e-15, -1e300],
        torch.int64: [0, 1, -1, 2**63 - 1, -(2**63), 2**53, 2**53 + 1],
        torch.int32: [0, 1, -5],
    }
    dtype = draw(st.sampled_from(sorted(pools, key=str)))
    total = batch * kv_heads * slots

    def filled(strategy: st.SearchStrategy[Any], dtype: torch.dtype) -> Tensor:
        drawn = draw(st.lists(strategy, min_size=total, max_size=total))
        return torch.tensor(drawn, dtype=dtype).view(batch, kv_heads, slots)

    scores = filled(st.sampled_from(pools[dtype]), dtype)
    order = filled(st.floats(0, 1), torch.float64).argsort(dim=-1)
    positions = order * draw(st.integers(1, 7)) + draw(st.integers(0, 99))
    candidates = filled(st.booleans(), torch.bool)
    count = draw(st.integers(0, int(candidates.sum(-1).min())))
    return Choice(scores, positions, candidates, count)


# --- attention --------------------------------------------------------------------------------


@st.composite
def prompted_cases(draw: st.DrawFn, *, rows: int = 2, longest: int = 40) -> Case:
    """Draw a batch of requests with prompts of unequal lengths, some of them still growing."""
    prompts = st.lists(st.integers(0, longest), min_size=rows, max_size=rows)
    return replace(draw(cases(rows=rows, longest=longest)), prompts=tuple(draw(prompts)))


@st.composite
def cases(draw: st.DrawFn, *, rows: int = 2, longest: int = 40) -> Case:
    """Draw a batch of requests of unequal lengths, and a chunking."""
    lengths = st.lists(st.integers(1, longest), min_size=rows, max_size=rows)
    return Case(
        lengths=tuple(draw(lengths)),
        chunks=tuple(draw(st.lists(st.integers(1, longest), min_size=1, max_size=4))),
        kv_heads=draw(st.integers(1, 3)),
        group=draw(st.integers(1, 3)),
        layer=draw(st.integers(0, 5)),
        seed=draw(SEEDS),
    )


# --- evaluations --------------------------------------------------------------------------------

FURTHER_BYTES = st.binary(max_size=300)
"""What somebody else may have appended to a file of finished cells."""

PAIRS_WITH_TIES = st.lists(st.tuples(st.integers(0, 5), st.floats(-9, 9)), min_size=2, max_size=30)
"""Points to be ranked by either side."""
