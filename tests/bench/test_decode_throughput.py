"""Decoding speed of vLLM under a policy beside stock vLLM, at equal attended length.

Engines live in one process and take turns, so that a busy machine slows both alike; what
counts is the ratio. A policy's request attends to budget..budget+interval slots, a stock
request of the same mean length to as many tokens.
"""

import statistics
import time
from pathlib import Path

import pytest
from transformers import PreTrainedModel
from vllm import LLM, SamplingParams

from fixtures.engines import start_engine
from fixtures.models import random_llama, random_prompt, save_model

pytestmark = [pytest.mark.bench, pytest.mark.vllm]

BUDGET, INTERVAL = 1024, 64
ROUNDS = 3
"""Each of them as long as an interval, so that every policy evicts once in it."""

TURN = 8
"""Steps after which it is the next engine's turn."""

STOCK_LENGTH = BUDGET + INTERVAL // 2 - ROUNDS * INTERVAL // 2
"""Prompt of stock requests, whose mean length over the rounds is then a policy's mean."""

SEGMENT = 1536
POLICIES = {
    "window": f"window:budget={BUDGET},interval={INTERVAL}",
    "sinks": f"sinks:budget={BUDGET},interval={INTERVAL}",
    "tova": f"tova:budget={BUDGET},interval={INTERVAL}",
    "h2o": f"h2o:budget={BUDGET},interval={INTERVAL}",
    "keys": f"fixtures.policies.KeyAndValueNorm:budget={BUDGET},interval={INTERVAL}",
    "centroid": f"centroid:budget={BUDGET},interval={INTERVAL}",
    "compressive": f"compressive:budget={BUDGET},interval={INTERVAL - 1}",
    "most-used": f"compressive:budget={BUDGET},interval={INTERVAL - 1},fn=most-used",
    "fam": f"fam:block={INTERVAL},segments={BUDGET // INTERVAL - 1}",
    "infini": f"infini:segment={SEGMENT},gate=0.3",
    "calibrated": f"infini:segment={SEGMENT},gate=calibrated",
}
"""Specs by the name that is printed.

Requests under infini are measured inside their second segment, over as many tokens as a stock
request has.
"""
EVICTING = ("window", "sinks", "tova", "h2o", "keys")
GROUPS = {
    "evicting": EVICTING,
    "memories": tuple(name for name in POLICIES if name not in EVICTING),
}
"""Names of policies that are measured together, beside the stock engine."""

SHAPE = {
    "num_hidden_layers": 16,
    "hidden_size": 1024,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "intermediate_size": 2816,
    "vocab_size": 512,
}


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    """A random Llama of 0.2 billion parameters."""
    return random_llama(**SHAPE)


@pytest.fixture(scope="module")
def path(model, tmp_path_factory) -> Path:
    """The model on disk."""
    return save_model(model, tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def stock(path) -> LLM:
    """The engine that all are compared with."""
    return start(path, None)


@pytest.fixture(scope="module", params=GROUPS)
def engines(request, path, stock) -> dict[str, LLM]:
    """One engine per policy of a group, beside the stock one."""
    names = GROUPS[request.param]
    return {"stock": stock} | {name: start(path, POLICIES[name]) for name in names}


def start(path: Path, spec: str | None) -> LLM:
    """Start an engine with room for eight requests."""
    settings = {"kv_cache_memory_bytes": 512 << 20, "max_num_batched_tokens": 1024}
    return start_engine(path, spec, max_model_len=4096, **settings)


def prompt_length(name: str) -> int:
    """Tokens before decoding is measured."""
    if name == "stock":
        return STOCK_LENGTH
    return SEGMENT + STOCK_LENGTH if "infini" in POLICIES[name] else BUDGET + INTERVAL


def start_requests(llm: LLM, prompts: list[list[int]]) -> list[str]:
    """Put requests into the batch, process their prompts, and give their names."""
    parameters = SamplingParams(
        max_tokens=1_000, temperature=0.0, ignore_eos=True, detokenize=False
    )
    names = [f"{len(prompts)}-{index}" for index in range(len(prompts))]
    for name, prompt in zip(names, prompts, strict=True):
        llm.llm_engine.add_request(name, {"prompt_token_ids": prompt}, parameters)
    started: set[str] = set()
    while len(started) < len(prompts):
        started |= {output.request_id for output in llm.llm_engine.step()}
    return names


def seconds_per_step(engines: dict[str, LLM]) -> dict[str, float]:
    """Mean time of a decoding step of the whole batch in one round, by engine."""
    seconds = dict.fromkeys(engines, 0.0)
    for _ in range(INTERVAL // TURN):
        for name, llm in engines.items():
            begin = time.perf_counter()
            for _ in range(TURN):
                llm.llm_engine.step()
            seconds[name] += time.perf_counter() - begin
    return {name: total / INTERVAL for name, total in seconds.items()}


@pytest.mark.parametrize("batch", [1, 8])
def test_decode_ratio_to_stock(batch, model, engines, capsys):
    """Prints tokens per second of every policy and their ratio to stock, medians of rounds."""
    running = {
        name: start_requests(
            llm, [random_prompt(model, prompt_length(name), seed) for seed in range(batch)]
        )
        for name, llm in engines.items()
    }
    rounds = [seconds_per_step(engines) for _ in range(ROUNDS)]
    for name, requests in running.items():
        engines[name].llm_engine.abort_request(requests)
    with capsys.disabled():
        print(f"\ndecode, batch {batch}, {BUDGET}..{BUDGET + INTERVAL} slots, float32")
        print("policy       tokens/s   ratio to stock (min..max of rounds)")
        for name in engines:
            speed = batch / statistics.median(times[name] for times in rounds)
            ratios = sorted(times["stock"] / times[name] for times in rounds)
            print(
                f"{name:11} {speed:9.1f}   {statistics.median(ratios):.3f} "
                f"({ratios[0]:.3f}..{ratios[-1]:.3f})"
            )
