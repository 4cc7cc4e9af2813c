"""Worker methods that answer from the engine's process: called by name, nothing is pickled."""

from typing import Any

from kvpolicy_vllm.engine import Engine


class WorkerExtension:
    """Mixed into vLLM's worker by ``worker_extension_cls``."""

    vllm_config: Any

    def kvpolicy_ledger(self) -> dict[str, Any]:
        """Ledgers of finished requests and their totals."""
        return Engine.of(self.vllm_config.instance_id).book.report()

    def kvpolicy_retained_positions(self, request_id: str, layer: int) -> list[list[int]] | None:
        """Positions that a request holds in a layer, per KV head; None if unknown."""
        book = Engine.of(self.vllm_config.instance_id).book
        positions = book.retained_positions(request_id, layer)
        return None if positions is None else positions.tolist()
