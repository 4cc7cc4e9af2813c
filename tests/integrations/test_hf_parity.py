"""transformers under a policy computes what the float64 oracle computes, in any chunking."""

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

from fixtures.caches import feed, retained, small_llama
from fixtures.families import FAMILIES as FURTHER
from fixtures.models import (
    SMALL_SHAPE,
    CertifiedPrompt,
    certified_prompts,
    random_gemma,
    random_llama,
    random_mistral,
    random_qwen3,
)
from kvpolicy_hf import PolicyCache
from oracles.llama import ModelOracle

PROMPT, NEW = 44, 12
TOLERANCE = 1e-3
"""On logits of a few units; float32 noise reaches 1e-4."""

SPECS = (
    "full",
    "window:budget=16",
    "window:budget=8,interval=12,protect=(3:6,20:22)",
    "sinks:budget=16",
    "sinks:budget=16,rope=reindex",
    "sinks:budget=13,interval=5,rope=reindex,sinks=3",
    "h2o:budget=16",
    "h2o:budget=16,interval=4,scope=layer",
    "h2o:budget=16,score=relative,recent=4",
    "h2o:budget=16,score=mean,decay=0.9,sinks=2,interval=3",
    "h2o:budget=16,group_pool=max",
    "tova:budget=16",
    "tova:budget=16,scope=head,recent=2,group_pool=sum",
    "random:budget=16,seed=7",
)
FAMILIES = {
    "llama": random_llama,
    "mha": lambda: random_llama(**SMALL_SHAPE | {"num_key_value_heads": 4}),
    "qwen3": random_qwen3,
    "mistral": random_mistral,
    "gemma": random_gemma,
}


@cache
def certified(spec: str) -> CertifiedPrompt:
    """Find a prompt of the small model on which float32 cannot decide otherwise."""
    return certified_prompts(small_llama(), [spec], [PROMPT], max_new_tokens=NEW)[0]


@pytest.mark.parametrize("spec", SPECS)
def test_generate_gives_the_oracles_tokens_and_sets(spec: str) -> None:
    """Proves `model.generate` with a PolicyCache equals the definition, for every policy."""
    prompt = certified(spec)
    past = PolicyCache(small_llama(), spec)
    ids = small_llama().generate(
        torch.tensor([prompt.ids]), past_key_values=past, max_new_tokens=NEW, do_sample=False
    )
    assert ids[0, PROMPT:].tolist() == prompt.run.tokens
    assert retained(past) == prompt.run.retained


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "spec", ["h2o:budget=16", "tova:budget=16", "sinks:budget=16,rope=reindex"]
)
def test_every_supported_family_equals_the_oracle(family: str, spec: str) -> None:
    """Proves QK-norm, Gemma's norms, MHA, GQA and MQA change nothing about the policy."""
    model = FAMILIES[family]()
    [prompt] = certified_prompts(model, [spec], [PROMPT], max_new_tokens=NEW)
    past = PolicyCache(model, spec)
    ids = model.generate(
        torch.tensor([prompt.ids]), past_key_values=past, max_new_tokens=NEW, do_sample=False
    )
    assert ids[0, PROMPT:].tolist() == prompt.run.tokens
    assert retained(past) == prompt.run.retained


@pytest.mark.parametrize("family", FURTHER)
@pytest.mark.parametrize("spec", ["h2o:budget=16", "tova:budget=16", "random:budget=16,interval=5"])
def test_every_further_family_equals_the_oracles_attention(family: str, spec: str) -> None:
    """Proves biases, experts, fused projections and partly rotated heads change nothing."""
    model = FURTHER[family]()
    [prompt] = certified_prompts(model, [spec], [PROMPT], max_new_tokens=NEW)
    past = PolicyCache(model, spec)
    ids = model.generate(
        torch.tensor([prompt.ids]), past_key_values=past, max_new_tokens=NEW, do_sample=False
    )
    assert ids[0, PROMPT:].tolist() == prompt.run.tokens
    assert retained(past) == prompt.run.retained


@pytest.mark.parametrize("spec", SPECS)
def test_every_token_retains_what_the_oracle_retains(spec: str) -> None:
    """Proves equality of sets and logits after each single token, not only at the end."""
    prompt = certified(spec)
    past, oracle = PolicyCache(small_llama(), spec), ModelOracle(small_llama(), spec)
    for token in prompt.ids + prompt.run.tokens[:-1]:
        logits = feed(small_llama(), past, [token], [])[0]
        np.testing.assert_allclose(logits, oracle.feed(token), atol=TOLERANCE)
        assert retained(past) == oracle.retained


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("size", [7, 16, PROMPT])
def test_chunk_size_changes_nothing(spec: str, size: int) -> None:
    """Proves chunked prefill through generate equals the oracle at any chunk size."""
    prompt = certified(spec)
    past = PolicyCache(small_llama(), spec)
    ids = small_llama().generate(
        torch.tensor([prompt.ids]),
        past_key_values=past,
        max_new_tokens=NEW,
        do_sample=False,
        prefill_chunk_size=size,
    )
    assert ids[0, PROMPT:].tolist() == prompt.run.tokens
    assert retained(past) == prompt.run.retained


@cache
def whole_logits(spec: str) -> torch.Tensor:
    """Give the logits of a certified prompt fed at once."""
    return feed(small_llama(), PolicyCache(small_llama(), spec), certified(spec).ids, [])


@given(
    spec=st.sampled_from(SPECS),
    borders=st.sets(st.integers(1, PROMPT - 1)).map(sorted),
)
@settings(max_examples=60)
def test_any_chunking_gives_the_same_logits_and_sets(spec: str, borders: list[int]) -> None:
    """Proves schedule invariance: where forwards end never shows in any logit or set."""
    past, whole = PolicyCache(small_llama(), spec), PolicyCache(small_llama(), spec)
    logits = feed(small_llama(), past, certified(spec).ids, borders)
    torch.testing.assert_close(logits, whole_logits(spec), atol=TOLERANCE, rtol=0)
    feed(small_llama(), whole, certified(spec).ids, [])
    assert retained(past) == retained(whole)


def test_full_equals_the_dynamic_cache() -> None:
    """Proves the baseline policy is transformers' own attention, decode included."""
    ids, borders = certified("full").ids, [20, 21, 22, 23, 40]
    ours = feed(small_llama(), PolicyCache(small_llama(), "full"), ids, borders)
    theirs = feed(small_llama(), DynamicCache(config=small_llama().config), ids, borders)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


@cache
def half_llama() -> Any:
    """Build the small model in bfloat16."""
    return random_llama(**SMALL_SHAPE).bfloat16()


def mean_shift(logits: torch.Tensor, others: torch.Tensor) -> float:
    """Average how far log-probabilities lie apart."""
    return float((logits.float().log_softmax(-1) - others.log_softmax(-1)).abs().mean())


@pytest.mark.parametrize("spec", ["full", "window:budget=16", "sinks:budget=16,rope=reindex"])
def test_bfloat16_adds_only_the_models_own_rounding(spec: str) -> None:
    """Proves half precision costs a policy no more than it costs the dense model."""
    ids = certified(spec).ids
    half = feed(half_llama(), PolicyCache(half_llama(), spec), ids, [30])
    dense = feed(small_llama(), DynamicCache(config=small_llama().config), ids, [30])
    half_dense = feed(half_llama(), DynamicCache(config=half_llama().config), ids, [30])
    assert mean_shift(half, whole_logits(spec)) < 2 * mean_shift(half_dense, dense)


@pytest.mark.parametrize("spec", ["h2o:budget=16", "tova:budget=16", "tova:budget=16,interval=4"])
def test_bfloat16_scores_lead_to_nearly_the_same_answers(spec: str) -> None:
    """Proves rounded scores, which may swap near-equals, matter less than evicting at all."""
    ids = certified(spec).ids
    past = PolicyCache(half_llama(), spec)
    half = feed(half_llama(), past, ids, [30])
    evicting = mean_shift(whole_logits(spec), feed(small_llama(), DynamicCache(), ids, []))
    assert mean_shift(half, whole_logits(spec)) < evicting / 2
    assert past.ledger().evicted == past.policy.occupancy.evicted(PROMPT)
