"""Prompts under kvpress's presses: a program of the environment that `make bench-env` builds.

It loads a model, runs every prompt under every press and says, as JSON, which positions each KV
head of each layer is left with: {press: [prompt][layer][KV head][kept], ascending}.
"""

import json
import sys
from contextlib import nullcontext

import kvpress
import torch
from transformers import DynamicCache, LlamaForCausalLM


def keys_of(
    model: LlamaForCausalLM, ids: list[int], press: kvpress.ScorerPress | None
) -> list[torch.Tensor]:
    """Keys that every layer is left with, [H_kv, kept, D]."""
    cache = DynamicCache(config=model.config)
    with nullcontext() if press is None else press(model):
        model(torch.tensor([ids]), past_key_values=cache, use_cache=True)
    return [layer.keys[0] for layer in cache.layers]


def positions(kept: torch.Tensor, full: torch.Tensor) -> list[list[int]]:
    """Where keys [H_kv, kept, D] stand among those of the full cache, [H_kv, T, D]."""
    distance = (kept[:, :, None] - full[:, None]).abs().amax(dim=-1)  # [H_kv, kept, T]
    nearest = distance.min(dim=-1)
    assert not nearest.values.any(), "a kept key is one of the full cache"
    return nearest.indices.sort(dim=-1).values.tolist()


def main() -> None:
    """Answer one question: a JSON object on standard input."""
    question = json.load(sys.stdin)
    torch.set_num_threads(1)
    model = LlamaForCausalLM.from_pretrained(question["model"], dtype=torch.float32).eval()
    answers: dict[str, list[list[list[list[int]]]]] = {}
    with torch.inference_mode():
        full = [keys_of(model, ids, None) for ids in question["prompts"]]
        for name, (press_class, options) in question["presses"].items():
            answers[name] = []
            for ids, every in zip(question["prompts"], full, strict=True):
                # kvpress keeps int(T * (1 - ratio)) tokens; half a token more survives rounding.
                ratio = 1 - (question["budget"] + 0.5) / len(ids)
                press = getattr(kvpress, press_class)(compression_ratio=ratio, **options)
                kept = keys_of(model, ids, press)
                answers[name].append([positions(*pair) for pair in zip(kept, every, strict=True)])
    json.dump(answers, sys.stdout)


if __name__ == "__main__":
    main()
