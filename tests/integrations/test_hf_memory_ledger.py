"""What memories cost, as counted in storage: constant in length, and all of it in the ledger."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fixtures.caches import fill, live_bytes, small_llama
from kvpolicy.memory.state import slots_of
from kvpolicy_hf import PolicyCache

LAYERS, KV_HEADS, GROUP, HEAD_DIM, WIDTH = 2, 2, 2, 32, 128
SLOT = 2 * HEAD_DIM * 4 + 8 + 4
"""Bytes of a token's slot and of a memory's: key, value, position, statistic or mass."""

MATRIX = (HEAD_DIM * HEAD_DIM + HEAD_DIM + 5 * GROUP) * 4
"""Bytes of a linear memory of one KV head."""

COSTS = {
    "bswa:block=8,segments=1,sinks=2": 0,
    "compressive:budget=18,interval=6": KV_HEADS * 9 * SLOT,
    "compressive:budget=18,interval=6,fn=most-used,memory=6": KV_HEADS * 6 * SLOT,
    "centroid:budget=16,interval=4": KV_HEADS * 4 * SLOT,
    "fam:block=8,segments=1,slots=4": KV_HEADS * 4 * SLOT,
    "fam:block=8,segments=1,slots=4,level=model": KV_HEADS * 4 * SLOT + 4 * WIDTH * 4,
    "infini:segment=8": 0,
    "infini:segment=8,gate=0.4": KV_HEADS * MATRIX,
    "infini:segment=8,gate=calibrated": KV_HEADS * MATRIX,
}
"""Bytes of one layer's memory of a row, from its first token on."""


@pytest.mark.parametrize("spec", COSTS)
def test_storage_is_constant_in_length(spec: str) -> None:
    """Proves a long request takes its window and its memory, and not one byte more."""
    past, sizes = PolicyCache(small_llama(), spec), []
    for num_tokens in (1, 60, 1, 200, 1, 400):
        fill(past, num_tokens)
        sizes.append(past.ledger().bytes_held)
    tokens = past.policy.occupancy.token_capacity
    assert tokens is not None
    full = LAYERS * (KV_HEADS * tokens * SLOT + COSTS[spec])
    assert sizes[1:] == [full] * 5
    assert sizes[0] <= full


@pytest.mark.parametrize("spec", COSTS)
def test_nothing_else_holds_what_was_absorbed(spec: str) -> None:
    """Proves the process grows by the ledger's bytes, and by what all rows of a model share."""
    before = live_bytes()
    past = PolicyCache(small_llama(), spec)
    fill(past, 500, rows=2)
    fill(past, 1, rows=2)
    held = past.ledger(0).bytes_held + past.ledger(1).bytes_held
    first_rows = LAYERS * 4 * WIDTH * 4 if "level=model" in spec else 0
    rotary = HEAD_DIM // 2 * 4
    assert live_bytes() - before - held <= first_rows + rotary
    past.reset()
    assert live_bytes() - before <= first_rows + rotary


def merged(spec: str, evicted: int) -> int:
    """Evicted tokens that a memory still stands for."""
    name = spec.partition(":")[0]
    if name == "bswa" or spec == "infini:segment=8":
        return 0
    if name != "compressive":
        return evicted
    slots = min(6 if "memory=6" in spec else 9, evicted // 3)
    return slots if "most-used" in spec else 3 * slots


@given(
    spec=st.sampled_from(sorted(COSTS)),
    chunks=st.lists(st.integers(1, 30), min_size=1, max_size=5),
    rows=st.integers(1, 3),
)
@settings(max_examples=25)
def test_the_ledger_counts_memories(spec: str, chunks: list[int], rows: int) -> None:
    """Proves slots, merged tokens and savings are what the law and the storage say."""
    past = PolicyCache(small_llama(), spec)
    for num_tokens in chunks:
        fill(past, num_tokens, rows)
    total, law = sum(chunks), past.policy.occupancy
    for row in range(rows):
        ledger = past.ledger(row)
        assert ledger.evicted == law.evicted(total)
        assert ledger.retained == law.held(total)
        assert ledger.slots_held == law.held(total) + law.state_slots
        assert ledger.merged == merged(spec, law.evicted(total))
        assert ledger.bytes_held >= LAYERS * (KV_HEADS * law.held(total) * SLOT + COSTS[spec])
        full_bytes = total * LAYERS * KV_HEADS * 2 * HEAD_DIM * 4
        assert ledger.bytes_saved == full_bytes - ledger.bytes_held


def test_merged_is_a_mean_over_heads_and_layers() -> None:
    """Proves dropped groups are not counted, however unequal the heads are."""
    past = PolicyCache(small_llama(), "compressive:budget=18,interval=6,min_similarity=0.55")
    fill(past, 44)
    slots = [layer.slots for layer in past._policy_layers if layer.slots is not None]
    filled = [int((slots_of(part.memory).mass > 0).sum()) for part in slots]
    assert past.ledger().merged == 3 * sum(filled) / (LAYERS * KV_HEADS)
    assert 0 < past.ledger().merged < past.ledger().evicted
