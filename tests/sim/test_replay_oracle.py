"""The replay decides as the float64 oracle does, token by token, in every layer and head."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kvpolicy_sim
from fixtures.replays import assert_follows_oracle
from fixtures.traces import Shape, header_of, random_layers, write_trace
from strategies import SEEDS, attended_specs

SHAPE = Shape()

SPECS = (
    "full",
    "window:budget=40",
    "window:budget=40,interval=1",
    "sinks:budget=33,interval=7",
    "random:budget=20",
    "random:budget=40,interval=1,seed=-4,protect=(3:9)",
    "tova:budget=40",
    "tova:budget=40,interval=1",
    "tova:budget=24,interval=1,scope=head,group_pool=max",
    "h2o:budget=40",
    "h2o:budget=40,interval=1",
    "h2o:budget=32,interval=1,scope=layer",
    "h2o:budget=32,score=mean,sinks=4",
    "h2o:budget=32,score=relative,decay=0.97,group_pool=max",
    "h2o:budget=24,interval=50,group_pool=sum,recent=3,protect=(5:9)",
)
"""Every built-in policy, score, scope and reduction, at interval 1 and others."""


@pytest.fixture(scope="module")
def layers():
    """Random tensors of two layers."""
    return random_layers(SHAPE)


@pytest.fixture(scope="module")
def report(layers, tmp_path_factory):
    """Every spec replayed on them, in one pass."""
    path = tmp_path_factory.mktemp("traces") / "t.kvtrace"
    write_trace(path, layers, header=header_of(SHAPE))
    return kvpolicy_sim.replay(path, SPECS)


@pytest.mark.parametrize("spec", SPECS)
def test_replay_follows_the_oracle(spec, layers, report):
    """Sets after every token, retained mass and output error equal the oracle's."""
    for layer, x in layers.items():
        assert_follows_oracle(report, spec, layer, x)


@given(
    spec=attended_specs(),
    seed=SEEDS,
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    tokens=st.integers(1, 150),
    sharpness=st.sampled_from([0.5, 2.0, 30.0]),
)
@settings(max_examples=60)
def test_any_policy_on_any_trace_follows_the_oracle(
    spec, seed, kv_heads, group, tokens, sharpness, tmp_path_factory
):
    """Whatever the shape, and however peaked the attention, decisions are the oracle's."""
    shape = Shape(tokens, (2,), kv_heads, group, 8, sharpness)
    layers = random_layers(shape, seed)
    path = tmp_path_factory.mktemp("traces") / "t.kvtrace"
    write_trace(path, layers, header=header_of(shape))
    report = kvpolicy_sim.replay(path, [spec], details=False, threads=1)
    assert_follows_oracle(report, spec, 2, layers[2])


def test_bfloat16_traces_are_replayed_in_float32(tmp_path):
    """A bfloat16 trace is replayed on exactly its numbers, without rounding in between."""
    shape = Shape(layers=(0,))
    x = random_layers(shape)[0]
    rounded = {0: type(x)(x.q.bfloat16(), x.k.bfloat16(), x.v.bfloat16())}
    path = write_trace(tmp_path / "t.kvtrace", rounded, header=header_of(shape, dtype="bfloat16"))
    spec = "h2o:budget=40,interval=1"
    exact = type(rounded[0])(*(y.float() for y in (rounded[0].q, rounded[0].k, rounded[0].v)))
    assert_follows_oracle(kvpolicy_sim.replay(path, [spec]), spec, 0, exact)


def test_attention_that_leaves_the_sharpest_key_is_exact(tmp_path):
    """Evicting a key whose logits exceed all others by 200 leaves no row that underflows."""
    shape = Shape(tokens=150, layers=(0,), kv_heads=1, group=2, head_dim=8)
    x = random_layers(shape)[0]
    x.k[:, 70] = 60.0 * x.q[:1, 0] / x.q[0, 0].norm() ** 2
    x.q[:, :] += x.q[0, 0] * 10
    path = write_trace(tmp_path / "t.kvtrace", {0: x}, header=header_of(shape))
    spec = "window:budget=16,interval=1"
    report = kvpolicy_sim.replay(path, [spec])
    lost = report.result(spec).outcomes[0, 0].retained_mass[..., 87:]
    assert lost.max() < 1e-30
    assert torch.from_numpy(report.result(spec).outcomes[0, 0].output_error).isfinite().all()
