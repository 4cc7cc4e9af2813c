"""Ledgers on a page: proof, per policy, of what it did to a request."""

from collections.abc import Iterable, Mapping
from typing import Any

from kvpolicy.page.document import Section
from kvpolicy.page.keys import Key
from kvpolicy.page.markup import Markup, amount, figure, size
from kvpolicy.page.tables import plain_table

TITLES = (
    "policy",
    "logical tokens",
    "retained",
    "evicted",
    "merged",
    "slots held",
    "blocks held",
    "bytes held",
    "bytes saved",
    "evictions",
    "policy seconds",
)


def ledger_section(ledgers: Iterable[tuple[Key, Mapping[str, Any]]], whose: str) -> Section:
    """Ledgers as a table.

    Args:
        ledgers: Of policies.
        whose: Which request's they are.
    """
    return Section(
        "Ledger",
        f"{whose} Tokens are means over layers and KV heads. In every row, what was evicted is "
        "exactly what the policy's occupancy law demands; otherwise there would be no page.",
        [plain_table("Ledger by policy", TITLES, (_row(key, found) for key, found in ledgers))],
    )


def _row(key: Key, ledger: Mapping[str, Any]) -> tuple[Markup | str, ...]:
    return (
        key.full_name(),
        *(
            amount(ledger[name], 2)
            for name in ("logical_tokens", "retained", "evicted", "merged", "slots_held")
        ),
        figure(ledger["blocks_held"]) if ledger["blocks_held"] else figure(None),
        size(ledger["bytes_held"]),
        _saved(ledger["bytes_saved"]),
        figure(ledger["evictions"]),
        figure(ledger["policy_seconds"], 3),
    )


def _saved(num_bytes: float) -> str:
    """Bytes with their sign: a policy's state may cost more than it saves."""
    return size(num_bytes) if num_bytes >= 0 else f"\N{MINUS SIGN}{size(-num_bytes)}"
