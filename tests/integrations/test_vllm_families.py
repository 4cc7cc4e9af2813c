"""Further families in vLLM: biases, experts, partly rotated heads.

Every engine has a process of its own: vLLM sets up experts for the first engine of a process
only, and patches transformers' classes of models that it runs through them.
"""

import pytest

from fixtures.engines import assert_equals_reference, generate, reference, start_engine
from fixtures.families import FAMILIES
from fixtures.models import certified_prompts, save_model

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

NUM_TOKENS = 12
SPECS = ("window:budget=24", "h2o:budget=24", "tova:budget=24", "keydiff:budget=24,recent=4")


@pytest.mark.parametrize("family", FAMILIES)
def test_further_families_equal_transformers(family, tmp_path, monkeypatch):
    """Tokens and retained positions of a mixed batch, in chunks of 32, are transformers'."""
    model = FAMILIES[family]()
    certified = certified_prompts(model, SPECS, [50], max_new_tokens=NUM_TOKENS)
    prompts = [prompt.ids for prompt in certified]
    expected = [
        reference(model, spec, ids, NUM_TOKENS) for spec, ids in zip(SPECS, prompts, strict=True)
    ]
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    engine = start_engine(save_model(model, tmp_path), "full", max_num_batched_tokens=32)
    outputs = generate(engine, prompts, NUM_TOKENS, SPECS)
    for output, answer in zip(outputs, expected, strict=True):
        assert_equals_reference(engine, output, answer)
    engine.llm_engine.engine_core.shutdown()
