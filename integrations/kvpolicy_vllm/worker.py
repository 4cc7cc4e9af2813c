"""vLLM's CPU worker with a ledger: it knows requests by id and when they finish."""

from collections.abc import Collection
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from vllm.v1.worker.cpu_worker import CPUWorker

from kvpolicy import LedgerError
from kvpolicy_vllm import requestlog
from kvpolicy_vllm.book import external_id
from kvpolicy_vllm.config import (
    check_engine,
    configured_capture,
    configured_policy,
    logs_requests,
)
from kvpolicy_vllm.dispatch import forget_choice
from kvpolicy_vllm.engine import Engine
from kvpolicy_vllm.header import header_of
from kvpolicy_vllm.lora import adapters_apart
from kvpolicy_vllm.metrics import Meter
from kvpolicy_vllm.recorder import Recorder

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner


def make_room_for_earlier_stages(runner: "GPUModelRunner") -> None:
    """Make what a pipeline's later stage receives the earlier ones' numbers in.

    vLLM makes it with the model's first forward for nobody, which its CPU worker leaves out where
    the model is not compiled, so that the first request would end the engine.
    """
    from vllm.distributed import get_pp_group

    if get_pp_group().is_first_rank or runner.intermediate_tensors is not None:
        return
    model: Any = runner.model
    runner.intermediate_tensors = model.make_empty_intermediate_tensors(
        batch_size=runner.max_num_tokens, dtype=runner.model_config.dtype, device=runner.device
    )


class PolicyWorker(CPUWorker):
    """Given as ``worker_cls``; without a policy it is vLLM's worker."""

    def __init__(self, vllm_config: "VllmConfig", *args: Any, **kwargs: Any) -> None:
        """Refuse engines that cannot keep the policy's promises before anything is loaded."""
        policy = configured_policy(vllm_config)
        if policy is not None:
            check_engine(vllm_config, policy)
            logs_requests(vllm_config)
            capture = configured_capture(vllm_config)
            if capture is not None:
                capture.make_directory()
        forget_choice()
        super().__init__(vllm_config, *args, **kwargs)

    def init_device(self) -> None:
        """Introduce the model runner to the engine, and observers to its book."""
        super().init_device()
        engine = Engine.find(self.vllm_config)
        if engine is None:
            return
        engine.runner = self.model_runner
        if logs_requests(self.vllm_config):
            engine.book.observers.append(requestlog.log)
        engine.meter = Meter.of(self.vllm_config)
        if engine.meter is not None:
            engine.meter.begin(engine.policy)
            engine.book.observers.append(engine.meter.count)

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Load the model, and get ready to record what the configuration asks for."""
        engine, capture = Engine.find(self.vllm_config), configured_capture(self.vllm_config)
        with nullcontext() if engine is None else adapters_apart():
            super().load_model(*args, **kwargs)
        if engine is not None:
            make_room_for_earlier_stages(self.model_runner)
        if engine is not None and capture is not None:
            header = header_of(engine.policy, capture, self.vllm_config, self.model_runner.model)
            engine.recorder = Recorder(capture, header)

    def execute_model(self, scheduler_output: "SchedulerOutput") -> Any:
        """Close finished requests, whose blocks this step may overwrite, then run it."""
        engine = Engine.find(self.vllm_config)
        if engine is not None:
            engine.book.drop(scheduler_output.preempted_req_ids or ())
            engine.close(scheduler_output.finished_req_ids)
            if engine.recorder is not None:
                engine.recorder.finish(scheduler_output.finished_req_ids)
            for new in scheduler_output.scheduled_new_reqs:
                engine.meet(new.req_id, new.sampling_params)
            engine.show()
        return super().execute_model(scheduler_output)

    def shutdown(self) -> None:
        """Complete the traces of requests that run no further, and withdraw their figures."""
        engine = Engine.find(self.vllm_config)
        if engine is not None and engine.recorder is not None:
            engine.recorder.close()
        if engine is not None and engine.meter is not None:
            engine.meter.close()
        super().shutdown()

    def kvpolicy_ledger(self) -> dict[str, Any]:
        """Ledgers and totals of requests that are finished, or idle here; or ``{"fault": line}``.

        The scheduler announces the end of the last requests only with the next step, so that
        a request without one counts as it stands.
        """
        engine = Engine.of(self.vllm_config)
        try:
            return engine.book.report({i: engine.blocks_of(i) for i in engine.book.accounts})
        except LedgerError as error:  # processes hand on no classes of errors
            return {"fault": str(error)}

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

    def kvpolicy_captures(self, running: Collection[str]) -> dict[str, list[str]]:
        """Complete traces and what went wrong: ``{"finished": [path], "faults": [line]}``.

        Args:
            running: Internal ids of requests that are not finished. The scheduler announces the
                end of the last requests only with the next step, the front end knows it before.
        """
        recorder = Engine.of(self.vllm_config).recorder
        assert recorder is not None, "the front end knows whether there is one"
        return recorder.report(running)
