"""From scores to victims: protection as a mask, one total order, exact counts.

This is the only place that decides which slots go. Scores rank, masks protect: no score
value, however large, protects a slot.
"""

import torch
from torch import Tensor

from kvpolicy.errors import PolicyError
from kvpolicy.policy import EvictionPolicy, View


def protected(policy: EvictionPolicy, view: View) -> Tensor:
    """Slots that must stay: sinks, the most recent tokens and pinned spans; [B, H_kv, S] bool."""
    positions = view.positions
    mask = positions < policy.sink_slots
    if policy.recent_slots:
        mask = mask | (positions >= view.n - policy.recent_slots)
    for first, last in policy.protect:
        mask = mask | ((positions >= first) & (positions < last))
    return mask


def select_victims(policy: EvictionPolicy, view: View, surplus: int) -> Tensor:
    """Choose the `surplus` slots per KV head that go in this eviction; [B, H_kv, S] bool.

    Raises:
        PolicyError: The policy's scores have the wrong shape or are not numbers.
    """
    scores = policy.score(view)
    check_scores(policy, scores, view)
    if policy.scope_is_layer:
        scores = scores.float().mean(dim=1, keepdim=True).expand_as(view.positions)
    return lowest(scores, view.positions, view.valid & ~protected(policy, view), surplus)


def check_scores(policy: EvictionPolicy, scores: Tensor, view: View) -> None:
    """Raise PolicyError unless every valid slot has a score that can be ordered."""
    if scores.shape != view.positions.shape:
        raise PolicyError(
            f"{policy}: score() must return [B, H_kv, S] = {tuple(view.positions.shape)}, "
            f"got {tuple(scores.shape)}"
        )
    if scores.is_floating_point() and bool((scores.isnan() & view.valid).any()):
        raise PolicyError(f"{policy}: score() returned NaN for a held slot; return finite scores")


def lowest(scores: Tensor, positions: Tensor, candidates: Tensor, count: int) -> Tensor:
    """Mark the `count` lowest-scored candidates of each row and head.

    Equal scores: the lowest position goes first.

    Args:
        scores: [B, H_kv, S], any real dtype.
        positions: [B, H_kv, S] int64, distinct among candidates.
        candidates: [B, H_kv, S] bool, at least `count` of them per row and head.
        count: How many to mark.
    """
    by_position = positions.argsort(dim=-1)
    by_score = scores.gather(-1, by_position).argsort(dim=-1, stable=True)
    order = by_position.gather(-1, by_score)  # [B, H_kv, S], worst slot first
    eligible = candidates.gather(-1, order)
    marked = eligible & (eligible.cumsum(-1) <= count)
    return torch.zeros_like(candidates).scatter(-1, order, marked)
