"""What policies of several budgets have in common."""

from collections.abc import Callable, Sequence
from typing import TypeVar

from kvpolicy.policy import CachePolicy
from kvpolicy.spec import split_spec

Item = TypeVar("Item")

MOST_DRAWN = 12
"""Policies that a picture of single policies shows."""


def budget_of(policy: CachePolicy) -> int | None:
    """The policy's budget, if it has one."""
    return getattr(policy, "budget", None)


def series_of(policy: CachePolicy) -> str:
    """A policy's spec without its budget: what points at several budgets have in common."""
    name, parameters = split_spec(str(policy))
    # Policies of blocks print segments, which their budget implies.
    items = [f"{k}={v}" for k, v in parameters.items() if k not in ("budget", "segments")]
    return f"{name}:{','.join(items)}" if items else name


def drawn(items: Sequence[Item], budget: Callable[[Item], float | None]) -> tuple[list[Item], str]:
    """What a picture of single policies has room for, and a remark on what was left out.

    Of many policies it is those without a budget and those with the middle one of their budgets.

    Args:
        items: What belongs to single policies.
        budget: An item's budget.
    """
    if len(items) <= MOST_DRAWN:
        return [*items], ""
    budgets = sorted({found for item in items if (found := budget(item))})
    if not budgets:
        return [*items][:MOST_DRAWN], f" The first {MOST_DRAWN} of {len(items)} policies are drawn."
    chosen = budgets[len(budgets) // 2]
    found = [item for item in items if budget(item) in (None, chosen)][:MOST_DRAWN]
    return found, f" Of {len(items)} policies, those with a budget of {chosen:,} are drawn."
