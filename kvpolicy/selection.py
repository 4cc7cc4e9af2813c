"""From scores to victims: protection as a mask, one total order, exact counts.

This is the only place that decides which slots go. Scores rank, masks protect: no score
value, however large, protects a slot.
"""

from dataclasses import replace

import torch
from torch import Tensor

from kvpolicy.errors import PolicyError
from kvpolicy.policy import EvictionPolicy, View
from kvpolicy.ranks import ALONE, Ranks


def protected(policy: EvictionPolicy, view: View) -> Tensor:
    """Slots that must stay: sinks, the most recent tokens and pinned spans; [B, H_kv, S] bool."""
    positions = view.positions
    mask = positions < policy.sink_slots
    if policy.recent_slots:
        mask = mask | (positions >= view.n - policy.recent_slots)
    for first, last in policy.spans:
        mask = mask | ((positions >= first) & (positions < last))
    return mask


def select_victims(
    policy: EvictionPolicy, view: View, surplus: int, ranks: Ranks = ALONE
) -> Tensor:
    """Choose the `surplus` slots per KV head that go in this eviction; [B, H_kv, S] bool.

    Raises:
        PolicyError: The policy's scores have the wrong shape or are not numbers, or it protects
            more slots than its budget holds.
    """
    if policy.scope_is_layer and ranks.count > 1:
        # Every rank makes the whole layer's decision, so that it is the decision of one process.
        layer = ranks.whole_layer(view)

        def decide() -> Tensor:
            return select_victims(policy, layer, surplus)

        # A stranger's may fail on one of them alone, from the same numbers.
        is_safe = _is_ours(policy)
        victims = decide() if is_safe else ranks.agree(decide, view.positions.device)
        return victims[:, : view.positions.shape[1]]
    candidates = view.valid & ~protected(policy, view)
    scores = policy.score(shown(policy, view))
    check_scores(policy, scores, view)
    if policy.scope_is_layer:
        scores = scores.float().mean(dim=1, keepdim=True).expand_as(view.positions)
        check_scores(policy, scores, view)  # the mean of inf and -inf is no number
    victims = lowest(scores, view.positions, candidates, surplus)
    counts = victims.sum(dim=-1)
    if bool((counts != surplus).any()):
        raise PolicyError(
            f"{policy}: {surplus} slots must go, but only {int(counts.min())} are not protected; "
            "protect fewer tokens"
        )
    return victims


def new_statistic(policy: EvictionPolicy, view: View) -> Tensor:
    """What a policy with its own `observe` remembers of the slots from now on; [B, H_kv, S].

    Raises:
        PolicyError: It has the wrong shape or is no numbers.
    """
    statistic = policy.observe(shown(policy, view))
    check_scores(policy, statistic, view, "observe")
    return statistic.float()


def shown(policy: EvictionPolicy, view: View) -> View:
    """A view that the policy may write into: a stranger's gets tensors of its own."""
    if _is_ours(policy):
        return view
    tensors = {name: x.clone() for name, x in vars(view).items() if isinstance(x, Tensor)}
    return replace(view, **tensors)


def _is_ours(policy: EvictionPolicy) -> bool:
    """Whether a policy is one of the package's own."""
    return type(policy).__module__.startswith("kvpolicy.")


def check_scores(policy: EvictionPolicy, scores: Tensor, view: View, method: str = "score") -> None:
    """Raise PolicyError unless every valid slot has a score that can be ordered.

    Infinite scores can.

    A row whose own evidence is not finite is excused: its result is lost already, and failing
    would take the other rows of the batch with it.
    """
    if not isinstance(scores, Tensor) or scores.shape != view.positions.shape:
        got = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        raise PolicyError(
            f"{policy}: {method}() must return a tensor [B, H_kv, S] = "
            f"{tuple(view.positions.shape)}, got {got}"
        )
    if scores.is_complex():
        raise PolicyError(f"{policy}: {method}() returned {scores.dtype}; return real numbers")
    if not scores.is_floating_point():
        return
    unordered = (scores.isnan() & view.valid).flatten(1).any(dim=1)  # [B]
    if bool(unordered.any()) and bool((unordered & ~_lost(view)).any()):
        raise PolicyError(
            f"{policy}: {method}() returned NaN for a held slot; return numbers that can be ordered"
        )


def _lost(view: View) -> Tensor:
    """Rows that show the policy something that is not finite; [B] bool."""
    lost = torch.zeros_like(view.valid[:, 0, 0])
    for evidence in (view.weights, view.accumulated):
        if evidence is not None:
            lost |= (~evidence.isfinite() & view.valid).flatten(1).any(dim=1)
    for vectors in (view.keys, view.values):
        if vectors is not None:
            lost |= (~vectors.isfinite().all(dim=-1) & view.valid).flatten(1).any(dim=1)
    return lost


def lowest(scores: Tensor, positions: Tensor, candidates: Tensor, count: int) -> Tensor:
    """Mark the `count` lowest-scored candidates of each row and head.

    Equal scores: the lowest position goes first. NaN ranks above every number. Takes O(S): what
    counts is the highest score that goes, and the order of slots only where that score is shared.

    Args:
        scores: [B, H_kv, S], any real dtype.
        positions: [B, H_kv, S] int64, distinct among candidates.
        candidates: [B, H_kv, S] bool, at least `count` of them per row and head.
        count: How many to mark.
    """
    if count == 0:
        return torch.zeros_like(candidates)
    ranks = scores.to(torch.uint8) if scores.dtype == torch.bool else scores
    ranks = ranks.masked_fill(~candidates, _last(ranks.dtype))
    limit = _nth_lowest(ranks, count)
    below, tied = ranks < limit, (ranks == limit) & candidates
    is_lost = limit.isnan()  # fewer than `count` candidates have numbers
    if bool(is_lost.any()):
        below = below | (is_lost & ~ranks.isnan())
        tied = tied | (is_lost & ranks.isnan() & candidates)
    marked = below | tied
    if bool((marked.sum(-1) == count).all()):
        return marked
    ends = torch.iinfo(torch.int64)
    order = positions.masked_fill(~tied, ends.max).masked_fill_(below, ends.min)
    return marked & (order <= _nth_lowest(order, count))


def _nth_lowest(x: Tensor, n: int) -> Tensor:
    """The n-th lowest number of each row and head, [B, H_kv, 1]; NaN is the highest."""
    return x.topk(n, dim=-1, largest=False, sorted=False).values.amax(dim=-1, keepdim=True)


def _last(dtype: torch.dtype) -> float | int:
    """What no score ranks above."""
    return torch.nan if dtype.is_floating_point else torch.iinfo(dtype).max
