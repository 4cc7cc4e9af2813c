"""Models of which some layers attend to a sliding window: the policy rules the others only."""

import pytest
import torch
from vllm import SamplingParams

import kvpolicy
import kvpolicy_vllm
from fixtures.engines import (
    BLOCK_SIZE,
    Cases,
    assert_equals_reference,
    chunks_of,
    generate,
    pool_of,
    preemptions,
    scheduler_of,
    start_engine,
)
from fixtures.families import FULL, SLIDING, random_gemma3
from fixtures.faults import Faulty
from fixtures.models import random_prompt, save_model
from kvpolicy import registry
from kvpolicy_vllm.engine import Engine
from kvpolicy_vllm.sliding import require_supported

pytestmark = pytest.mark.vllm

NUM_TOKENS = Cases.num_tokens
SPECS = ("full", "window:budget=24,interval=5", "h2o:budget=24", "tova:budget=24")
SERVER = "h2o:budget=40,interval=8"
CELL = 2 * 32 * 4
"""Bytes of a key and its value."""


@pytest.fixture(scope="module")
def model():
    """A random Gemma 3: two layers of full attention between four with a sliding window."""
    return random_gemma3()


@pytest.fixture(scope="module")
def path(model, tmp_path_factory):
    """The model on disk."""
    return save_model(model, tmp_path_factory.mktemp("gemma3"))


@pytest.fixture(scope="module")
def cases(model):
    """Certified prompts, shorter and longer than budget and window, with their answers."""
    return Cases(model)


@pytest.fixture(scope="module")
def engine(path):
    """An engine whose requests bring their policies."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(registry._registered, Faulty.name, Faulty)
        yield start_engine(path, "full", allow=(*kvpolicy.available(), Faulty.name))


@pytest.mark.parametrize("chunk", [32, 2048])
@pytest.mark.parametrize("spec", SPECS)
def test_a_batch_of_unequal_lengths_equals_transformers(engine, cases, spec, chunk):
    """Tokens and what ruled layers retain, past budget and window, in chunks and in one piece."""
    prompts, expected = zip(*cases.of(spec), strict=True)
    with chunks_of(engine, chunk):
        outputs = generate(engine, prompts, NUM_TOKENS, spec)
    for output, answer in zip(outputs, expected, strict=True):
        assert_equals_reference(engine, output, answer)


def test_policies_may_mix_in_one_batch(engine, cases):
    """Every row follows its own policy; sliding layers follow none."""
    mixed = [cases.of(SPECS[index % len(SPECS)])[index] for index in range(8)]
    outputs = generate(engine, [ids for ids, _ in mixed], NUM_TOKENS, SPECS * 2)
    for output, (_, expected) in zip(outputs, mixed, strict=True):
        assert_equals_reference(engine, output, expected)


def test_preemption_and_recompute_change_nothing(engine, cases):
    """Requests that lose their blocks in all layers and start again equal transformers."""
    for spec in SPECS:
        prompts, expected = zip(*cases.of(spec), strict=True)
        with preemptions(engine) as preempted, chunks_of(engine, 32), pool_of(engine, 17):
            outputs = generate(engine, prompts, NUM_TOKENS, spec)
        for output, answer in zip(outputs, expected, strict=True):
            assert_equals_reference(engine, output, answer)
        assert preempted, f"the pool was large enough for everyone under {spec}"


@pytest.mark.parametrize("spec", ["h2o:budget=24", "full"])
def test_the_prefix_cache_finds_nothing(engine, cases, spec):
    """Sliding layers find blocks of a known prompt, but their hit alone would skip evictions."""
    ids, expected = cases.of(spec)[-1]
    for _ in range(2):
        [output] = generate(engine, [ids], NUM_TOKENS, spec)
        assert_equals_reference(engine, output, expected)
        assert output.num_cached_tokens == 0


def test_a_failing_policy_goes_on_as_a_window(engine, cases):
    """Containment works beside sliding layers: the row goes on, its neighbour notices nothing."""
    ids, expected = cases.of("h2o:budget=24")[-1]
    alone, under_window = generate(
        engine, [ids, ids], NUM_TOKENS, ["faulty:budget=24,how=raise", "window:budget=24"]
    )
    failed, neighbour = generate(
        engine, [ids, ids], NUM_TOKENS, ["faulty:budget=24,how=raise", "h2o:budget=24"]
    )
    assert_equals_reference(engine, neighbour, expected)
    for output in (alone, failed):
        assert output.outputs[0].token_ids == under_window.outputs[0].token_ids
        fault = kvpolicy_vllm.ledger(engine)["requests"][output.request_id]["fault"]
        assert "(2 layers under a window)" in fault


def test_blocks_full_of_nan_harm_nobody(engine, cases):
    """What others left in blocks, here no numbers at all, reaches no layer of either kind."""
    context = engine.llm_engine.vllm_config.compilation_config.static_forward_context
    for layer in context.values():
        layer.kv_cache.fill_(torch.nan)
    prompts, expected = zip(*cases.of("h2o:budget=24"), strict=True)
    with chunks_of(engine, 32):
        outputs = generate(engine, prompts, NUM_TOKENS, "h2o:budget=24")
    for output, answer in zip(outputs, expected, strict=True):
        assert_equals_reference(engine, output, answer)


def test_sliding_layers_have_no_retained_positions(engine, model):
    """Asking for them says that they are under no policy."""
    [output] = generate(engine, [random_prompt(model, 50, seed=1)], 2)
    with pytest.raises(kvpolicy.PolicyError, match="attends to a sliding window"):
        kvpolicy_vllm.retained_positions(engine, output.request_id, 0)


@pytest.fixture(scope="module")
def budgeted(path):
    """An engine that allots blocks for budget + interval, two of them."""
    return start_engine(path, SERVER, max_num_batched_tokens=64)


@pytest.mark.parametrize("spec", SPECS[1:])
def test_a_budgeted_allotment_equals_transformers(budgeted, cases, spec):
    """Blocks that pass between sliding layers and others keep nothing of what they held."""
    prompts, expected = zip(*cases.of(spec), strict=True)
    with preemptions(budgeted) as preempted, pool_of(budgeted, 24):
        outputs = generate(budgeted, prompts, NUM_TOKENS, spec)
    for output, answer in zip(outputs, expected, strict=True):
        assert_equals_reference(budgeted, output, answer)
    assert not preempted, "admission goes by what requests will hold"


def test_ledgers_count_the_blocks_that_the_scheduler_counts(budgeted, model):
    """At every decoded token, blocks held are those of all block tables, and bytes follow."""
    engine, scheduler = budgeted.llm_engine, scheduler_of(budgeted)
    prompt = {"prompt_token_ids": random_prompt(model, 70, seed=5)}
    engine.add_request(
        "counted", prompt, SamplingParams(max_tokens=80, ignore_eos=True, detokenize=False)
    )
    counts = set()
    while engine.has_unfinished_requests():
        engine.step()
        [request_id] = scheduler.requests or [None]
        if request_id is None or scheduler.requests[request_id].num_output_tokens < 2:
            continue
        tables = [
            manager.req_to_blocks[request_id]
            for manager in scheduler.kv_cache_manager.coordinator.single_type_managers
        ]
        held = [sum(not block.is_null for block in table) for table in tables]
        entry = kvpolicy_vllm.ledger(budgeted)["requests"]["counted"]
        page = BLOCK_SIZE * 2 * (CELL + 8)
        assert entry["blocks_held"] == sum(held)
        assert entry["bytes_held"] == sum(held) * 2 * page
        stock = sum(held[:-1]) + -(-entry["logical_tokens"] // BLOCK_SIZE)
        assert entry["bytes_saved"] == stock * 2 * BLOCK_SIZE * 2 * CELL - entry["bytes_held"]
        assert held[-1] == 2, "two blocks for budget + interval"
        counts.add(tuple(held))
    assert len(counts) > 1, "sliding layers hold two blocks, or three"


def test_more_ruled_layers_than_sliding_ones_are_refused(tmp_path):
    """Where vLLM gives the policy's layers several block tables, the engine does not start."""
    save_model(random_gemma3(layer_types=[FULL, SLIDING, FULL, FULL, SLIDING, FULL]), tmp_path)
    with pytest.raises(kvpolicy.UnsupportedError, match="groups with block tables of their own"):
        start_engine(tmp_path, "window:budget=48")


@pytest.mark.parametrize("spec", ["sinks:budget=48,rope=reindex", "compressive:budget=48"])
def test_policies_for_all_layers_are_refused(path, spec):
    """What was not shown to be right beside sliding layers does not start, nor where RoPE is plain.

    Gemma 3 is refused for its rotary embeddings already.
    """
    with pytest.raises(kvpolicy.UnsupportedError, match="needs plain rotary embeddings"):
        start_engine(path, spec)
    with pytest.raises(kvpolicy.UnsupportedError, match="is not tested beside layers that attend"):
        require_supported(Engine(kvpolicy.parse(spec), has_layers=True))


def test_several_processes_are_refused():
    """Stages or ranks with layers of both kinds were not compared with anything."""
    with pytest.raises(kvpolicy.UnsupportedError, match="is not tested over 2 processes"):
        require_supported(Engine(kvpolicy.parse("window:budget=48"), has_layers=True), 2)


def test_captures_are_refused(path, tmp_path):
    """A trace holds what attends to all tokens, which sliding layers do not."""
    with pytest.raises(kvpolicy.UnsupportedError, match=r"some layers of .* attend to a sliding"):
        start_engine(path, "full", capture=tmp_path)


def test_a_model_of_sliding_layers_only_is_refused(tmp_path):
    """Nothing would be left for the policy, which must not be silently inert."""
    save_model(random_gemma3(layer_types=[SLIDING] * 6), tmp_path)
    with pytest.raises(kvpolicy.UnsupportedError, match="sliding windows in all layers"):
        start_engine(tmp_path, "window:budget=48")
