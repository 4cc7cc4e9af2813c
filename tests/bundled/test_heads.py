"""What heads attend to: the measurements of the model card, against transformers and by design."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from kvpolicy import bundled_model
from kvpolicy.bundled.training import heads
from kvpolicy.bundled.training.evaluate import heldout_windows
from kvpolicy.bundled.training.heads import (
    attention_weights,
    retrieval_score,
    sink_mass,
    table,
)
from kvpolicy.bundled.training.model import Architecture, Llama
from kvpolicy.bundled.training.retrieval import Answer, Retrieval


def test_attention_weights_are_those_of_transformers(model, corpus):
    """Every layer's weights equal what transformers computes from the shipped folder."""
    tokens = torch.from_numpy(corpus.tokens[:96].astype(np.int64))[None]
    reference = AutoModelForCausalLM.from_pretrained(
        bundled_model(), dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        expected = reference(tokens, output_attentions=True).attentions
    for ours, theirs in zip(attention_weights(model, tokens), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def given_weights(monkeypatch, weights):
    """Let every model attend with `weights` [H, T, T] in its only layer."""
    monkeypatch.setattr(heads, "attention_weights", lambda *_: iter([weights[None]]))
    return Llama(Architecture(vocabulary=8, hidden=8, num_layers=1, num_query_heads=2))


def test_sink_mass_is_the_mean_over_late_queries(monkeypatch):
    """Early queries, whose choice is small, do not count."""
    weights = torch.zeros(2, 256, 256)
    weights[:, :128, 0] = 1.0
    weights[0, 128:, 0] = 0.75
    weights[1, 128:192, 0] = 0.5
    model = given_weights(monkeypatch, weights)
    assert sink_mass(model, [torch.zeros(1, 256)]).tolist() == [[0.75, 0.25]]


def test_retrieval_score_is_the_share_of_tokens_looked_up(monkeypatch):
    """A head that looks at the statement's token scores; one that looks beside it does not."""
    weights = torch.zeros(2, 12, 12)
    # The answer [9, 12) was stated at [2, 5) and [5, 8); its first token does not count.
    weights[0, 9, 3] = weights[0, 10, 7] = 1.0
    weights[1, 9, 3] = weights[1, 10, 8] = 1.0
    model = given_weights(monkeypatch, weights)
    answer = Answer(start=9, size=3, stated=(2, 5))
    sequence = Retrieval(np.zeros(12, dtype=np.int64), (answer,))
    assert retrieval_score(model, [sequence]).tolist() == [[1.0, 0.5]]


def test_table_has_a_row_per_layer():
    """The card's table: figures of one layer's heads side by side."""
    mass = torch.tensor([[0.1, 0.25], [0.5, 1.0]])
    assert table({"mass": mass, "score": 1 - mass}).splitlines() == [
        "| layer | mass | score |",
        "|---|---|---|",
        "| 0 | 0.10 0.25 | 0.90 0.75 |",
        "| 1 | 0.50 1.00 | 0.50 0.00 |",
    ]


@pytest.mark.parametrize("count", [1, 3])
def test_sink_mass_weighs_windows_equally(model, corpus, count):
    """A batch of windows gives the mean of the windows alone."""
    windows = torch.from_numpy(corpus.tokens[: count * 160].astype(np.int64)).view(count, 160)
    alone = torch.stack([sink_mass(model, [row[None]]) for row in windows]).mean(0)
    torch.testing.assert_close(sink_mass(model, [windows]), alone, rtol=1e-4, atol=1e-6)


def test_the_card_shows_the_sinks_of_the_shipped_weights(model, corpus):
    """The card's mass on BOS is that of these weights, as far as other text of a book can tell."""
    card = Path(bundled_model(), "README.md").read_text(encoding="utf-8")
    lines = card.split("| layer | mass on BOS", 1)[1].splitlines()[2 : 2 + model.sizes.num_layers]
    told = torch.tensor([[float(figure) for figure in row.split("|")[2].split()] for row in lines])
    measured = sink_mass(model, heldout_windows(corpus, 1024, 4))
    torch.testing.assert_close(measured, told, rtol=0, atol=0.1)
