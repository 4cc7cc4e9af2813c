"""A line in vLLM's log for every finished request."""

from typing import TYPE_CHECKING

from vllm.logger import init_logger

if TYPE_CHECKING:
    from kvpolicy_vllm.book import Finished

logger = init_logger("vllm.kvpolicy")
"""Below vLLM's own logger, whose handlers and level it shares."""


def log(request: "Finished") -> None:
    """Write a request's figures as ``key=value``, for people and programs."""
    ledger = request.ledger
    logger.info(
        "kvpolicy: request=%s policy=%s tokens=%d retained=%s evicted=%s merged=%s evictions=%d "
        "blocks=%d bytes_held=%d bytes_saved=%d policy_ms=%.3f allotted_by=%s contained=%d",
        request.request_id,
        ledger.policy,
        ledger.logical_tokens,
        ledger.retained,
        ledger.evicted,
        ledger.merged,
        ledger.evictions,
        ledger.blocks_held,
        ledger.bytes_held,
        ledger.bytes_saved,
        1e3 * ledger.policy_seconds,
        ledger.allotted_by,
        ledger.fault is not None,
    )
