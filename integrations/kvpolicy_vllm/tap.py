"""Follows which request sits in which row of the batch: a logits processor that does nothing.

Attention never sees sampling parameters. A logits processor does, in the worker, with every
addition, removal and move of rows before the forward they belong to, and is vLLM's public
channel for it. vLLM loads it into every engine, with or without a policy, so the class fits
both of its model runners and imports the rest of this package only when it needs it.
"""

from typing import TYPE_CHECKING, Any

from vllm.v1.sample.logits_processor.interface import BatchUpdate, LogitsProcessor
from vllm.v1.worker.gpu.sample.logits_processor.interface import (
    LogitsProcessor as SecondRunnersLogitsProcessor,
)

if TYPE_CHECKING:
    import torch
    from vllm import SamplingParams
    from vllm.config import VllmConfig


class RequestPolicies(LogitsProcessor, SecondRunnersLogitsProcessor):
    """Keeps `Engine.rows` in step with the batch; logits pass through unchanged."""

    @classmethod
    def validate_params(cls, sampling_params: "SamplingParams") -> None:
        """Refuse a bad per-request policy or capture where the request enters (HTTP 400).

        Raises:
            PolicyError: The spec is wrong, an import path, not allowed, does not fit the server's
                policy, or there is none; or the request asks to be recorded where it cannot be.
        """
        from kvpolicy import PolicyError
        from kvpolicy_vllm.config import (
            CAPTURE_KEY,
            KEY,
            check_capture,
            check_request,
            request_capture,
            request_policy,
        )
        from kvpolicy_vllm.frontend import announced

        server = announced()
        policy = request_policy(sampling_params, None if server is None else server.allowed)
        wants_capture = request_capture(sampling_params)
        if policy is not None:
            if server is None:
                raise PolicyError(
                    f"{KEY} of a request needs a server that was started with "
                    "kvpolicy_vllm.engine_args(SPEC) or --kv-policy SPEC"
                )
            check_request(policy, server.policy)
        if wants_capture:
            if server is None or not server.is_recorded:
                raise PolicyError(
                    f"{CAPTURE_KEY} of a request needs a server that was started with "
                    "engine_args(SPEC, capture=...) or --kv-policy-capture DIRECTORY"
                )
            check_capture(policy or server.policy)

    def __init__(self, vllm_config: "VllmConfig", *_: Any) -> None:
        """Begin this engine; the model, and with it the attention backend, comes later."""
        from kvpolicy_vllm.dispatch import forget_choice
        from kvpolicy_vllm.engine import Engine

        self.engine: Engine | None = Engine.start(vllm_config)
        if self.engine is not None:
            forget_choice()

    def is_argmax_invariant(self) -> bool:
        """Greedy sampling need not call `apply`."""
        return True

    def add_request(self, req_idx: int, sampling_params: "SamplingParams") -> bool:
        """Tell the second model runner that no request needs its logits processed."""
        return False

    def apply(self, logits: "torch.Tensor", ctx: Any = None) -> "torch.Tensor":
        """Give the logits back."""
        return logits

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follow rows: removed, then added, then moved, as vLLM prescribes."""
        if self.engine is not None and batch_update is not None:
            self.engine.follow(batch_update)
