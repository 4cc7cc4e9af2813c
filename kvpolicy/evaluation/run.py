"""Running samples under policies, batch by batch, each beside the full cache."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from kvpolicy.evaluation.cells import Cell, Cells, Key
from kvpolicy.evaluation.measured import Measured, measure
from kvpolicy.evaluation.sample import Sample
from kvpolicy.policy import CachePolicy


class Host(Protocol):
    """What runs a model."""

    def batch_size(self, samples: Sequence[Sample]) -> int:
        """How many of these samples to run at a time."""
        ...

    def predict(self, batch: Sequence[Sample], policy: CachePolicy) -> list[Tensor]:
        """Log-probabilities [n, V] of each sample's n tokens to be predicted, under a policy.

        Raises:
            LedgerError: A cache evicted other than its occupancy law demands.
        """
        ...


@dataclass
class Run:
    """What one policy did.

    Attributes:
        policy: The policy.
        measured: One entry per sample, contexts in ascending order.
        seconds: Time that its forwards took.
    """

    policy: CachePolicy
    measured: list[Measured]
    seconds: float = 0.0


def evaluate(
    host: Host,
    samples: Mapping[int, Sequence[Sample]],
    policies: Sequence[CachePolicy],
    cells: Cells | None = None,
    advance: Callable[[int], object] = lambda _: None,
) -> list[Run]:
    """Run samples under policies; the first one, the full cache, is the others' reference.

    Args:
        host: Runs the model.
        samples: By context length.
        policies: The full cache first.
        cells: What is finished already; gets whatever is finished here.
        advance: Told the tokens of every batch done, per policy.

    Raises:
        ValueError: A policy sets prompts apart where there are none.
        LedgerError: A cache evicted other than its occupancy law demands.
        PolicyError: A finished cell is not of these samples.
    """
    require_prompts(samples, policies)
    cells = Cells() if cells is None else cells
    runs = [Run(policy, []) for policy in policies]
    for context in sorted(samples):
        size = host.batch_size(samples[context])
        for first in range(0, len(samples[context]), size):
            batch = samples[context][first : first + size]
            keys = [Key(str(policy), context, first) for policy in policies]
            found = _finish(host, batch, policies, keys, cells, advance)
            for run, cell in zip(runs, found, strict=True):
                run.measured += cell.measured
                run.seconds += cell.seconds
    return runs


def _finish(
    host: Host,
    batch: Sequence[Sample],
    policies: Sequence[CachePolicy],
    keys: Sequence[Key],
    cells: Cells,
    advance: Callable[[int], object],
) -> list[Cell]:
    """Give every policy's cell of a batch; run those that are not finished."""
    tokens = sum(len(sample.tokens) for sample in batch)
    known = [cells.find(key, batch) for key in keys]
    finished: list[Cell] = []
    reference: list[Tensor] | None = None
    for policy, key, cell in zip(policies, keys, known, strict=True):
        done = cell
        # Predictions are kept nowhere, so the full cache runs again for whoever is missing.
        if done is None or (reference is None and None in known):
            began = time.perf_counter()
            predicted = host.predict(batch, policy)
            reference = predicted if reference is None else reference
            measured = [measure(*each) for each in zip(batch, predicted, reference, strict=True)]
            done = done or Cell(measured, time.perf_counter() - began)
        if cell is None:
            cells.add(key, done)
        finished.append(done)
        advance(tokens)
    return finished


def require_prompts(
    samples: Mapping[int, Sequence[Sample]], policies: Sequence[CachePolicy]
) -> None:
    """Raise ValueError unless policies find the prompts that they set apart."""
    has_prompts = all(each.prompt_tokens for group in samples.values() for each in group)
    needing = [str(policy) for policy in policies if policy.needs_prompt]
    if needing and not has_prompts:
        raise ValueError(
            f"{needing[0]} sets the prompt apart, and perplexity has none: a window is one text; "
            "say how many of its first tokens are the prompt (--prompt-len)"
        )
