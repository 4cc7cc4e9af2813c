"""``prefill=bulk`` and ``protect=prompt`` in transformers: what is the prompt, and the oracle's."""

import copy
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from fixtures.caches import feed, retained, small_llama
from fixtures.models import (
    CertifiedPrompt,
    certified_prompts,
    certified_run,
    random_gemma,
    random_llama,
    random_mistral,
    random_prompt,
    random_qwen3,
)
from kvpolicy import PolicyError, UnsupportedError
from kvpolicy_hf import PolicyCache
from oracles.llama import ModelOracle

PROMPT, NEW = 44, 28
TOLERANCE = 1e-3
"""On logits of a few units; float32 noise reaches 1e-4."""

SPECS = (
    "window:budget=16,prefill=bulk",
    "window:budget=8,interval=12,protect=(3:6,20:22),prefill=bulk",
    "sinks:budget=13,interval=5,sinks=3,rope=reindex,prefill=bulk",
    "h2o:budget=16,prefill=bulk",
    "h2o:budget=16,interval=4,scope=layer,score=relative,prefill=bulk",
    "tova:budget=16,interval=3,prefill=bulk",
    "random:budget=16,prefill=bulk",
    "window:budget=8,interval=3,protect=prompt",
    "h2o:budget=12,protect=prompt",
    "h2o:budget=12,score=mean,decay=0.9,interval=3,protect=prompt",
    "tova:budget=12,scope=head,interval=2,protect=prompt",
)
IN_BATCHES = (SPECS[0], SPECS[2], SPECS[3], SPECS[7], SPECS[8])
FAMILIES = {
    "llama": random_llama,
    "qwen3": random_qwen3,
    "mistral": random_mistral,
    "gemma": random_gemma,
}
LENGTHS = (1, 9, 16, 17, 25, 40)


@cache
def certified(spec: str) -> CertifiedPrompt:
    """Find a prompt of the small model on which float32 cannot decide otherwise."""
    return certified_prompts(small_llama(), [spec], [PROMPT], max_new_tokens=NEW)[0]


@cache
def certified_batch(spec: str) -> list[CertifiedPrompt]:
    """Find such prompts of unequal lengths, within the budget and beyond."""
    return certified_prompts(small_llama(), [spec], LENGTHS, max_new_tokens=NEW)


def generate(
    past: PolicyCache, rows: list[list[int]], model: Any = None, **arguments: Any
) -> list[list[int]]:
    """Generate greedily after left-padded rows; the new tokens of each."""
    model, width = model or small_llama(), max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    settings = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0} | arguments
    out = model.generate(ids, attention_mask=mask, past_key_values=past, **settings)
    return out[:, width:].tolist()


@pytest.mark.parametrize("spec", SPECS)
def test_generate_gives_the_oracles_tokens_and_sets(spec: str) -> None:
    """Proves that generate's prefill is the prompt, for both modes, against the definition."""
    prompt, past = certified(spec), PolicyCache(small_llama(), spec)
    assert generate(past, [prompt.ids]) == [prompt.run.tokens]
    assert retained(past) == prompt.run.retained
    law = past.policy.occupancy.of_prompt(PROMPT)
    ledger = past.ledger()
    assert ledger.evicted == law.evicted(PROMPT + NEW - 1) > 0
    assert ledger.evictions == law.evictions(PROMPT + NEW - 1)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("spec", ["h2o:budget=16,prefill=bulk", "tova:budget=16,protect=prompt"])
def test_every_supported_family_equals_the_oracle(family: str, spec: str) -> None:
    """Proves both modes on every tested architecture."""
    model = FAMILIES[family]()
    [prompt] = certified_prompts(model, [spec], [PROMPT], max_new_tokens=NEW)
    past = PolicyCache(model, spec)
    assert generate(past, [prompt.ids], model) == [prompt.run.tokens]
    assert retained(past) == prompt.run.retained


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("size", [7, 16, 43])
def test_a_chunked_prefill_is_one_prompt(spec: str, size: int) -> None:
    """Proves prefill_chunk_size changes nothing once the cache knows where the prompt ends."""
    prompt, past = certified(spec), PolicyCache(small_llama(), spec, prompt_tokens=PROMPT)
    assert generate(past, [prompt.ids], prefill_chunk_size=size) == [prompt.run.tokens]
    assert retained(past) == prompt.run.retained


@pytest.mark.parametrize("spec", SPECS)
def test_every_token_retains_what_the_oracle_retains(spec: str) -> None:
    """Proves equality of sets and logits after each single token of a prompt and behind it."""
    prompt, past = certified(spec), PolicyCache(small_llama(), spec, prompt_tokens=PROMPT)
    oracle = ModelOracle(small_llama(), spec, prompt=PROMPT)
    for token in prompt.ids + prompt.run.tokens[:-1]:
        logits = feed(small_llama(), past, [token], [])[0]
        np.testing.assert_allclose(logits, oracle.feed(token), atol=TOLERANCE)
        assert retained(past) == oracle.retained


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("borders", [[], [20], [PROMPT], [30, 60], [10, PROMPT - 1, PROMPT + 9]])
def test_any_chunking_around_a_prompt_gives_the_same(spec: str, borders: list[int]) -> None:
    """Proves forwards may end before, at or behind a prompt's end: no set or logit changes."""
    prompt = certified(spec)
    ids = prompt.ids + prompt.run.tokens[:-1]
    past, oracle = PolicyCache(small_llama(), spec, prompt_tokens=PROMPT), certified_logits(spec)
    np.testing.assert_allclose(feed(small_llama(), past, ids, borders), oracle, atol=TOLERANCE)
    assert retained(past) == prompt.run.retained


@cache
def certified_logits(spec: str) -> np.ndarray:
    """Give the oracle's logits after each token of a certified generation."""
    oracle, prompt = ModelOracle(small_llama(), spec, prompt=PROMPT), certified(spec)
    return np.stack([oracle.feed(token) for token in prompt.ids + prompt.run.tokens[:-1]])


@pytest.mark.parametrize("spec", IN_BATCHES)
@pytest.mark.parametrize("chunk", [None, 9])
def test_rows_of_a_padded_batch_have_prompts_of_their_own(spec: str, chunk: int | None) -> None:
    """Proves padding is no prompt: unequal rows each do what the oracle does with them alone."""
    expected = certified_batch(spec)
    lengths = None if chunk is None else list(LENGTHS)
    past = PolicyCache(small_llama(), spec, prompt_tokens=lengths)
    out = generate(past, [prompt.ids for prompt in expected], prefill_chunk_size=chunk)
    for row, prompt in enumerate(expected):
        assert out[row] == prompt.run.tokens
        assert retained(past, row) == prompt.run.retained
        law = past.policy.occupancy.of_prompt(LENGTHS[row])
        assert past.ledger(row).evicted == law.evicted(LENGTHS[row] + NEW - 1)


@pytest.mark.parametrize("spec", IN_BATCHES)
def test_a_second_turn_is_no_prompt(spec: str) -> None:
    """Proves a later turn's tokens stream like generated ones, however many come at once."""
    new = 6
    for seed in range(60):
        first = random_prompt(small_llama(), 20, seed)
        run = certified_run(small_llama(), spec, first, new)
        if run is None:
            continue
        second = first + run.tokens + random_prompt(small_llama(), 25, seed + 1000)
        answer = certified_run(small_llama(), spec, second, new, prompt=20)
        if answer is not None:
            break
    else:
        raise LookupError(f"no certified conversation for {spec}")
    past = PolicyCache(small_llama(), spec)
    assert generate(past, [first], max_new_tokens=new) == [run.tokens]
    assert generate(past, [second], max_new_tokens=new) == [answer.tokens]
    assert retained(past) == answer.retained
    assert past.ledger().logical_tokens == len(second) + new - 1


@pytest.mark.parametrize("spec", IN_BATCHES)
def test_a_copy_knows_the_prompt(spec: str) -> None:
    """Proves deepcopy: a copy made behind a prompt, or within it, goes on like the original."""
    prompt = certified(spec)
    ids, expected = prompt.ids + prompt.run.tokens[:-1], prompt.run.retained
    for given, at in ((None, PROMPT), (PROMPT, 30)):
        past = PolicyCache(small_llama(), spec, prompt_tokens=given)
        feed(small_llama(), past, ids[:at], [])
        other = copy.deepcopy(past)
        for one in (other, past):
            feed(small_llama(), one, ids[at:], list(range(1, len(ids) - at)))
            assert retained(one) == expected


def test_a_reset_cache_takes_another_prompt() -> None:
    """Proves reset forgets the rows' prompts, given ones included, and takes new ones."""
    short, long = certified_batch("h2o:budget=16,prefill=bulk")[-2:]
    past = PolicyCache(small_llama(), "h2o:budget=16,prefill=bulk", prompt_tokens=25)
    assert generate(past, [short.ids], prefill_chunk_size=10) == [short.run.tokens]
    past.reset()
    assert past.ledger().logical_tokens == 0
    assert generate(past, [long.ids]) == [long.run.tokens]
    past.reset(prompt_tokens=[25, 25])
    assert generate(past, [short.ids] * 2, prefill_chunk_size=10) == [short.run.tokens] * 2


@pytest.mark.parametrize("spec", ["h2o:budget=16,interval=4,prefill=bulk", "window:budget=20"])
def test_bytes_of_a_bulk_prompt_are_given_back(spec: str) -> None:
    """Proves that behind a padded batch of prompts storage is the budget's, as under stream."""
    past = PolicyCache(small_llama(), spec)
    generate(past, [random_prompt(small_llama(), n, n) for n in (300, 130, 5)])
    cell = 2 * 4 * small_llama().config.head_dim + 12
    heads = small_llama().config.num_key_value_heads
    assert past.ledger().bytes_held <= len(past.layers) * heads * 21 * cell


REFUSED = {
    "a chunk": (None, [[9, 9]], r"second one brings 9 columns.*prompt_tokens="),
    "rows": ([5, 6, 7], [[9]], "the prompts of 3 rows but the forward has 1"),
}


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.parametrize("mode", ["prefill=bulk", "protect=prompt"])
def test_prompts_without_a_known_end_are_refused(kind: str, mode: str) -> None:
    """Proves nothing is guessed: what may be half a prompt is refused, and nothing changes."""
    given, [sizes], message = REFUSED[kind]
    past = PolicyCache(small_llama(), f"window:budget=4,{mode}", prompt_tokens=given)
    *before, last = sizes
    for size in before:
        feed(small_llama(), past, list(range(size)), [])
    tokens = past.ledger().logical_tokens
    with pytest.raises(UnsupportedError, match=message):
        feed(small_llama(), past, list(range(last)), [])
    assert past.ledger().logical_tokens == tokens


@pytest.mark.parametrize("given", [-1, 2.5, True, [3, -1], ["4"], torch.tensor([3, 4]), "12"])
def test_prompts_of_no_length_are_refused(given: Any) -> None:
    """Proves construction and reset name what is no number of tokens."""
    with pytest.raises(PolicyError, match="prompt_tokens must be a number of tokens"):
        PolicyCache(small_llama(), "window:budget=4,prefill=bulk", prompt_tokens=given)
    with pytest.raises(PolicyError, match="prompt_tokens must be a number of tokens"):
        PolicyCache(small_llama(), "window:budget=4").reset(given)


def test_streaming_policies_need_no_prompt() -> None:
    """Proves that a prompt's length means nothing to a policy that streams."""
    spec, ids = "h2o:budget=16", certified("h2o:budget=16,prefill=bulk").ids
    told, untold = (
        PolicyCache(small_llama(), spec, prompt_tokens=30),
        PolicyCache(small_llama(), spec),
    )
    assert torch.equal(feed(small_llama(), told, ids, [20]), feed(small_llama(), untold, ids, [20]))
    assert retained(told) == retained(untold)
