"""How one sample went under one policy, beside the full cache on the same tokens."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kvpolicy.evaluation.sample import Sample

ROWS = 256
"""Predictions compared at a time: over a large vocabulary, each takes a megabyte."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Sums over the tokens of each target, in the sample's order.

    Attributes:
        nll: Negative log-likelihoods, in nats.
        right: Tokens that were the likeliest ones.
        kl: Divergences of the predictions from the full cache's, in nats.
        agreed: Predictions whose likeliest token is the full cache's.
        diverged: Predictions before the first one that does not agree; None if all do.
    """

    nll: list[float]
    right: list[int]
    kl: list[float]
    agreed: list[int]
    diverged: int | None


def measure(sample: Sample, predicted: Tensor, reference: Tensor) -> Measured:
    """Compare predictions with what came, and with the full cache's.

    Args:
        sample: What was asked.
        predicted: [n, V] log-probabilities of the n tokens to be predicted.
        reference: [n, V] the same with the full cache.
    """
    truth = torch.tensor([sample.tokens[index] for index in sample.predicted()])
    choice = predicted.argmax(dim=-1)
    agreed = choice == reference.argmax(dim=-1)
    nll = -predicted.gather(-1, truth[:, None])[:, 0].double()
    parts = zip(reference.split(ROWS), predicted.split(ROWS), strict=True)
    kl = torch.cat([_divergences(*part) for part in parts])
    sizes = [target.size for target in sample.targets]
    differing = (~agreed).nonzero()
    return Measured(
        nll=[part.sum().item() for part in nll.split(sizes)],
        right=[int(part.sum()) for part in (choice == truth).split(sizes)],
        kl=[part.sum().item() for part in kl.split(sizes)],
        agreed=[int(part.sum()) for part in agreed.split(sizes)],
        diverged=int(differing[0]) if len(differing) else None,
    )


def _divergences(reference: Tensor, predicted: Tensor) -> Tensor:
    """KL of each prediction from its reference, both [n, V] log-probabilities; [n] float64."""
    # What is impossible with the full cache adds nothing, also where it stays impossible.
    terms = (reference.exp() * (reference - predicted)).masked_fill(reference == -torch.inf, 0)
    return terms.sum(dim=-1).double().clamp(min=0)  # below it is rounding
