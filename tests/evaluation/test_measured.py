"""Scores of one sample, worked out by hand."""

import math

import pytest
import torch

from kvpolicy.evaluation.measured import measure
from kvpolicy.evaluation.sample import Sample, Target

SAMPLE = Sample(
    tokens=[9, 0, 1, 2, 2],
    prompt_tokens=0,
    targets=[
        Target(first=1, last=3, group=(0, 1)),
        Target(first=4, last=5, group=(1, 2)),
    ],
)


def test_scores_of_three_predictions_by_hand():
    """Likelihoods, right tokens, divergences and agreement are summed target by target."""
    predicted = torch.tensor([[0.5, 0.25, 0.25], [0.6, 0.3, 0.1], [0.1, 0.2, 0.7]])
    reference = torch.tensor([[0.8, 0.1, 0.1], [0.2, 0.7, 0.1], [0.1, 0.2, 0.7]])
    found = measure(SAMPLE, predicted.log(), reference.log())
    assert found.nll == pytest.approx([-math.log(0.5) - math.log(0.3), -math.log(0.7)])
    assert found.right == [1, 1]
    first = 0.8 * math.log(0.8 / 0.5) + 0.2 * math.log(0.1 / 0.25)
    second = 0.2 * math.log(0.2 / 0.6) + 0.7 * math.log(0.7 / 0.3)
    assert found.kl == pytest.approx([first + second, 0.0], abs=1e-6)
    assert found.agreed == [1, 1]
    assert found.diverged == 1


def test_what_agrees_everywhere_never_diverges():
    """The full cache beside itself: no divergence, whatever is right."""
    same = torch.tensor([[0.2, 0.3, 0.5]] * 3).log()
    found = measure(SAMPLE, same, same)
    assert (found.kl, found.agreed, found.diverged) == ([0.0, 0.0], [2, 1], None)


def test_impossible_tokens_add_nothing():
    """A token of probability zero with the full cache does not make the divergence NaN."""
    reference = torch.tensor([[0.5, 0.5, 0.0]] * 3).log()
    found = measure(SAMPLE, reference, reference)
    assert found.kl == [0.0, 0.0]
    thinner = torch.tensor([[0.25, 0.25, 0.5]] * 3).log()
    assert measure(SAMPLE, thinner, reference).kl == pytest.approx([2 * math.log(2), math.log(2)])


def test_long_texts_are_compared_like_short_ones():
    """A thousand predictions, more than are compared at a time: torch's own divergence."""
    predicted, reference = torch.randn(2, 1000, 7).log_softmax(dim=-1)
    target = Target(first=1, last=1001, group=(0, 1))
    found = measure(
        Sample(tokens=[0] * 1001, prompt_tokens=0, targets=[target]), predicted, reference
    )
    expected = torch.nn.functional.kl_div(predicted, reference, log_target=True, reduction="sum")
    assert found.kl == pytest.approx([expected.item()], rel=1e-5)
