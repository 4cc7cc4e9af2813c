"""Memories in transformers compute what the float64 oracle computes, in any chunking."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import DynamicCache

from fixtures.caches import feed, retained, small_llama
from fixtures.models import (
    SMALL_SHAPE,
    CertifiedPrompt,
    certified_prompts,
    random_gemma,
    random_llama,
    random_mistral,
    random_prompt,
    random_qwen3,
)
from kvpolicy_hf import PolicyCache
from oracles.llama import ModelOracle

PROMPT, NEW = 44, 8
TOLERANCE = 1e-3
"""On logits of a few units; float32 noise reaches 1e-4."""

MAIN = (
    "bswa:block=8,segments=1",
    "compressive:budget=18,rate=2,interval=6",
    "compressive:budget=18,interval=6,fn=most-used",
    "centroid:budget=16,interval=4",
    "fam:block=8,segments=1,slots=4",
    "fam:block=8,segments=1,slots=4,level=model",
    "infini:segment=8,gate=0.4",
    "infini:segment=8,gate=calibrated",
)
"""One spec of every kind of memory."""

CHOOSING = (
    "compressive:budget=18,interval=6,fn=most-used",
    "centroid:budget=16,interval=4",
    "fam:block=8,segments=1,slots=4",
)
"""Those of them that decide between tokens or slots."""

SPECS = (
    *MAIN,
    "bswa:block=5,segments=2,sinks=3",
    "bswa:block=8,segments=0",
    "compressive:budget=16",
    "compressive:budget=19,rate=4,memory=5,interval=12,sinks=3,bias=none",
    "compressive:budget=12,memory=2,interval=12",
    "compressive:budget=18,interval=6,fn=max",
    "compressive:budget=18,interval=6,fn=conv",
    "compressive:budget=18,interval=6,fn=attention",
    "compressive:budget=18,interval=6,min_similarity=0.55",
    "compressive:budget=16,memory=0",
    "centroid:budget=16,slots=6,interval=5,sinks=2,bias=none",
    "fam:block=5,budget=23,slots=5,sinks=3,bias=none",
    "fam:block=5,budget=23,slots=5,sinks=3,level=model,query=previous",
    "fam:block=8,segments=1,slots=0",
    "infini:segment=8",
    "infini:segment=7,gate=0.4,update=delta",
    "infini:segment=7,gate=calibrated,update=delta",
)
FAMILIES: dict[str, Callable[[], Any]] = {
    "mha": lambda: random_llama(**SMALL_SHAPE | {"num_key_value_heads": 4}),
    "qwen3": random_qwen3,
    "mistral": random_mistral,
    "gemma": random_gemma,
}


@cache
def certified(spec: str) -> CertifiedPrompt:
    """Find a prompt on which float32 cannot decide otherwise."""
    return certified_prompts(small_llama(), [spec], [PROMPT], max_new_tokens=NEW)[0]


def require_the_oracles_steps(spec: str, ids: list[int], oracle: ModelOracle) -> None:
    """Assert equal logits and sets after every token."""
    past = PolicyCache(small_llama(), spec)
    for token in ids:
        logits = feed(small_llama(), past, [token], [])[0]
        np.testing.assert_allclose(logits, oracle.feed(token), atol=TOLERANCE, rtol=0)
        assert retained(past) == oracle.retained


@pytest.mark.parametrize("spec", SPECS)
def test_every_token_is_the_oracles(spec: str) -> None:
    """Proves equality of logits and sets after each single token, for every option."""
    prompt = certified(spec)
    require_the_oracles_steps(
        spec, prompt.ids + prompt.run.tokens[:-1], ModelOracle(small_llama(), spec)
    )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("spec", MAIN)
def test_every_family_generates_what_the_oracle_generates(family: str, spec: str) -> None:
    """Proves QK-norm, Gemma's norms, MHA, GQA and MQA change nothing about memories."""
    used = FAMILIES[family]()
    [prompt] = certified_prompts(used, [spec], [PROMPT], max_new_tokens=NEW)
    past = PolicyCache(used, spec)
    ids = used.generate(
        torch.tensor([prompt.ids]), past_key_values=past, max_new_tokens=NEW, do_sample=False
    )
    assert ids[0, PROMPT:].tolist() == prompt.run.tokens
    assert retained(past) == prompt.run.retained


def kernels(path: Path) -> str:
    """Write kernels for ``fn=conv``; the spec that uses them."""
    generator = torch.Generator().manual_seed(0)
    shape = (2, 2, 3, 32, 32)
    tensors = {
        name: torch.eye(32) / 3 + 0.02 * torch.randn(shape, generator=generator)
        for name in ("keys", "values")
    }
    save_file(tensors, path)
    return f"compressive:budget=18,interval=6,fn=conv,weights={path}"


def gates(path: Path) -> str:
    """Write gates for `infini`; the spec that uses them."""
    save_file({"beta": torch.linspace(-2.0, 1.0, 8).view(2, 4)}, path)
    return f"infini:segment=8,gate={path}"


@pytest.mark.parametrize("write", [kernels, gates])
def test_parameters_from_a_file_are_the_oracles(
    write: Callable[[Path], str], tmp_path: Path
) -> None:
    """Proves fitted kernels and trained gates reach the right layer and head."""
    path = tmp_path / "parameters.safetensors"
    spec = write(path)
    parameters = {name: x.double().numpy() for name, x in load_file(path).items()}
    oracle = ModelOracle(small_llama(), spec, parameters)
    require_the_oracles_steps(spec, random_prompt(small_llama(), PROMPT, 0), oracle)


@cache
def whole(spec: str) -> tuple[torch.Tensor, list[tuple[tuple[int, ...], ...]]]:
    """Give logits and sets of a certified prompt fed at once."""
    past = PolicyCache(small_llama(), spec)
    return feed(small_llama(), past, certified(spec).ids, []), retained(past)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("size", [1, 7, 8])
def test_chunk_size_changes_nothing(spec: str, size: int) -> None:
    """Proves forwards of one token, of blocks, and across blocks equal one forward."""
    past = PolicyCache(small_llama(), spec)
    logits = feed(small_llama(), past, certified(spec).ids, list(range(size, PROMPT, size)))
    torch.testing.assert_close(logits, whole(spec)[0], atol=TOLERANCE, rtol=0)
    assert retained(past) == whole(spec)[1]


@given(
    spec=st.sampled_from(SPECS),
    borders=st.sets(st.integers(1, PROMPT - 1)).map(sorted),
)
@settings(max_examples=60)
def test_any_chunking_gives_the_same_logits_and_sets(spec: str, borders: list[int]) -> None:
    """Proves schedule invariance: where forwards end never shows in any logit or set."""
    past = PolicyCache(small_llama(), spec)
    logits = feed(small_llama(), past, certified(spec).ids, borders)
    torch.testing.assert_close(logits, whole(spec)[0], atol=TOLERANCE, rtol=0)
    assert retained(past) == whole(spec)[1]


def test_memories_without_room_are_plain_windows() -> None:
    """Proves the degenerate cases: no slots, a closed gate, and one segment of blocks."""
    ids = random_prompt(small_llama(), PROMPT, 0)
    for spec, plain in (
        ("fam:block=8,segments=1,slots=0", "bswa:block=8,segments=1"),
        ("fam:block=8,segments=1,slots=0,level=model", "bswa:block=8,segments=1"),
        ("infini:segment=8", "bswa:block=8,segments=0"),
        ("compressive:budget=16,memory=0,interval=3", "window:budget=16,interval=3"),
        ("centroid:budget=16,slots=0,interval=3", "window:budget=16,interval=3"),
        ("bswa:block=3,segments=5", "window:budget=15,interval=3"),
    ):
        logits = feed(small_llama(), PolicyCache(small_llama(), spec), ids, [20, 21])
        other = feed(small_llama(), PolicyCache(small_llama(), plain), ids, [20, 21])
        assert torch.equal(logits, other), spec


@cache
def half() -> Any:
    """Build the model in bfloat16."""
    return random_llama(**SMALL_SHAPE).bfloat16()


def mean_shift(logits: torch.Tensor, others: torch.Tensor) -> float:
    """Average how far log-probabilities lie apart."""
    return float((logits.float().log_softmax(-1) - others.log_softmax(-1)).abs().mean())


@pytest.mark.parametrize("spec", [spec for spec in MAIN if spec not in CHOOSING])
def test_bfloat16_adds_only_the_models_own_rounding(spec: str) -> None:
    """Proves half precision costs a memory no more than it costs the dense model."""
    ids = certified(spec).ids
    rounded = feed(half(), PolicyCache(half(), spec), ids, [30])
    dense = feed(small_llama(), DynamicCache(config=small_llama().config), ids, [30])
    half_dense = feed(half(), DynamicCache(config=half().config), ids, [30])
    assert mean_shift(rounded, whole(spec)[0]) < 2 * mean_shift(half_dense, dense)


@pytest.mark.parametrize("spec", CHOOSING)
def test_bfloat16_choices_lead_to_nearly_the_same_answers(spec: str) -> None:
    """Proves rounded keys, which may swap near-equals, matter less than evicting at all."""
    ids = certified(spec).ids
    rounded = feed(half(), PolicyCache(half(), spec), ids, [30])
    evicting = mean_shift(whole(spec)[0], feed(small_llama(), DynamicCache(), ids, []))
    assert mean_shift(rounded, whole(spec)[0]) < evicting / 2
