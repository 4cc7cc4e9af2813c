"""The look-ahead routine: equal to steps and to the oracle, whatever the chunks."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

import kvpolicy
from kvpolicy import lookahead
from kvpolicy.attention import AttentionLayer
from kvpolicy.lookahead import extend
from kvpolicy.rehearsal import Case, Host, Row, by_chunks, by_steps
from kvpolicy.rotary import Rotary
from kvpolicy.slots import Slots
from oracles.dense import NEAR_TIE, replay_layer, rotate
from strategies import attended_specs, cases

SPECS = [
    "full",
    "window:budget=7,interval=3",
    "sinks:budget=7,interval=1,sinks=2",
    "h2o:budget=7,interval=3",
    "h2o:budget=7,interval=3,decay=0.7,score=relative",
    "h2o:budget=7,interval=2,score=mean,scope=layer",
    "tova:budget=7,interval=3",
    "tova:budget=7,interval=2,scope=head,group_pool=sum",
    "random:budget=7,interval=5",
    "knorm:budget=7,interval=3,recent=2",
    "keydiff:budget=7,interval=3,sinks=1",
    "snapkv:budget=7,interval=3,window=4,kernel=3",
    "fixtures.policies.FadingMaximum:budget=7,interval=3",
    "fixtures.policies.RowTimesKeyNorm:budget=7,interval=3",
]


@pytest.fixture(params=[1, 3, 8, 128])
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Look ahead over this many tokens at once."""
    monkeypatch.setattr(lookahead, "BLOCK", request.param)
    return request.param


def certified(spec: str, case: Case) -> Case:
    """Return a case like this one in which the oracle meets no near-tie."""
    for seed in range(50):
        drawn = replace(case, seed=case.seed + seed)
        runs = [replay_layer(spec, *row, layer=case.layer) for row in drawn.rows()]
        if min(run.min_margin for run in runs) >= NEAR_TIE:
            return drawn
    raise AssertionError(f"{spec}: every one of 50 seeds has a near-tie")


@pytest.mark.parametrize("spec", [spec for spec in SPECS if "fixtures" not in spec])
def test_equals_the_oracle_whatever_the_block(spec: str, block: int) -> None:
    """Proves sets and outputs of whole sequences against float64, on certified inputs."""
    case = certified(spec, Case(lengths=(40, 23), chunks=(40,), layer=2))
    run = by_chunks(kvpolicy.parse(spec), case)
    for index, row in enumerate(case.rows()):
        oracle = replay_layer(spec, *row, layer=2)
        assert run.retained[index][row.length] == oracle.retained[-1]
        np.testing.assert_allclose(run.outputs[index].numpy(), oracle.outputs, atol=2e-5)


@given(spec=attended_specs(), case=cases())
@settings(max_examples=60)
def test_any_parameters_and_chunks_equal_the_oracle(spec: str, case: Case) -> None:
    """Proves the same for drawn policies and chunkings; near-ties prove nothing."""
    oracles = [replay_layer(spec, *row, layer=case.layer) for row in case.rows()]
    assume(min(oracle.min_margin for oracle in oracles) >= NEAR_TIE)
    run = by_chunks(kvpolicy.parse(spec), case)
    for index, oracle in enumerate(oracles):
        for n, kept in run.retained[index].items():
            assert kept == oracle.retained[n - 1]
        np.testing.assert_allclose(run.outputs[index].numpy(), oracle.outputs, atol=2e-5)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("chunks", [(1,), (7,), (16,), (40,), (1, 39), (13, 2, 25)])
def test_t12_chunk_sizes_form_one_class(spec: str, chunks: tuple[int, ...]) -> None:
    """Proves E1 T12: chunk borders change neither sets nor outputs."""
    case = Case(lengths=(40, 23), chunks=chunks)
    stepped, chunked = (run(kvpolicy.parse(spec), case) for run in (by_steps, by_chunks))
    for index in range(2):
        common = chunked.retained[index].keys()
        assert {n: stepped.retained[index][n] for n in common} == chunked.retained[index]
        torch.testing.assert_close(
            stepped.outputs[index], chunked.outputs[index], rtol=0, atol=2e-5
        )


@pytest.mark.parametrize("spec", ["sinks:budget=6,sinks=2,interval=3", "window:budget=6"])
@pytest.mark.parametrize("chunks", [(40,), (5, 11)])
def test_reindex_equals_the_oracle_in_chunks(spec: str, chunks: tuple[int, ...]) -> None:
    """Proves that queries are turned by what was evicted before each of them."""
    case = Case(lengths=(40, 15), chunks=chunks)
    spec = f"{spec},rope=reindex"
    rows = case.rows()
    turned = [
        Row(*(torch.from_numpy(rotate(x.numpy(), range(row.length), 1e4)).float() for x in row[:2]),
            row.v)
        for row in rows
    ]  # fmt: skip
    host = Host(kvpolicy.parse(spec), case, turned)
    for index, row in enumerate(rows):
        turn = 0
        while not host.is_done(index):
            host.extend(index, chunks[turn % len(chunks)])
            turn += 1
        oracle = replay_layer(spec, *row, theta=1e4)
        np.testing.assert_allclose(host.run.outputs[index].numpy(), oracle.outputs, atol=2e-5)


@pytest.mark.parametrize("spec", SPECS)
def test_rows_in_lockstep_equal_rows_alone(spec: str, block: int) -> None:
    """Proves that a look-ahead over several rows couples none of them."""
    case = Case(lengths=(30, 30, 30))
    rows, layer = case.rows(), a_layer(spec)
    slots = Slots.empty(*(torch.stack([row[i][:, 0] for row in rows]) for i in (1, 2)))
    batch = extend(layer, slots, *map(torch.stack, zip(*rows, strict=True)))
    for index, row in enumerate(rows):
        single = Slots.empty(row.k[None, :, 0], row.v[None, :, 0])
        alone = extend(layer, single, *(x[None] for x in row))
        torch.testing.assert_close(batch[index], alone[0], rtol=0, atol=2e-5)
        held = layer.occupancy.of_prompt(0).held(30)
        assert torch.equal(
            slots.positions[index, :, :held].sort(-1).values,
            single.positions[0, :, :held].sort(-1).values,
        )


@given(case=cases(), switches=st.lists(st.booleans(), min_size=1, max_size=6))
@settings(max_examples=20)
def test_steps_and_chunks_may_alternate(case: Case, switches: list[bool]) -> None:
    """Proves that both routines leave the same state behind: prefill, decode, next turn."""
    policy = kvpolicy.parse("h2o:budget=6,interval=2,recent=1.0")
    host = Host(policy, case, [case.rows()[0]])
    turn = 0
    while not host.is_done(0):
        if switches[turn % len(switches)]:
            host.extend(0, case.chunks[turn % len(case.chunks)])
        else:
            host.step([0])
        turn += 1
    stepped = by_steps(policy, case, [case.rows()[0]])
    torch.testing.assert_close(host.run.outputs[0], stepped.outputs[0], rtol=0, atol=2e-5)


def a_layer(spec: str | kvpolicy.CachePolicy) -> AttentionLayer:
    """Make a layer with heads of 8."""
    return AttentionLayer(kvpolicy.parse(spec), 0, 8**-0.5, Rotary.from_theta(1e4, 8))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_caches_keep_their_dtype(dtype: torch.dtype) -> None:
    """Proves that storage and outputs stay in the model's dtype, weights in float32."""
    row = Row(*(x.to(dtype) for x in Case(lengths=(40, 1)).rows()[0]))
    slots = Slots.empty(row.k[None, :, 0], row.v[None, :, 0])
    output = extend(a_layer("h2o:budget=6"), slots, *(x[None] for x in row))
    assert (output.dtype, slots.keys.dtype) == (dtype, dtype)
    assert slots.accumulated.dtype == torch.float32
    assert not output.isnan().any()


class FailsLate(kvpolicy.ScorePolicy):
    """Fails at an eviction far into the chunk."""

    def score(self, view: kvpolicy.View) -> Tensor:
        """Rate by position, or fail."""
        if (view.n > 25).any():
            raise RuntimeError("planned")
        return view.positions


def test_failure_in_a_later_block_undoes_the_earlier_ones(block: int) -> None:
    """Proves all or nothing over a chunk of many blocks."""
    row = Case(lengths=(40, 1)).rows()[0]
    host = Host(FailsLate(budget=6, interval=2), Case(), [row])
    host.extend(0, 9)
    before = host.state()
    with pytest.raises(RuntimeError, match="planned"):
        host.extend(0, 31)
    assert before.equals(host.state())


def test_rows_out_of_step_are_a_bug_of_the_host() -> None:
    """Proves that unequal rows in one look-ahead do not pass silently."""
    row = Case(lengths=(10, 1)).rows()[0]
    slots = Slots.empty(row.k[None, :, 0].expand(2, -1, -1), row.v[None, :, 0].expand(2, -1, -1))
    slots.tokens = [0, 1]
    with pytest.raises(AssertionError, match="lockstep"):
        extend(a_layer("window:budget=4"), slots, *(x[None].expand(2, -1, -1, -1) for x in row))


def test_long_chunks_walk_many_blocks() -> None:
    """Proves the default block at a length that crosses it several times."""
    case = Case(lengths=(400, 130), chunks=(400,))
    for spec in ("h2o:budget=32,recent=1.0", "window:budget=32", "random:budget=32"):
        policy = kvpolicy.parse(spec)
        chunked = by_chunks(policy, case)
        for index, row in enumerate(case.rows()):
            oracle = replay_layer(spec, *row)
            assert chunked.retained[index][row.length] == oracle.retained[-1]
            np.testing.assert_allclose(chunked.outputs[index].numpy(), oracle.outputs, atol=2e-5)


def test_storage_of_a_host_keeps_its_size() -> None:
    """Proves that a copy of whole blocks, with slots past the law's, comes back as whole blocks."""
    layer = AttentionLayer(kvpolicy.parse("h2o:budget=7,interval=3"), 0, scale=0.5)
    slots = Slots.empty(torch.zeros(1, 1, 4), torch.zeros(1, 1, 4))
    slots.reserve(16, limit=None)
    room = slots.capacity
    extend(layer, slots, *(torch.randn(1, 1, 20, 4) for _ in range(3)))
    assert slots.capacity == room > layer.occupancy.token_capacity
