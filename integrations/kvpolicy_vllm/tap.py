"""Follows which request sits in which row of the batch: a logits processor that does nothing.

Attention never sees sampling parameters. A logits processor does, in the worker, with every
addition, removal and move of rows before the forward they belong to, and is vLLM's public
channel for it. Both model runners' interfaces are implemented by one class.
"""

from typing import TYPE_CHECKING, Any

from vllm.v1.sample.logits_processor.interface import (
    BatchUpdate,
    LogitsProcessor,
    MoveDirectionality,
)

from kvpolicy import PolicyError, UnsupportedError, parse
from kvpolicy_vllm.config import KEY, check_policy
from kvpolicy_vllm.dispatch import forget_choice
from kvpolicy_vllm.engine import Engine, check_request
from kvpolicy_vllm.frontend import server_policy

if TYPE_CHECKING:
    import torch
    from vllm import SamplingParams
    from vllm.config import VllmConfig


class RequestPolicies(LogitsProcessor):
    """Keeps `Engine.rows` in step with the batch; logits pass through unchanged."""

    @classmethod
    def validate_params(cls, sampling_params: "SamplingParams") -> None:
        """Refuse a bad per-request policy where the request enters (HTTP 400).

        Raises:
            PolicyError: The spec is wrong, an import path, or exceeds the server's allotment.
        """
        spec = (sampling_params.extra_args or {}).get(KEY)
        if spec is None:
            return
        if not isinstance(spec, str) or "." in spec.partition(":")[0]:
            raise PolicyError(
                f"{KEY} of a request must be a spec string with a policy's name, got {spec!r}; "
                "import paths are for the server's own policy only"
            )
        policy, server = parse(spec), server_policy()
        check_policy(policy)
        if server is not None:
            check_request(policy, server)

    def __init__(
        self, vllm_config: "VllmConfig", device: "torch.device", is_pin_memory: bool
    ) -> None:
        """Begin this engine; the model, and with it the attention backend, comes later."""
        forget_choice()
        self.engine = Engine.start(vllm_config)

    def is_argmax_invariant(self) -> bool:
        """Greedy sampling need not call `apply`."""
        return True

    def apply(self, logits: "torch.Tensor") -> "torch.Tensor":
        """Give the logits back."""
        return logits

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follow rows: removed, then added, then moved, as vLLM prescribes."""
        engine = self.engine
        if engine is None or batch_update is None:
            return
        if not engine.has_layers:
            raise UnsupportedError(
                f"kv_policy={engine.policy} is configured but vLLM chose an attention backend "
                "without it; on this platform only CPU_ATTN carries policies"
            )
        rows = engine.rows
        for row in batch_update.removed:
            rows.pop(row, None)
        for row, params, *_ in batch_update.added:
            _put(rows, row, engine.requested_policy(params))
        for source, target, direction in batch_update.moved:
            moved, replaced = rows.pop(source, None), rows.pop(target, None)
            _put(rows, target, moved)
            if direction is MoveDirectionality.SWAP:
                _put(rows, source, replaced)


def _put(rows: dict[int, Any], row: int, policy: Any) -> None:
    """Set a row's policy; None means the server's."""
    if policy is None:
        rows.pop(row, None)
    else:
        rows[row] = policy
