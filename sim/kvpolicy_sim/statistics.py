"""Small statistics of replays: bootstrap intervals, sets from eviction times."""

from collections.abc import Sequence

import numpy as np

from kvpolicy import Occupancy

RESAMPLES = 2000
"""Bootstrap samples."""


def uncounted_steps(law: Occupancy) -> int:
    """First steps that figures leave out: there, whatever the policy, nothing has been evicted.

    Args:
        law: Settled. The steps are as many as its token slots or, if they are more, as the tokens
            of a ``bulk`` prompt.
    """
    return law.prompt_tokens or law.retained or 0


def bootstrap_mean(values: Sequence[float], level: float = 0.95) -> list[float] | None:
    """Percentile bootstrap interval of the mean, [low, high]; None of fewer than two values.

    Values are of whole sequences: the steps of one sequence depend on each other.
    """
    if len(values) < 2:
        return None
    generator = np.random.default_rng(0)
    samples = generator.choice(np.asarray(values), (RESAMPLES, len(values))).mean(axis=1)
    tail = 50 * (1 - level)
    low, high = np.percentile(samples, [tail, 100 - tail])
    return [float(low), float(high)]


def mean_or_none(values: np.ndarray) -> float | None:
    """The mean of what is not NaN; None if nothing is left."""
    found = values[~np.isnan(values)]
    return float(found.mean(dtype=np.float64)) if found.size else None


def is_retained(evicted_at: np.ndarray, tokens: int | None = None) -> np.ndarray:
    """Which tokens are held after `tokens` tokens, default all; [H_kv, T] bool.

    Args:
        evicted_at: [H_kv, T], tokens seen when a token was evicted; 0 if it never was.
        tokens: Tokens seen.
    """
    total = evicted_at.shape[1]
    seen = total if tokens is None else tokens
    return ((evicted_at == 0) | (evicted_at > seen)) & (np.arange(total) < seen)


def retained_at(evicted_at: np.ndarray, tokens: int | None = None) -> np.ndarray:
    """Positions held after `tokens` tokens, [H_kv, kept] int64, ascending."""
    kept = is_retained(evicted_at, tokens)
    return np.stack([np.flatnonzero(row) for row in kept]).astype(np.int64)


def jaccard(first: np.ndarray, second: np.ndarray) -> float:
    """Mean over KV heads of |A and B| / |A or B| of two sets given as masks [H_kv, T]."""
    both, either = (first & second).sum(axis=-1), (first | second).sum(axis=-1)
    return float((both / np.maximum(either, 1)).mean())
