"""Slow references for the offline optimum: the definition, every choice, a linear program.

Written over single queries rather than segments, sharing no code with the oracle. Query t sees
the tokens [0, t]; a token evicted after n tokens is unseen from query n on. Under a law (R, I),
I tokens leave after n = R + I, R + 2 I, ...; queries t >= R count.
"""

from collections.abc import Iterator
from itertools import combinations

import numpy as np
from scipy.optimize import linprog
from scipy.sparse import csr_array


def retained_mass(attention: np.ndarray, retained: int, evicted_at: np.ndarray) -> float:
    """Mean over the counted queries of the attention to what each still sees."""
    tokens, seen = len(attention), []
    for t in range(retained, tokens):
        held = [s for s in range(t + 1) if not 0 < evicted_at[s] <= t]
        seen.append(attention[t, held].sum(dtype=np.float64))
    return float(np.mean(seen))


def most_retained(attention: np.ndarray, retained: int, interval: int) -> float:
    """The largest retained mass, by trying every choice of every eviction."""
    dues = range(retained + interval, len(attention), interval)
    return most_left(attention, dict.fromkeys(dues, interval), retained)


def most_left(
    attention: np.ndarray, leaving: dict[int, int], counted_from: int, kept: int = 0
) -> float:
    """The same where `leaving[n]` tokens leave after n tokens, and the first `kept` never."""
    return max(
        retained_mass(attention, counted_from, evicted_at)
        for evicted_at in _choices(leaving, kept, np.zeros(len(attention), np.int64))
    )


def _choices(leaving: dict[int, int], kept: int, evicted_at: np.ndarray) -> Iterator[np.ndarray]:
    """Everything that can be evicted, given what has been."""
    if not leaving:
        yield evicted_at
        return
    n, *later = sorted(leaving)
    held = kept + np.flatnonzero(evicted_at[kept:n] == 0)
    for victims in combinations(held, leaving[n]):
        chosen = evicted_at.copy()
        chosen[list(victims)] = n
        yield from _choices({due: leaving[due] for due in later}, kept, chosen)


def linear_program(attention: np.ndarray, retained: int, interval: int) -> float:
    """The largest retained mass, as a flow of slots: x[t, s] is 1 where query t sees token s.

    A query sees its own token, no other that the query before it did not see, and no more than
    the law holds. Fractions are allowed; the optimum is the same without.
    """
    tokens = len(attention)
    index = {(t, s): i for i, (t, s) in enumerate(zip(*np.tril_indices(tokens), strict=True))}
    entries: list[tuple[int, int, float]] = []
    limits: list[float] = []
    for t in range(tokens):
        # Before query t, t tokens were processed; its own comes on top.
        surplus = (t - retained) // interval * interval if t >= retained + interval else 0
        entries += [(len(limits), index[t, s], 1.0) for s in range(t + 1)]
        limits.append(t - surplus + 1)
        for s in range(t):
            entries += [(len(limits), index[t, s], 1.0), (len(limits), index[t - 1, s], -1.0)]
            limits.append(0.0)
    rows, columns, values = zip(*entries, strict=True)
    weights = attention[np.tril_indices(tokens)].astype(np.float64)
    is_counted = np.tril_indices(tokens)[0] >= retained
    found = linprog(
        -weights * is_counted,
        A_ub=csr_array((values, (rows, columns)), shape=(len(limits), len(weights))),
        b_ub=limits,
        bounds=[(float(t == s), 1.0) for t, s in index],
        method="highs",
    )
    assert found.status == 0, found.message
    return -found.fun / (tokens - retained)
