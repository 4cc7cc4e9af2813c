"""Requests with LoRA adapters equal models that have these merged into their weights."""

from collections.abc import Iterator
from typing import Any

import pytest
from transformers import PreTrainedModel
from vllm import LLM
from vllm.lora.request import LoRARequest

import kvpolicy
import kvpolicy_vllm
from fixtures.adapters import RANK, save_adapter
from fixtures.engines import (
    SPREAD,
    assert_equals_reference,
    generate,
    reference,
    spread_engine,
    start_engine,
)
from fixtures.models import certified_prompts

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

NUM_TOKENS = 20
LENGTHS = (9, 47, 83, 61, 75, 100)
SPECS = ("full", "window:budget=48", "h2o:budget=48", "tova:budget=40,interval=5")
SHARING = "h2o:budget=24,protect=prompt"
WITH_ADAPTERS: dict[str, Any] = {
    "enable_lora": True,
    "max_loras": 2,
    "max_lora_rank": RANK,
    "max_num_batched_tokens": 64,
}
"""Settings of an engine that has room for two adapters."""

Adapted = tuple[LoRARequest | None, PreTrainedModel]
"""What a request brings, and the model that it then runs on."""


@pytest.fixture(scope="module")
def adapted(model, tmp_path_factory) -> list[Adapted]:
    """No adapter, and two that fill all the slots of an engine."""
    folder = tmp_path_factory.mktemp("adapters")
    made = [(None, model)]
    for seed in (1, 2):
        merged = save_adapter(model, folder / str(seed), seed)
        made.append((LoRARequest(f"adapter-{seed}", seed, str(folder / str(seed))), merged))
    return made


@pytest.fixture(scope="module", params=["alone", *SPREAD])
def engine(request, path) -> Iterator[LLM]:
    """An engine whose requests bring policies and adapters, in one process or several."""
    if request.param == "alone":
        yield start_engine(path, "full", **WITH_ADAPTERS)
        return
    with spread_engine(request.param, path, "full", **WITH_ADAPTERS) as llm:
        yield llm


def certified(model: PreTrainedModel, spec: str, length: int) -> list[int]:
    """A prompt on which nothing that the policy or the greedy choice decides is close."""
    [prompt] = certified_prompts(
        model, [spec], [length], max_new_tokens=NUM_TOKENS, first_seed=100 * length
    )
    return prompt.ids


@pytest.mark.parametrize("spec", SPECS)
def test_adapters_mix_in_one_batch(engine, adapted, spec):
    """Tokens and retained positions are those of merged weights, without an adapter as well."""
    brought = [adapted[index % 3] for index in range(len(LENGTHS))]
    prompts = [
        certified(merged, spec, length)
        for (_, merged), length in zip(brought, LENGTHS, strict=True)
    ]
    outputs = generate(engine, prompts, NUM_TOKENS, spec, lora=[lora for lora, _ in brought])
    ledgers = kvpolicy_vllm.ledger(engine)["requests"]
    for (_, merged), prompt, output in zip(brought, prompts, outputs, strict=True):
        assert_equals_reference(engine, output, reference(merged, spec, prompt, NUM_TOKENS))
        evicted = kvpolicy.parse(spec).occupancy.evicted(len(prompt) + NUM_TOKENS - 1)
        assert ledgers[output.request_id]["evicted"] == evicted


def test_prompts_are_shared_under_the_same_adapter_only(path, adapted):
    """A kept prompt comes from the prefix cache for its own adapter, never for another."""
    llm = start_engine(path, SHARING, **WITH_ADAPTERS)
    prompt, found = certified(adapted[1][1], SHARING, 100), []
    for lora, merged in (*adapted, *adapted):
        [output] = generate(llm, [prompt], NUM_TOKENS, lora=[lora])
        assert_equals_reference(llm, output, reference(merged, SHARING, prompt, NUM_TOKENS))
        found.append(output.num_cached_tokens)
    assert found == [0, 0, 0, 96, 96, 96]
