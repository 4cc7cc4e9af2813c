"""Policies by layers in transformers: the oracle's tokens and sets, and ledgers over layers."""

import pytest
import torch

from fixtures.caches import feed, retained
from fixtures.models import certified_prompts, random_llama, random_prompt
from kvpolicy import LedgerError, PolicyError
from kvpolicy_hf import PolicyCache

PROMPT, NEW = 44, 12

SPECS = (
    "mix:layers=(0-1:full;2-:h2o),budget=16",
    "mix:layers=(0:window:interval=5;1-2:h2o:recent=4;3-:tova:budget=20,scope=head),budget=16",
    "mix:layers=(0:h2o;1:sinks;2:random:seed=3;3:tova),budget=16,interval=3",
)


@pytest.fixture(scope="module")
def model():
    """A random Llama of four layers."""
    return random_llama()


@pytest.mark.parametrize("spec", SPECS)
def test_generate_gives_the_oracles_tokens_and_sets(model, spec):
    """Every layer follows its own policy's definition, and with them the whole model."""
    [prompt] = certified_prompts(model, [spec], [PROMPT], max_new_tokens=NEW)
    past = PolicyCache(model, spec)
    ids = model.generate(
        torch.tensor([prompt.ids]), past_key_values=past, max_new_tokens=NEW, do_sample=False
    )
    assert ids[0, PROMPT:].tolist() == prompt.run.tokens
    assert retained(past) == prompt.run.retained


@pytest.mark.parametrize("spec", SPECS)
def test_chunks_change_nothing(model, spec):
    """Layers whose evictions fall on different tokens still do not see chunks."""
    ids = random_prompt(model, 60, 3)
    once, parts = PolicyCache(model, spec), PolicyCache(model, spec)
    whole = feed(model, once, ids, [])
    assert torch.allclose(whole, feed(model, parts, ids, [1, 8, 17, 30, 31, 59]), atol=1e-3)
    assert retained(once) == retained(parts)


def test_a_ledger_is_the_mean_over_layers(model):
    """Two layers that keep everything and two that keep 16 of 400 tokens: 208 on average."""
    past = PolicyCache(model, "mix:layers=(0-1:full;2-:h2o),budget=16,interval=4")
    feed(model, past, random_prompt(model, 400, 0), [])
    ledger = past.ledger()
    assert (ledger.retained, ledger.evicted, ledger.slots_held) == (208, 192, 208)
    assert ledger.evictions == 96
    uniform = PolicyCache(model, "h2o:budget=16,interval=4")
    feed(model, uniform, random_prompt(model, 400, 0), [])
    assert 0 < ledger.bytes_saved < uniform.ledger().bytes_saved


def test_a_layer_that_did_not_evict_is_found(model):
    """The ledger holds every layer to its own law: one that differs is an error."""
    past = PolicyCache(model, "mix:layers=(0-1:full;2-:h2o),budget=16,interval=4")
    feed(model, past, random_prompt(model, 40, 0), [])
    past.layers[3].slots.evicted[0] -= 4
    with pytest.raises(LedgerError, match="evicted 20 of 40 tokens, the occupancy law demands 24"):
        past.ledger()


def test_a_model_with_more_layers_is_refused(model):
    """A mix that ends before the model does is refused when the cache is made."""
    with pytest.raises(PolicyError, match="no policy for layer 2"):
        PolicyCache(model, "mix:layers=(0-1:full)")


def test_prompts_set_apart_are_set_apart_in_every_part(model):
    """prefill=bulk in a part beside full layers takes the prompt of the first forward."""
    past = PolicyCache(model, "mix:layers=(0-1:full;2-:h2o:prefill=bulk),budget=16")
    feed(model, past, random_prompt(model, 40, 0), [])
    counts = [past.retained_positions(layer).shape[-1] for layer in range(4)]
    assert counts == [40, 40, 16, 16]
