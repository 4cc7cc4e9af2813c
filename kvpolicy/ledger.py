"""The ledger: proof, per request, that a policy ran and what it saved."""

from dataclasses import asdict, dataclass
from typing import Any, Self

from kvpolicy.errors import LedgerError
from kvpolicy.occupancy import Occupancy

SEMANTICS = 1
"""Version of the retention semantics; a change of decisions raises it."""


@dataclass(frozen=True)
class Ledger:
    """What one request cost and lost.

    Token counts are means over layers and KV heads (equal counts make them integers);
    bytes cover keys, values and the per-slot policy state of all layers.
    """

    policy: str
    logical_tokens: int
    retained: int | float
    evicted: int | float
    slots_held: int | float
    blocks_held: int
    bytes_held: int
    bytes_saved: int
    evictions: int
    policy_seconds: float
    merged: int | float = 0
    semantics: int = SEMANTICS

    def as_dict(self) -> dict[str, Any]:
        """Give the ledger as a JSON-ready dictionary with the contract's keys."""
        return asdict(self)

    def check(self, occupancy: Occupancy) -> Self:
        """Return self if `evicted` is the occupancy law's figure.

        Raises:
            LedgerError: The policy evicted too much or too little, or never ran.
        """
        due = occupancy.evicted(self.logical_tokens)
        if self.evicted != due:
            raise LedgerError(
                f"{self.policy} evicted {self.evicted} of {self.logical_tokens} tokens, "
                f"the occupancy law demands {due}: the policy did not run as configured"
            )
        return self
