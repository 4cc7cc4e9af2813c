"""Every built-in policy: the contract suite, and its scores against their definitions."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import kvpolicy
from kvpolicy.policies.random import splitmix64
from kvpolicy.policy import View
from kvpolicy.rehearsal import Case, Run, by_chunks, by_steps
from kvpolicy.testing import CONTRACT, PolicyContract, check_policy
from oracles.dense import random_score
from strategies import cases

CONTRACTED = [
    "fixtures.policies.Digest:budget=9",
    "bswa:block=4,segments=2",
    "bswa:block=3,segments=0",
    "bswa:block=3,segments=1,sinks=2",
    "compressive:budget=8",
    "compressive:budget=12,rate=2,fn=max,bias=none",
    "compressive:budget=8,fn=most-used",
    "compressive:budget=9,fn=attention,sinks=2",
    "compressive:budget=9,fn=conv,memory=5,min_similarity=0.2",
    "centroid:budget=8",
    "centroid:budget=9,slots=4,sinks=1,bias=none",
    "fam:block=4,segments=1,slots=3",
    "fam:block=3,segments=0,slots=4,sinks=1",
    "infini:segment=5",
    "infini:segment=5,gate=0.3",
    "infini:segment=4,gate=0.5,update=delta",
    "infini:segment=5,gate=calibrated",
    "full",
    "window:budget=16",
    "window:budget=16,protect=(1:3,6:7)",
    "window:budget=16,rope=reindex",
    "sinks:budget=16,sinks=2",
    "sinks:budget=16,rope=reindex",
    "h2o:budget=16",
    "h2o:budget=16,score=relative,decay=0.8,group_pool=max",
    "h2o:budget=16,score=mean,scope=layer,sinks=1",
    "tova:budget=16",
    "tova:budget=16,scope=head,group_pool=sum,recent=2,protect=(2:4)",
    "snapkv:budget=12,window=5",
    "snapkv:budget=12,interval=7,window=3,kernel=3,group_pool=sum,sinks=2",
    "knorm:budget=16",
    "knorm:budget=16,sinks=2,recent=0.25",
    "keydiff:budget=16",
    "keydiff:budget=16,interval=3,recent=3,protect=(2:4)",
    "random:budget=16,seed=7",
    "mix:layers=(0:window;1-2:h2o;3-:random),budget=8,interval=3",
    "fixtures.policies.FadingMaximum:budget=16",
    "fixtures.policies.RowTimesKeyNorm:budget=16,power=0.5,scope=layer",
]


@pytest.mark.parametrize("spec", CONTRACTED)
def test_keeps_the_contract(spec: str) -> None:
    """Proves every promise of kvpolicy.testing for the policy, on small drawn cases."""
    outcomes = check_policy(spec, examples=6)
    assert [outcome.check for outcome in outcomes] == [check.__name__ for check in CONTRACT]


def test_every_built_in_policy_is_contracted() -> None:
    """Proves that a new policy cannot be forgotten above."""
    assert {*kvpolicy.registry.BUILT_IN} <= {spec.partition(":")[0] for spec in CONTRACTED}


class TestTOVAThroughTheMixin(PolicyContract):
    """Proves that the public base class runs one test per promise."""

    policy = "tova:budget=8"
    examples = 3


# --- random -----------------------------------------------------------------------------------


def unsigned(x: Tensor) -> list[int]:
    """Read int64 as the unsigned words they stand for."""
    return [value % 2**64 for value in x.flatten().tolist()]


def test_splitmix64_gives_the_published_numbers() -> None:
    """Proves the hash on the first outputs of the generator with seed 0, state + increment."""
    increment = 0x9E3779B97F4A7C15
    states = torch.tensor([(i * increment % 2**64 + 2**63) % 2**64 - 2**63 for i in range(5)])
    assert unsigned(splitmix64(states)) == [
        0xE220A8397B1DCDAF,
        0x6E789E6AA1B965F4,
        0x06C45D188009454F,
        0xF88BB8A8724C81EC,
        0x1B39896A51A8749B,
    ]


@given(
    seed=st.integers(-(2**61), 2**61),
    layer=st.integers(0, 200),
    kv_head=st.integers(0, 200),
    n=st.integers(1, 2**40),
    positions=st.lists(st.integers(0, 2**40), min_size=1, max_size=5),
)
def test_random_chains_splitmix64(
    seed: int, layer: int, kv_head: int, n: int, positions: list[int]
) -> None:
    """Proves the order (seed, layer, KV head, n, position) and the unsigned comparison."""
    policy = kvpolicy.parse(f"random:budget=4,seed={seed}")
    view = a_view(positions=torch.tensor([[positions]]), n=n, layer=layer, kv_head=kv_head)
    scores = policy.score(view)[0, 0].tolist()
    expected = [random_score(seed % 2**64, layer, kv_head, n, p) for p in positions]
    assert [score % 2**64 ^ 1 << 63 for score in scores] == expected
    order = sorted(range(len(positions)), key=lambda i: expected[i])
    assert sorted(range(len(positions)), key=lambda i: scores[i]) == order


def test_random_evicts_uniformly() -> None:
    """Proves that old and new tokens, and heads, survive about equally often."""
    case = Case(lengths=(64, 64), kv_heads=2, group=1)
    survived = torch.zeros(48)
    for seed in range(20):
        policy = kvpolicy.parse(f"random:budget=16,interval=48,seed={seed}")
        for row in by_steps(policy, case).retained:
            assert row[64][0] != row[64][1]
            for kept in row[64]:
                survived[torch.tensor([p // 16 for p in kept])] += 1
    shares = survived[:4] / survived.sum()
    assert shares.sub(0.25).abs().max() < 0.05


# --- scores by definition ---------------------------------------------------------------------


def a_view(*, positions: Tensor, n: int, layer: int = 0, kv_head: int = 0, **shown: Tensor) -> View:
    """Show a policy one row and head."""
    nothing = dict.fromkeys(("weights", "accumulated", "keys", "values"))
    return View(
        positions=positions,
        valid=torch.ones_like(positions, dtype=torch.bool),
        n=torch.tensor([[[n]]]),
        visible=torch.tensor([[[positions.shape[-1]]]]),
        kv_heads=torch.tensor([[[kv_head]]]),
        budget=4,
        layer=layer,
        **{**nothing, **shown},
    )


@pytest.mark.parametrize("name", ["window", "sinks"])
def test_static_policies_rate_by_position(name: str) -> None:
    """Proves that the oldest unprotected slot goes first."""
    positions = torch.tensor([[[7, 0, 3]]])
    scores = kvpolicy.parse(f"{name}:budget=8").score(a_view(positions=positions, n=9))
    assert torch.equal(scores, positions)


def test_tova_rates_by_the_newest_row() -> None:
    """Proves that nothing but the last row counts."""
    weights = torch.rand(1, 1, 3)
    view = a_view(positions=torch.tensor([[[7, 0, 3]]]), n=9, weights=weights)
    assert torch.equal(kvpolicy.parse("tova:budget=8").score(view), weights)


def test_h2o_mean_divides_by_the_rows_since_the_slot_was_written() -> None:
    """Proves that the own row counts: position p has been seen n - p times."""
    view = a_view(
        positions=torch.tensor([[[0, 5, 9]]]), n=10, accumulated=torch.tensor([[[5.0, 5.0, 0.5]]])
    )
    scores = kvpolicy.parse("h2o:budget=8,score=mean").score(view)
    torch.testing.assert_close(scores, torch.tensor([[[0.5, 1.0, 0.5]]]))
    assert torch.equal(kvpolicy.parse("h2o:budget=8").score(view), view.accumulated)


def attention_rows(case: Case, retained: list[set[int]]) -> list[dict[int, float]]:
    """Weights of a single head, token by token, over what is held: plain Python."""
    row = case.rows()[0]
    rows = []
    for t, before in enumerate([set(), *retained][: row.length]):
        slots = sorted(before | {t})
        logits = [float(row.q[0, t] @ row.k[0, s]) / math.sqrt(8) for s in slots]
        top = max(logits)
        exps = [math.exp(x - top) for x in logits]
        rows.append({s: e / sum(exps) for s, e in zip(slots, exps, strict=True)})
    return rows


@given(
    seed=st.integers(0, 999),
    score=st.sampled_from(["sum", "mean", "relative"]),
    decay=st.sampled_from([1.0, 0.9, 0.3]),
)
@settings(max_examples=15)
def test_h2o_statistics_follow_their_definition(seed: int, score: str, decay: float) -> None:
    """Proves sum, mean, relative and decay-before-addition on the scores the policy gives."""
    case = Case(lengths=(24, 24), kv_heads=1, group=1, seed=seed)
    policy = kvpolicy.parse(f"h2o:budget=6,interval=3,score={score},decay={decay}")
    run = by_steps(policy, case)
    rows = attention_rows(case, [set(run.retained[0][n][0]) for n in range(1, 25)])
    for (row, n), made in run.decisions.items():
        if row != 0:
            continue
        positions = made.view.positions[made.row, 0].tolist()
        for position, got in zip(positions, made.scores[made.row, 0].tolist(), strict=True):
            expected = 0.0
            for t in range(position, n):
                unit = len(rows[t]) if score == "relative" else 1
                expected = expected * decay + rows[t][position] * unit
            expected /= 1 if score == "sum" else n - position
            assert got == pytest.approx(expected, rel=1e-4, abs=1e-6)


@given(case=cases(longest=24))
@settings(max_examples=15)
def test_group_pools_reduce_the_groups_weights(case: Case) -> None:
    """Proves mean, max and sum over a KV head's query heads, and the layer's mean."""
    specs = [f"tova:budget=4,interval=1,scope=head,group_pool={p}" for p in ("mean", "max", "sum")]
    by_pool = []
    for spec in [*specs, "tova:budget=4,interval=1"]:
        decisions = by_steps(kvpolicy.parse(spec), case).decisions
        first = [made for (row, n), made in decisions.items() if (row, n) == (0, 5)]
        by_pool.append(first[0].view.weights[first[0].row] if first else None)
    if by_pool[0] is None:
        return
    row = case.rows()[0]
    groups = row.q[:, 4].view(case.kv_heads, case.group, 8)
    weights = (groups @ row.k[:, :5].transpose(1, 2) / math.sqrt(8)).softmax(-1)  # [H_kv, G, 5]
    layer = weights.mean(dim=(0, 1)).expand(case.kv_heads, 5)
    for got, expected in zip(
        by_pool, (weights.mean(1), weights.amax(1), weights.sum(1), layer), strict=True
    ):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


# --- custom policies --------------------------------------------------------------------------


class ObservedSum(kvpolicy.ScorePolicy):
    """H2O written with its own observe()."""

    needs = ("last_row", "accumulated")
    recent: int | float = 0.5

    def observe(self, view: View) -> Tensor:
        """Add the newest row."""
        return view.accumulated + view.weights

    def score(self, view: View) -> Tensor:
        """Rate by the sum."""
        return view.accumulated


@given(case=cases())
@settings(max_examples=15)
def test_observe_can_replace_the_built_in_statistic(case: Case) -> None:
    """Proves that observe() sees each row once, in rows of unequal lengths too."""
    ours = by_steps(ObservedSum(budget=8, interval=3), case)
    theirs = by_steps(kvpolicy.parse("h2o:budget=8,interval=3"), case)
    assert ours.retained == theirs.retained


def test_custom_policies_are_found_by_import_path() -> None:
    """Proves that a class of at most 30 lines needs no registration to run anywhere."""
    policy = kvpolicy.parse("fixtures.policies.FadingMaximum:budget=8,fade=0.5")
    assert str(policy) == "fixtures.policies.FadingMaximum:budget=8,fade=0.5"
    assert policy.fade == 0.5


@pytest.mark.parametrize(
    "declared", [(), ("last_row",), ("accumulated",), ("keys",), ("values",), ("keys", "last_row")]
)
@pytest.mark.parametrize("run", [by_steps, by_chunks])
def test_views_show_what_was_declared_and_no_more(
    declared: tuple[str, ...], run: Callable[..., Run]
) -> None:
    """Proves that undeclared evidence is None, so that a policy cannot lean on it by chance."""
    shown = set()

    class Curious(kvpolicy.ScorePolicy):
        """Notes what it is shown."""

        needs = declared

        def score(self, view: View) -> Tensor:
            """Rate by position."""
            evidence = {"last_row": view.weights, "accumulated": view.accumulated}
            evidence |= {"keys": view.keys, "values": view.values}
            shown.update(need for need, x in evidence.items() if x is not None)
            return view.positions

    run(Curious(budget=4), Case(lengths=(9, 9)))
    assert shown == {*declared}


def test_unknown_needs_are_refused() -> None:
    """Proves that a misspelt need is an error at construction."""

    class Misspelt(kvpolicy.ScorePolicy):
        """Asks for what does not exist."""

        needs = ("lastrow",)

    with pytest.raises(kvpolicy.PolicyError, match=r"unknown needs .*lastrow.*last_row"):
        Misspelt(budget=4)
