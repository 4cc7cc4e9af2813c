"""Decoding speed of vLLM under a policy beside stock vLLM, at equal attended length.

Engines live in one process and take turns, so that a busy machine slows both alike; what
counts is the ratio. A policy's request attends to budget..budget+interval slots, a stock
request of the same mean length to as many tokens.
"""

import statistics
import time

import pytest
from vllm import LLM, SamplingParams

from fixtures.engines import start_engine
from fixtures.models import random_llama, random_prompt, save_model

pytestmark = [pytest.mark.bench, pytest.mark.vllm]

BUDGET, INTERVAL = 1024, 64
STEPS, ROUNDS = 2 * INTERVAL, 5
STOCK_LENGTH = BUDGET + INTERVAL // 2 - STEPS // 2
"""Prompt of stock requests, whose mean length over the steps is then a policy's mean."""

POLICIES = ("window", "sinks", "tova", "h2o")
SHAPE = {
    "num_hidden_layers": 16,
    "hidden_size": 1024,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "intermediate_size": 2816,
    "vocab_size": 512,
}


def start_requests(llm: LLM, prompts: list[list[int]]) -> None:
    """Put requests into the batch and process their prompts."""
    parameters = SamplingParams(
        max_tokens=100_000, temperature=0.0, ignore_eos=True, detokenize=False
    )
    for index, prompt in enumerate(prompts):
        llm.llm_engine.add_request(str(index), {"prompt_token_ids": prompt}, parameters)
    started: set[str] = set()
    while len(started) < len(prompts):
        started |= {output.request_id for output in llm.llm_engine.step()}


def seconds_per_step(llm: LLM, steps: int) -> float:
    """Mean time of a decoding step of the whole batch."""
    begin = time.perf_counter()
    for _ in range(steps):
        llm.llm_engine.step()
    return (time.perf_counter() - begin) / steps


@pytest.mark.parametrize("batch", [1, 8])
def test_decode_ratio_to_stock(batch, tmp_path, capsys):
    """Prints tokens per second of every policy and their ratio to stock, medians of rounds."""
    model = random_llama(**SHAPE)
    path = save_model(model, tmp_path)
    prompts = [random_prompt(model, BUDGET + INTERVAL, seed) for seed in range(batch)]
    engines = {"stock": start_engine(path, **settings())}
    for name in POLICIES:
        policy = f"{name}:budget={BUDGET},interval={INTERVAL}"
        engines[name] = start_engine(path, policy, **settings())
    start_requests(engines["stock"], [prompt[:STOCK_LENGTH] for prompt in prompts])
    for name in POLICIES:
        start_requests(engines[name], prompts)
    rounds = [
        {name: seconds_per_step(llm, STEPS // ROUNDS) for name, llm in engines.items()}
        for _ in range(ROUNDS)
    ]
    with capsys.disabled():
        print(f"\ndecode, batch {batch}, {BUDGET}..{BUDGET + INTERVAL} slots, float32")
        print("policy   tokens/s   ratio to stock (min..max of rounds)")
        for name in engines:
            speed = batch / statistics.median(times[name] for times in rounds)
            ratios = sorted(times["stock"] / times[name] for times in rounds)
            print(
                f"{name:7} {speed:9.1f}   {statistics.median(ratios):.3f} "
                f"({ratios[0]:.3f}..{ratios[-1]:.3f})"
            )


def settings() -> dict:
    """Engine arguments that hold eight requests."""
    return {"kv_cache_memory_bytes": 512 << 20, "max_num_batched_tokens": 1024}
