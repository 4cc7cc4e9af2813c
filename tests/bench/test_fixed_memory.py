"""How much a fixed KV memory serves: stock vLLM beside policies, on the same pool of blocks.

The pool holds eight full requests. Every engine works off the same load alone, stock before and
after the policies, so that a machine that slows down shows.
"""

import time
from dataclasses import dataclass

import pytest
from transformers import PreTrainedModel
from vllm import LLM, SamplingParams

import kvpolicy_vllm
from fixtures.engines import BLOCK_SIZE, start_engine
from fixtures.models import random_llama, random_prompt, save_model

pytestmark = [pytest.mark.bench, pytest.mark.vllm]

FULL_REQUESTS = 8
BUDGET = 256
POLICIES = {"window": f"window:budget={BUDGET}", "h2o": f"h2o:budget={BUDGET}"}


@dataclass(frozen=True)
class Load:
    """Requests that arrive at once.

    Attributes:
        requests: How many.
        prompt: Tokens of each prompt.
        output: Tokens that each generates.
    """

    requests: int
    prompt: int
    output: int

    @property
    def tokens(self) -> int:
        """Tokens of one request."""
        return self.prompt + self.output

    @property
    def num_blocks(self) -> int:
        """Blocks of the pool, vLLM's null block included."""
        return FULL_REQUESTS * -(-self.tokens // BLOCK_SIZE) + 1


LOADS = {"long outputs": Load(48, 256, 2048), "long prompts": Load(16, 8192, 64)}


@dataclass(frozen=True)
class Served:
    """What became of a load.

    Attributes:
        seconds: Until the last request was done.
        running: Mean number of running requests, over time.
        preemptions: Requests that lost their blocks.
    """

    seconds: float
    running: float
    preemptions: int


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    """A random Llama, so small that it takes 48 requests to a length of 2,304 in minutes."""
    return random_llama()


@pytest.fixture(scope="module")
def path(model, tmp_path_factory):
    """The model on disk."""
    return save_model(model, tmp_path_factory.mktemp("llama"))


def serve(llm: LLM, prompts: list[list[int]], output: int, name: str) -> Served:
    """Work off requests that arrive at once."""
    engine = llm.llm_engine
    scheduler = engine.engine_core.engine_core.scheduler
    parameters = SamplingParams(
        max_tokens=output, temperature=0.0, ignore_eos=True, detokenize=False
    )
    for index, prompt in enumerate(prompts):
        engine.add_request(f"{name}-{index}", {"prompt_token_ids": prompt}, parameters)
    preempted, original = [0], scheduler._preempt_request

    def preempt(*args, **kwargs):
        preempted[0] += 1
        return original(*args, **kwargs)

    scheduler._preempt_request = preempt
    begin = now = time.perf_counter()
    area = 0.0
    while engine.has_unfinished_requests():
        engine.step()
        before, now = now, time.perf_counter()
        area += (now - before) * len(scheduler.running)
    scheduler._preempt_request = original
    return Served(now - begin, area / (now - begin), preempted[0])


@pytest.mark.parametrize("name", LOADS)
def test_fixed_memory(name, model, path, capsys):
    """Prints running requests and throughput on one pool, and both as ratios to stock."""
    load = LOADS[name]
    settings = {
        "num_gpu_blocks_override": load.num_blocks,
        "max_model_len": load.tokens,
        "max_num_seqs": load.requests,
        "max_num_batched_tokens": 1024,
    }
    engines = {
        key: start_engine(path, spec, **settings)
        for key, spec in ({"stock": None} | POLICIES).items()
    }
    prompts = [random_prompt(model, load.prompt, seed) for seed in range(load.requests)]
    turns = ["stock", *POLICIES, "stock"]
    served = [
        (key, serve(engines[key], prompts, load.output, str(turn)))
        for turn, key in enumerate(turns)
    ]
    for key in POLICIES:
        totals = kvpolicy_vllm.ledger(engines[key])["totals"]
        assert totals["requests"] == load.requests
    stock = [result for key, result in served if key == "stock"]
    tokens = load.requests * load.output
    with capsys.disabled():
        print(
            f"\n{name}: {load.requests} requests of {load.prompt} + {load.output} tokens, a pool "
            f"of {load.num_blocks - 1} blocks of {BLOCK_SIZE} ({FULL_REQUESTS} full requests), "
            f"budget {BUDGET}"
        )
        print("policy   running   of stock   tokens/s   of stock   preempted")
        for key, result in served:
            running = [result.running / each.running for each in stock]
            speed = [each.seconds / result.seconds for each in stock]
            print(
                f"{key:8} {result.running:7.1f} {shown(running):>10} "
                f"{tokens / result.seconds:10.0f} {shown(speed):>10} {result.preemptions:11}"
            )


def shown(ratios: list[float]) -> str:
    """Ratios to both runs of stock."""
    return f"{min(ratios):.2f}..{max(ratios):.2f}"
