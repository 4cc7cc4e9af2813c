"""What the layers need of one forward.

All layers share one plan, but for rows whose policy failed in some of them: those layers run the
same rows under the policies that took over there.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from torch import Tensor

from kvpolicy import CachePolicy
from kvpolicy_vllm.containment import fallback_of
from kvpolicy_vllm.plan import Plan
from kvpolicy_vllm.recording import RecordedRow
from kvpolicy_vllm.rows import Row


@dataclass
class RetentionMetadata:
    """One forward's plan.

    Attributes:
        rows: The rows.
        plan: What is done with them.
        schedule: The kernel's own plan for the rows attended in place.
        planned: Plans some of the forward's rows, or parts of them, by themselves.
        recorded: Rows whose attention goes into traces.
    """

    rows: list[Row]
    plan: Plan
    schedule: Tensor | None
    planned: "Callable[[list[Row]], RetentionMetadata]"
    recorded: list[RecordedRow] = field(default_factory=list)
    _others: "dict[frozenset[tuple[int, CachePolicy]], RetentionMetadata]" = field(
        default_factory=dict
    )

    def of_layer(self, layer: int) -> "RetentionMetadata":
        """The same forward in a layer, with the policies that took over there."""
        taken_over = {
            row.index: fallback_of(row.policy.of_layer(layer))
            for row in self.rows
            if layer in row.account.faults
        }
        if not taken_over:
            return self
        key = frozenset(taken_over.items())
        if key not in self._others:
            rows = [replace(row, policy=taken_over.get(row.index, row.policy)) for row in self.rows]
            self._others[key] = self.planned(rows)
        return self._others[key]
