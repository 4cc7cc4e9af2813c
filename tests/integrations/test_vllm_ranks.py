"""What several workers of one engine report is one ledger."""

import pytest

from kvpolicy import LedgerError
from kvpolicy_vllm.ranks import merge_reports

pytestmark = pytest.mark.vllm


def report(heads: int, **ledgers: dict) -> dict:
    """What a worker with so many KV heads, over all its layers, reports."""
    return {"totals": {}, "requests": ledgers, "heads": heads}


def entry(**figures: float | str) -> dict:
    """A request's ledger with some figures of its own."""
    return {
        "policy": "h2o:budget=32",
        "logical_tokens": 100,
        "retained": 33,
        "evicted": 67,
        "merged": 0,
        "slots_held": 33,
        "blocks_held": 2,
        "bytes_held": 1000,
        "bytes_saved": 500,
        "evictions": 34,
        "policy_seconds": 0.5,
        "allotted_by": "h2o:budget=32",
        "fault": None,
        **figures,
    }


def test_bytes_add_up_and_counts_do_not():
    """Every rank holds bytes of its own heads; counts and time are the request's."""
    merged = merge_reports([report(2, a=entry()), report(2, a=entry(bytes_held=1200))])
    ledger = merged["requests"]["a"]
    assert ledger == entry(bytes_held=2200, bytes_saved=1000)
    assert merged["totals"]["logical_tokens"] == 100
    assert merged["totals"]["requests"] == 1


def test_a_failure_on_any_rank_is_the_requests():
    """A policy may fail on the heads of one rank alone; the ledger tells all the same."""
    reports = [report(2, a=entry()), report(2, a=entry(fault="token 9, layer 0: it failed"))]
    assert merge_reports(reports)["requests"]["a"]["fault"] == "token 9, layer 0: it failed"
    assert merge_reports(reports[:1] * 2)["requests"]["a"]["fault"] is None


def test_means_are_over_the_heads_of_all_ranks():
    """A stage with three times as many layers counts three times."""
    merged = merge_reports([report(6, a=entry(merged=4)), report(2, a=entry(merged=8))])
    assert merged["requests"]["a"]["merged"] == 5


def test_requests_that_not_every_rank_knows_are_left_out():
    """A request whose ledger one rank has forgotten gives no half figures."""
    merged = merge_reports([report(2, a=entry(), b=entry()), report(2, b=entry())])
    assert list(merged["requests"]) == ["b"]


def test_a_fault_of_any_worker_is_raised():
    """A policy that did not run on one rank is not hidden by the others."""
    with pytest.raises(LedgerError, match="did not run"):
        merge_reports([report(2, a=entry()), {"fault": "the policy did not run as configured"}])
