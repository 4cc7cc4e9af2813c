"""What snapkv, knorm and keydiff keep of a prompt, beside kvpress's presses on the same model."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from fixtures.models import random_llama, random_prompt, save_model
from kvpolicy_hf import PolicyCache
from oracles.llama import ModelOracle

pytestmark = pytest.mark.bench

KVPRESS_PYTHON = Path(__file__).parents[2] / ".venv-bench" / "bin" / "python"
BUDGET = 96
LENGTHS = (100, 160, 257, 400)
PRESSES = {
    f"snapkv:budget={BUDGET},window=32,kernel=5": (
        "SnapKVPress",
        {"window_size": 32, "kernel_size": 5},
    ),
    f"snapkv:budget={BUDGET},window=8,kernel=7": (
        "SnapKVPress",
        {"window_size": 8, "kernel_size": 7},
    ),
    f"knorm:budget={BUDGET},prefill=bulk": ("KnormPress", {}),
    f"keydiff:budget={BUDGET},prefill=bulk": ("KeyDiffPress", {}),
}


def test_prompts_are_left_with_what_kvpress_leaves(tmp_path, capsys):
    """Every layer and KV head keeps what kvpress's own press keeps, but for certified near-ties.

    The float64 oracle follows kvpress's sets through each prompt and objects to any other
    difference.
    """
    model = random_llama()
    prompts = [random_prompt(model, length, seed=length) for length in LENGTHS]
    question = {
        "model": str(save_model(model, tmp_path)),
        "prompts": prompts,
        "presses": PRESSES,
        "budget": BUDGET,
    }
    answer = subprocess.run(
        [KVPRESS_PYTHON, Path(__file__).with_name("kvpress_prompts.py")],
        input=json.dumps(question),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    theirs = json.loads(answer.stdout)
    with capsys.disabled():
        print(f"\nkept of prompts of {LENGTHS} tokens, budget {BUDGET}, beside kvpress")
        for spec in PRESSES:
            runs = list(zip(prompts, theirs[spec], strict=True))
            near_ties = sum(follow(model, spec, ids, layers) for ids, layers in runs)
            ours = [heads for ids in prompts for heads in retained(model, spec, ids)]
            kept = [heads for layers in theirs[spec] for heads in layers]
            equal = [a == b for a, b in zip(ours, kept, strict=True)]
            print(
                f"  {spec:45} {sum(equal)} of {len(equal)} layers are equal in every KV head; "
                f"kvpress and the oracle part at {near_ties} near-ties"
            )
            assert len(equal) - sum(equal) <= near_ties, spec


def follow(model: PreTrainedModel, spec: str, ids: list[int], kept: list[list[list[int]]]) -> int:
    """Near-ties at which the float64 oracle adopts what somebody keeps of a prompt."""
    oracle = ModelOracle(model, spec, prompt=len(ids))
    for token in ids[:-1]:
        oracle.feed(token)
    oracle.feed(ids[-1], host_retained=kept)
    return oracle.near_ties


def retained(model: PreTrainedModel, spec: str, ids: list[int]) -> list[list[list[int]]]:
    """What a policy keeps of a prompt, [layer][KV head][kept]."""
    cache = PolicyCache(model, spec)
    with torch.inference_mode():
        model(torch.tensor([ids]), past_key_values=cache)
    layers = range(model.config.num_hidden_layers)
    return [cache.retained_positions(layer).tolist() for layer in layers]
