"""Stock vLLM and policies side by side: same prompts, engines of one process, alternating rounds.

The engines live in a child process, so that vLLM's settings (threads, logging, one process per
engine) do not reach the caller, and its output goes to a log file. Importing this module loads
no vLLM, because the child must set its environment before it does.
"""

import os
import statistics
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from kvpolicy import KVPolicyError
from kvpolicy.model_facts import windows_of

if TYPE_CHECKING:
    from vllm import LLM

SETTINGS = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
}
"""Environment of the child. A tiny model is fastest on one thread."""

OVERRIDES = ("VLLM_CPU_KVCACHE_SPACE",)
"""Variables that would take precedence over the plan."""

BLOCK_SIZE = 32


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a trial runs.

    Attributes:
        model: Model folder.
        policies: Policy specs, each an engine of its own beside a stock one.
        prompts: Token ids; they run as one batch.
        new_tokens: Tokens generated per prompt.
        kv_memory: Bytes of KV cache per engine.
        max_model_len: Longest request an engine accepts.
        chunk: Most tokens of one forward, so that longer prompts are prefilled in chunks.
        rounds: Pairs of speed measurements per policy.
    """

    model: str
    policies: tuple[str, ...]
    prompts: tuple[tuple[int, ...], ...]
    new_tokens: int
    kv_memory: int
    max_model_len: int = 32768
    chunk: int = 256
    rounds: int = 5


@dataclass(frozen=True, kw_only=True)
class Generation:
    """What one engine generated, in the order of the prompts.

    Attributes:
        policy: Spec; None for stock vLLM.
        max_concurrency: vLLM's figure for requests of `max_model_len` tokens.
        tokens: New tokens of each request.
        retained: Positions each request held at its end, by layer and KV head.
        ledgers: Each request's ledger.
    """

    policy: str | None
    max_concurrency: float
    tokens: list[list[int]]
    retained: list[list[list[list[int]]]]
    ledgers: list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Decode speed of a policy beside stock vLLM, measured in alternation.

    Attributes:
        policy: Spec.
        tokens_per_second: Of each round.
        stock: Tokens per second of stock vLLM in the same rounds.
    """

    policy: str
    tokens_per_second: list[float]
    stock: list[float]

    @property
    def ratios(self) -> list[float]:
        """Policy over stock, round by round."""
        return [p / s for p, s in zip(self.tokens_per_second, self.stock, strict=True)]

    @property
    def ratio(self) -> float:
        """Median ratio."""
        return statistics.median(self.ratios)


@dataclass(frozen=True)
class _Failure:
    """An error of the child, on one line."""

    message: str


class Trial:
    """A child process that runs plans; use as a context manager.

    It starts importing vLLM at once, and engines when `generate` brings a plan.
    """

    def __enter__(self) -> Self:
        """Start the child."""
        self._folder = tempfile.TemporaryDirectory(prefix="kvpolicy-")
        self._log = Path(self._folder.name) / "vllm.log"
        context = get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, str(self._log)), daemon=True)
        self._process.start()
        theirs.close()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop the child."""
        self._connection.close()
        self._process.join(timeout=10)
        if self._process.is_alive():
            self._process.terminate()
            self._process.join()
        self._folder.cleanup()

    def generate(self, plan: Plan) -> Iterator[Generation]:
        """Run the plan's prompts on stock vLLM, then under each policy.

        Raises:
            KVPolicyError: An engine failed, or a ledger contradicts its occupancy law.
        """
        self._plan = plan
        self._connection.send(plan)
        for _ in range(1 + len(plan.policies)):
            yield self._receive()

    def measure(self) -> Iterator[Speed]:
        """Measure decode speeds of the latest plan, after `generate` is exhausted, by policy."""
        self._connection.send("measure")
        for _ in self._plan.policies:
            yield self._receive()

    def _receive(self) -> Any:
        try:
            message = self._connection.recv()
        except EOFError:
            raise KVPolicyError(f"vLLM's process ended early; {self._last_words()}") from None
        if isinstance(message, _Failure):
            raise KVPolicyError(message.message)
        return message

    def _last_words(self) -> str:
        lines = self._log.read_text("utf-8", "replace").splitlines() if self._log.exists() else []
        return "its last output: " + " | ".join(deque((x for x in lines if x.strip()), maxlen=3))


def _serve(connection: Connection, log: str) -> None:
    """The child: obey the parent until it hangs up."""
    stream = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for number in (1, 2):
        os.dup2(stream, number)
    os.environ.update(SETTINGS)
    for name in OVERRIDES:
        os.environ.pop(name, None)
    try:
        import vllm  # noqa: F401  # the slow part, while the parent prepares the plan

        # Tearing an engine down would take the others' process groups with it: all are kept.
        trials: list[tuple[Plan, dict[str | None, LLM]]] = []
        while True:
            order = connection.recv()
            if isinstance(order, Plan):
                trials.append((order, {}))
                plan, engines = trials[-1]
                for policy in (None, *plan.policies):
                    engines[policy] = _engine(plan, policy)
                    connection.send(_generate(plan, policy, engines[policy]))
            else:
                plan, engines = trials[-1]
                for policy in plan.policies:
                    connection.send(_measure(plan, policy, engines[None], engines[policy]))
    except (EOFError, BrokenPipeError):
        return
    except Exception as error:
        connection.send(_Failure(f"vLLM: {type(error).__name__}: {' '.join(str(error).split())}"))
        raise
    finally:
        sys.stdout.flush()


def _engine(plan: Plan, policy: str | None) -> "LLM":
    """One engine in this process."""
    from vllm import LLM

    from kvpolicy_vllm import engine_args

    return LLM(
        plan.model,
        **({} if policy is None else engine_args(policy)),
        dtype="float32",
        max_model_len=plan.max_model_len,
        block_size=BLOCK_SIZE,
        max_num_batched_tokens=plan.chunk,
        max_num_seqs=len(plan.prompts),
        kv_cache_memory_bytes=plan.kv_memory,
        enforce_eager=True,
        disable_log_stats=True,
    )


def _generate(plan: Plan, policy: str | None, llm: "LLM") -> Generation:
    """Run all prompts as one batch and collect what the policy did."""
    from kvpolicy_vllm import ledger, retained_positions

    outputs = llm.generate(_inputs(plan), _sampling(plan), use_tqdm=False)
    names = [] if policy is None else [output.request_id for output in outputs]
    ledgers = ledger(llm)["requests"] if names else {}
    windows = windows_of(llm.llm_engine.vllm_config.model_config.hf_text_config)
    layers = [layer for layer, window in enumerate(windows) if window is None]
    return Generation(
        policy=policy,
        max_concurrency=_max_concurrency(llm),
        tokens=[list(output.outputs[0].token_ids) for output in outputs],
        retained=[[retained_positions(llm, n, layer).tolist() for layer in layers] for n in names],
        ledgers=[ledgers[name] for name in names],
    )


def _max_concurrency(llm: "LLM") -> float:
    """The figure that vLLM logs when it starts."""
    from vllm.v1.core.kv_cache_utils import get_max_concurrency_for_kv_cache_config

    core: Any = llm.llm_engine.engine_core
    return get_max_concurrency_for_kv_cache_config(
        llm.llm_engine.vllm_config, core.engine_core.scheduler.kv_cache_config
    )


def _measure(plan: Plan, policy: str, stock: "LLM", engine: "LLM") -> Speed:
    """Alternate between both engines; every other round begins with the other one."""
    names = count()
    measured: dict[bool, list[float]] = {True: [], False: []}
    for round_ in range(plan.rounds):
        for is_stock in (True, False) if round_ % 2 else (False, True):
            llm = stock if is_stock else engine
            speed = _decode_speed(plan, llm, lambda: f"speed-{policy}-{next(names)}")
            measured[is_stock].append(speed)
    return Speed(policy=policy, tokens_per_second=measured[False], stock=measured[True])


def _decode_speed(plan: Plan, llm: "LLM", new_name: Callable[[], str]) -> float:
    """Tokens per second from when every prompt has been processed to the end."""
    engine = llm.llm_engine
    waiting = {new_name(): prompt for prompt in _inputs(plan)}
    for name, prompt in waiting.items():
        engine.add_request(name, prompt, _sampling(plan))
    num_tokens, began = 0, 0.0
    while engine.has_unfinished_requests():
        outputs = engine.step()
        if not waiting:
            num_tokens += len(outputs)
            continue
        for output in outputs:
            waiting.pop(output.request_id, None)
        if not waiting:
            began = time.perf_counter()
    return num_tokens / (time.perf_counter() - began)


def _inputs(plan: Plan) -> list[Any]:
    return [{"prompt_token_ids": list(prompt)} for prompt in plan.prompts]


def _sampling(plan: Plan) -> Any:
    """Greedy, exactly `new_tokens` long."""
    from vllm import SamplingParams

    return SamplingParams(
        max_tokens=plan.new_tokens, temperature=0.0, ignore_eos=True, detokenize=False
    )
