"""Blocks and memories against the float64 oracle: step by step, and by look-ahead."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from safetensors.torch import save_file

import kvpolicy
from fixtures.decoders import SmallDecoder, run_with_weights
from kvpolicy import lookahead
from kvpolicy.rehearsal import HEAD_DIM, Case, Host, Row, Run, by_chunks, by_steps
from oracles.dense import NEAR_TIE, LayerRun, parse, replay_layer
from oracles.memory import Given
from strategies import cases, feedback_specs, memory_specs

THETA = 1e4
GRID = [
    "bswa:block=4,segments=2",
    "bswa:block=3,segments=0,sinks=2",
    "compressive:budget=12",
    "compressive:budget=12,interval=6,sinks=2,memory=5",
    "compressive:budget=12,interval=15,memory=3,rate=5",
    "compressive:budget=12,memory=0",
    "compressive:budget=12,rate=1,interval=4",
    "compressive:budget=12,rate=2,bias=none",
    "compressive:budget=12,fn=max,interval=6",
    "compressive:budget=12,fn=max,bias=none,min_similarity=0.5,interval=6",
    "compressive:budget=12,rate=2,min_similarity=0.6,interval=6",
    "compressive:budget=12,fn=most-used,interval=6",
    "compressive:budget=14,fn=most-used,interval=12,rate=4,sinks=1,memory=2",
    "compressive:budget=12,fn=attention,interval=6",
    "compressive:budget=12,fn=attention,min_similarity=0.5,sinks=1",
    "compressive:budget=12,fn=conv,interval=6",
    "compressive:budget=12,fn=conv,rate=2,interval=2,bias=none,sinks=2",
    "centroid:budget=12",
    "centroid:budget=12,slots=4,sinks=2,interval=5",
    "centroid:budget=12,slots=4,interval=3,bias=none",
    "centroid:budget=6,slots=3,interval=20",
    "centroid:budget=12,slots=3,interval=4,sinks=1",
    "centroid:budget=12,slots=0",
    "fam:block=4,segments=1,slots=3",
    "fam:block=3,segments=0,slots=5,sinks=1",
    "fam:block=2,segments=2,slots=6,sinks=2,bias=none",
    "fam:block=4,budget=10,slots=2",
    "infini:segment=6",
    "infini:segment=5,gate=0.3",
    "infini:segment=5,gate=1,update=delta",
    "infini:segment=1,gate=0.5,update=delta",
    "infini:segment=5,gate=calibrated",
    "infini:segment=4,gate=calibrated,update=delta",
    "infini:segment=1,gate=calibrated",
]
FEEDBACK = [
    "fam:level=model,block=4,segments=1,slots=3",
    "fam:level=model,block=4,segments=1,slots=3,query=previous",
    "fam:level=model,block=3,segments=0,slots=5,sinks=2",
    "fam:level=model,block=5,segments=2,slots=1,query=previous,sinks=1",
    "fam:level=model,block=1,segments=3,slots=2",
]

Oracles = list[LayerRun]


def oracles_of(spec: str, case: Case, given: Given | None = None) -> Oracles:
    """Replay every row of a case by the definition; its keys count as rotated."""
    return [
        replay_layer(spec, *row, layer=case.layer, rotated_by=THETA, given=given)
        for row in case.rows()
    ]


def certified(spec: str, case: Case, given: Given | None = None) -> tuple[Case, Oracles]:
    """Find a case like this one in which no decision of the oracle is close."""
    for seed in range(50):
        drawn = replace(case, seed=case.seed + seed)
        oracles = oracles_of(spec, drawn, given)
        if min(oracle.min_margin for oracle in oracles) >= NEAR_TIE:
            return drawn, oracles
    raise AssertionError(f"{spec}: every one of 50 seeds has a near-tie")


def assert_equals(run: Run, oracles: Oracles) -> None:
    """Assert the oracle's sets wherever the run was looked at, and its outputs everywhere."""
    for index, oracle in enumerate(oracles):
        for n, kept in run.retained[index].items():
            assert kept == oracle.retained[n - 1]
        np.testing.assert_allclose(run.outputs[index].numpy(), oracle.outputs, atol=2e-5)


@pytest.fixture(params=[3, 128])
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Look ahead over this many tokens at once."""
    monkeypatch.setattr(lookahead, "BLOCK", request.param)
    return request.param


@pytest.mark.parametrize("spec", GRID)
def test_batch_of_unequal_lengths_equals_the_oracle(spec: str) -> None:
    """Proves every option of every memory, sets and outputs after each token of each row."""
    case, oracles = certified(spec, Case(lengths=(45, 23, 9), layer=1))
    assert_equals(by_steps(kvpolicy.parse(spec), case), oracles)


@pytest.mark.parametrize("spec", GRID)
def test_look_ahead_equals_the_oracle_whatever_the_block(spec: str, block: int) -> None:
    """Proves the same of whole prompts and of chunks that end anywhere."""
    case, oracles = certified(spec, Case(lengths=(45, 23, 9), chunks=(45, 7, 1), layer=1))
    assert_equals(by_chunks(kvpolicy.parse(spec), case), oracles)


@pytest.mark.parametrize("spec", GRID)
def test_long_texts_turn_a_memory_over_many_times(spec: str) -> None:
    """Proves that nothing drifts over hundreds of tokens: full slots, large positions and sums."""
    case, oracles = certified(spec, Case(lengths=(220, 60), chunks=(150, 1, 33), kv_heads=1))
    assert_equals(by_chunks(kvpolicy.parse(spec), case), oracles)


def sharpened(case: Case, factor: float) -> list[Row]:
    """Give rows whose queries are so long that most attention underflows in float32."""
    return [Row(factor * row.q, row.k, row.v) for row in case.rows()]


@pytest.mark.parametrize("fn", ["mean", "max", "conv", "attention"])
def test_sharp_attention_equals_the_oracle(fn: str) -> None:
    """Proves that slots are fitted to the attention of groups that get next to none of it."""
    case = Case(lengths=(45, 23), group=1)
    spec = f"compressive:budget=12,interval=6,fn={fn}"
    rows = sharpened(case, 25)
    run = by_steps(kvpolicy.parse(spec), case, rows)
    assert_equals(run, [replay_layer(spec, *row, rotated_by=THETA) for row in rows])


@pytest.mark.parametrize("spec", GRID)
def test_sharp_attention_gives_no_infinities(spec: str) -> None:
    """Proves that query heads which disagree by hundreds of nats leave outputs finite."""
    case = Case(lengths=(45, 23), group=3)
    run = by_steps(kvpolicy.parse(spec), case, sharpened(case, 50))
    assert all(outputs.isfinite().all() for outputs in run.outputs)


@pytest.mark.parametrize("run", [by_steps, by_chunks])
@given(spec=memory_specs(), case=cases())
@settings(max_examples=100)
def test_any_parameters_equal_the_oracle(
    run: Callable[[kvpolicy.CachePolicy, Case], Run], spec: str, case: Case
) -> None:
    """Proves the same for drawn parameters, lengths, heads and chunks; near-ties prove nothing."""
    oracles = oracles_of(spec, case)
    assume(min(oracle.min_margin for oracle in oracles) >= NEAR_TIE)
    assert_equals(run(kvpolicy.parse(spec), case), oracles)


# --- rows that pass through the model's layer -------------------------------------------------


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("spec", FEEDBACK)
def test_feedback_rows_equal_the_oracle(spec: str, chunked: bool) -> None:
    """Proves algorithm 2 of TransformerFAM, in a batch of unequal lengths and in chunks."""
    for is_gated, has_qk_norm in ((True, False), (False, True)):
        case = Case(lengths=(40, 23, 9), chunks=(17, 1, 6))
        decoder = SmallDecoder(case, is_gated=is_gated, has_qk_norm=has_qk_norm)
        oracles = oracles_of(spec, case, decoder.for_oracle(parse(spec).state_slots))
        assert_equals(
            run_with_weights(kvpolicy.parse(spec), case, decoder, chunked=chunked), oracles
        )


@pytest.mark.parametrize("chunked", [False, True])
@given(spec=feedback_specs(), case=cases())
@settings(max_examples=30)
def test_any_feedback_rows_equal_the_oracle(chunked: bool, spec: str, case: Case) -> None:
    """Proves the same for drawn blocks, rows, sinks, heads, lengths and chunks."""
    decoder = SmallDecoder(case)
    oracles = oracles_of(spec, case, decoder.for_oracle(parse(spec).state_slots))
    assert_equals(run_with_weights(kvpolicy.parse(spec), case, decoder, chunked=chunked), oracles)


# --- files of parameters ----------------------------------------------------------------------


def assert_file_equals(spec: str, path: Path, arrays: dict[str, np.ndarray], case: Case) -> None:
    """Assert that a file of parameters means to the engine what arrays mean to the oracle."""
    save_file({name: torch.from_numpy(x).float() for name, x in arrays.items()}, path)
    oracles = oracles_of(spec, case, Given(arrays))
    assert_equals(by_steps(kvpolicy.parse(spec), case), oracles)
    assert_equals(by_chunks(kvpolicy.parse(spec), case), oracles)


@pytest.mark.parametrize("update", ["linear", "delta"])
def test_trained_gates_equal_the_oracle(update: str, tmp_path: Path) -> None:
    """Proves that every query head of a layer has the gate that the file says."""
    case = Case(lengths=(40, 23), chunks=(16, 3), kv_heads=2, group=3, layer=1)
    beta = np.random.default_rng(0).normal(size=(2, 6)).astype(np.float32)
    path = tmp_path / "gates.safetensors"
    spec = f"infini:segment=5,update={update},gate={path}"
    assert_file_equals(spec, path, {"beta": beta}, case)


@pytest.mark.parametrize("options", ["", ",bias=none,interval=6", ",sinks=2,min_similarity=0.5"])
def test_fitted_kernels_equal_the_oracle(options: str, tmp_path: Path) -> None:
    """Proves the convolution of keys and of values, per KV head and layer."""
    case = Case(lengths=(40, 23), chunks=(16, 3), kv_heads=2, layer=1)
    draw = np.random.default_rng(1).normal
    shape = (3, 2, 3, HEAD_DIM, HEAD_DIM)
    kernels = {name: draw(size=shape).astype(np.float32) / 4 for name in ("keys", "values")}
    path = tmp_path / "kernels.safetensors"
    spec = f"compressive:budget=12,fn=conv,weights={path}{options}"
    assert_file_equals(spec, path, kernels, certified(spec, case, Given(kernels))[0])


def test_heads_split_over_devices_read_their_own_kernels(tmp_path: Path) -> None:
    """Proves that a device with the second half of the KV heads takes the second half's kernels."""
    draw = np.random.default_rng(2).normal
    kernels = {name: draw(size=(1, 4, 3, HEAD_DIM, HEAD_DIM)) / 4 for name in ("keys", "values")}
    path = tmp_path / "kernels.safetensors"
    save_file({name: torch.from_numpy(x).float() for name, x in kernels.items()}, path)
    spec = f"compressive:budget=12,fn=conv,weights={path}"
    case = Case(lengths=(30, 12), kv_heads=2)
    halves = Given({name: x.astype(np.float32)[:, 2:] for name, x in kernels.items()})
    run = by_steps(kvpolicy.parse(spec), case, first_kv_head=2)
    assert_equals(run, oracles_of(spec, case, halves))


# --- half precision ---------------------------------------------------------------------------

SMOOTH = [
    spec
    for spec in GRID
    if "most-used" not in spec and "similarity" not in spec and not spec.startswith("bswa")
]


@pytest.mark.parametrize("spec", SMOOTH)
def test_memories_of_half_precision_caches_stay_close(spec: str) -> None:
    """Proves that a bfloat16 cache costs a memory rounding and nothing else."""
    case, _ = certified(spec, Case(lengths=(60, 1)))
    row = case.rows()[0]
    half = type(row)(*(x.bfloat16() for x in row))
    host = Host(kvpolicy.parse(spec), case, [half])
    while not host.is_done(0):
        host.step([0])
    oracle = replay_layer(spec, *(x.double() for x in half), rotated_by=THETA)
    error = host.run.outputs[0].double().numpy() - oracle.outputs
    assert np.abs(error).mean() < 2**-7
