"""Policies with memories are replayed as the float64 oracle and the core's steps do it."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import kvpolicy_sim
from fixtures.replays import (
    assert_follows_oracle,
    full_attention,
    oracle_run,
    relative_error,
)
from fixtures.traces import Shape, header_of, random_layers, write_trace
from kvpolicy import UnsupportedError, parse
from kvpolicy.attention import AttentionLayer
from kvpolicy.engine import step
from kvpolicy_sim import lanes, layerwise
from kvpolicy_sim.replay import rotary_of
from kvpolicy_sim.rules import is_compiled
from oracles.memory import Given
from strategies import SEEDS

SHAPE = Shape(tokens=170)
THETA = 10_000.0

BLOCKS = (
    "bswa:block=16,segments=2",
    "bswa:block=11,segments=1,sinks=3",
    "bswa:block=16,segments=0",
    "bswa:block=1,segments=0,sinks=2",
    "infini:segment=32",
    "infini:segment=1",
    "compressive:budget=32,memory=0",
    "centroid:budget=32,slots=0,sinks=2",
    "fam:block=16,segments=1,slots=0",
)
"""Without a memory: compiled."""

MEMORIES = (
    "compressive:budget=32",
    "compressive:budget=32,interval=3,rate=4,memory=5,sinks=2",
    "compressive:budget=32,fn=max,bias=none",
    "compressive:budget=32,fn=most-used,interval=6",
    "compressive:budget=32,fn=most-used,sinks=3,memory=2",
    "compressive:budget=32,fn=attention,sinks=1",
    "compressive:budget=32,fn=conv,interval=9",
    "compressive:budget=32,min_similarity=0.6",
    "compressive:budget=20,interval=90,memory=4",
    "centroid:budget=32",
    "centroid:budget=32,slots=6,interval=1,bias=none",
    "centroid:budget=24,interval=40,sinks=3",
    "fam:block=16,segments=2,slots=8",
    "fam:block=12,segments=0,slots=5,sinks=2,bias=none",
    "infini:segment=32,gate=0.4",
    "infini:segment=20,gate=0.7,update=delta",
    "infini:segment=1,gate=1.0",
    "infini:segment=24,gate=calibrated",
    "infini:segment=100,gate=calibrated,update=delta",
)
"""Every family and option that no file belongs to."""


@pytest.fixture(scope="module")
def layers():
    """Random tensors of two layers."""
    return random_layers(SHAPE)


@pytest.fixture(scope="module")
def path(layers, tmp_path_factory):
    """A trace of them."""
    path = tmp_path_factory.mktemp("traces") / "t.kvtrace"
    return write_trace(path, layers, header=header_of(SHAPE))


@pytest.fixture(scope="module")
def report(path):
    """Every spec replayed on them, in one pass."""
    return kvpolicy_sim.replay(path, [*BLOCKS, *MEMORIES])


@pytest.mark.parametrize("spec", [*BLOCKS, *MEMORIES])
def test_replay_follows_the_oracle(spec, layers, report):
    """Sets, retained mass and the error of outputs, memory included, equal the oracle's."""
    for layer, x in layers.items():
        assert_follows_oracle(report, spec, layer, x, rotated_by=THETA)


@pytest.mark.parametrize("gates", ["trained", "conv"])
def test_parameters_from_files_follow_the_oracle(gates, layers, path, tmp_path):
    """Kernels and gates of a file are read for their own layer and head."""
    generator = torch.Generator().manual_seed(3)
    file = tmp_path / "p.safetensors"
    if gates == "trained":
        tensors = {"beta": torch.randn(2, 4, generator=generator)}
        spec, text = f"infini:segment=32,gate={file}", "infini:segment=32,gate=0.5"
    else:
        shape = (2, 2, 3, 16, 16)
        tensors = {
            name: torch.eye(16) / 3 + torch.randn(shape, generator=generator) / 10
            for name in ("keys", "values")
        }
        spec = f"compressive:budget=32,fn=conv,weights={file}"
        text = "compressive:budget=32,fn=conv,weights=file"
    save_file(tensors, file)
    report = kvpolicy_sim.replay(path, [spec])
    given = Given({name: x.double().numpy() for name, x in tensors.items()})
    for layer, x in layers.items():
        assert_follows_oracle(report, spec, layer, x, rotated_by=THETA, given=given, text=text)


@given(
    spec=st.sampled_from(MEMORIES),
    seed=SEEDS,
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    tokens=st.integers(1, 150),
    sharpness=st.sampled_from([0.5, 2.0]),
)
@example(spec="infini:segment=1,gate=1.0", seed=0, kv_heads=1, group=1, tokens=1, sharpness=0.5)
@settings(max_examples=25)
def test_any_shape_follows_the_oracle(
    spec, seed, kv_heads, group, tokens, sharpness, tmp_path_factory
):
    """Whatever the shape, outputs and sets are the oracle's, unless its choices nearly tie."""
    shape = Shape(tokens, (2,), kv_heads, group, 8, sharpness)
    layers = random_layers(shape, seed)
    path = tmp_path_factory.mktemp("traces") / "t.kvtrace"
    write_trace(path, layers, header=header_of(shape))
    report = kvpolicy_sim.replay(path, [spec], details=False, threads=1)
    _, run = oracle_run(report, spec, 2, layers[2], rotated_by=THETA)
    if run.min_margin > 1e-4:
        assert_follows_oracle(report, spec, 2, layers[2], rotated_by=THETA)


@pytest.mark.parametrize("level", ["layer-local", "open-loop"])
def test_compiled_walk_equals_the_core(level, path, monkeypatch):
    """Block windows and memories without room are compiled, and decide as the core does."""
    assert all(is_compiled(parse(spec)) for spec in BLOCKS)
    assert not any(is_compiled(parse(spec)) for spec in MEMORIES)
    compiled = kvpolicy_sim.replay(path, BLOCKS, level=level)
    monkeypatch.setattr(layerwise, "is_compiled", lambda _: False)
    assert_same(compiled, kvpolicy_sim.replay(path, BLOCKS, level=level), BLOCKS)


def assert_same(ours, theirs, specs):
    """Two reports agree in every decision, and in figures up to rounding."""
    for spec in specs:
        for place, outcome in ours.result(spec).outcomes.items():
            other = theirs.result(spec).outcomes[place]
            np.testing.assert_array_equal(outcome.evicted_at, other.evicted_at, err_msg=spec)
            for name, tolerance in (("retained_mass", 1e-6), ("output_error", 5e-6)):
                np.testing.assert_allclose(
                    getattr(outcome, name), getattr(other, name), rtol=1e-4, atol=tolerance
                )


@pytest.mark.parametrize("spec", MEMORIES)
def test_replay_equals_steps_of_the_core(spec, layers, path, report):
    """Token by token through the reference engine, outputs and memory are the replay's."""
    header = header_of(SHAPE)
    x, policy = layers[1], parse(spec)
    layer = AttentionLayer(policy, 1, header.scale, rotary_of(header))
    slots = layer.new_slots(*(y[None] for y in (x.q, x.k, x.v)))
    outputs = torch.stack(
        [
            step(layer, slots, x.q[None, :, t], x.k[None, :, t], x.v[None, :, t])[0]
            for t in range(SHAPE.tokens)
        ],
        dim=1,
    )
    outcome = report.result(spec).outcomes[0, 1]
    error = relative_error(outputs.double().numpy(), full_attention(x)[1])
    np.testing.assert_allclose(outcome.output_error, error, rtol=1e-4, atol=5e-6)
    evicted = policy.occupancy.evicted(SHAPE.tokens)
    assert outcome.merged == pytest.approx(policy.merged(slots.memory, 0, evicted))


def test_blocks_and_threads_change_nothing(path, monkeypatch):
    """However many tokens are looked ahead, and layers taken at once, results are the same."""
    specs = (MEMORIES[0], MEMORIES[3], MEMORIES[9], MEMORIES[12], MEMORIES[17])
    one = kvpolicy_sim.replay(path, specs, threads=1)
    three = kvpolicy_sim.replay(path, specs, threads=3)
    for spec in specs:
        ours, theirs = one.result(spec), three.result(spec)
        assert ours.retained_mass == theirs.retained_mass
        assert ours.output_error == theirs.output_error
        assert ours.memory_share == theirs.memory_share
    monkeypatch.setattr(lanes, "BLOCK", 7)
    assert_same(one, kvpolicy_sim.replay(path, specs), specs)


def test_bfloat16_traces_are_replayed_in_float32(tmp_path):
    """Memories of a bfloat16 trace are computed from exactly its numbers, without rounding."""
    shape = Shape(layers=(0,))
    x = random_layers(shape)[0]
    rounded = type(x)(x.q.bfloat16(), x.k.bfloat16(), x.v.bfloat16())
    header = header_of(shape, dtype="bfloat16")
    path = write_trace(tmp_path / "t.kvtrace", {0: rounded}, header=header)
    exact = type(x)(rounded.q.float(), rounded.k.float(), rounded.v.float())
    specs = ["centroid:budget=32", "infini:segment=24,gate=calibrated"]
    report = kvpolicy_sim.replay(path, specs)
    for spec in specs:
        assert_follows_oracle(report, spec, 0, exact, rotated_by=THETA)


def test_sampled_heads_give_the_same_heads(layers, path, tmp_path):
    """A trace of the second KV head alone is that head of the whole trace."""
    part = {layer: type(x)(x.q[SHAPE.group :], x.k[1:], x.v[1:]) for layer, x in layers.items()}
    alone = tmp_path / "head.kvtrace"
    write_trace(alone, part, header=header_of(SHAPE, kv_heads=(1,)))
    file = tmp_path / "k.safetensors"
    kernels = torch.eye(16).expand(2, 2, 3, 16, 16) * torch.tensor([0.2, 0.4]).view(1, 2, 1, 1, 1)
    save_file({name: kernels.contiguous().clone() for name in ("keys", "values")}, file)
    spec = f"compressive:budget=32,fn=conv,weights={file}"
    report = kvpolicy_sim.replay(alone, [spec])
    given = Given({name: kernels[:, 1:].double().numpy() for name in ("keys", "values")})
    for layer, x in part.items():
        text = "compressive:budget=32,fn=conv,weights=file"
        assert_follows_oracle(report, spec, layer, x, rotated_by=THETA, given=given, text=text)


@pytest.mark.parametrize(
    ("spec", "changes", "reason"),
    [
        ("centroid:budget=32", {"rope": None}, "does not say how they are rotated"),
        ("compressive:budget=32", {"query_stride": 3}, "capture with query_stride=1"),
        ("fam:block=16,segments=1,slots=4,level=model", {}, "--weights"),
        ("infini:segment=16,gate=g.safetensors", {"kv_heads": (1,)}, "capture all heads"),
    ],
)
def test_what_cannot_be_replayed_is_refused_with_what_to_change(spec, changes, reason, tmp_path):
    """A missing rotation, sampled queries, missing weights and heads are named before any work."""
    shape = Shape(tokens=40)
    heads = changes.get("kv_heads", (0, 1))
    part = {
        layer: type(x)(x.q[: 2 * len(heads)], x.k[: len(heads)], x.v[: len(heads)])
        for layer, x in random_layers(shape).items()
    }
    path = write_trace(tmp_path / "t.kvtrace", part, header=header_of(shape, **changes))
    with pytest.raises(UnsupportedError, match=reason):
        kvpolicy_sim.replay(path, [spec])


@pytest.mark.parametrize("how", ["interleaved", "partial"])
def test_rotations_that_cannot_be_undone_are_refused(how, tmp_path):
    """Interleaved pairs and heads that are rotated in part are refused for memories alone."""
    rope = header_of(Shape()).rope
    if how == "interleaved":
        rope = replace(rope, interleaved=True)
    else:
        rope = replace(rope, inverse_frequencies=rope.inverse_frequencies[:4])
    header = header_of(Shape(), rope=rope)
    path = write_trace(tmp_path / "t.kvtrace", random_layers(), header=header)
    with pytest.raises(UnsupportedError, match="before their rotation"):
        kvpolicy_sim.replay(path, ["centroid:budget=32"])
    kvpolicy_sim.replay(path, ["centroid:budget=32,slots=0"])
