"""A replay predicts what hosts retain: exactly, wherever their inputs are the traced run's."""

import pytest
import torch

import kvpolicy_sim
from fixtures.models import random_llama, random_prompt, save_model
from kvpolicy import parse
from kvpolicy_hf import PolicyCache

POSITIONAL = (
    "window:budget=24",
    "sinks:budget=24,interval=5",
    "random:budget=24,seed=3",
)
ATTENTIVE = ("h2o:budget=24", "h2o:budget=24,interval=3,scope=layer", "tova:budget=24")
APART_BY_POSITION = (
    "sinks:budget=24,interval=5,prefill=bulk",
    "random:budget=24,prefill=bulk",
    "window:budget=16,protect=prompt",
)
APART_BY_ATTENTION = (
    "h2o:budget=24,prefill=bulk",
    "tova:budget=24,interval=3,prefill=bulk",
    "h2o:budget=16,protect=prompt",
)
TOKENS, PROMPT = 96, 60


@pytest.fixture(scope="module")
def model():
    """A random Llama of four layers."""
    return random_llama()


@pytest.fixture(scope="module")
def report(model, tmp_path_factory):
    """Every policy replayed on a trace of the model's own full-cache run."""
    path = tmp_path_factory.mktemp("traces") / "t.kvtrace"
    ids = torch.tensor([random_prompt(model, TOKENS, 0)])
    trace = kvpolicy_sim.capture(model, ids, path, prompt_len=PROMPT)
    specs = [*POSITIONAL, *ATTENTIVE, *APART_BY_POSITION, *APART_BY_ATTENTION]
    return kvpolicy_sim.replay(trace, specs)


def retained(model, spec, num_tokens):
    """What transformers holds in every layer after some tokens of the same text."""
    cache = PolicyCache(model, spec, PROMPT)
    ids = torch.tensor([random_prompt(model, TOKENS, 0)])[:, :num_tokens]
    with torch.inference_mode():
        model(ids, past_key_values=cache)
    return [cache.retained_positions(layer).tolist() for layer in range(len(cache.layers))]


@pytest.mark.parametrize("spec", [*POSITIONAL, *APART_BY_POSITION])
def test_sets_of_positional_policies_are_predicted_in_every_layer(model, report, spec):
    """Policies that look at positions keep in transformers what the replay says."""
    for layer, positions in enumerate(retained(model, spec, TOKENS)):
        assert report.retained_positions(spec, layer).tolist() == positions


@pytest.mark.parametrize("spec", [*ATTENTIVE, *APART_BY_ATTENTION])
def test_sets_of_the_first_layer_are_predicted(model, report, spec):
    """Layer 0 sees the same inputs with and without eviction, so its sets agree to the end."""
    assert report.retained_positions(spec, 0).tolist() == retained(model, spec, TOKENS)[0]


@pytest.mark.parametrize("spec", [*ATTENTIVE, *APART_BY_ATTENTION])
def test_first_evictions_are_predicted_in_every_layer(model, report, spec):
    """Until a token has been evicted all layers see the traced inputs: the first one agrees."""
    first = parse(spec).occupancy.of_prompt(PROMPT).next_due(0)
    for layer, positions in enumerate(retained(model, spec, first)):
        assert report.retained_positions(spec, layer, tokens=first).tolist() == positions


@pytest.mark.vllm
def test_sets_of_positional_policies_are_predicted_in_vllm(model, tmp_path):
    """vLLM, generating, keeps in every layer what a replay of a full run of its text says."""
    import kvpolicy_vllm
    from fixtures.engines import generate, start_engine

    llm = start_engine(save_model(model, tmp_path), "full", max_num_batched_tokens=32)
    prompt = random_prompt(model, 60, 0)
    outputs = generate(llm, [prompt] * len(POSITIONAL), 12, POSITIONAL)
    for spec, output in zip(POSITIONAL, outputs, strict=True):
        ids = torch.tensor([[*prompt, *output.outputs[0].token_ids[:-1]]])
        with kvpolicy_sim.capture(model, ids, tmp_path / f"{output.request_id}.kvtrace") as trace:
            report = kvpolicy_sim.replay(trace, [spec])
        for layer in range(model.config.num_hidden_layers):
            found = kvpolicy_vllm.retained_positions(llm, output.request_id, layer)
            assert report.retained_positions(spec, layer).tolist() == found.tolist(), layer
