"""Memories belong to rows: padding, unequal lengths, second turns, copies, failures, reset."""

import copy
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fixtures.caches import small_llama
from fixtures.models import certified_run, random_prompt
from kvpolicy.memory.state import Memory, Passage
from kvpolicy.policies.fam import FAM
from kvpolicy_hf import PolicyCache

NEW = 8
LENGTHS = (3, 16, 23, 40)
TOLERANCE = 1e-3
"""On logits of a few units; float32 noise reaches 1e-4."""

FEEDBACK = "fam:block=8,segments=1,slots=4,level=model"
SPECS = (
    "bswa:block=8,segments=1,sinks=2",
    "compressive:budget=18,rate=2,interval=6",
    "compressive:budget=18,interval=6,fn=attention",
    "compressive:budget=18,interval=6,fn=most-used",
    "centroid:budget=16,interval=4",
    "fam:block=8,segments=1,slots=4",
    FEEDBACK,
    "fam:block=5,segments=1,slots=4,sinks=3,level=model,query=previous",
    "infini:segment=8,gate=0.4,update=delta",
    "infini:segment=8,gate=calibrated",
)


class Conversation(NamedTuple):
    """Two turns on which float32 cannot decide otherwise; each answer is the greedy one."""

    first: list[int]
    second: list[int]
    answer: list[int]

    @property
    def text(self) -> list[int]:
        """Everything that was said."""
        return self.second + self.answer


@cache
def conversation(spec: str) -> Conversation:
    """Find a conversation without near-ties; its second turn contains the first."""
    for seed in range(50):
        first = random_prompt(small_llama(), 20, seed)
        run = certified_run(small_llama(), spec, first, NEW)
        if run is None:
            continue
        second = first + run.tokens + random_prompt(small_llama(), 15, seed + 1000)
        answer = certified_run(small_llama(), spec, second, NEW)
        if answer is not None:
            return Conversation(first, second, answer.tokens)
    raise LookupError(f"no certified conversation for {spec}")


def left_padded(rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Lay out rows with padding in front; ids and attention mask."""
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    return ids, torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])


def generate(past: PolicyCache, rows: list[list[int]], **arguments: Any) -> list[list[int]]:
    """Generate `NEW` tokens after each row, greedily."""
    ids, mask = left_padded(rows)
    out = small_llama().generate(
        ids,
        attention_mask=mask,
        position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
        past_key_values=past,
        do_sample=False,
        pad_token_id=0,
        max_new_tokens=NEW,
        **arguments,
    )
    return out[:, ids.shape[1] :].tolist()


@torch.no_grad()
def after(past: PolicyCache, ids: list[int]) -> torch.Tensor:
    """Feed one row; its last logits."""
    return small_llama()(torch.tensor([ids]), past_key_values=past).logits[0, -1]


def memories(past: PolicyCache, row: int = 0) -> list[Memory]:
    """Give each layer's memory of a row."""
    slots = [layer.slots for layer in past._policy_layers]
    return [
        part.memory.rows(torch.tensor([row]))
        for part in slots
        if part is not None and part.memory is not None
    ]


def require_equal(past: PolicyCache, row: int, alone: PolicyCache) -> None:
    """Assert that a row holds what a cache of its own holds."""
    for layer in range(len(past.layers)):
        assert torch.equal(past.retained_positions(layer, row), alone.retained_positions(layer))
    for mine, its in zip(memories(past, row), memories(alone), strict=True):
        for x, y in zip(mine.tensors(), its.tensors(), strict=True):
            torch.testing.assert_close(x, y, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("spec", SPECS)
@torch.no_grad()
def test_rows_of_unequal_lengths_decode_as_if_alone(spec: str) -> None:
    """Proves each row's memory is its own, though evictions and boundaries fall apart."""
    text = conversation(spec).text
    ids, mask = left_padded([text[:length] for length in LENGTHS])
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    past, alone = (
        PolicyCache(small_llama(), spec),
        [PolicyCache(small_llama(), spec) for _ in LENGTHS],
    )
    small_llama()(ids, attention_mask=mask, position_ids=positions, past_key_values=past)
    for cache_of_row, length in zip(alone, LENGTHS, strict=True):
        after(cache_of_row, text[:length])
    for step in range(NEW):
        new = [text[length + step] for length in LENGTHS]
        mask = torch.cat([mask, torch.ones(len(new), 1, dtype=torch.int64)], dim=1)
        positions = torch.tensor(LENGTHS)[:, None] + step
        together = small_llama()(
            torch.tensor(new)[:, None],
            attention_mask=mask,
            position_ids=positions,
            past_key_values=past,
        )
        for row, (cache_of_row, token) in enumerate(zip(alone, new, strict=True)):
            logits = after(cache_of_row, [token])
            torch.testing.assert_close(together.logits[row, -1], logits, atol=TOLERANCE, rtol=0)
            require_equal(past, row, cache_of_row)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("chunk", [None, 9])
def test_a_left_padded_batch_generates_what_its_rows_do(spec: str, chunk: int | None) -> None:
    """Proves `generate` on a padded batch gives the oracle's tokens for every row."""
    first, second, answer = conversation(spec)
    past = PolicyCache(small_llama(), spec)
    tokens = generate(past, [first, second], prefill_chunk_size=chunk)
    assert tokens == [second[len(first) : len(first) + NEW], answer]


@given(data=st.data(), spec=st.sampled_from(SPECS))
@settings(max_examples=25)
@torch.no_grad()
def test_padding_anywhere_leaves_memories_alone(data: st.DataObject, spec: str) -> None:
    """Proves only real tokens are absorbed, wherever padding and chunk borders lie."""
    width, long = data.draw(st.integers(20, 50), "columns"), conversation(spec).text
    real = st.lists(st.booleans(), min_size=width, max_size=width)
    mask = torch.tensor(data.draw(st.lists(real, min_size=2, max_size=3), "mask")).long()
    mask *= mask.cumsum(-1) <= len(long)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    ids = torch.tensor(long)[positions] * mask
    past, start = PolicyCache(small_llama(), spec), 0
    while start < width:
        end = min(width, start + data.draw(st.integers(1, 20), "chunk"))
        small_llama()(
            ids[:, start:end],
            attention_mask=mask[:, :end],
            position_ids=positions[:, start:end],
            past_key_values=past,
        )
        start = end
    for row, tokens in enumerate(mask.sum(-1).tolist()):
        if tokens:
            alone = PolicyCache(small_llama(), spec)
            after(alone, long[:tokens])
            require_equal(past, row, alone)


@pytest.mark.parametrize("spec", SPECS)
def test_a_second_turn_continues_the_first(spec: str) -> None:
    """Proves generate on a used cache equals the oracle on the whole conversation."""
    first, second, answer = conversation(spec)
    past, fresh = PolicyCache(small_llama(), spec), PolicyCache(small_llama(), spec)
    generate(past, [first])
    assert generate(past, [second]) == [answer]
    after(fresh, second + answer[:-1])
    require_equal(past, 0, fresh)


@pytest.mark.parametrize("spec", SPECS)
def test_a_copy_made_mid_stream_goes_its_own_way(spec: str) -> None:
    """Proves deepcopy shares no memory: both continue as if the other did not exist."""
    long = conversation(spec).text
    past, fresh = PolicyCache(small_llama(), spec), PolicyCache(small_llama(), spec)
    after(past, long[:21])
    twin = copy.deepcopy(past)
    after(twin, [7] * 30)
    torch.testing.assert_close(after(past, long[21:]), after(fresh, long), atol=TOLERANCE, rtol=0)
    require_equal(past, 0, fresh)
    assert twin.ledger().logical_tokens == 51


def test_a_copy_shares_the_models_weights() -> None:
    """Proves deepcopy copies rows only: no parameter, buffer or module of the model."""
    past = PolicyCache(small_llama(), FEEDBACK)
    after(past, conversation(FEEDBACK).text)
    twin = copy.deepcopy(past)
    for mine, its in zip(past._policy_layers, twin._policy_layers, strict=True):
        assert mine.attention.decoder is its.attention.decoder is not None
        assert mine.slots is not its.slots


@pytest.mark.parametrize("spec", SPECS)
def test_reset_forgets_the_memory(spec: str) -> None:
    """Proves a reset cache takes another batch and gives a fresh cache's answers."""
    first, second, answer = conversation(spec)
    past, fresh = PolicyCache(small_llama(), spec), PolicyCache(small_llama(), spec)
    generate(past, [first, second])
    past.reset()
    assert past.ledger().bytes_held == 0
    assert generate(past, [second]) == [answer]
    after(fresh, second + answer[:-1])
    require_equal(past, 0, fresh)


@pytest.mark.parametrize("spec", SPECS)
def test_inference_mode_and_no_grad_may_alternate(spec: str) -> None:
    """Proves memories made in inference mode can be rewritten outside of it."""
    long = conversation(spec).text
    past, fresh = PolicyCache(small_llama(), spec), PolicyCache(small_llama(), spec)
    with torch.inference_mode():
        small_llama()(torch.tensor([long[:20]]), past_key_values=past)
    small_llama()(torch.tensor([long[20:]]), past_key_values=past)
    after(fresh, long)
    require_equal(past, 0, fresh)
    assert not any(x.requires_grad for memory in memories(past) for x in memory.tensors())


class Forgetful(FAM):
    """A memory that fails in one layer."""

    name = "forgetful"
    layer: int = 0

    def reflect(self, memory: Memory, newest: Passage) -> Any:
        """Fail at the third boundary."""
        if int(newest.n.max()) == 24 and newest.setting.layer == self.layer:
            raise ZeroDivisionError
        return super().reflect(memory, newest)


@torch.no_grad()
def test_a_memory_failing_in_the_first_layer_changes_nothing() -> None:
    """Proves rows are rewritten only once all is decided, in one forward and in steps."""
    policy = Forgetful(block=8, segments=1, slots=4, level="model")
    text = conversation(FEEDBACK).text
    for held, new in ((20, 10), (23, 1)):
        past, before = PolicyCache(small_llama(), policy), PolicyCache(small_llama(), policy)
        after(past, text[:held])
        after(before, text[:held])
        with pytest.raises(ZeroDivisionError):
            after(past, text[held : held + new])
        require_equal(past, 0, before)
        assert past.ledger().logical_tokens == held
