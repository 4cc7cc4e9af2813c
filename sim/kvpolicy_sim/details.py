"""What was lost, in detail: measured on sampled steps against the dense attention row.

Retained mass and output error are known at every step of a replay. Which tokens the mass was
on is not, because a replay never looks at what a policy has evicted; so some evenly spaced
rows of full attention are computed for it.

Axes: H_kv KV heads, G query heads per KV head, n sampled rows, T tokens.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kvpolicy import CachePolicy
from kvpolicy_sim.inputs import LayerInputs
from kvpolicy_sim.layerwise import PolicyOutcome

SAMPLED_ROWS = 128
"""Rows of full attention computed per head, evenly spaced."""

RECALL_AT = (16, 64)
"""Sizes of the sets of most attended tokens."""

Marks = Sequence[tuple[str, int, int]]
"""Named half-open spans of positions."""


@dataclass(frozen=True)
class Details:
    """What one policy lost in one layer of one sequence; weights are means over query heads.

    Attributes:
        steps: [n] tokens seen at the sampled rows.
        lost_by_age: [H_kv, n, bins] attention on evicted tokens; bin b has ages 2^b .. 2^(b+1)-1.
        recall: [H_kv, n, len(RECALL_AT)] share of the most attended tokens that were retained;
            NaN where there are fewer tokens.
        mark_mass: [H_kv, n, marks] attention on each marked span.
        mark_retained: [H_kv, n, marks] its part on tokens that were retained.
    """

    steps: np.ndarray
    lost_by_age: np.ndarray
    recall: np.ndarray
    mark_mass: np.ndarray
    mark_retained: np.ndarray


def measure_details(
    inputs: LayerInputs, outcomes: Mapping[CachePolicy, PolicyOutcome], marks: Marks
) -> dict[CachePolicy, Details]:
    """Compare what policies retained with full attention on sampled rows.

    Args:
        inputs: The layer.
        outcomes: What the policies did to it.
        marks: Spans to follow.
    """
    rows = sampled_rows(inputs.queries.shape[2])
    tokens = rows * inputs.stride  # [n]
    parts: dict[CachePolicy, list[tuple[Tensor, ...]]] = {policy: [] for policy in outcomes}
    for head in range(len(inputs.kv_heads)):
        weights = _full_rows(inputs, head, rows, tokens)  # [n, T]
        likeliest = weights.topk(min(max(RECALL_AT), inputs.tokens), dim=-1).indices
        for policy, outcome in outcomes.items():
            evicted_at = torch.from_numpy(outcome.evicted_at[head])
            kept = (evicted_at == 0) | (tokens[:, None] < evicted_at)  # [n, T]
            parts[policy].append(
                (
                    _by_age(weights.masked_fill(kept, 0.0), tokens),
                    _recall(kept, likeliest, tokens),
                    *_on_marks(weights, kept, marks),
                )
            )
    return {
        policy: Details(
            (tokens + 1).numpy(), *(torch.stack(x).numpy() for x in zip(*found, strict=True))
        )
        for policy, found in parts.items()
    }


def sampled_rows(num_rows: int) -> Tensor:
    """Evenly spaced rows, the last one included; [n] int64."""
    count = min(num_rows, SAMPLED_ROWS)
    return (torch.arange(1, count + 1) * num_rows).div(count, rounding_mode="floor") - 1


def _full_rows(inputs: LayerInputs, head: int, rows: Tensor, tokens: Tensor) -> Tensor:
    """Rows of full attention, the mean over a KV head's query heads; [n, T]."""
    logits = inputs.queries[head, :, rows] @ inputs.keys[head].T  # [G, n, T]
    future = torch.arange(inputs.tokens) > tokens[:, None]
    return logits.masked_fill_(future, -torch.inf).softmax(dim=-1).mean(dim=0)


def _by_age(lost: Tensor, tokens: Tensor) -> Tensor:
    """Sum lost weights [n, T] by the logarithm of age; [n, bins]."""
    bins = int(lost.shape[1]).bit_length()
    summed = torch.nn.functional.pad(lost.double().cumsum(dim=-1), (1, 0))  # [n, T + 1]
    ages = 2 ** torch.arange(bins + 1)
    edges = (tokens[:, None] + 1 - ages).clamp(min=0)  # tokens older than an age: [0, edge)
    below = summed.gather(1, edges)  # [n, bins + 1]
    return (below[:, :-1] - below[:, 1:]).float()


def _recall(kept: Tensor, likeliest: Tensor, tokens: Tensor) -> Tensor:
    """Share of the most attended tokens that were kept; [n, len(RECALL_AT)]."""
    hits = kept.gather(1, likeliest).float()
    columns = [hits[:, :k].mean(dim=1).masked_fill(tokens + 1 < k, torch.nan) for k in RECALL_AT]
    return torch.stack(columns, dim=1)


def _on_marks(weights: Tensor, kept: Tensor, marks: Marks) -> tuple[Tensor, Tensor]:
    """Attention on each marked span, and its retained part; both [n, marks]."""
    spans = [slice(first, last) for _, first, last in marks]
    empty = weights.new_zeros(weights.shape[0], 0)
    total = [weights[:, span].sum(dim=1) for span in spans]
    retained = [(weights * kept)[:, span].sum(dim=1) for span in spans]
    return (
        torch.stack(total, dim=1) if marks else empty,
        torch.stack(retained, dim=1) if marks else empty,
    )
