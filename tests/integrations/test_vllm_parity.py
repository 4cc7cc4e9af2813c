"""vLLM computes what transformers computes, whatever its scheduler does with the requests."""

import pytest
import torch
from vllm import LLM

from fixtures.engines import (
    Cases,
    assert_equals_reference,
    generate,
    preemptions,
    reference,
    start_engine,
)
from fixtures.models import random_prompt
from kvpolicy_vllm import backend, parts

pytestmark = pytest.mark.vllm

NUM_TOKENS = Cases.num_tokens
LENGTHS = Cases.lengths
SPECS = (
    "full",
    "window:budget=48",
    "window:budget=24,interval=40,protect=(3:7,20:24)",
    "sinks:budget=48,interval=1",
    "h2o:budget=48",
    "h2o:budget=40,interval=1,scope=layer,sinks=2",
    "h2o:budget=48,group_pool=max,score=mean,recent=8",
    "h2o:budget=24,interval=40,decay=0.9",
    "tova:budget=48",
    "tova:budget=40,interval=5,scope=head,recent=1",
    "random:budget=48,seed=3",
)
SCHEDULES = {
    "whole prompts": {"max_num_batched_tokens": 2048},
    "chunks of 128": {"max_num_batched_tokens": 128},
    "chunks of 32": {"max_num_batched_tokens": 32},
}


@pytest.fixture(scope="module")
def cases(model) -> Cases:
    """Certified prompts with their answers."""
    return Cases(model)


@pytest.fixture(scope="module", params=SCHEDULES, ids=lambda name: name.replace(" ", "-"))
def engine(request, path) -> LLM:
    """An engine whose requests bring their policies, under one way of scheduling prompts."""
    return start_engine(path, "full", **SCHEDULES[request.param])


@pytest.mark.parametrize("spec", SPECS)
def test_a_batch_of_unequal_lengths_equals_transformers(engine, cases, spec):
    """Tokens and retained positions do not depend on neighbours or on scheduler chunks."""
    prompts, expected = zip(*cases.of(spec), strict=True)
    outputs = generate(engine, prompts, NUM_TOKENS, spec)
    for output, answer in zip(outputs, expected, strict=True):
        assert_equals_reference(engine, output, answer)


@pytest.mark.parametrize("spec", SPECS)
def test_a_request_alone_equals_transformers(engine, cases, spec):
    """A lone request gives the same as in a batch."""
    ids, expected = cases.of(spec)[-1]
    [output] = generate(engine, [ids], NUM_TOKENS, spec)
    assert_equals_reference(engine, output, expected)


def test_policies_may_mix_in_one_batch(engine, cases):
    """Every row of a batch follows its own policy."""
    mixed = [cases.of(spec)[index % len(LENGTHS)] for index, spec in enumerate(SPECS)]
    outputs = generate(engine, [ids for ids, _ in mixed], NUM_TOKENS, SPECS)
    for output, (_, expected) in zip(outputs, mixed, strict=True):
        assert_equals_reference(engine, output, expected)


@pytest.mark.parametrize("spec", SPECS[1:])
def test_a_budgeted_allotment_equals_transformers(budgeted, cases, spec):
    """With blocks for budget + interval only, every policy that fits still equals transformers."""
    prompts, expected = zip(*cases.of(spec), strict=True)
    outputs = generate(budgeted, prompts, NUM_TOKENS, spec)
    for output, answer in zip(outputs, expected, strict=True):
        assert_equals_reference(budgeted, output, answer)


@pytest.fixture(scope="module")
def budgeted(path) -> LLM:
    """An engine that allots three blocks of 32 slots, enough for every policy but full."""
    return start_engine(path, "h2o:budget=64", max_num_batched_tokens=64)


@pytest.mark.parametrize("prefill", ["stream", "bulk"])
def test_reindexed_positions_equal_transformers(path, cases, prefill):
    """A server at cache ranks equals transformers at cache ranks, in a batch of eight."""
    spec = f"sinks:budget=48,rope=reindex,prefill={prefill}"
    engine = start_engine(path, spec, max_num_batched_tokens=64)
    prompts, expected = zip(*cases.of(spec), strict=True)
    for output, answer in zip(generate(engine, prompts, NUM_TOKENS), expected, strict=True):
        assert_equals_reference(engine, output, answer)


@pytest.mark.parametrize(
    ("server", "num_blocks", "specs"),
    [("full", 11, SPECS), ("h2o:budget=64", 9, SPECS[1:])],
    ids=["full", "budgeted"],
)
def test_preemption_and_recompute_change_nothing(path, cases, server, num_blocks, specs):
    """Requests that queue, lose their blocks and start again still equal transformers."""
    engine = start_engine(
        path,
        server,
        num_gpu_blocks_override=num_blocks,
        max_model_len=160,
        max_num_batched_tokens=64,
    )
    for spec in specs:
        prompts, expected = zip(*cases.of(spec), strict=True)
        with preemptions(engine) as preempted:
            outputs = generate(engine, prompts, NUM_TOKENS, spec)
        for output, answer in zip(outputs, expected, strict=True):
            assert_equals_reference(engine, output, answer)
        assert preempted, f"the pool was large enough for everyone under {spec}"


@pytest.mark.parametrize(
    "spec",
    [
        "fixtures.policies.RowTimesKeyNorm:budget=48,power=0.5",
        "fixtures.policies.KeyAndValueNorm:budget=48,interval=5",
        "fixtures.policies.FadingMaximum:budget=48,interval=1,fade=0.8",
    ],
)
def test_a_custom_policy_by_import_path_equals_transformers(path, model, spec):
    """A policy of a stranger, keys and its own statistic included, runs in vLLM unchanged."""
    engine = start_engine(path, spec, max_num_batched_tokens=32)
    prompts = [random_prompt(model, length, seed=length) for length in (30, 77, 101)]
    outputs = generate(engine, prompts, NUM_TOKENS)
    for ids, output in zip(prompts, outputs, strict=True):
        assert_equals_reference(engine, output, reference(model, spec, ids, NUM_TOKENS))


def test_what_a_policy_needs_at_evictions_is_read_then(path, model, monkeypatch):
    """Decoding rows are not copied for keys and values, and few rows at once where they are due."""
    walked: list[int] = []
    original = backend.walk

    def walk(part, *args):
        walked.append(part.tokens.shape[1])
        return original(part, *args)

    monkeypatch.setattr(backend, "walk", walk)
    monkeypatch.setattr(parts, "MAX_READ", 2 * 53)
    spec = "fixtures.policies.KeyAndValueNorm:budget=48,interval=5"
    engine = start_engine(path, spec, max_num_batched_tokens=32)
    prompts = [random_prompt(model, 63, seed=seed) for seed in range(5)]
    outputs = generate(engine, prompts, NUM_TOKENS)
    for ids, output in zip(prompts, outputs, strict=True):
        assert_equals_reference(engine, output, reference(model, spec, ids, NUM_TOKENS))
    assert walked, "prompts with evictions inside are walked"
    assert 1 not in walked


def test_bfloat16_stays_within_its_rounding(path, model):
    """Tokens decoded in bfloat16, over several evictions, have float32's log-probabilities.

    Policies that score attention may swap slots whose scores bfloat16 cannot tell apart; that
    must cost less than half of what their evictions cost.
    """
    engine = start_engine(path, "full", dtype="bfloat16")
    wide = start_engine(path, "full")
    prompts = [random_prompt(model, length, seed=length) for length in (40, 90, 130)]
    for spec in ("full", "window:budget=32", "h2o:budget=32", "tova:budget=32"):
        outputs = generate(engine, prompts, 12, spec, logprobs=0)
        texts = [
            ids + list(output.outputs[0].token_ids)
            for ids, output in zip(prompts, outputs, strict=True)
        ]
        found = torch.tensor(
            [
                entry[token].logprob
                for output in outputs
                for token, entry in zip(
                    output.outputs[0].token_ids, output.outputs[0].logprobs, strict=True
                )
            ]
        )
        rounding = (found - last_log_probabilities(wide, texts, 12, spec)).abs().mean()
        if spec.startswith(("h2o", "tova")):
            exact = last_log_probabilities(wide, texts, 12, spec)
            eviction = (last_log_probabilities(wide, texts, 12, "full") - exact).abs().mean()
            assert rounding < eviction / 2, spec
        else:
            assert rounding < 0.1, spec


def last_log_probabilities(llm: LLM, texts: list[list[int]], count: int, spec: str) -> torch.Tensor:
    """Log-probabilities of every text's last `count` tokens."""
    outputs = generate(llm, texts, 1, spec, prompt_logprobs=0)
    return torch.tensor(
        [
            entry[token].logprob
            for text, output in zip(texts, outputs, strict=True)
            for token, entry in zip(text[-count:], output.prompt_logprobs[-count:], strict=True)
        ]
    )
