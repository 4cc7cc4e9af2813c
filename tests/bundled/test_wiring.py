"""Initial weights: an untrained model already copies, and its heads rest on BOS."""

import numpy as np
import pytest
import torch

from kvpolicy.bundled.training.evaluate import induction_accuracy
from kvpolicy.bundled.training.heads import attention_weights, sink_mass
from kvpolicy.bundled.training.model import Architecture, Llama, rotary_tables
from kvpolicy.bundled.training.tokenizer import BOS_ID
from kvpolicy.bundled.training.wiring import wire


def wired(**options):
    """Return an untrained model of the shipped sizes."""
    model = Llama(Architecture())
    model.initialise(0)
    wire(model, 0, **options)
    return model


@pytest.fixture
def window(corpus):
    """A window of 512 tokens of a book behind BOS."""
    body = corpus.tokens[:511].astype(np.int64)
    return torch.from_numpy(np.concatenate([[BOS_ID], body]))[None]


def test_layer_0_looks_back_as_laid_out(window):
    """Two heads attend one and two positions back, two blur those from there to nine back."""
    (weights,) = next(attention_weights(wired(), window))  # [H, T, T]
    queries = torch.arange(16, 511)

    def share(head, distances):
        return sum(weights[head, queries, queries - back] for back in distances).min()

    assert share(0, [1]) > 0.99
    assert share(1, [2]) > 0.99
    assert share(2, range(1, 10)) > 0.99
    assert share(3, range(1, 10)) > 0.99
    assert share(2, [3]) < 0.9


def test_untrained_heads_rest_on_bos(window):
    """On book text, most attention of heads that are neither look-back nor copy goes to BOS."""
    mass = sink_mass(wired(), [window])
    assert mass[2:].min() > 0.5
    assert mass[0].max() < 0.1


def test_without_sinks_untrained_heads_do_not_rest_on_bos(window):
    """The comparison starts from heads without a sink."""
    assert sink_mass(wired(has_sinks=False), [window]).max() < 0.1


def test_bos_is_massive_and_read_as_nothing():
    """Layer 0 makes BOS huge; its value is zero behind that, so that a head at rest is silent."""
    model = wired()
    tokens = torch.tensor([[BOS_ID, 100]])
    cosine, sine = rotary_tables(2, 64, model.sizes.rope_theta)
    hidden = model.layer(0)(model.embed_tokens(tokens), cosine, sine)
    bos, other = hidden[0].norm(dim=-1).tolist()
    assert bos > 10 * other
    for index in range(1, model.sizes.num_layers):
        layer = model.layer(index)
        value = layer.self_attn.project(layer.input_layernorm(hidden), cosine, sine).value[0]
        assert value[:, 0].norm() < 0.01 * value[:, 1].norm()
        hidden = layer(hidden, cosine, sine)


@pytest.mark.parametrize("has_sinks", [False, True])
def test_untrained_model_continues_a_repetition(has_sinks):
    """The induction head works from the first step, with or without sinks beside it."""
    assert induction_accuracy(wired(has_sinks=has_sinks), 256, 2).mean > 0.9


def test_other_widths_are_refused():
    """The layout of the residual stream is made for one width."""
    with pytest.raises(ValueError, match="hidden = 256: got 128"):
        wire(Llama(Architecture(hidden=128)), 0)
