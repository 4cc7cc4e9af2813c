"""Time steps of vLLM alone beside vLLM with this plugin and no policy, taking turns.

A plugin that was loaded stays loaded, so that this has a process of its own, where vLLM alone
comes first. Prints a line of JSON: per pair of turns, the seconds of vLLM alone and those with
the plugin. Usage: policy_off.py MODEL
"""

import json
import os
import sys
from time import perf_counter
from unittest.mock import patch

from vllm import LLM, SamplingParams, plugins
from vllm.v1.sample import logits_processor

BATCH, PROMPT = 8, 32
PAIRS, STEPS = 400, 4


def start(model: str) -> LLM:
    """Start an engine with all requests in its batch, their prompts processed."""
    llm = LLM(
        model,
        dtype="float32",
        skip_tokenizer_init=True,
        block_size=32,
        kv_cache_memory_bytes=256 << 20,
        max_model_len=2048,
        max_num_seqs=BATCH,
        enforce_eager=True,
        disable_log_stats=True,
    )
    parameters = SamplingParams(
        max_tokens=2048 - PROMPT, temperature=0.0, ignore_eos=True, detokenize=False
    )
    for index in range(BATCH):
        prompt = {"prompt_token_ids": list(range(index, index + PROMPT))}
        llm.llm_engine.add_request(str(index), prompt, parameters)
    seconds(llm)
    return llm


def seconds(llm: LLM) -> float:
    """Time of some steps."""
    begin = perf_counter()
    for _ in range(STEPS):
        llm.llm_engine.step()
    return perf_counter() - begin


def is_loaded() -> bool:
    """Whether the plugin is in this process."""
    return "kvpolicy_vllm" in sys.modules


def main() -> None:
    """Let both take turns, each first in every other pair."""
    [model] = sys.argv[1:]
    with (
        patch.dict(os.environ, VLLM_PLUGINS=""),
        # These are loaded whatever VLLM_PLUGINS says.
        patch.object(logits_processor, "_load_logitsprocs_plugins", list),
    ):
        alone = start(model)
    assert not is_loaded(), "vLLM alone"
    plugins.plugins_loaded = False
    engines = [alone, start(model)]
    assert is_loaded(), "the plugin is not installed"
    pairs: list[list[float]] = []
    for turn in range(PAIRS):
        order = (0, 1) if turn % 2 == 0 else (1, 0)
        times = {which: seconds(engines[which]) for which in order}
        pairs.append([times[0], times[1]])
    print(json.dumps(pairs))


if __name__ == "__main__":
    main()
