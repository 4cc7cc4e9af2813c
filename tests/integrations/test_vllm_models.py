"""vLLM equals transformers on other architectures and on the bundled, trained model."""

from itertools import cycle

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

import kvpolicy
import kvpolicy_vllm
from fixtures.engines import (
    assert_equals_reference,
    generate,
    reference,
    start_engine,
)
from fixtures.models import (
    LOGIT_MARGIN,
    certified_prompts,
    random_gemma,
    random_mistral,
    random_qwen3,
    save_model,
)
from kvpolicy.bundled import heldout_text
from oracles.dense import NEAR_TIE
from oracles.llama import ModelOracle

pytestmark = pytest.mark.vllm

NUM_TOKENS = 20


@pytest.mark.parametrize(
    "build",
    [random_qwen3, lambda: random_mistral(sliding_window=None), random_gemma],
    ids=["qwen3", "mistral", "gemma"],
)
def test_other_architectures_equal_transformers(build, tmp_path):
    """Normalised queries, other families and a single KV head change nothing."""
    model = build()
    engine = start_engine(save_model(model, tmp_path), "full", max_num_batched_tokens=32)
    specs = ("window:budget=24", "h2o:budget=24", "tova:budget=24")
    certified = certified_prompts(model, specs, [50], max_new_tokens=NUM_TOKENS)
    prompts = [prompt.ids for prompt in certified]
    outputs = generate(engine, prompts, NUM_TOKENS, specs)
    for output, spec, ids in zip(outputs, specs, prompts, strict=True):
        assert_equals_reference(engine, output, reference(model, spec, ids, NUM_TOKENS))


@pytest.fixture(scope="module")
def bundled():
    """The bundled model in float32."""
    return AutoModelForCausalLM.from_pretrained(kvpolicy.bundled_model(), dtype="float32")


@pytest.fixture(scope="module")
def passages():
    """Token ids of passages of held-out text, as the bundled model reads them."""
    tokenizer = AutoTokenizer.from_pretrained(kvpolicy.bundled_model())
    text = heldout_text()
    return [tokenizer(text[start : start + 2000])["input_ids"] for start in range(0, 60_000, 2000)]


@pytest.mark.parametrize(
    "spec",
    [
        "full",
        "window:budget=64",
        "sinks:budget=64",
        "h2o:budget=64",
        "tova:budget=64",
    ],
)
def test_the_bundled_model_equals_transformers(bundled_engine, bundled, passages, spec):
    """On a trained model too, tokens are those of transformers, and so is every retained set.

    Sets may differ where the oracle finds a near-tie. The model's previous-token head gives all
    tokens the same sum of attention, so that h2o nearly always ties there, and nowhere else.
    """
    cases = decided(bundled, spec, passages)
    outputs = generate(bundled_engine, [ids for ids, _ in cases], NUM_TOKENS, spec)
    for output, (ids, oracle) in zip(outputs, cases, strict=True):
        expected = reference(bundled, spec, ids, NUM_TOKENS)
        assert list(output.outputs[0].token_ids) == expected.tokens
        tied = heads_with_near_ties(oracle)
        assert len(tied) <= 2
        for layer, positions in enumerate(expected.retained):
            found = kvpolicy_vllm.retained_positions(bundled_engine, output.request_id, layer)
            for head in {0, 1} - {head for tied_layer, head in tied if tied_layer == layer}:
                assert found[head].tolist() == positions[head].tolist(), (layer, head)
                assert tuple(found[head].tolist()) == oracle.layers[layer].attention.retained[head]


def decided(model, spec: str, passages: list[list[int]]) -> list[tuple[list[int], ModelOracle]]:
    """Two passages whose greedy tokens are beyond doubt, with the oracle that continued them."""
    found: list[tuple[list[int], ModelOracle]] = []
    for ids, length in zip(passages, cycle((100, 115, 130)), strict=False):
        oracle = ModelOracle(model, spec)
        run = oracle.generate(ids[:length], NUM_TOKENS)
        if min(run.logit_margins) >= LOGIT_MARGIN and len(heads_with_near_ties(oracle)) <= 2:
            found.append((ids[:length], oracle))
        if len(found) == 2:
            return found
    raise LookupError(f"no two of {len(passages)} passages are decided under {spec}")


def heads_with_near_ties(oracle: ModelOracle) -> set[tuple[int, int]]:
    """Layers and KV heads in which some eviction was too close to call."""
    return {
        (index, head)
        for index, layer in enumerate(oracle.layers)
        for eviction in layer.attention.evictions
        if eviction.margin < NEAR_TIE
        for head in ((0, 1) if eviction.kv_head is None else (eviction.kv_head,))
    }


@pytest.fixture(scope="module")
def bundled_engine():
    """An engine of the bundled model whose requests bring their policies."""
    return start_engine(kvpolicy.bundled_model(), "full", max_num_batched_tokens=128)
