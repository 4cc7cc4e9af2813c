"""Heads spread over processes: what ``scope=layer`` needs of the other ranks' heads.

Tensor parallelism gives every rank as many consecutive KV heads. ``scope=head`` needs nothing
of the others. ``scope=layer`` takes means over all query heads; every rank keeps the means over
its own, which stay linear sums however they accumulate, and they meet at an eviction.

Axes as in `kvpolicy.attention`.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvpolicy.errors import PolicyError, UnsupportedError
from kvpolicy.policy import CachePolicy, EvictionPolicy, View


def _only_mine(x: Tensor) -> Tensor:
    return x[None]


@dataclass(frozen=True)
class Ranks:
    """Processes that share a layer's heads, equally many on each.

    Attributes:
        count: How many.
        gather: Lays a tensor of every rank side by side, [count, ...] in the order of ranks. All
            ranks call it at the same evictions and get the same bits.
    """

    count: int = 1
    gather: Callable[[Tensor], Tensor] = _only_mine

    def whole_layer(self, view: View) -> View:
        """Show the heads of all ranks where all heads hold the same slots.

        The view's weights and statistic are means over this rank's query heads. They become the
        means over all, added up in the order of ranks: an all-reduce may add in another order on
        every rank, and then near-ties would be decided differently.
        """
        mine = [x[:, 0] for x in (view.weights, view.accumulated) if x is not None]
        means = iter(self.gather(torch.stack(mine)).mean(dim=0) if mine else ())
        batch, kv_heads, slots = view.positions.shape
        total = kv_heads * self.count

        def widen(x: Tensor) -> Tensor:
            return x[:, :1].expand(batch, total, slots)

        return replace(
            view,
            positions=widen(view.positions),
            valid=widen(view.valid),
            weights=None if view.weights is None else widen(next(means)[:, None]),
            accumulated=None if view.accumulated is None else widen(next(means)[:, None]),
            kv_heads=torch.arange(total, device=view.positions.device)[None, :, None],
        )

    def agree(self, decide: Callable[[], Tensor], device: torch.device) -> Tensor:
        """Decide on every rank, or fail on all of them, so that none waits for another's retry.

        Args:
            decide: Makes the same decision everywhere.
            device: Where the ranks exchange.

        Raises:
            PolicyError: It failed on another rank.
            Exception: What was raised on this one.
        """
        decided, failure = None, None
        try:
            decided = decide()
        except Exception as error:
            failure = error
        failed = self.gather(torch.tensor([float(failure is not None)], device=device))[:, 0]
        if failure is not None:
            raise failure
        if decided is None or bool(failed.any()):
            raise PolicyError(f"its ranks decide together, and it failed on {int(failed.argmax())}")
        return decided


ALONE = Ranks()


def check_spread(policy: CachePolicy) -> None:
    """Refuse policies whose decisions would need more than one exchange per eviction.

    Raises:
        UnsupportedError: With what to change.
    """
    if policy.members != (policy,):
        for member in policy.members:
            check_spread(member)
        return
    if not isinstance(policy, EvictionPolicy) or not policy.scope_is_layer:
        return
    if policy.observes_every_token:
        raise UnsupportedError(
            f"{policy}: with heads spread over processes, scope=layer with an observe() of its own "
            "would have to exchange every token's weights; use scope=head, or run one process"
        )
    vectors = sorted({"keys", "values"} & set(policy.needs))
    if vectors:
        raise UnsupportedError(
            f"{policy}: with heads spread over processes, scope=layer cannot show {vectors} of all "
            "heads; use scope=head, or run one process"
        )
