"""vLLM's CPU worker with a ledger: it knows requests by id and when they finish."""

from typing import TYPE_CHECKING, Any

from vllm.v1.worker.cpu_worker import CPUWorker

from kvpolicy_vllm.book import external_id
from kvpolicy_vllm.config import check_engine, configured_policy
from kvpolicy_vllm.dispatch import forget_choice
from kvpolicy_vllm.engine import Engine

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.sched.output import SchedulerOutput


class PolicyWorker(CPUWorker):
    """Given as ``worker_cls``; without a policy it is vLLM's worker."""

    def __init__(self, vllm_config: "VllmConfig", *args: Any, **kwargs: Any) -> None:
        """Refuse engines that cannot keep the policy's promises before anything is loaded."""
        policy = configured_policy(vllm_config)
        if policy is not None:
            check_engine(vllm_config, policy)
        forget_choice()
        super().__init__(vllm_config, *args, **kwargs)

    def init_device(self) -> None:
        """Introduce the model runner to the engine."""
        super().init_device()
        engine = Engine.find(self.vllm_config)
        if engine is not None:
            engine.runner = self.model_runner

    def execute_model(self, scheduler_output: "SchedulerOutput") -> Any:
        """Close finished requests, whose blocks this step may overwrite, then run it."""
        engine = Engine.find(self.vllm_config)
        if engine is not None:
            engine.book.drop(scheduler_output.preempted_req_ids or ())
            engine.close(scheduler_output.finished_req_ids)
        return super().execute_model(scheduler_output)

    def kvpolicy_ledger(self) -> dict[str, Any]:
        """Ledgers and totals of requests that are finished, or idle here.

        The scheduler announces the end of the last requests only with the next step, so that
        a request without one counts as it stands.
        """
        engine = Engine.of(self.vllm_config)
        return engine.book.report({i: engine.blocks_of(i) for i in engine.book.accounts})

    def kvpolicy_retained_positions(self, request_id: str, layer: int) -> list[list[int]] | None:
        """Positions that a request holds in a layer, per KV head; None if unknown."""
        engine = Engine.of(self.vllm_config)
        for live_id in engine.book.accounts:
            if external_id(live_id) == request_id:
                states = engine.book.retained(live_id, engine.blocks_of(live_id))
                break
        else:
            states = engine.book.states.get(request_id, {})
        return states[layer].tolist() if layer in states else None
