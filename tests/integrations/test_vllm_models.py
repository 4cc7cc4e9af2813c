"""vLLM equals transformers on other architectures and on the bundled, trained model."""

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

import kvpolicy
from fixtures.engines import (
    assert_equals_reference,
    generate,
    reference,
    start_engine,
)
from fixtures.models import (
    certified_prompts,
    certified_run,
    random_gemma,
    random_mistral,
    random_qwen3,
    save_model,
)
from kvpolicy.bundled import heldout_text

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
        "sinks:budget=64,rope=reindex",
        "h2o:budget=64",
        "tova:budget=64",
    ],
)
def test_the_bundled_model_equals_transformers(bundled_engine, bundled, passages, spec):
    """On a trained model too, tokens and retained positions equal those of transformers."""
    certified = (
        (ids[:length], run)
        for ids, length in zip(passages, range(100, 400, 10), strict=False)
        if (run := certified_run(bundled, spec, ids[:length], NUM_TOKENS)) is not None
    )
    cases = [next(certified), next(certified)]
    outputs = generate(bundled_engine, [ids for ids, _ in cases], NUM_TOKENS, spec)
    for output, (ids, run) in zip(outputs, cases, strict=True):
        expected = reference(bundled, spec, ids, NUM_TOKENS)
        assert expected.tokens == list(run.tokens)
        assert_equals_reference(bundled_engine, output, expected)


@pytest.fixture(scope="module")
def bundled_engine():
    """An engine of the bundled model whose requests bring their policies."""
    return start_engine(kvpolicy.bundled_model(), "full", max_num_batched_tokens=128)
