"""Evicted keys and values are really gone, and the ledger counts what was dropped."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fixtures.caches import fill, live_bytes, small_llama
from kvpolicy import LedgerError
from kvpolicy_hf import PolicyCache

KEYS = {
    "semantics",
    "policy",
    "logical_tokens",
    "retained",
    "evicted",
    "merged",
    "slots_held",
    "blocks_held",
    "bytes_held",
    "bytes_saved",
    "evictions",
    "policy_seconds",
}
SPECS = (
    "window:budget=16",
    "sinks:budget=20,interval=7",
    "h2o:budget=16,interval=4",
    "tova:budget=16",
    "random:budget=16",
)


@pytest.mark.parametrize("spec", SPECS)
def test_storage_is_constant_in_length(spec: str) -> None:
    """Proves a long request takes the slots of budget + interval and not one more."""
    past, sizes = PolicyCache(small_llama(), spec), []
    for num_tokens in (50, 1, 200, 1, 400):
        fill(past, num_tokens)
        sizes.append(past.ledger().bytes_held)
    occupancy = past.policy.occupancy
    per_slot = 2 * (2 * 32 * 4 + 8 + 4)  # two KV heads: key, value, position, statistic
    assert occupancy.capacity is not None
    assert sizes[1:] == [2 * occupancy.capacity * per_slot] * 4
    assert sizes[0] <= sizes[1]


def test_nothing_else_holds_what_was_evicted() -> None:
    """Proves the process's tensors grow by the cache's own storage alone."""
    before = live_bytes()
    past = PolicyCache(small_llama(), "h2o:budget=16")
    fill(past, 500)
    fill(past, 1)
    rotary = 2 * 16 * 4  # at most one copy of the frequencies per layer
    assert 0 < live_bytes() - before - past.ledger().bytes_held <= rotary
    past.reset()
    assert live_bytes() - before <= rotary


@given(
    spec=st.sampled_from(("full", *SPECS)),
    chunks=st.lists(st.integers(1, 30), min_size=1, max_size=5),
    rows=st.integers(1, 3),
)
@settings(max_examples=25)
def test_the_ledger_is_the_occupancy_law(spec: str, chunks: list[int], rows: int) -> None:
    """Proves what storage counted as dropped is what the law demands, after any forward."""
    past = PolicyCache(small_llama(), spec)
    for num_tokens in chunks:
        fill(past, num_tokens, rows)
    total, occupancy = sum(chunks), past.policy.occupancy
    for row in range(rows):
        ledger = past.ledger(row).as_dict()
        assert set(ledger) == KEYS
        assert ledger["policy"] == spec
        assert ledger["logical_tokens"] == total
        assert ledger["evicted"] == occupancy.evicted(total)
        assert ledger["retained"] == ledger["slots_held"] == occupancy.held(total)
        assert ledger["evictions"] == occupancy.evictions(total)
        assert past.retained_positions(1, row).shape == (2, ledger["retained"])
        full_bytes = total * 2 * 2 * 2 * 32 * 4
        assert ledger["bytes_saved"] == full_bytes - ledger["bytes_held"]


def test_a_policy_that_did_not_run_fails_its_ledger() -> None:
    """Proves the count is measured: storage that dropped too little is an error."""
    past = PolicyCache(small_llama(), "window:budget=16")
    fill(past, 40)
    for layer in past._policy_layers:
        assert layer.slots is not None
        layer.slots.evicted[0] -= 2
    with pytest.raises(LedgerError, match=r"evicted 22 of 40 tokens, the occupancy law demands 24"):
        past.ledger()


def test_policy_seconds_grow_with_the_work() -> None:
    """Proves the time in the ledger is measured."""
    past = PolicyCache(small_llama(), "h2o:budget=16")
    fill(past, 40)
    first = past.ledger().policy_seconds
    fill(past, 40)
    assert 0 < first < past.ledger().policy_seconds
