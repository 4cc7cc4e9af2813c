"""Every way through the replay gives the same: compiled or core, threads, blocks, strides."""

from threading import Event

import numpy as np
import pytest

import kvpolicy_sim
from fixtures.policies import FadingMaximum, RowTimesKeyNorm
from fixtures.traces import Shape, header_of, random_layers, write_trace
from kvpolicy import parse
from kvpolicy_sim import layerwise, rules
from kvpolicy_sim.replay import _Worker

SHAPE = Shape(tokens=290, layers=(1, 4), kv_heads=2, group=3)

SPECS = (
    "full",
    "window:budget=40,interval=1",
    "sinks:budget=33",
    "random:budget=24",
    "tova:budget=40",
    "tova:budget=24,scope=head,interval=1",
    "h2o:budget=40,interval=1",
    "h2o:budget=32,score=mean,decay=0.9,protect=(2:7)",
)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A trace of two sequences, longer than several blocks."""
    path = tmp_path_factory.mktemp("traces") / "t.kvtrace"
    return write_trace(path, random_layers(SHAPE), random_layers(SHAPE, 1), header=header_of(SHAPE))


def assert_same(ours, theirs, specs=SPECS, rows=slice(None)):
    """Two reports agree in every decision, and in figures up to rounding."""
    for spec in specs:
        for place, outcome in ours.result(spec).outcomes.items():
            other = theirs.result(spec).outcomes[place]
            np.testing.assert_array_equal(outcome.evicted_at, other.evicted_at, err_msg=spec)
            np.testing.assert_allclose(
                outcome.retained_mass[..., rows], other.retained_mass, rtol=2e-5, atol=1e-7
            )
            np.testing.assert_allclose(
                outcome.output_error[rows], other.output_error, rtol=1e-4, atol=2e-6
            )


@pytest.mark.parametrize("level", ["layer-local", "open-loop"])
def test_compiled_walk_equals_the_core(path, level, monkeypatch):
    """The compiled walk and the core's look-ahead decide alike at both levels."""
    compiled = kvpolicy_sim.replay(path, SPECS, level=level)
    monkeypatch.setattr(layerwise, "is_compiled", lambda _: False)
    assert_same(compiled, kvpolicy_sim.replay(path, SPECS, level=level))


def test_open_loop_observes_full_attention_however_little_is_left(tmp_path, monkeypatch):
    """What is e^-200 of full attention is observed as nothing, not as all there is."""
    shape = Shape(tokens=150, layers=(0,), kv_heads=1, group=1, head_dim=8)
    x = random_layers(shape)[0]
    x.k[:, 20] = 60.0 * x.q[:, 0] / x.q[0, 0].norm() ** 2
    x.q[:] += x.q[0, 0] * 10
    path = write_trace(tmp_path / "t.kvtrace", {0: x}, header=header_of(shape))
    spec = "tova:budget=8,interval=1,sinks=2,protect=(40:44)"
    compiled = kvpolicy_sim.replay(path, spec, level="open-loop")
    monkeypatch.setattr(layerwise, "is_compiled", lambda _: False)
    core = kvpolicy_sim.replay(path, spec, level="open-loop")
    ours, theirs = (r.result(spec).outcomes[0, 0].evicted_at for r in (compiled, core))
    np.testing.assert_array_equal(ours, theirs)


def test_number_of_threads_changes_nothing(path):
    """One thread and three give equal reports, bit for bit."""
    one, three = (kvpolicy_sim.replay(path, SPECS, threads=n) for n in (1, 3))
    assert_same(one, three)
    for spec in SPECS:
        assert one.result(spec).retained_mass == three.result(spec).retained_mass


def test_order_in_which_layers_finish_changes_nothing(path, monkeypatch):
    """Results lie in the order of layers, so that means do not depend on which finished first."""
    last_is_done, run = Event(), _Worker.run

    def last_layer_first(worker, sequence, layer):
        if (sequence, layer) == (0, 1):
            last_is_done.wait()
        found = run(worker, sequence, layer)
        if (sequence, layer) == (1, 4):
            last_is_done.set()
        return found

    monkeypatch.setattr(_Worker, "run", last_layer_first)
    result = kvpolicy_sim.replay(path, "sinks:budget=33", threads=2).result("sinks:budget=33")
    assert list(result.outcomes) == [(0, 1), (0, 4), (1, 1), (1, 4)]


def test_sampled_queries_give_the_same_rows(path, tmp_path):
    """A trace with every third query gives those rows of policies that look at positions."""
    specs = ("full", "window:budget=40,interval=1", "sinks:budget=33", "random:budget=24")
    header = header_of(SHAPE, query_stride=3)
    sampled = tmp_path / "sampled.kvtrace"
    write_trace(sampled, random_layers(SHAPE), random_layers(SHAPE, 1), header=header)
    whole = kvpolicy_sim.replay(path, specs)
    assert_same(whole, kvpolicy_sim.replay(sampled, specs), specs, slice(None, None, 3))


def test_sampled_heads_give_the_same_heads(path, tmp_path):
    """A trace of the second KV head alone is that head of the whole trace, also for `random`."""
    header = header_of(SHAPE, kv_heads=(1,))
    part = {
        layer: type(x)(x.q[SHAPE.group :], x.k[1:], x.v[1:])
        for layer, x in random_layers(SHAPE).items()
    }
    write_trace(tmp_path / "head.kvtrace", part, header=header)
    specs = ("random:budget=24", "h2o:budget=40,interval=1")
    whole = kvpolicy_sim.replay(path, specs, sequences=[0])
    alone = kvpolicy_sim.replay(tmp_path / "head.kvtrace", specs)
    for spec in specs:
        for layer in SHAPE.layers:
            ours = whole.result(spec).outcomes[0, layer].evicted_at[1:]
            np.testing.assert_array_equal(
                ours, alone.result(spec).outcomes[0, layer].evicted_at, err_msg=spec
            )


def test_custom_policies_are_replayed(path):
    """Policies by import path run through their own `score` and `observe`."""
    specs = [
        f"fixtures.policies.{cls.__name__}:budget=24,interval=3"
        for cls in (RowTimesKeyNorm, FadingMaximum)
    ]
    report = kvpolicy_sim.replay(path, specs)
    for spec in specs:
        assert not rules.is_compiled(parse(spec))
        assert report.result(spec).ledger(0).evicted == parse(spec).occupancy.evicted(SHAPE.tokens)


def test_reindexing_changes_outputs_and_not_what_is_retained(path):
    """rope=reindex keeps the sets and masses of rope=keep, at other rotations of the query."""
    keep, reindex = "sinks:budget=32", "sinks:budget=32,rope=reindex"
    report = kvpolicy_sim.replay(path, [keep, reindex])
    ours, theirs = (report.result(spec).outcomes[0, 1] for spec in (keep, reindex))
    np.testing.assert_array_equal(ours.evicted_at, theirs.evicted_at)
    np.testing.assert_allclose(ours.retained_mass, theirs.retained_mass, rtol=2e-5, atol=1e-7)
    assert np.abs(ours.output_error - theirs.output_error).max() > 1e-3
