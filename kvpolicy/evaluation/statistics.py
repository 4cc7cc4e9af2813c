"""How sure figures are: the bootstrap over samples, paired where policies are compared.

Tokens of one sample depend on each other, so that samples are what is drawn again.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

RESAMPLES = 2000
"""Bootstrap samples."""

LEVEL = 0.95
"""Of all intervals."""


@dataclass(frozen=True)
class Ratio:
    """A figure that is a sum over samples divided by another: a mean per token or per answer.

    Attributes:
        sums: [samples] what is averaged.
        counts: [samples] over how many.
    """

    sums: np.ndarray
    counts: np.ndarray

    @property
    def value(self) -> float:
        """Over all samples."""
        return float(self.sums.sum() / self.counts.sum())

    @property
    def interval(self) -> tuple[float, float] | None:
        """Percentile bootstrap interval; None of fewer than two samples."""
        return None if len(self.sums) < 2 else _interval(self._resampled())

    def difference_interval(self, other: "Ratio") -> tuple[float, float] | None:
        """Interval of this figure less another one of the same samples, drawn together."""
        if len(self.sums) < 2:
            return None
        return _interval(self._resampled() - other._resampled())

    def _resampled(self) -> np.ndarray:
        """The figure of each bootstrap sample; [RESAMPLES]."""
        drawn = _draws(len(self.sums))
        return (drawn @ self.sums) / (drawn @ self.counts)


@lru_cache(maxsize=8)
def _draws(samples: int) -> np.ndarray:
    """How often each bootstrap sample has each sample, always alike; [RESAMPLES, samples]."""
    generator = np.random.default_rng(0)
    return generator.multinomial(samples, np.full(samples, 1 / samples), size=RESAMPLES)


def _interval(values: np.ndarray) -> tuple[float, float]:
    tail = 50 * (1 - LEVEL)
    low, high = np.percentile(values, [tail, 100 - tail])
    return float(low), float(high)


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Spearman's: the correlation of ranks, equal values sharing their mean rank.

    It is NaN if one side has no order.
    """
    a, b = _ranks(np.asarray(first, float)), _ranks(np.asarray(second, float))
    a, b = a - a.mean(), b - b.mean()
    scale = np.sqrt((a @ a) * (b @ b))
    return float(a @ b / scale) if scale > 0 else float("nan")


def _ranks(values: np.ndarray) -> np.ndarray:
    """Mean rank of each value."""
    below = (values[:, None] > values).sum(axis=1)
    equal = (values[:, None] == values).sum(axis=1)
    return below + (equal - 1) / 2
