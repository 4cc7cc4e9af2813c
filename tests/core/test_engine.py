"""The step engine against the float64 oracle, and the identities of policies.md E1."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import kvpolicy
from kvpolicy.attention import AttentionLayer
from kvpolicy.engine import step
from kvpolicy.rehearsal import Case, Host, Row, Run, by_steps, reference
from kvpolicy.rotary import Rotary
from kvpolicy.slots import Slots
from oracles.dense import LayerRun, replay_layer, rotate
from strategies import attended_specs, cases

THETA = 1e4
GRID = [
    "window:budget=6,interval=1",
    "window:budget=6,interval=4,protect=(1:3)",
    "sinks:budget=6,interval=1,sinks=2",
    "sinks:budget=6,interval=9",
    "h2o:budget=6,interval=1",
    "h2o:budget=7,interval=3,recent=0.4,sinks=1",
    "h2o:budget=6,interval=8,recent=1",
    "h2o:budget=6,interval=2,score=mean",
    "h2o:budget=6,interval=2,score=relative",
    "h2o:budget=6,interval=3,decay=0.5",
    "h2o:budget=6,interval=3,decay=0.9,score=relative",
    "h2o:budget=6,interval=2,group_pool=max",
    "h2o:budget=6,interval=2,group_pool=sum,score=mean,decay=0.8",
    "h2o:budget=6,interval=2,scope=layer",
    "tova:budget=6,interval=1",
    "tova:budget=6,interval=4,recent=2,sinks=1",
    "tova:budget=6,interval=2,scope=head",
    "tova:budget=6,interval=2,scope=head,group_pool=max",
    "knorm:budget=6,interval=1",
    "knorm:budget=7,interval=3,recent=0.4,sinks=1",
    "keydiff:budget=6,interval=2",
    "keydiff:budget=6,interval=5,recent=2,protect=(2:4)",
    "snapkv:budget=6,interval=4,window=3,kernel=3",
    "snapkv:budget=6,interval=2,window=5,scope=layer",
    "random:budget=6,interval=1",
    "random:budget=6,interval=5,seed=-3,protect=(2:4)",
    "full",
]


def follow(spec: str, case: Case, run: Run, index: int, row: Row) -> LayerRun:
    """Run the oracle beside a row's record; it objects to any but a near-tie difference."""
    sets = run.retained[index]
    return replay_layer(
        spec, *row, layer=case.layer, host_retained=[sets[n] for n in range(1, row.length + 1)]
    )


def assert_equals_oracle(spec: str, case: Case) -> None:
    """Assert that every row of a batch has the oracle's sets and outputs."""
    run = by_steps(kvpolicy.parse(spec), case)
    for index, row in enumerate(case.rows()):
        oracle = follow(spec, case, run, index, row)
        assert [run.retained[index][n + 1] for n in range(row.length)] == oracle.retained
        np.testing.assert_allclose(run.outputs[index].numpy(), oracle.outputs, atol=2e-5)


@pytest.mark.parametrize("spec", GRID)
def test_batch_of_unequal_lengths_equals_the_oracle(spec: str) -> None:
    """Proves semantics 1 for every built-in policy, sets after every token and outputs."""
    for seed in range(2):
        assert_equals_oracle(spec, Case(lengths=(40, 23, 9), layer=seed, seed=seed))


@given(spec=attended_specs(), case=cases())
@settings(max_examples=60)
def test_any_parameters_equal_the_oracle(spec: str, case: Case) -> None:
    """Proves the same for drawn parameters, lengths, heads and groups."""
    assert_equals_oracle(spec, case)


def test_near_ties_are_rare_enough_to_prove_something() -> None:
    """Proves that the oracle followed a host at no decision of the grid's fixed cases."""
    for spec in GRID:
        case = Case(lengths=(40, 23, 9), seed=0)
        run = by_steps(kvpolicy.parse(spec), case)
        rows = enumerate(case.rows())
        assert sum(follow(spec, case, run, i, row).near_ties for i, row in rows) == 0


def rotated(row: Row) -> Row:
    """Rotate a row's queries and keys at their positions, as a model does before caching."""
    q, k = (torch.from_numpy(rotate(x.numpy(), range(row.length), THETA)) for x in (row.q, row.k))
    return Row(q.float(), k.float(), row.v)


@pytest.mark.parametrize("spec", ["sinks:budget=6,sinks=2", "window:budget=6", "sinks:budget=6"])
@pytest.mark.parametrize("interval", [1, 4])
def test_reindex_equals_attention_on_the_compacted_sequence(spec: str, interval: int) -> None:
    """Proves rope=reindex: the oracle rotates the kept keys by rank, from scratch, each step."""
    spec = f"{spec},interval={interval},rope=reindex"
    case = Case(lengths=(40, 15))
    rows = case.rows()
    run = by_steps(kvpolicy.parse(spec), case, [rotated(row) for row in rows])
    for index, row in enumerate(rows):
        oracle = replay_layer(spec, *row, theta=THETA)
        np.testing.assert_allclose(run.outputs[index].numpy(), oracle.outputs, atol=2e-5)


# --- identities -------------------------------------------------------------------------------

EVICTING = ("window", "sinks", "h2o", "tova", "random")


def outputs_and_sets(spec: str, case: Case, rows: list[Row] | None = None) -> Run:
    """Run a spec step by step."""
    return by_steps(kvpolicy.parse(spec), case, rows)


def assert_same(first: Run, second: Run, *, exactly: bool = True) -> None:
    """Assert equal sets and outputs."""
    assert first.retained == second.retained
    for ours, theirs in zip(first.outputs, second.outputs, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0 if exactly else 2e-5)


@pytest.mark.parametrize("name", EVICTING)
def test_t1_budget_of_the_whole_sequence_is_the_full_cache(name: str) -> None:
    """Proves E1 T1 for every policy, bit by bit."""
    case = Case(lengths=(30, 12))
    assert_same(outputs_and_sets(f"{name}:budget=30", case), outputs_and_sets("full", case))


@pytest.mark.parametrize("interval", [1, 3])
def test_t2_all_policies_hold_equally_many_slots(interval: int) -> None:
    """Proves E1 T2: comparisons at one budget are fair, step by step."""
    case = Case(lengths=(40, 30))
    runs = [outputs_and_sets(f"{name}:budget=8,interval={interval}", case) for name in EVICTING]
    sizes = [[[len(kept[0]) for kept in row.values()] for row in run.retained] for run in runs]
    assert all(size == sizes[0] for size in sizes)


@given(case=cases(), budget=st.integers(1, 12), interval=st.integers(1, 15))
@settings(max_examples=20)
def test_t3_h2o_with_everything_recent_is_window(case: Case, budget: int, interval: int) -> None:
    """Proves E1 T3, first half."""
    common = f"budget={budget},interval={interval}"
    h2o = outputs_and_sets(f"h2o:{common},recent=1.0", case)
    assert_same(h2o, outputs_and_sets(f"window:{common}", case))


def uniform(case: Case) -> list[Row]:
    """Give the case's rows queries that attend to everything equally."""
    return [row._replace(q=torch.zeros_like(row.q)) for row in case.rows()]


@pytest.mark.parametrize("interval", [1, 4, 11])
@pytest.mark.parametrize("scope", ["layer", "head"])
def test_t3_tova_on_uniform_attention_is_window(interval: int, scope: str) -> None:
    """Proves E1 T3, second half: exact ties go by position."""
    case, common = Case(lengths=(40, 23)), f"budget=8,interval={interval}"
    tova = outputs_and_sets(f"tova:{common},scope={scope}", case, uniform(case))
    assert_same(tova, outputs_and_sets(f"window:{common}", case, uniform(case)))


@pytest.mark.parametrize("recent", [1, 4, 7])
def test_t4_h2o_on_uniform_attention_is_sinks(recent: int) -> None:
    """Proves E1 T4: the earliest slots have collected most."""
    case = Case(lengths=(40, 23))
    h2o = outputs_and_sets(f"h2o:budget=8,interval=1,recent={recent}", case, uniform(case))
    sinks = outputs_and_sets(f"sinks:budget=8,interval=1,sinks={8 - recent}", case, uniform(case))
    assert_same(h2o, sinks)


def test_sinks_without_sinks_is_window() -> None:
    """Proves policies.md A2: i = 0 is FIFO."""
    case = Case(lengths=(40, 23))
    assert_same(
        outputs_and_sets("sinks:budget=8,sinks=0", case), outputs_and_sets("window:budget=8", case)
    )


@pytest.mark.parametrize("spec", ["h2o:budget=8", "tova:budget=8,scope=head"])
def test_t15_group_pools_agree_at_group_size_one(spec: str) -> None:
    """Proves E1 T15, first half: plain multi-head attention leaves nothing to pool."""
    case = Case(lengths=(40, 23), kv_heads=3, group=1)
    runs = [outputs_and_sets(f"{spec},group_pool={pool}", case) for pool in ("mean", "max", "sum")]
    assert_same(runs[0], runs[1])
    assert_same(runs[0], runs[2])


@pytest.mark.parametrize("spec", ["tova:budget=8", "h2o:budget=8,scope=layer"])
def test_t15_layer_decisions_ignore_how_heads_share_keys(spec: str) -> None:
    """Proves E1 T15, second half: KV heads copied per query head change nothing."""
    case = Case(lengths=(40,) * 2, kv_heads=2, group=3)
    copied = [
        Row(row.q, row.k.repeat_interleave(3, 0), row.v.repeat_interleave(3, 0))
        for row in case.rows()
    ]
    shared, copies = outputs_and_sets(spec, case), outputs_and_sets(spec, case, copied)
    for ours, theirs in zip(shared.retained, copies.retained, strict=True):
        assert {n: kept[0] for n, kept in ours.items()} == {
            n: kept[5] for n, kept in theirs.items()
        }
    for ours, theirs in zip(shared.outputs, copies.outputs, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)


def test_every_kv_head_keeps_its_own_set() -> None:
    """Proves true per-head eviction: under scope=head the heads' sets part."""
    run = outputs_and_sets("h2o:budget=8,recent=1", Case(lengths=(40,) * 2))
    assert run.retained[0][40][0] != run.retained[0][40][1]


def test_random_splits_over_devices_like_it_runs_on_one() -> None:
    """Proves that a KV head's place in the whole model, not on its device, seeds `random`."""
    policy, case = kvpolicy.parse("random:budget=6"), Case(lengths=(30,) * 2, kv_heads=2)
    whole, row = reference(policy, case), case.rows()[0]
    part = Row(row.q[2:], row.k[1:], row.v[1:])
    split = by_steps(policy, case, [part], first_kv_head=1)
    assert split.retained[0][30][0] == whole.retained[0][30][1]
    assert by_steps(policy, case, [part]).retained[0][30] != split.retained[0][30]


# --- storage ----------------------------------------------------------------------------------


def a_layer(spec: str) -> AttentionLayer:
    """Make a layer with heads of 8."""
    return AttentionLayer(kvpolicy.parse(spec), 0, 8**-0.5)


def feed(
    layer: AttentionLayer, slots: Slots, row: Row, first: int, last: int, dtype: torch.dtype
) -> Tensor:
    """Step through some tokens of one row; the last output."""
    output = torch.empty(0)
    for t in range(first, last):
        output = step(layer, slots, *(x[None, :, t].to(dtype) for x in row))
    return output


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_storage_never_grows_beyond_the_capacity(dtype: torch.dtype) -> None:
    """Proves constant memory in the cache's own dtype, with outputs in the query's."""
    layer, row = a_layer("h2o:budget=8,interval=3"), Case(lengths=(200,) * 2).rows()[0]
    slots = Slots.empty(*(x[None, :, 0].to(dtype) for x in row[1:]))
    for t in range(200):
        output = feed(layer, slots, row, t, t + 1, dtype)
        assert slots.capacity <= 11
        assert (output.dtype, slots.keys.dtype, slots.accumulated.dtype) == (
            dtype,
            dtype,
            torch.float32,
        )
    assert slots.num_bytes == 11 * 2 * (2 * 8 * dtype.itemsize + 8 + 4)
    assert slots.evicted == [layer.occupancy.evicted(200)]


def test_full_cache_keeps_growing() -> None:
    """Proves storage without a limit, past its first growth steps."""
    layer, row = a_layer("full"), Case(lengths=(150,) * 2).rows()[0]
    slots = Slots.empty(row.k[None, :, 0], row.v[None, :, 0])
    feed(layer, slots, row, 0, 150, torch.float32)
    assert slots.capacity >= 150
    assert slots.evicted == [0]
    assert slots.positions[0, :, :150].tolist() == [list(range(150))] * 2


@pytest.mark.parametrize("spec", ["h2o:budget=6", "tova:budget=6", "random:budget=6"])
def test_t14_a_copy_made_midway_goes_on_identically(spec: str) -> None:
    """Proves E1 T14: snapshot and fork are bit-exact, and the copies are independent."""
    layer, (row, other) = a_layer(spec), Case(lengths=(40, 40)).rows()
    slots = Slots.empty(row.k[None, :, 0], row.v[None, :, 0])
    feed(layer, slots, row, 0, 20, torch.float32)
    fork = copy.deepcopy(slots)
    feed(layer, copy.deepcopy(slots), other, 20, 40, torch.float32)
    first = feed(layer, slots, row, 20, 40, torch.float32)
    assert torch.equal(first, feed(layer, fork, row, 20, 40, torch.float32))
    assert torch.equal(slots.positions, fork.positions)
    assert (slots.tokens, slots.evicted) == (fork.tokens, fork.evicted)


class FailsFor(kvpolicy.ScorePolicy):
    """Fails as soon as a row reaches a number of tokens."""

    needs = ("accumulated",)
    tokens: int = 0

    def score(self, view: kvpolicy.View) -> Tensor:
        """Rate by accumulated attention, or fail."""
        if (view.n == self.tokens).any():
            raise RuntimeError("planned")
        return view.accumulated


def test_failed_step_leaves_every_row_as_it_was() -> None:
    """Proves all or nothing: one row's failing score undoes the step of its neighbours."""
    rows = Case(lengths=(40, 35)).rows()
    policy = FailsFor(budget=6, interval=2, tokens=20)
    host = Host(policy, Case(), rows)
    for _ in range(5):
        host.step([0])
    for _ in range(14):
        host.step([0, 1])
    before = host.state()
    assert before.tokens == [19, 14]
    with pytest.raises(RuntimeError, match="planned"):
        host.step([0, 1])
    assert before.equals(host.state())
    host.layer = replace(host.layer, policy=replace(policy, tokens=0))
    host.step([0, 1])
    assert host.slots.tokens == [20, 15]


def test_time_spent_deciding_is_measured() -> None:
    """Proves that the ledger's policy_seconds has a source."""
    layer, row = a_layer("h2o:budget=6"), Case(lengths=(20,) * 2).rows()[0]
    slots = Slots.empty(row.k[None, :, 0], row.v[None, :, 0])
    feed(layer, slots, row, 0, 20, torch.float32)
    assert 0 < layer.stopwatch.seconds < 60


def test_reindex_without_rotary_embedding_is_a_bug_of_the_host() -> None:
    """Proves that a host that forgets the rotary embedding hears of it."""
    layer, row = a_layer("sinks:budget=6,rope=reindex"), Case(lengths=(20,) * 2).rows()[0]
    slots = Slots.empty(row.k[None, :, 0], row.v[None, :, 0])
    with pytest.raises(AssertionError, match="rotary"):
        feed(layer, slots, row, 0, 20, torch.float32)
    assert Rotary.from_theta(THETA, 8).inverse_frequencies.shape == (4,)
