"""Identities of blocks and memories: what must equal what, whatever the input."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import kvpolicy
from fixtures.decoders import SmallDecoder, run_with_weights
from kvpolicy.memory import linear
from kvpolicy.memory.policy import SlotMemoryPolicy
from kvpolicy.memory.state import Shape, SlotMemory
from kvpolicy.rehearsal import HEAD_DIM, Case, Host, Row, Run, by_chunks, by_steps
from kvpolicy.rotary import Rotary
from oracles.arithmetic import rotate, softmax
from strategies import SEEDS, cases

THETA = 1e4
ROTARY = Rotary.from_theta(THETA, HEAD_DIM)


def run_of(spec: str, case: Case, rows: list[Row] | None = None) -> Run:
    """Run a spec step by step."""
    return by_steps(kvpolicy.parse(spec), case, rows)


def assert_same(first: Run, second: Run, *, exactly: bool = True) -> None:
    """Assert equal outputs, and equal sets wherever both were looked at."""
    for ours, theirs in zip(first.retained, second.retained, strict=True):
        assert all(ours[n] == theirs[n] for n in ours.keys() & theirs.keys())
    assert_same_outputs(first, second, atol=0 if exactly else 2e-5)


def assert_same_outputs(first: Run, second: Run, *, atol: float = 0) -> None:
    """Assert equal outputs."""
    for ours, theirs in zip(first.outputs, second.outputs, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=atol)


def raw(x: Tensor) -> np.ndarray:
    """Turn cached vectors [..., T, D] back by their positions, in float64."""
    return rotate(x.double().numpy(), -np.arange(x.shape[-2]), THETA)


# --- blocks -----------------------------------------------------------------------------------


@given(case=cases(), segments=st.integers(1, 9))
@settings(max_examples=20)
def test_blocks_of_one_token_are_a_window(case: Case, segments: int) -> None:
    """Proves bswa with B=1 == window(budget=m, interval=1), bit by bit."""
    blocks = run_of(f"bswa:block=1,segments={segments}", case)
    assert_same(blocks, run_of(f"window:budget={segments},interval=1", case))


@given(case=cases(), block=st.integers(1, 12))
@settings(max_examples=20)
def test_no_segments_are_attention_within_blocks(case: Case, block: int) -> None:
    """Proves bswa with m=0 == the full cache on each block alone."""
    run = run_of(f"bswa:block={block},segments=0", case)
    for row, outputs in zip(case.rows(), run.outputs, strict=True):
        for first in range(0, row.length, block):
            part = Row(*(x[:, first : first + block] for x in row))
            alone = run_of("full", case, [part, part]).outputs[0]
            torch.testing.assert_close(outputs[:, first : first + block], alone, rtol=0, atol=2e-5)


@pytest.mark.parametrize("segments", [0, 1, 3])
def test_a_text_within_one_block_is_attended_densely(segments: int) -> None:
    """Proves bswa with T <= B == the full cache, bit by bit."""
    case = Case(lengths=(20, 13))
    assert_same_outputs(run_of(f"bswa:block=20,segments={segments}", case), run_of("full", case))


@given(
    length=st.integers(1, 60),
    block=st.integers(1, 9),
    segments=st.integers(0, 3),
    sinks=st.integers(0, 2),
)
@settings(max_examples=30)
def test_a_token_sees_whole_segments_and_its_block(
    length: int, block: int, segments: int, sinks: int
) -> None:
    """Proves the visible set of TransformerBSWA: between mB + 1 and (m+1)B tokens and the sinks."""
    spec = f"bswa:block={block},segments={segments},sinks={sinks}"
    run = run_of(spec, Case(lengths=(length, 1), kv_heads=1))
    for t in range(length):
        own = sinks + max(0, t - sinks) // block * block  # where the token's block begins
        first = max(sinks, own - segments * block)
        visible = {*(run.retained[0][t][0] if t else ()), t}
        assert visible == {*range(min(sinks, t + 1)), *range(first, t + 1)}
        if own > first == own - segments * block:
            assert segments * block < len(visible) - sinks <= (segments + 1) * block


@pytest.mark.parametrize("memory", [1, 4, 7])
def test_one_segment_is_the_memory_of_transformer_xl(memory: int) -> None:
    """Proves attention over [previous segment; current one up to the token], segment by segment."""
    case = Case(lengths=(40, 23), group=1)
    run = run_of(f"bswa:block={memory},segments=1", case)
    for row, outputs in zip(case.rows(), run.outputs, strict=True):
        q, k, v = (x.double().numpy() for x in row)
        for begin in range(0, row.length, memory):
            previous = max(0, begin - memory)
            for t in range(begin, min(begin + memory, row.length)):
                logits = q[:, t, None] @ k[:, previous : t + 1].transpose(0, 2, 1) / HEAD_DIM**0.5
                expected = (softmax(logits) @ v[:, previous : t + 1])[:, 0]
                np.testing.assert_allclose(outputs[:, t].numpy(), expected, atol=2e-5)


# --- feedback attention memory ----------------------------------------------------------------


@given(case=cases(), block=st.integers(1, 7), segments=st.integers(0, 2), sinks=st.integers(0, 2))
@settings(max_examples=20)
def test_feedback_memory_is_the_same_token_by_token_and_block_by_block(
    case: Case, block: int, segments: int, sinks: int
) -> None:
    """Proves that FAM's slots are rewritten at its boundaries, however tokens are fed."""
    spec = f"fam:block={block},segments={segments},slots=3,sinks={sinks}"
    in_blocks = Case(**{**case.__dict__, "chunks": (block,)})
    policy = kvpolicy.parse(spec)
    assert_same(by_steps(policy, case), by_chunks(policy, in_blocks), exactly=False)
    policy, weights = kvpolicy.parse(f"{spec},level=model"), SmallDecoder(case)
    stepped = run_with_weights(policy, case, weights, chunked=False)
    chunked = run_with_weights(policy, in_blocks, weights, chunked=True)
    assert_same(stepped, chunked, exactly=False)


@pytest.mark.parametrize("level", ["kv", "model"])
@given(case=cases())
@settings(max_examples=10)
def test_feedback_memory_without_slots_is_its_window(level: str, case: Case) -> None:
    """Proves fam:slots=0 == bswa, bit by bit, in steps and in chunks."""
    fam = kvpolicy.parse(f"fam:block=4,segments=1,sinks=1,slots=0,level={level}")
    bswa = kvpolicy.parse("bswa:block=4,segments=1,sinks=1")
    for run in (by_steps, by_chunks):
        assert_same(run(fam, case), run(bswa, case))


@pytest.mark.parametrize("level", ["kv", "model"])
def test_feedback_memory_that_nobody_sees_is_its_window(
    level: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Proves that FAM reaches outputs through its slots' attention alone."""
    case = Case(lengths=(40, 23), chunks=(9, 2))
    monkeypatch.setattr(
        SlotMemoryPolicy, "slot_bias", lambda _, memory: torch.full_like(memory.mass, -torch.inf)
    )
    fam = kvpolicy.parse(f"fam:block=4,segments=1,slots=3,level={level}")
    for chunked, run in ((False, by_steps), (True, by_chunks)):
        bswa = run(kvpolicy.parse("bswa:block=4,segments=1"), case)
        hidden = run_with_weights(fam, case, SmallDecoder(case), chunked=chunked)
        assert_same(hidden, bswa, exactly=False)


# --- infini-attention -------------------------------------------------------------------------


def sigma(x: np.ndarray) -> np.ndarray:
    """ELU + 1."""
    return np.where(x > 0, x + 1, np.exp(np.minimum(x, 0)))


@given(case=cases(), segment=st.integers(1, 9))
@settings(max_examples=20)
def test_open_linear_memory_is_a_convex_combination(case: Case, segment: int) -> None:
    """Proves the closed form: weights sigma(q) sigma(k_j) over all tokens of ended segments."""
    run = run_of(f"infini:segment={segment},gate=1.0", case)
    for row, outputs in zip(case.rows(), run.outputs, strict=True):
        q, k = sigma(raw(row.q)), sigma(np.repeat(raw(row.k), case.group, axis=0))
        v = np.repeat(row.v.double().numpy(), case.group, axis=0)
        for t in range(segment, row.length):
            ended = t // segment * segment
            weights = np.einsum("hd,hjd->hj", q[:, t], k[:, :ended])
            expected = np.einsum("hj,hjd->hd", weights, v[:, :ended])
            expected /= weights.sum(axis=1, keepdims=True)
            np.testing.assert_allclose(outputs[:, t].numpy(), expected, atol=2e-5)


def memory_after(spec: str, case: Case) -> linear.LinearMemory:
    """Give what two rows of equal length leave in the matrix."""
    host = Host(kvpolicy.parse(spec), case, case.rows())
    for _ in range(case.lengths[0]):
        host.step([0, 1])
    assert isinstance(host.slots.memory, linear.LinearMemory)
    return host.slots.memory


def test_linear_memory_does_not_know_segments() -> None:
    """Proves that the linear rule leaves the same M and z under any segmentation."""
    case = Case(lengths=(24, 24))
    once, *others = (memory_after(f"infini:segment={n},gate=0.5", case) for n in (24, 1, 3, 8))
    for other in others:
        torch.testing.assert_close(other.matrix, once.matrix, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(other.normaliser, once.normaliser, rtol=1e-5, atol=1e-5)


def test_delta_halves_what_is_stored_again() -> None:
    """Proves v, v/2, v/2, ... under delta, whose normaliser grows, and v for ever under linear."""
    key, value = torch.randn(1, 1, 1, HEAD_DIM), torch.randn(1, 1, 1, HEAD_DIM)
    empty = linear.LinearMemory.empty(Shape.of(key, key, value))
    for is_delta, shares in ((True, (1, 0.5, 0.5, 0.5)), (False, (1, 1, 1, 1))):
        memory = empty
        for share in shares:
            memory = linear.store(memory, key, value, delta=is_delta)
            recalled = linear.recall(memory, key[:, :, None]).output[:, :, 0]
            torch.testing.assert_close(recalled, share * value)


@pytest.mark.parametrize("gate", ["closed", "0.0"])
@pytest.mark.parametrize("update", ["linear", "delta"])
@given(case=cases())
@settings(max_examples=10)
def test_closed_gate_is_attention_within_segments(gate: str, update: str, case: Case) -> None:
    """Proves infini with its gate shut == bswa:segments=0, bit by bit, in steps and in chunks."""
    infini = kvpolicy.parse(f"infini:segment=5,gate={gate},update={update}")
    for run in (by_steps, by_chunks):
        assert_same(run(infini, case), run(kvpolicy.parse("bswa:block=5,segments=0"), case))


@pytest.mark.parametrize("gate", ["0.7", "1.0", "calibrated"])
def test_a_text_within_one_segment_is_attended_densely(gate: str) -> None:
    """Proves infini with T <= segment == the full cache, bit by bit: empty memories add nothing."""
    case = Case(lengths=(20, 13))
    assert_same_outputs(run_of(f"infini:segment=20,gate={gate}", case), run_of("full", case))


# --- empty memories ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spec",
    [
        *(
            f"compressive:budget=12,interval=6,fn={fn}"
            for fn in ("mean", "max", "most-used", "conv", "attention")
        ),
        "compressive:budget=12,interval=6,bias=none",
        "centroid:budget=9,slots=3,interval=6",
        "centroid:budget=9,slots=3,interval=6,bias=none",
        "fam:block=6,segments=1,slots=3",
    ],
)
def test_a_memory_without_content_contributes_nothing(spec: str) -> None:
    """Proves that reserved slots weigh nothing before the first eviction, whose token counts."""
    case = Case(lengths=(12, 7), chunks=(12,))
    policy = kvpolicy.parse(spec)
    assert policy.occupancy.next_due(0) == 12
    for run in (by_steps, by_chunks):
        assert_same_outputs(run(policy, case), run(kvpolicy.parse("full"), case), atol=1e-6)


# --- size, mass, rotation ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "spec",
    [
        "bswa:block=4,segments=2",
        "compressive:budget=12",
        "centroid:budget=12",
        "fam:block=4,segments=1,slots=3",
        "infini:segment=8,gate=0.5",
        "infini:segment=8,gate=calibrated,update=delta",
    ],
)
def test_state_is_constant_in_length(spec: str) -> None:
    """Proves that ten times the text takes not a byte more, token slots and memory."""
    sizes = []
    for length in (30, 300):
        case = Case(lengths=(length, 1), chunks=(17,))
        host = Host(kvpolicy.parse(spec), case, case.rows())
        while not host.is_done(0):
            host.extend(0, 17)
        memory = host.slots.memory
        sizes.append((host.slots.num_bytes, 0 if memory is None else memory.num_bytes))
    assert sizes[0] == sizes[1]
    assert (sizes[0][1] > 0) == (not spec.startswith("bswa"))


@pytest.mark.parametrize("run", ["steps", "chunks"])
@given(case=cases(), slots=st.integers(1, 6), sinks=st.integers(0, 2), interval=st.integers(1, 9))
@settings(max_examples=20)
def test_centroids_conserve_mass(
    run: str, case: Case, slots: int, sinks: int, interval: int
) -> None:
    """Proves that every evicted token counts once, in each KV head."""
    spec = f"centroid:budget=10,slots={slots},sinks={sinks},interval={interval}"
    for row in case.rows():
        host = Host(kvpolicy.parse(spec), case, [row])
        while not host.is_done(0):
            host.step([0]) if run == "steps" else host.extend(0, case.chunks[0])
        memory = host.slots.memory
        assert isinstance(memory, SlotMemory)
        assert (memory.mass.sum(dim=-1) == host.layer.occupancy.evicted(row.length)).all()
        assert (memory.mass == memory.mass.round()).all()


@given(seed=SEEDS, position=st.integers(0, 32767))
@settings(max_examples=30)
def test_turning_back_undoes_rotation(seed: int, position: int) -> None:
    """Proves R_-p R_p = I to float32 noise, within a model's trained length."""
    x = torch.randn(5, HEAD_DIM, generator=torch.Generator().manual_seed(seed))
    places = torch.full((5,), position)
    there_and_back = ROTARY.shift(ROTARY.shift(x, places), -places)
    torch.testing.assert_close(there_and_back, x, rtol=0, atol=2e-6)
