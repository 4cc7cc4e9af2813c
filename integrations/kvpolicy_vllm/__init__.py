"""kvpolicy in stock vLLM: retention policies through vLLM's plugin interfaces only."""

from typing import TYPE_CHECKING, Any

from kvpolicy import PolicyError, TraceError
from kvpolicy_vllm.capture import Capture

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from torch import Tensor
    from vllm import LLM

__all__ = ["Capture", "captures", "engine_args", "ledger", "register", "retained_positions"]


def register() -> None:
    """VLLM's plugin entry point; see `kvpolicy_vllm.plugin`."""
    from kvpolicy_vllm import plugin

    plugin.register()


def engine_args(
    policy: str,
    *,
    allow: "Sequence[str] | str | None" = None,
    capture: "Capture | Path | str | None" = None,
    log: bool = False,
    **arguments: Any,
) -> dict[str, Any]:
    """Engine arguments that run a policy: ``LLM(model, **engine_args("h2o:budget=1024"))``.

    Args:
        policy: The policy's spec.
        allow: Names of the policies that requests may bring; the policy's own unless given.
        capture: What to record of requests, or just the directory; needs the policy ``full``.
        log: Whether every finished request gets a line of figures in vLLM's log.
        **arguments: Further engine arguments; `additional_config` is merged.

    Raises:
        PolicyError: The spec, a name or the capture is wrong.
        UnsupportedError: The installed vLLM release is not supported, or the policy evicts and
            is to be captured.
    """
    from kvpolicy_vllm.admission import ALLOW_KEY
    from kvpolicy_vllm.cli import engine_settings
    from kvpolicy_vllm.config import CAPTURE_KEY, LOG_KEY
    from kvpolicy_vllm.plugin import check_version

    check_version()
    extra = dict(arguments.pop("additional_config", None) or {})
    listed, given = extra.pop(ALLOW_KEY, None), extra.pop(CAPTURE_KEY, None)
    log = bool(extra.pop(LOG_KEY, False)) or log
    settings = engine_settings(
        str(policy),
        given if capture is None else capture,
        allow=listed if allow is None else allow,
        log=log,
    )
    return {
        **settings,
        **arguments,
        "additional_config": {**extra, **settings["additional_config"]},
    }


def ledger(llm: "LLM") -> dict[str, Any]:
    """Ledgers of an engine: ``{"totals": {...}, "requests": {request id: {...}}}``.

    Listed are the latest 4,096 finished requests and those that run, as they stand; totals
    cover both.

    Raises:
        PolicyError: The engine was made without `engine_args` or ``--kv-policy``.
        LedgerError: A request's evictions differ from its occupancy law.
    """
    from kvpolicy_vllm.ranks import merge_reports

    return merge_reports(_call(llm, "kvpolicy_ledger"))


def retained_positions(llm: "LLM", request_id: str, layer: int) -> "Tensor":
    """Positions that a request holds in a layer: [H_kv, kept] int64, ascending.

    Works while the request runs and, for the latest 64 requests, after it finished.

    Raises:
        PolicyError: The request or the layer is unknown, or its state is gone.
    """
    import torch

    parts = _call(llm, "kvpolicy_retained_positions", request_id, layer)
    positions = [head for part in parts if part is not None for head in part]
    if not positions:
        raise PolicyError(
            f"no retained positions of request {request_id!r} in layer {layer}: it is unknown, "
            "more than 64 requests finished since, or the layer attends to a sliding window and "
            "is under no policy; ask right after it finishes, for a layer of full attention"
        )
    return torch.tensor(positions, dtype=torch.int64)


def captures(llm: "LLM") -> "list[Path]":
    """Traces of an engine's finished requests, as files that can be read: the latest 4,096.

    Raises:
        PolicyError: The engine was made without a capture.
        TraceError: Recordings failed since the last call; the message names each of them.
    """
    from pathlib import Path

    from kvpolicy_vllm.config import configured_capture

    if configured_capture(llm.llm_engine.vllm_config) is None:
        raise PolicyError(
            "this engine records no requests; construct it with "
            "LLM(model, **kvpolicy_vllm.engine_args('full', capture=DIRECTORY))"
        )
    running = list(llm.llm_engine.output_processor.request_states)
    [report] = _call(llm, "kvpolicy_captures", running)
    if report["faults"]:
        raise TraceError("; ".join(report["faults"]))
    return [Path(path) for path in report["finished"]]


def _call(llm: "LLM", method: str, *args: Any) -> list[Any]:
    """Ask the engine's workers, by name: nothing is pickled.

    Returns:
        Their answers, by rank: the tensor-parallel ranks of the pipeline's first stage come first.
    """
    from vllm.utils.import_utils import resolve_obj_by_qualname

    from kvpolicy_vllm.worker import PolicyWorker

    worker = resolve_obj_by_qualname(llm.llm_engine.vllm_config.parallel_config.worker_cls)
    if not issubclass(worker, PolicyWorker):
        raise PolicyError(
            "this engine keeps no ledger or trace by request; construct it with "
            "LLM(model, **kvpolicy_vllm.engine_args(SPEC))"
        )
    return llm.collective_rpc(method, args=args)
