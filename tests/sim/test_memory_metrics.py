"""Figures of policies with memories, from first principles: share, merged tokens, bytes, regret."""

import math

import numpy as np
import pytest
import torch

import kvpolicy_sim
from fixtures.traces import LayerTensors, Shape, header_of, random_layers, write_trace
from kvpolicy import parse
from kvpolicy.ledger import Ledger
from kvpolicy.policies.infini import Infini
from kvpolicy.trace import Trace
from kvpolicy_sim.estimate import estimate
from kvpolicy_sim.recommend import recommend
from oracles.arithmetic import rotate

SHAPE = Shape(tokens=200)
THETA = 10_000.0


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A random trace of two layers."""
    path = tmp_path_factory.mktemp("traces") / "t.kvtrace"
    return write_trace(path, random_layers(SHAPE), header=header_of(SHAPE))


def replayed(path, spec, **options):
    """A policy's result and its JSON entry."""
    report = kvpolicy_sim.replay(path, [spec], **options)
    return report.result(spec), report.as_dict()["results"][0]


def test_share_of_one_slot_is_its_softmax_weight(tmp_path):
    """After one eviction the share is exp(logit) of the pooled key over the sum of all."""
    shape = Shape(tokens=7, layers=(0,), kv_heads=1, group=1, head_dim=8)
    x = random_layers(shape)[0]
    path = write_trace(tmp_path / "t.kvtrace", {0: x}, header=header_of(shape))
    spec = "compressive:budget=5,rate=2,memory=1,interval=2"
    result, entry = replayed(path, spec)
    q, k = x.q[0].double().numpy(), x.k[0].double().numpy()
    raw = rotate(k[:2], -np.arange(2), THETA).mean(axis=0)
    keys = np.concatenate([rotate(raw, 0.5, THETA)[None], k[2:]])
    weights = np.exp(keys @ q[6] / math.sqrt(8) + np.array([math.log(2), 0, 0, 0, 0, 0]))
    share = result.outcomes[0, 0].memory_share
    assert share[:6] == pytest.approx(0, abs=1e-6)
    assert share[6] == pytest.approx(weights[0] / weights.sum(), rel=1e-5)
    assert entry["memory_share"] == pytest.approx(share[4:].mean())  # beyond the token slots
    assert entry["merged"] == 2


def test_share_of_a_constant_gate_is_the_gate(path):
    """A gate of 0.3 gives the memory 0.3 of the output once there is one, and nothing before."""
    spec = "infini:segment=50,gate=0.3"
    result, entry = replayed(path, spec)
    share = result.outcomes[0, 1].memory_share
    assert not share[:50].any()
    np.testing.assert_allclose(share[50:], 0.3, rtol=1e-6)
    assert entry["memory_share"] == pytest.approx(0.3 * 150 / 200)


def test_share_of_a_calibrated_gate_after_one_segment(tmp_path):
    """With one sample the estimate is its true log-mass, moved by the ratio of kernel masses."""
    shape = Shape(tokens=9, layers=(0,), kv_heads=1, group=1, head_dim=8)
    x = random_layers(shape)[0]
    path = write_trace(tmp_path / "t.kvtrace", {0: x}, header=header_of(shape))
    result, _ = replayed(path, "infini:segment=8,gate=calibrated")
    q, k = (y[0].double().numpy() for y in (x.q, x.k))
    raw_q, raw_k = (rotate(y, -np.arange(9), THETA) for y in (q, k))
    kernel = [np.where(y > 0, y + 1, np.exp(y)) for y in (raw_q, raw_k)]
    mass = kernel[0] @ kernel[1][:8].sum(axis=0)
    known = np.log(np.exp(k[:8] @ q[7] / math.sqrt(8)).sum())
    estimate_ = known + np.log(mass[8] / mass[7])
    share = 1 / (1 + np.exp(k[8] @ q[8] / math.sqrt(8) - estimate_))
    assert result.outcomes[0, 0].memory_share[8] == pytest.approx(share, rel=1e-5)


def test_policies_without_a_memory_have_no_share(path):
    """Neither a window nor a closed gate has a memory_share or merged tokens."""
    for spec in ("window:budget=32", "infini:segment=50", "centroid:budget=32,slots=0"):
        _, entry = replayed(path, spec)
        assert entry["memory_share"] is None
        assert entry["merged"] == 0


def test_an_empty_memory_changes_nothing(path):
    """While nothing has left, a memory policy is the full cache: mass 1, error and share 0."""
    result, entry = replayed(path, "centroid:budget=300")
    assert entry["retained_mass"]["min"] == pytest.approx(1, abs=1e-5)
    assert entry["output_error"]["p95"] < 1e-5
    assert entry["memory_share"] == pytest.approx(0, abs=1e-6)
    assert result.ledger(0).evicted == 0


def test_equal_tokens_are_merged_without_loss(tmp_path):
    """Where all raw keys and all values are alike, any merge answers as full attention does."""
    shape = Shape(tokens=80, layers=(0,))
    raw = random_layers(shape)[0]
    places = np.arange(80)
    still = {name: getattr(raw, name)[:, :1].expand(-1, 80, -1).numpy() for name in "kv"}
    keys = torch.from_numpy(rotate(still["k"], np.zeros(80), THETA)).float()
    x = LayerTensors(raw.q * 0 + raw.q[:, :1], keys, torch.from_numpy(still["v"].copy()))
    frequencies = (0.0,) * 8  # without rotation positions do not matter
    rope = type(header_of(shape).rope)(kind="default", inverse_frequencies=frequencies)
    path = write_trace(tmp_path / "t.kvtrace", {0: x}, header=header_of(shape, rope=rope))
    for spec in ("compressive:budget=20", "centroid:budget=20", "fam:block=8,segments=1,slots=4"):
        _, entry = replayed(path, spec)
        assert entry["output_error"]["p95"] < 1e-5
        share = replayed(path, spec)[0].outcomes[0, 0].memory_share
        if not spec.startswith("compressive"):  # nothing is ever dropped
            evicted = np.array([parse(spec).occupancy.evicted(int(n)) for n in places])
            np.testing.assert_allclose(share, evicted / (places + 1), rtol=1e-4, atol=1e-6)


BYTES = {
    "compressive:budget=32": (16, 16, 0),
    "centroid:budget=32,slots=8": (24, 8, 0),
    "fam:block=16,segments=1,slots=6,sinks=2": (18, 6, 0),
    "infini:segment=30,gate=0.5": (0, 0, 16 * 16 + 16 + 5 * 2),
    "infini:segment=30": (0, 0, 0),
    "window:budget=32": (32, 0, 0),
}
"""Token slots, state slots, and float32 numbers beside slots, per KV head."""


@pytest.mark.parametrize("spec", BYTES)
def test_bytes_count_slots_state_and_memories(spec, path):
    """Every slot takes 2 * 16 floats and 8 bytes of state; reserved ones from the first token."""
    kept, reserved, floats = BYTES[spec]
    result, entry = replayed(path, spec)
    law = parse(spec).occupancy
    assert law.retained == kept
    slots = law.held(200) + reserved
    num_bytes = 2 * 2 * (slots * (2 * 16 * 4 + 8) + floats * 4)
    ledger = result.ledger(0)
    assert ledger.bytes_held == entry["bytes_kept"] == num_bytes
    assert ledger.slots_held == slots
    assert ledger.bytes_saved == 2 * 2 * 200 * 2 * 16 * 4 - num_bytes
    peak = 2 * 2 * ((kept + law.interval + reserved) * (2 * 16 * 4 + 8) + floats * 4)
    assert entry["bytes_at_peak"] == result.bytes_at_peak(0) == peak
    assert entry["slot_equivalents"] == pytest.approx(peak / (2 * 2 * 2 * 16 * 4))
    policy = parse(spec)
    if isinstance(policy, Infini):
        assert policy.memory_floats(16, 2) == floats


def test_merged_is_what_memories_stand_for(path):
    """FIFO slots stand for `rate` tokens each, the others for all that was evicted."""
    for spec, merged in (
        ("compressive:budget=32", 16 * 3),
        ("compressive:budget=32,fn=most-used", 16),
        ("centroid:budget=32", "evicted"),
        ("fam:block=16,segments=1,slots=6", "evicted"),
        ("infini:segment=30,gate=calibrated", "evicted"),
    ):
        ledger = replayed(path, spec)[0].ledger(0)
        assert isinstance(ledger, Ledger)
        assert ledger.merged == (ledger.evicted if merged == "evicted" else merged)


def test_regret_is_that_of_the_token_slots(path):
    """Policies with equal token slots share one optimum, whatever their memory."""
    specs = ["window:budget=24,interval=6", "centroid:budget=32,slots=8,interval=6"]
    report = kvpolicy_sim.replay(path, specs, oracle=True)
    window, centroid = (entry["regret"] for entry in report.as_dict()["results"])
    assert window == pytest.approx(centroid, rel=1e-6)


def test_nothing_is_regretted_where_all_tokens_go(path):
    """With no token slot an eviction leaves no choice, so the optimum is what was kept."""
    specs = ["infini:segment=30,gate=0.5", "bswa:block=30,segments=0"]
    report = kvpolicy_sim.replay(path, specs, oracle=True)
    for entry in report.as_dict()["results"]:
        assert entry["regret"]["upper"] == pytest.approx(0, abs=1e-6)
        assert entry["budget"] == 0
        lost = 1 - report.result(entry["policy"]).head_mass.mean()
        assert entry["recall"]["16"] < 1
        assert 0 < lost < 1


def test_pages_show_memories(path, tmp_path):
    """The page has the memory's share, and its bytes as slots, also beside policies without."""
    specs = ["full", "window:budget=32", "centroid:budget=32", "infini:segment=30,gate=0.5"]
    kvpolicy_sim.replay(path, specs, oracle=True).to_html(tmp_path / "r.html")
    text = (tmp_path / "r.html").read_text("utf-8")
    assert "absorbed" in text
    assert "slots at peak</small>" in text
    plain = kvpolicy_sim.replay(path, specs[:2])
    plain.to_html(tmp_path / "p.html")
    assert "absorbed" not in (tmp_path / "p.html").read_text("utf-8")


def test_budgets_of_memories_are_recommended(path):
    """A search over budgets counts the memory's slots in them."""
    (found,) = recommend(path, 0.8, ["compressive:memory=0.5"])
    assert found.retained_mass >= 0.8
    assert found.budget == found.policy.budget
    assert found.policy.occupancy.retained < found.budget


def test_estimates_grow_with_memories(path):
    """Memory slots and matrices are part of the bound."""
    with Trace.open(path) as trace:
        small, large = (
            estimate(trace.header, trace.sequences, 2, [parse(spec)], 1).bytes
            for spec in ("centroid:budget=64,slots=8", "centroid:budget=60000,slots=50000")
        )
    assert large - small > 50_000 * 2 * 32 * 4
