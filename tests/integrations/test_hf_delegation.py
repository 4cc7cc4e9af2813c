"""A model that serves a PolicyCache serves everything else exactly as before."""

import copy
import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

from fixtures.models import SMALL_SHAPE, random_llama, random_prompt, save_model
from kvpolicy_hf import PolicyCache


@cache
def pair(implementation: str) -> tuple[Any, Any]:
    """Build one model twice: untouched, and after a PolicyCache was made for it."""
    plain, used = random_llama(**SMALL_SHAPE), random_llama(**SMALL_SHAPE)
    for each in (plain, used):
        each.set_attn_implementation(implementation)
    PolicyCache(used, "h2o:budget=16")
    return plain, used


def caches(model: Any, kind: str) -> DynamicCache | StaticCache | None:
    """Make a cache of transformers' own, or none."""
    match kind:
        case "dynamic":
            return DynamicCache(config=model.config)
        case "static":
            return StaticCache(config=model.config, max_cache_len=40)
        case _:
            return None


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["none", "dynamic", "static"])
@pytest.mark.parametrize("padding", [0, 5])
@torch.no_grad()
def test_other_caches_give_bit_identical_logits(
    implementation: str, kind: str, padding: int
) -> None:
    """Proves delegation: same masks, same kernels, difference 0.0, with a PolicyCache between."""
    logits = []
    ids = torch.tensor([random_prompt(pair("sdpa")[0], 30, seed) for seed in range(2)])
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    for model in pair(implementation):
        past = caches(model, kind)
        parts = [(0, 20), (20, 29), (29, 30)] if past is not None else [(0, 30)]
        outputs = []
        for first, last in parts:
            arguments: dict[str, Any] = {"attention_mask": mask[:, :last]} if padding else {}
            if past is not None:
                arguments["past_key_values"] = past
            outputs.append(model(ids[:, first:last], **arguments).logits)
            if model is pair(implementation)[1]:
                model(ids, past_key_values=PolicyCache(model, "window:budget=4"))
        logits.append(torch.cat(outputs, dim=1))
    assert torch.equal(*logits)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_generate_without_a_policy_is_as_before(implementation: str) -> None:
    """Proves plain generation and beam search still work on the same model."""
    ids = torch.tensor([random_prompt(pair("sdpa")[0], 20, 0)])
    for arguments in ({}, {"num_beams": 2}):
        first, second = (
            model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0, **arguments)
            for model in pair(implementation)
        )
        assert torch.equal(first, second)


def test_importing_changes_nothing_and_the_name_is_registered_once_needed() -> None:
    """Proves the model's implementation becomes `kvpolicy` when a cache is made, not before."""
    model: Any = random_llama(**SMALL_SHAPE)
    assert model.config._attn_implementation == "sdpa"
    PolicyCache(model, "full")
    PolicyCache(model, "window:budget=8")
    assert model.config._attn_implementation == "kvpolicy"


@torch.no_grad()
def test_a_copied_model_still_delegates() -> None:
    """Proves what was replaced is remembered through deepcopy, without a PolicyCache for it."""
    plain, used = pair("eager")
    ids = torch.tensor([random_prompt(plain, 20, 0)])
    assert torch.equal(copy.deepcopy(used)(ids).logits, plain(ids).logits)


def test_saved_models_carry_no_trace(tmp_path: Path) -> None:
    """Proves config.json is the same, and the model loads without kvpolicy's name."""
    for name, model in zip(("plain", "used"), pair("sdpa"), strict=True):
        save_model(model, tmp_path / name)
    configs = [json.loads((tmp_path / n / "config.json").read_text()) for n in ("plain", "used")]
    assert configs[0] == configs[1]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "used")
    assert loaded.config._attn_implementation == "sdpa"
