"""What the offline optimum costs, and how far bounds and other policies are from it.

Attention is that of `kvpolicy_sim.synth`'s drifting topics, one head, built block by block.
"""

import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from kvpolicy import Occupancy
from kvpolicy_sim.oracle import Problem, belady, exact, solve
from kvpolicy_sim.oracle.optimum import EXACT_UP_TO
from kvpolicy_sim.patterns import Head

pytestmark = pytest.mark.bench

SIZES = [(256, 32), (1024, 64), (2048, 128), (4096, 256), (8192, 512)]
GROUP, HEAD_DIM, ROWS = 4, 64, 256
LARGEST_EXACT = 7 * 10**10


def rows_of_attention(tokens: int) -> Iterator[tuple[int, np.ndarray]]:
    """Attention of one head, the mean over its group, in blocks of rows."""
    head = Head("drift", tokens=tokens, group=GROUP, head_dim=HEAD_DIM, seed=0, layer=0, kv_head=0)
    blocks = list(head.blocks())
    queries, keys = torch.cat([x.q for x in blocks], 1), torch.cat([x.k for x in blocks])
    for first in range(0, tokens, ROWS):
        last = min(tokens, first + ROWS)
        logits = queries[:, first:last] @ keys[:last].T * HEAD_DIM**-0.5
        future = torch.arange(last) > torch.arange(first, last)[:, None]
        yield first, logits.masked_fill_(future, -torch.inf).softmax(dim=-1).mean(dim=0).numpy()


def most_per_query(rows: np.ndarray, first: int, law: Occupancy) -> float:
    """Mass of the best slots of every counted query, as if evicted tokens could come back."""
    queries = range(max(first, law.retained), first + len(rows))
    return sum(
        np.partition(rows[t - first], -int(law.held(t) + 1))[-int(law.held(t) + 1) :].sum()
        for t in queries
    )


def timed(function: Callable[..., Any], *arguments: Any, **options: Any) -> tuple[Any, float]:
    """A result, and the CPU seconds that it took."""
    begin = time.process_time()
    result = function(*arguments, **options)
    return result, time.process_time() - begin


@pytest.mark.parametrize(("tokens", "budget"), SIZES)
@pytest.mark.parametrize("share", [None, 16], ids=["interval=1", "interval=budget/16"])
def test_oracle_cost(tokens, budget, share, capsys):
    """Prints CPU seconds of one thread, and retained mass."""
    law = Occupancy(budget, budget // share if share else 1)
    problem, loose, adding = Problem(tokens, law), 0.0, 0.0
    for first, rows in rows_of_attention(tokens):
        loose += most_per_query(rows, first, law)
        adding += timed(problem.add_rows, first, rows)[1]
    adding += timed(problem.losses)[1]
    exact(Problem.of(np.eye(4), Occupancy(1)))  # compiles
    size = problem.num_evictions * tokens**2
    found, bounding = timed(solve, problem, exact_up_to=min(EXACT_UP_TO, size / 4))
    figures = f"summing {adding:.2f} s, bounds {bounding:.2f} s"
    masses = f"[{found.lower:.5f}, {found.upper:.5f}]"
    if size <= LARGEST_EXACT:
        best, solving = timed(exact, problem)
        figures += f", exact {solving:.2f} s"
        masses += f" {best.mass:.5f}"
    with capsys.disabled():
        print(
            f"\nT={tokens} {law}: {figures}; mass {masses}, belady {belady(problem).mass:.4f}, "
            f"best slots of each query {loose / (tokens - budget):.4f}"
        )
