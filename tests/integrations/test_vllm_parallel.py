"""Engines whose heads or layers are spread over processes compute what transformers computes."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel
from vllm import LLM

import kvpolicy
import kvpolicy_vllm
from fixtures.engines import (
    BLOCK_SIZE,
    SPREAD,
    Reference,
    assert_equals_reference,
    generate,
    reference,
    spread_engine,
)
from fixtures.faults import FaultyRank
from fixtures.models import SHAPE, certified_prompts, random_prompt
from fixtures.servers import knowing
from kvpolicy import registry
from kvpolicy.memory.policy import MemoryPolicy
from kvpolicy_vllm.engine import Engine

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

NUM_TOKENS = 20
NUM_LAYERS = 2
LENGTHS = (9, 47, 83, 120)
SERVER = "compressive:budget=96,memory=40,interval=24"
"""A policy whose allotment has room for all the others."""

CHUNKED: dict[str, Any] = {"allow": [*kvpolicy.available()], "max_num_batched_tokens": 64}
"""Settings under which prompts come in pieces, under any policy."""

SPECS = (
    "window:budget=48",
    "sinks:budget=48,interval=1",
    "h2o:budget=48",
    "h2o:budget=40,interval=1,scope=layer,sinks=2",
    "h2o:budget=48,scope=layer,score=relative,decay=0.9",
    "tova:budget=48",
    "tova:budget=40,interval=5,scope=head,recent=1",
    "random:budget=48,seed=3",
    "centroid:budget=36,slots=8,interval=4",
    "compressive:budget=36,memory=12,fn=attention,interval=9,sinks=2",
)


@pytest.fixture(scope="module")
def cases(model) -> dict[str, list[tuple[list[int], Reference]]]:
    """Per policy, prompts of unequal lengths with transformers' answers."""
    return {spec: [a_case(model, spec, length) for length in LENGTHS] for spec in SPECS}


def a_case(model: PreTrainedModel, spec: str, length: int) -> tuple[list[int], Reference]:
    """A prompt on which nothing is close, where attention decides, and its answer."""
    if isinstance(kvpolicy.parse(spec), MemoryPolicy):
        ids = random_prompt(model, length, seed=length)
    else:
        [certified] = certified_prompts(
            model, [spec], [length], max_new_tokens=NUM_TOKENS, first_seed=100 * length
        )
        ids = certified.ids
    return ids, reference(model, spec, ids, NUM_TOKENS)


@pytest.fixture(scope="module", autouse=True)
def known(tmp_path_factory) -> Iterator[None]:
    """Requests may name a policy that fails in one of two processes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(registry._registered, FaultyRank.name, FaultyRank)
        folder = tmp_path_factory.mktemp("policies")
        knowing(folder, FaultyRank)
        patch.syspath_prepend(folder)  # which processes that are spawned here take over
        yield


@pytest.fixture(scope="module", params=SPREAD)
def engine(request, path, known) -> Iterator[LLM]:
    """An engine whose requests bring their policies."""
    settings = CHUNKED | {"allow": [*CHUNKED["allow"], FaultyRank.name]}
    with spread_engine(request.param, path, SERVER, **settings) as llm:
        yield llm


@pytest.mark.parametrize("spec", SPECS)
def test_a_batch_of_unequal_lengths_equals_transformers(engine, cases, spec):
    """Tokens and the retained positions of all layers and heads are those of one process."""
    prompts, expected = zip(*cases[spec], strict=True)
    outputs = generate(engine, prompts, NUM_TOKENS, spec)
    for output, answer in zip(outputs, expected, strict=True):
        assert_equals_reference(engine, output, answer)


def test_policies_may_mix_in_one_batch(engine, cases):
    """Ranks meet at the same evictions, whatever else is in the batch."""
    mixed = [cases[spec][index % len(LENGTHS)] for index, spec in enumerate(SPECS)]
    outputs = generate(engine, [ids for ids, _ in mixed], NUM_TOKENS, SPECS)
    for output, (_, expected) in zip(outputs, mixed, strict=True):
        assert_equals_reference(engine, output, expected)


def test_the_ledger_covers_all_processes(engine, cases):
    """Bytes are those of all layers and heads, tokens are the request's."""
    spec = "h2o:budget=48"
    [output] = generate(engine, [cases[spec][-1][0]], NUM_TOKENS, spec)
    report = kvpolicy_vllm.ledger(engine)
    ledger, tokens = report["requests"][output.request_id], LENGTHS[-1] + NUM_TOKENS - 1
    assert ledger["logical_tokens"] == tokens
    assert ledger["evicted"] == kvpolicy.parse(spec).occupancy.evicted(tokens)
    cell = 2 * SHAPE["head_dim"] * 4 + 8  # key, value and state of a slot
    slots = ledger["blocks_held"] * BLOCK_SIZE
    assert ledger["bytes_held"] == slots * cell * SHAPE["num_key_value_heads"] * NUM_LAYERS
    assert report["totals"]["requests"] == len(report["requests"])


def test_a_fault_of_any_process_is_an_error(engine):
    """A ledger that disagrees with the law on the second rank alone is raised."""
    engine.collective_rpc(note_fault)
    with pytest.raises(kvpolicy.LedgerError, match="noted on rank 1"):
        kvpolicy_vllm.ledger(engine)
    engine.collective_rpc(forget_faults)
    kvpolicy_vllm.ledger(engine)


def note_fault(worker: Any) -> None:
    """Put a fault into the second worker's book."""
    if worker.rank == 1:
        Engine.of(worker.vllm_config).book.faults.append("noted on rank 1")


def forget_faults(worker: Any) -> None:
    """Remove faults from a worker's book."""
    Engine.of(worker.vllm_config).book.faults.clear()


@pytest.mark.parametrize("engine", ["heads"], indirect=True)
@pytest.mark.parametrize("scope", ["layer", "head"])
def test_what_fails_on_one_rank_is_contained(engine, model, cases, scope):
    """With scope=layer on both, which neither wait nor part; with scope=head where it fails.

    Neighbours that meet at evictions of their own notice nothing.
    """
    neighbours = {s: cases[s][index % len(LENGTHS)] for index, s in enumerate(SPECS[3:6])}
    prompt = random_prompt(model, 90, seed=1)
    failing = f"faulty_rank:budget=48,scope={scope}"
    prompts, specs = [ids for ids, _ in neighbours.values()], [*neighbours]
    output, *others = generate(engine, [prompt, *prompts], NUM_TOKENS, [failing, *specs])
    for other, (_, expected) in zip(others, neighbours.values(), strict=True):
        assert_equals_reference(engine, other, expected)
    requests = kvpolicy_vllm.ledger(engine)["requests"]
    assert "token 51, layer 0: ValueError: cannot rate here" in requests[output.request_id]["fault"]
    assert not any(requests[other.request_id]["fault"] for other in others)
    if scope == "layer":
        expected = reference(model, "window:budget=48", prompt, NUM_TOKENS)
        assert_equals_reference(engine, output, expected)
        return
    [output] = generate(engine, [prompt], 1, failing)
    kept, window = (
        reference(model, f"{name}:budget=48", prompt, 1).retained[0] for name in ("h2o", "window")
    )
    found = kvpolicy_vllm.retained_positions(engine, output.request_id, 0)
    assert torch.equal(found, torch.stack([kept[0], window[1]]))
    assert not torch.equal(kept[1], window[1])


@pytest.mark.parametrize("spread", SPREAD)
def test_trained_gates_are_those_of_their_heads(path, model, tmp_path, spread):
    """Every process takes its layers' and heads' gates from the file."""
    save_file({"beta": torch.randn(2, 4)}, tmp_path / "gates.safetensors")
    spec = f"infini:segment=24,gate={tmp_path / 'gates.safetensors'}"
    prompts = [random_prompt(model, length, seed=length) for length in LENGTHS]
    with spread_engine(spread, path, spec, **CHUNKED) as llm:
        for ids, output in zip(prompts, generate(llm, prompts, NUM_TOKENS), strict=True):
            assert_equals_reference(llm, output, reference(model, spec, ids, NUM_TOKENS))
