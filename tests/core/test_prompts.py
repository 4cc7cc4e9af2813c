"""Prompts set apart: ``prefill=bulk`` and ``protect=prompt`` in the engine and in look-ahead."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import kvpolicy
from kvpolicy import lookahead
from kvpolicy.attention import AttentionLayer
from kvpolicy.engine import step
from kvpolicy.lookahead import extend
from kvpolicy.policy import View
from kvpolicy.rehearsal import Case, Host, Row, Run, by_chunks, by_steps
from kvpolicy.slots import Slots
from kvpolicy.testing import check_policy
from oracles.dense import NEAR_TIE, LayerRun, replay_layer, rotate
from strategies import prompt_specs, prompted_cases

POLICIES = [
    "window:budget=7,interval=3",
    "sinks:budget=7,interval=1,sinks=2",
    "h2o:budget=7,interval=3",
    "h2o:budget=7,interval=4,decay=0.7,score=relative",
    "h2o:budget=7,interval=2,score=mean,scope=layer",
    "tova:budget=7,interval=9",
    "random:budget=7,interval=5",
    "knorm:budget=7,interval=3",
    "keydiff:budget=7,interval=4,sinks=1",
]
SPECS = [f"{spec},{mode}" for spec in POLICIES for mode in ("prefill=bulk", "protect=prompt")]
SPECS += [
    "snapkv:budget=7,interval=3,window=5,kernel=3",
    "snapkv:budget=8,interval=9,window=4,kernel=1,group_pool=max,sinks=1",
]
BATCH = Case(lengths=(40, 33, 29), prompts=(22, 15, 5), chunks=(6, 11))


def follow(spec: str, case: Case, run: Run, index: int) -> LayerRun:
    """Run the oracle beside a row's record by steps; it objects to any but a near-tie."""
    sets, row = run.retained[index], case.rows()[index]
    host = [sets[n] for n in range(1, row.length + 1)]
    return replay_layer(spec, *row, layer=case.layer, prompt=case.prompt(index), host_retained=host)


def outputs_and_sets(spec: str, case: Case) -> Run:
    """Run a spec step by step."""
    return by_steps(kvpolicy.parse(spec), case)


def assert_same(first: Run, second: Run) -> None:
    """Assert equal sets and outputs, bit by bit."""
    assert first.retained == second.retained
    assert all(map(torch.equal, first.outputs, second.outputs))


@pytest.mark.parametrize("spec", SPECS)
def test_steps_of_unequal_prompts_equal_the_oracle(spec: str) -> None:
    """Proves both modes by steps: sets after every token, outputs, rows of unequal prompts."""
    for seed in range(2):
        case = replace(BATCH, layer=seed, seed=seed)
        run = outputs_and_sets(spec, case)
        for index in range(len(case.lengths)):
            oracle = follow(spec, case, run, index)
            assert list(run.retained[index].values()) == oracle.retained
            assert oracle.near_ties == 0
            np.testing.assert_allclose(run.outputs[index].numpy(), oracle.outputs, atol=2e-5)


@given(spec=prompt_specs(), case=prompted_cases())
@settings(max_examples=100)
def test_any_steps_equal_the_oracle(spec: str, case: Case) -> None:
    """Proves the same for drawn parameters, prompts, lengths, heads and groups."""
    run = outputs_and_sets(spec, case)
    for index in range(len(case.lengths)):
        oracle = follow(spec, case, run, index)
        np.testing.assert_allclose(run.outputs[index].numpy(), oracle.outputs, atol=2e-5)


@given(spec=prompt_specs(), case=prompted_cases(), block=st.sampled_from([3, 16, 128]))
@settings(max_examples=100)
def test_any_chunks_equal_the_oracle(spec: str, case: Case, block: int) -> None:
    """Proves look-ahead for drawn policies, prompts, chunkings and blocks; near-ties are left."""
    oracles = [
        replay_layer(spec, *row, layer=case.layer, prompt=case.prompt(index))
        for index, row in enumerate(case.rows())
    ]
    assume(min(oracle.min_margin for oracle in oracles) >= NEAR_TIE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lookahead, "BLOCK", block)
        run = by_chunks(kvpolicy.parse(spec), case)
    for index, oracle in enumerate(oracles):
        for n, kept in run.retained[index].items():
            assert kept == oracle.retained[n - 1]
        np.testing.assert_allclose(run.outputs[index].numpy(), oracle.outputs, atol=2e-5)


@pytest.mark.parametrize("chunks", [(1,), (7,), (22,), (40,), (21, 1, 18), (13, 2, 25)])
@pytest.mark.parametrize("spec", SPECS)
def test_chunks_of_a_prompt_form_one_class(spec: str, chunks: tuple[int, ...]) -> None:
    """Proves that a prompt fed in chunks ends as one fed at once, however the borders fall."""
    case = replace(BATCH, chunks=chunks)
    stepped, chunked = (run(kvpolicy.parse(spec), case) for run in (by_steps, by_chunks))
    for index, retained in enumerate(chunked.retained):
        assert {n: stepped.retained[index][n] for n in retained} == retained
        torch.testing.assert_close(
            stepped.outputs[index], chunked.outputs[index], rtol=0, atol=2e-5
        )


@pytest.mark.parametrize("run", [by_steps, by_chunks])
@pytest.mark.parametrize("spec", ["sinks:budget=6,sinks=2,interval=3", "window:budget=6"])
def test_reindexed_bulk_equals_the_oracle(spec: str, run: object) -> None:
    """Proves rope=reindex across a bulk eviction: ranks jump by as much as was dropped."""
    spec, case = (
        f"{spec},prefill=bulk,rope=reindex",
        replace(BATCH, lengths=(40, 30), prompts=(21, 9)),
    )
    turned = [
        Row(*(torch.from_numpy(rotate(x.numpy(), range(row.length), 1e4)).float() for x in row[:2]),
            row.v)
        for row in case.rows()
    ]  # fmt: skip
    host = Host(kvpolicy.parse(spec), case, turned)
    for index, row in enumerate(case.rows()):
        while not host.is_done(index):
            host.step([index]) if run is by_steps else host.extend(index, 8)
        oracle = replay_layer(spec, *row, theta=1e4, prompt=case.prompt(index))
        np.testing.assert_allclose(host.run.outputs[index].numpy(), oracle.outputs, atol=2e-5)


@pytest.mark.parametrize("spec", POLICIES)
def test_a_prompt_within_the_budget_is_no_special_case(spec: str) -> None:
    """Proves that bulk is stream, bit by bit, for prompts of at most R tokens."""
    case = replace(BATCH, prompts=(7, 3, 0))
    assert_same(outputs_and_sets(f"{spec},prefill=bulk", case), outputs_and_sets(spec, case))


@pytest.mark.parametrize("spec", POLICIES)
def test_without_a_prompt_protecting_it_changes_nothing(spec: str) -> None:
    """Proves that protect=prompt is stream, bit by bit, for requests without a prompt."""
    case = replace(BATCH, prompts=())
    assert_same(outputs_and_sets(f"{spec},protect=prompt", case), outputs_and_sets(spec, case))


@pytest.mark.parametrize("interval", [1, 4, 30])
@pytest.mark.parametrize("spec", ["window:budget=9", "sinks:budget=9,sinks=3"])
def test_bulk_ends_where_stream_ends_for_policies_of_positions(spec: str, interval: int) -> None:
    """Proves policies.md A1: after an eviction, bulk and stream hold the same positions."""
    spec = f"{spec},interval={interval}"
    case = Case(lengths=(9 + 2 * interval,) * 2, prompts=(9 + interval,) * 2)
    bulk, stream = (outputs_and_sets(x, case) for x in (f"{spec},prefill=bulk", spec))
    for n in (9 + interval, 9 + 2 * interval):
        assert bulk.retained[0][n] == stream.retained[0][n]


@pytest.mark.parametrize("name", ["window", "h2o", "tova"])
def test_a_budget_for_all_that_is_generated_is_the_full_cache(name: str) -> None:
    """Proves that protect=prompt counts generated tokens only: they fit, nothing is lost."""
    spec, case = f"{name}:budget=18,interval=1,protect=prompt", replace(BATCH, prompts=(22, 15, 11))
    assert_same(outputs_and_sets(spec, case), outputs_and_sets("full", case))


@pytest.mark.parametrize("spec", SPECS)
def test_a_prompt_is_attended_densely(spec: str) -> None:
    """Proves that up to a prompt's end every query sees all before it, under both modes."""
    case = replace(BATCH, lengths=(22, 15, 5))
    ours, full = by_chunks(kvpolicy.parse(spec), case), outputs_and_sets("full", case)
    for mine, dense in zip(ours.outputs, full.outputs, strict=True):
        torch.testing.assert_close(mine, dense, rtol=0, atol=2e-5)


@pytest.mark.parametrize("spec", ["h2o:budget=8,interval=3", "window:budget=8,interval=3"])
@pytest.mark.parametrize("chunks", [(1,), (500,), (60,)])
def test_storage_is_given_back_behind_a_bulk_prompt(spec: str, chunks: tuple[int, ...]) -> None:
    """Proves that memory peaks at the prompt and then is that of the budget."""
    case = Case(lengths=(500,), chunks=chunks, prompts=(320,))
    host, largest = Host(kvpolicy.parse(f"{spec},prefill=bulk"), case, case.rows()), 0
    while not host.is_done(0):
        host.extend(0, chunks[0])
        largest = max(largest, host.slots.capacity)
        assert host.slots.capacity <= (320 if host.slots.tokens[0] < 320 else 11)
    assert largest >= (300 if chunks != (500,) else 8)
    assert host.slots.num_bytes <= 11 * 2 * (2 * 8 * 4 + 8 + 4)
    assert host.slots.evicted == [host.law(0).evicted(500)]


def test_storage_is_kept_while_one_row_is_within_its_prompt() -> None:
    """Proves that a neighbour's eviction frees nothing that another row still holds."""
    case = Case(lengths=(60, 60), prompts=(20, 50))
    policy, rows = kvpolicy.parse("h2o:budget=8,interval=3,prefill=bulk"), case.rows()
    host = Host(policy, case, rows)
    for n in range(60):
        host.step([0, 1])
        assert host.slots.capacity >= (n + 1 if n < 49 else 8)
    assert host.slots.capacity == 11
    for index, row in enumerate(rows):
        alone = by_steps(policy, case.alone(index), [row])
        assert alone.retained[0] == host.run.retained[index]


def test_rows_that_drop_unequally_in_one_step_decide_apart() -> None:
    """Proves that one step evicts a whole prompt's surplus in one row and one token in others."""
    case = Case(lengths=(30, 30, 30), prompts=(20, 0, 20))
    run = outputs_and_sets("window:budget=8,interval=4,prefill=bulk", case)
    newest = tuple(range(12, 20))
    assert [run.retained[index][20] for index in range(3)] == [(newest, newest)] * 3
    assert [run.retained[index][19][0] for index in range(3)] == [
        tuple(range(19)),
        tuple(range(8, 19)),
        tuple(range(19)),
    ]


def test_rows_with_unequal_prompts_are_no_lockstep() -> None:
    """Proves that look-ahead refuses rows whose laws differ, instead of taking the first's."""
    layer = AttentionLayer(kvpolicy.parse("window:budget=4,prefill=bulk"), 0, 8**-0.5)
    q, k, v = (x[None].expand(2, -1, -1, -1) for x in Case(lengths=(12, 1)).rows()[0])
    extend(layer, layer.new_slots(q, k, v, prompts=[3, 4]), q, k, v)  # both stream
    with pytest.raises(AssertionError, match="one law"):
        extend(layer, layer.new_slots(q, k, v, prompts=[9, 8]), q, k, v)


class ByRow(kvpolicy.ScorePolicy):
    """Asks to see the newest row and the statistic."""

    needs = ("last_row", "accumulated")

    def score(self, view: View) -> torch.Tensor:
        """Rate by position."""
        return view.positions


@pytest.mark.parametrize("run", [by_steps, by_chunks])
def test_a_policy_is_not_shown_the_prompt_that_stays(
    run: Callable[[kvpolicy.CachePolicy, Case], Run],
) -> None:
    """Proves that protect=prompt shows generated tokens only, and counts all that were seen."""
    case = Case(lengths=(30,), prompts=(12,), chunks=(30,))
    decisions = run(ByRow(budget=6, interval=3, protect="prompt"), case).decisions
    assert [n for _, n in decisions] == [21, 24, 27, 30]
    for made in decisions.values():
        view = made.view
        assert view.valid.sum(dim=-1).eq(9).all()
        assert view.positions[view.valid].min() >= 12
        assert view.visible.item() == 12 + 9
        assert view.weights is not None
        assert view.weights[~view.valid].eq(0).all()
        assert view.weights.sum(dim=-1).lt(1).all()  # the prompt has its share of the softmax


def test_slots_carry_their_prompts() -> None:
    """Proves that copies of rows, kept slots and rows put back know their prompts."""
    layer, row = AttentionLayer(kvpolicy.parse("full"), 0, 1.0), Case(lengths=(4, 1)).rows()[0]
    q, k, v = (x[None, :, 0].expand(3, -1, -1) for x in row)
    slots = layer.new_slots(q, k, v, prompts=[5, 0, 9])
    step(layer, slots, q, k, v)
    part = slots.rows([2, 0], 1)
    assert part.prompts == part.keep(torch.zeros(2, 2, 1, dtype=torch.int64)).prompts == [9, 5]
    into = Slots.empty(k, v)
    into.put_rows([1, 2], part, layer.occupancy)
    assert into.prompts == [0, 9, 5]


@pytest.mark.parametrize(
    "spec", [*SPECS[4:8], "fixtures.policies.FadingMaximum:budget=7,prefill=bulk"]
)
def test_prompts_keep_the_contract(spec: str) -> None:
    """Proves every promise of the contract suite, which draws prompts for such policies."""
    check_policy(spec, examples=12)
