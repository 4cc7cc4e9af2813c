"""The occupancy law against a count of slots, and its helpers against each other."""

import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvpolicy import Occupancy, parse
from strategies import LAWS, PROMPT_LAWS

TOKENS = 120


def counted(law: Occupancy, tokens: int = TOKENS) -> list[int]:
    """Count slots held after 0, 1, ... tokens by appending and evicting one by one."""
    held = [0]
    for _ in range(tokens):
        now = held[-1] + 1
        held.append(law.retained if now == law.retained + law.interval else now)
    return held


@given(law=LAWS)
def test_held_is_what_counting_gives(law: Occupancy) -> None:
    """Proves the closed formula against the sawtooth made step by step."""
    assert [law.held(n) for n in range(TOKENS + 1)] == counted(law)


@given(law=LAWS)
def test_held_and_evicted_add_up(law: Occupancy) -> None:
    """Proves that every token is either held or evicted, and that eviction is final."""
    evicted = [law.evicted(n) for n in range(TOKENS)]
    assert [law.held(n) + gone for n, gone in enumerate(evicted)] == list(range(TOKENS))
    assert evicted == sorted(evicted)


@given(law=LAWS)
def test_evictions_are_due_where_slots_are_dropped(law: Occupancy) -> None:
    """Proves is_due, next_due and evictions against the count."""
    held = counted(law)
    due = [n for n in range(1, TOKENS + 1) if held[n] <= held[n - 1]]
    assert [n for n in range(TOKENS + 1) if law.is_due(n)] == due
    for n in range(TOKENS - law.interval - law.retained):
        assert law.next_due(n) == next(m for m in range(n + 1, TOKENS) if law.is_due(m))
        assert law.evictions(n) == sum(m <= n for m in due)


@given(law=LAWS)
def test_tensors_and_arrays_agree_with_ints(law: Occupancy) -> None:
    """Proves that schedulers and kernels share one definition."""
    counts, held = list(range(TOKENS)), counted(law, TOKENS - 1)
    assert law.held(torch.tensor(counts)).tolist() == held
    assert law.held(torch.tensor(counts, dtype=torch.int32)).tolist() == held
    assert law.held(np.array(counts)).tolist() == held
    assert law.evicted(torch.tensor(counts)).tolist() == [law.evicted(n) for n in counts]


@given(law=LAWS, n=st.integers(0, TOKENS), block_size=st.integers(1, 32))
def test_blocks_cover_the_fullest_moment(law: Occupancy, n: int, block_size: int) -> None:
    """Proves that blocks suffice for the slots inside every step so far, and not one more."""
    held = counted(law)
    peak = law.state_slots + max([held[m - 1] + 1 for m in range(1, n + 1)], default=0)
    assert law.num_blocks(n, block_size) == (peak + block_size - 1) // block_size
    assert peak <= law.capacity


def counted_behind(law: Occupancy, prompt: int, tokens: int = TOKENS) -> list[int]:
    """Count slots held after 0, 1, ... tokens of a request whose prompt is set apart."""
    if law.prompts == "keep":
        stream = counted(Occupancy(law.retained, law.interval), tokens)
        return [*range(prompt), *(prompt + held for held in stream)][: tokens + 1]
    held = [0]
    for n in range(1, tokens + 1):
        now = held[-1] + 1
        if prompt > law.retained:
            is_due = n >= prompt and (n - prompt) % law.interval == 0
        else:
            is_due = now == law.retained + law.interval
        held.append(law.retained if is_due else now)
    return held


@given(law=PROMPT_LAWS, prompt=st.integers(0, TOKENS))
def test_prompts_set_apart_are_counted_apart(law: Occupancy, prompt: int) -> None:
    """Proves the laws of bulk and kept prompts against a count, evictions and surplus included."""
    settled, held = law.of_prompt(prompt), counted_behind(law, prompt)
    counts = list(range(TOKENS + 1))
    assert [settled.held(n) for n in counts] == held
    assert settled.held(torch.tensor(counts)).tolist() == held
    dropped = [0, *(before + 1 - after for before, after in pairwise(held))]
    assert [settled.surplus(n) for n in counts] == dropped
    due = [n for n in counts if dropped[n]]
    assert [n for n in counts if settled.is_due(n)] == due
    assert [settled.evictions(n) for n in counts] == [sum(m <= n for m in due) for n in counts]
    for n in counts[: due[-1] if due else 0]:
        assert settled.next_due(n) == next(m for m in due if m > n)


@given(law=PROMPT_LAWS, prompt=st.integers(0, TOKENS), block_size=st.integers(1, 32))
def test_blocks_of_a_bulk_prompt_are_returned(law: Occupancy, prompt: int, block_size: int) -> None:
    """Proves that blocks cover a prompt while it lasts, and only what decoding needs after it."""
    settled, held = law.of_prompt(prompt), counted_behind(law, prompt)
    for n in range(1, TOKENS + 1):
        blocks = settled.num_blocks(n, block_size)
        assert blocks * block_size >= held[n - 1] + 1 + law.state_slots
        if law.prompts == "bulk" and n > prompt > law.retained:
            assert blocks == -(-min(n + law.state_slots, law.capacity) // block_size)
        else:
            assert blocks == -(-(max(held[:n], default=0) + 1 + law.state_slots) // block_size)
    assert law.num_blocks(TOKENS, block_size) == -(-(TOKENS + law.state_slots) // block_size)


def test_an_unsettled_law_evicts_nothing_by_accident() -> None:
    """Proves that a law whose prompt is unknown refuses to be counted with."""
    law = parse("window:budget=4,prefill=bulk").occupancy
    assert law.needs_prompt
    assert not law.of_prompt(3).needs_prompt
    with pytest.raises(AssertionError, match="of_prompt"):
        law.held(9)


def test_full_keeps_every_token() -> None:
    """Proves the unbounded law."""
    law = Occupancy(retained=None, state_slots=3)
    assert law.capacity is None
    assert law.next_due(10) is None
    assert (law.held(10), law.evicted(10), law.evictions(10), law.is_due(10)) == (10, 0, 0, False)
    assert law.held(torch.arange(5)).tolist() == [0, 1, 2, 3, 4]
    assert law.num_blocks(13, 16) == 1
    assert law.num_blocks(14, 16) == 2


def test_law_of_infini_starts_from_nothing() -> None:
    """Proves R = 0: a segment fills up and is let go as a whole."""
    law = Occupancy(retained=0, interval=3)
    assert [law.held(n) for n in range(8)] == [0, 1, 2, 0, 1, 2, 0, 1]


@pytest.mark.parametrize(
    ("spec", "held"),
    [
        ("window:budget=3,interval=1", [0, 1, 2, 3, 3, 3, 3]),
        ("window:budget=2,interval=3", [0, 1, 2, 3, 4, 2, 3, 4, 2]),
        ("window:budget=1,interval=2", [0, 1, 2, 1, 2, 1]),
    ],
)
def test_examples_by_hand(spec: str, held: list[int]) -> None:
    """Proves the law on sequences small enough to check by eye."""
    law = parse(spec).occupancy
    assert [law.held(n) for n in range(len(held))] == held


@pytest.mark.parametrize(("budget", "interval"), [(1, 1), (16, 1), (31, 1), (32, 2), (1024, 64)])
def test_default_interval_stays_within_six_percent(budget: int, interval: int) -> None:
    """Proves the default max(1, budget // 16)."""
    assert parse(f"h2o:budget={budget}").occupancy == Occupancy(budget, interval)


@given(law=LAWS, n=st.integers(10**12, 10**15))
def test_law_holds_for_any_length(law: Occupancy, n: int) -> None:
    """Proves that nothing depends on lengths being small."""
    assert law.retained <= law.held(n) < law.retained + law.interval
    assert (n - law.held(n)) % law.interval == 0
    assert law.next_due(n) - n <= law.interval


def test_the_semantics_page_shows_the_law() -> None:
    """Proves the page's worked example of prompts set apart against the formula."""
    page = Path(__file__).parents[2] / "docs" / "explanation" / "semantics.md"
    shown = re.findall(
        r"^    (prefill=\w+|protect=prompt) +([\d ]+)$", page.read_text("utf-8"), re.MULTILINE
    )
    assert len(shown) == 3
    for mode, numbers in shown:
        law = parse(f"window:budget=4,interval=3,{mode}").occupancy.of_prompt(6)
        assert [law.held(n) for n in range(1, 17)] == [int(number) for number in numbers.split()]


@given(law=PROMPT_LAWS, prompt=st.integers(0, 60))
def test_limit_is_the_fullest_moment_to_come(law: Occupancy, prompt: int) -> None:
    """Proves that storage of `limit` slots suffices from any moment on, and is given back."""
    law = law.of_prompt(prompt)
    for n in range(TOKENS):
        fullest = max(law.held(m) + 1 for m in range(n, n + 100))
        assert fullest <= law.limit(n)
    assert law.limit(prompt) == law.token_capacity == law.limit(TOKENS)
