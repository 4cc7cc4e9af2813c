"""Rows of a batch never interact: padding, unequal lengths, second turns, copies, sampling."""

import copy
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

from fixtures.caches import retained, small_llama
from fixtures.models import (
    SMALL_SHAPE,
    CertifiedPrompt,
    certified_prompts,
    certified_run,
    random_llama,
    random_prompt,
)
from kvpolicy_hf import PolicyCache

NEW = 8
LENGTHS = (1, 5, 15, 16, 17, 25, 33, 40)
SPECS = (
    "full",
    "window:budget=16,interval=3",
    "sinks:budget=16,rope=reindex",
    "h2o:budget=16",
    "h2o:budget=12,interval=5,scope=layer,score=relative",
    "tova:budget=16",
    "random:budget=16",
)


@cache
def prompts(spec: str) -> list[CertifiedPrompt]:
    """Find eight certified prompts of unequal lengths."""
    return certified_prompts(small_llama(), [spec], LENGTHS, max_new_tokens=NEW)


def left_padded(rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Lay out rows with padding in front; ids and attention mask."""
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    return ids, torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])


def generate(past: PolicyCache | DynamicCache, ids: torch.Tensor, **arguments) -> torch.Tensor:
    """Generate `NEW` tokens, greedily unless told otherwise."""
    arguments = {"do_sample": False, "pad_token_id": 0, "max_new_tokens": NEW} | arguments
    return small_llama().generate(ids, past_key_values=past, **arguments)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("chunk", [None, 9])
def test_a_left_padded_batch_equals_solo_runs(spec: str, chunk: int | None) -> None:
    """Proves eight unequal rows each do what the oracle does with them alone."""
    expected = prompts(spec)
    ids, mask = left_padded([prompt.ids for prompt in expected])
    past = PolicyCache(small_llama(), spec)
    out = generate(past, ids, attention_mask=mask, prefill_chunk_size=chunk)
    for row, prompt in enumerate(expected):
        assert out[row, -NEW:].tolist() == prompt.run.tokens
        assert retained(past, row) == prompt.run.retained
        assert past.ledger(row).logical_tokens == len(prompt.ids) + NEW - 1


def test_the_eager_implementation_pads_as_well() -> None:
    """Proves the float masks of a model that was eager before mark padding like bool ones."""
    expected = prompts("h2o:budget=16")
    eager: Any = random_llama(**SMALL_SHAPE)
    eager.set_attn_implementation("eager")
    ids, mask = left_padded([prompt.ids for prompt in expected])
    out = eager.generate(
        ids,
        attention_mask=mask,
        past_key_values=PolicyCache(eager, "h2o:budget=16"),
        max_new_tokens=NEW,
        do_sample=False,
        pad_token_id=0,
    )
    assert out[:, -NEW:].tolist() == [prompt.run.tokens for prompt in expected]


@given(data=st.data(), spec=st.sampled_from(SPECS))
@settings(max_examples=30)
@torch.no_grad()
def test_padding_anywhere_takes_no_slot_and_no_position(data: st.DataObject, spec: str) -> None:
    """Proves only real tokens count, wherever padding and chunk borders lie."""
    width = data.draw(st.integers(20, 60), "columns")
    real = data.draw(
        st.lists(st.lists(st.booleans(), min_size=width, max_size=width), min_size=2, max_size=3),
        "mask",
    )
    mask = torch.tensor(real, dtype=torch.int64)
    long = prompts(spec)[-1].ids + prompts(spec)[-1].run.tokens
    counts = mask.cumsum(-1)
    mask = mask * (counts <= len(long))
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
    assert past.get_seq_length() == width
    for row in range(len(real)):
        tokens = int(mask[row].sum())
        alone = PolicyCache(small_llama(), spec)
        if tokens:
            small_llama()(torch.tensor([long[:tokens]]), past_key_values=alone)
            assert retained(past, row) == retained(alone)
        assert past.ledger(row).evicted == past.policy.occupancy.evicted(tokens)


def two_turns(
    spec: str, lengths: tuple[int, int] = (20, 15)
) -> tuple[list[int], list[int], list[int]]:
    """Find a prompt, a second turn and its answer on which float32 cannot decide otherwise."""
    for seed in range(50):
        first = random_prompt(small_llama(), lengths[0], seed)
        run = certified_run(small_llama(), spec, first, NEW)
        if run is None:
            continue
        second = first + run.tokens + random_prompt(small_llama(), lengths[1], seed + 1000)
        answer = certified_run(small_llama(), spec, second, NEW)
        if answer is not None:
            return first, second, answer.tokens
    raise LookupError(f"no certified conversation for {spec}")


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("explicit", [False, True])
def test_a_second_turn_continues_the_first(spec: str, explicit: bool) -> None:
    """Proves generate on a used cache equals the oracle on the whole conversation."""
    first, second, answer = two_turns(spec)
    past = PolicyCache(small_llama(), spec)
    generate(past, torch.tensor([first]))
    assert past.get_seq_length() == len(first) + NEW - 1
    total = len(second)
    arguments = {}
    if explicit:
        arguments = {
            "attention_mask": torch.ones(1, total, dtype=torch.int64),
            "position_ids": torch.arange(total)[None],
        }
    out = generate(past, torch.tensor([second]), **arguments)
    assert out[0, total:].tolist() == answer
    assert past.ledger().logical_tokens == total + NEW - 1


@pytest.mark.parametrize("spec", ["h2o:budget=16", "sinks:budget=16,interval=4,rope=reindex"])
def test_a_second_turn_of_a_padded_batch_continues_each_row(spec: str) -> None:
    """Proves the mask of the whole history keeps positions right after unequal first turns."""
    turns = [two_turns(spec, lengths) for lengths in ((20, 15), (9, 15), (17, 15))]
    ids, mask = left_padded([first for first, _, _ in turns])
    past = PolicyCache(small_llama(), spec)
    generate(past, ids, attention_mask=mask)
    ids, mask = left_padded([second for _, second, _ in turns])
    out = generate(past, ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0))
    assert out[:, -NEW:].tolist() == [answer for _, _, answer in turns]


@pytest.mark.parametrize("spec", SPECS)
def test_a_copy_made_mid_stream_goes_its_own_way(spec: str) -> None:
    """Proves deepcopy shares no state: both continue as if the other did not exist."""
    long = prompts(spec)[-1]
    past = PolicyCache(small_llama(), spec)
    with torch.no_grad():
        small_llama()(torch.tensor([long.ids[:30]]), past_key_values=past)
        twin = copy.deepcopy(past)
        small_llama()(torch.tensor([[7] * 12]), past_key_values=twin)
    out = generate(past, torch.tensor([long.ids]))
    assert out[0, -NEW:].tolist() == long.run.tokens
    assert retained(past) == long.run.retained
    assert twin.ledger().logical_tokens == 42


def test_sampling_is_reproducible_and_equals_the_dense_cache() -> None:
    """Proves a seed fixes the sample, which under `full` is the dense cache's."""
    ids = torch.tensor([random_prompt(small_llama(), 30, 0)])

    def sample(past: PolicyCache | DynamicCache) -> list[list[int]]:
        torch.manual_seed(3)
        return generate(
            past, ids, do_sample=True, num_return_sequences=3, max_new_tokens=20
        ).tolist()

    samples = sample(PolicyCache(small_llama(), "h2o:budget=16"))
    assert samples == sample(PolicyCache(small_llama(), "h2o:budget=16"))
    assert len({tuple(row) for row in samples}) == 3
    assert sample(PolicyCache(small_llama(), "full")) == sample(
        DynamicCache(config=small_llama().config)
    )


def test_reset_makes_the_cache_new() -> None:
    """Proves a reset cache takes another batch and gives a fresh cache's answers."""
    prompt = prompts("h2o:budget=16")[-1]
    past = PolicyCache(small_llama(), "h2o:budget=16")
    generate(past, torch.tensor([prompt.ids, prompt.ids]))
    past.reset()
    assert past.get_seq_length() == 0
    assert past.ledger().logical_tokens == 0
    assert past.retained_positions(0).shape == (2, 0)
    assert generate(past, torch.tensor([prompt.ids]))[0, -NEW:].tolist() == prompt.run.tokens


def test_inference_mode_and_no_grad_may_alternate() -> None:
    """Proves storage made in inference mode can be written outside of it."""
    prompt = prompts("h2o:budget=16")[-1]
    past = PolicyCache(small_llama(), "h2o:budget=16")
    with torch.inference_mode():
        small_llama()(torch.tensor([prompt.ids[:20]]), past_key_values=past)
    assert generate(past, torch.tensor([prompt.ids]))[0, -NEW:].tolist() == prompt.run.tokens
