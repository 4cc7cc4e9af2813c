"""vLLM's tensor-parallel ranks: the exchange between them, and what their workers report together.

Ranks of a tensor-parallel group hold consecutive KV heads of the same layers, those of a
pipeline different layers. All of them run the same requests.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from kvpolicy import LedgerError
from kvpolicy.ranks import ALONE, Ranks
from kvpolicy_vllm.book import totals

_ADDED = ("bytes_held", "bytes_saved")
"""Ledger entries that every rank has its own share of; for others the first one speaks."""

_MEANS = ("retained", "evicted", "merged", "slots_held")
"""Ledger entries that are means over layers and KV heads."""


def tensor_ranks() -> Ranks:
    """The ranks among which this process's layers have their heads spread."""
    from vllm.distributed import get_tp_group

    group = get_tp_group()
    if group.world_size == 1:
        return ALONE

    def gather(x: Tensor) -> Tensor:
        return group.all_gather(x[None].contiguous(), dim=0)

    return Ranks(group.world_size, gather)


def merge_reports(reports: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Join the ledgers that an engine's workers give, each over its own layers and heads.

    Raises:
        LedgerError: A worker found evictions that differ from a request's occupancy law.
    """
    for report in reports:
        if "fault" in report:
            raise LedgerError(report["fault"])
    if len(reports) == 1:
        first = reports[0]
        return {"totals": first["totals"], "requests": first["requests"]}
    shares = [report["heads"] for report in reports]
    known = set.intersection(*(set(report["requests"]) for report in reports))
    requests = {
        name: _merge([report["requests"][name] for report in reports], shares)
        for name in reports[0]["requests"]
        if name in known
    }
    return {"totals": totals(requests), "requests": requests}


def _merge(ledgers: Sequence[dict[str, Any]], shares: Sequence[int]) -> dict[str, Any]:
    """Join one request's ledgers of ranks that hold so many KV heads of all their layers."""
    added = {key: sum(ledger[key] for ledger in ledgers) for key in _ADDED}
    means = {key: _mean([ledger[key] for ledger in ledgers], shares) for key in _MEANS}
    faults = dict.fromkeys(ledger["fault"] for ledger in ledgers if ledger["fault"])
    return {**ledgers[0], **added, **means, "fault": "; ".join(faults) or None}


def _mean(values: Sequence[int | float], shares: Sequence[int]) -> int | float:
    """The mean of values that stand for so many heads; exact where they are equal."""
    if len(set(values)) == 1:
        return values[0]
    weighted = zip(values, shares, strict=True)
    return sum(value * share for value, share in weighted) / sum(shares)
