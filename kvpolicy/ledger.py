"""The ledger: proof, per request, that a policy ran and what it saved."""

from collections.abc import Iterable
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
    bytes cover keys, values and the per-slot policy state of all layers. Where layers evict at
    different times, `evictions` are those of the one that does most often.
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
        check_evicted(self.policy, self.logical_tokens, self.evicted, occupancy)
        return self


def check_evicted(policy: str, tokens: int, evicted: int | float, law: Occupancy) -> None:
    """Hold what was evicted to an occupancy law.

    Args:
        policy: Spec of the policy.
        tokens: Tokens seen.
        evicted: Tokens evicted.
        law: The law, settled by the request's prompt.

    Raises:
        LedgerError: They differ.
    """
    due = law.evicted(tokens)
    if evicted != due:
        raise LedgerError(
            f"{policy} evicted {evicted} of {tokens} tokens, the occupancy law demands {due}: "
            "the policy did not run as configured"
        )


def mean(values: Iterable[int | float]) -> int | float:
    """The mean, as an integer where it is one."""
    found = list(values)
    average = sum(found) / len(found)
    return int(average) if float(average).is_integer() else average
