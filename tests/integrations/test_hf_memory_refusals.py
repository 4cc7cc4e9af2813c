"""Memories that would not be exact on a model are refused when the cache is made."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from fixtures.models import random_llama
from kvpolicy import PolicyError, UnsupportedError
from kvpolicy_hf import PolicyCache
from kvpolicy_hf.support import rotary_of

TINY: dict[str, Any] = {
    "num_hidden_layers": 2,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 16,
    "vocab_size": 32,
    "max_position_embeddings": 256,
    "pad_token_id": None,
}
FEEDBACK = "fam:block=4,segments=1,slots=2,level=model"
SLOTS = ("fam:block=4,segments=1,slots=2", "centroid:budget=8", "compressive:budget=8")
ROPE: dict[str, dict[str, Any]] = {
    "linear": {"factor": 2.0},
    "llama3": {
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 64},
}


def tiny(**config: Any) -> Any:
    """Build a Llama of two layers."""
    return random_llama(**TINY | config)


def with_rope(kind: str, **more: Any) -> Any:
    """Build a Llama with scaled RoPE."""
    return tiny(rope_parameters={"rope_type": kind, "rope_theta": 1e4, **ROPE[kind], **more})


@pytest.mark.parametrize("kind", ROPE)
def test_scaled_rope_is_undone_exactly(kind: str) -> None:
    """Proves a rotated key turns back to the projected one, times YaRN's factor if there is one."""
    model = with_rope(kind)
    rotate = model.model.rotary_emb
    raw = torch.randn(1, 2, 200, 8, generator=torch.Generator().manual_seed(0))
    positions = torch.arange(200)
    cos, sin = rotate(raw, positions[None])
    first, second = raw.chunk(2, dim=-1)
    rotated = raw * cos + torch.cat([-second, first], dim=-1) * sin
    turned_back = rotary_of(model).shift(rotated, -positions)
    assert rotate.attention_scaling == pytest.approx(1.1386 if kind == "yarn" else 1.0, abs=1e-4)
    torch.testing.assert_close(turned_back, raw * rotate.attention_scaling, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", ROPE)
@pytest.mark.parametrize("spec", SLOTS)
@torch.no_grad()
def test_scaled_rope_keeps_memories_independent_of_chunks(kind: str, spec: str) -> None:
    """Proves memories run on every RoPE that stands still."""
    model, ids = with_rope(kind), torch.arange(30)[None]
    whole, steps = PolicyCache(model, spec), PolicyCache(model, spec)
    logits = model(ids, past_key_values=whole).logits
    parts = [model(ids[:, n : n + 1], past_key_values=steps).logits for n in range(30)]
    torch.testing.assert_close(torch.cat(parts, dim=1), logits, atol=1e-3, rtol=0)


@pytest.mark.parametrize("kind", ROPE)
def test_rows_of_the_model_need_plain_rope(kind: str) -> None:
    """Proves level=model names the RoPE that it does not rotate by, and the way out."""
    with pytest.raises(UnsupportedError, match=rf"plain RoPE only, got .*{kind}.*use level=kv"):
        PolicyCache(with_rope(kind), FEEDBACK)


@pytest.mark.parametrize("spec", [*SLOTS, FEEDBACK, "infini:segment=4,gate=0.5"])
def test_partial_rotary_embeddings_are_refused(spec: str) -> None:
    """Proves heads that RoPE rotates in part are not silently turned as if whole."""
    model = with_rope("linear", partial_rotary_factor=0.5)
    with pytest.raises(UnsupportedError, match=r"rotates 4 of \[8\] dimensions|plain RoPE only"):
        PolicyCache(model, spec)
    PolicyCache(model, "window:budget=8")
    PolicyCache(model, "infini:segment=4")


class Adapted(nn.Linear):
    """A linear map with something beside it, as adapters put it."""


def adapt(model: Any) -> None:
    """Put an adapter in the place of a projection."""
    model.model.layers[1].self_attn.q_proj = Adapted(16, 16)


def add(model: Any) -> None:
    """Add a module that the layer's known forward does not call."""
    model.model.layers[1].adapter = nn.Linear(16, 16)


def hook(model: Any) -> None:
    """Change what a layer gives."""
    model.model.layers[1].register_forward_hook(lambda _module, _inputs, output: output)


def hook_before(model: Any) -> None:
    """Change what a module inside a layer is given."""
    model.model.layers[1].mlp.register_forward_pre_hook(lambda _module, inputs: inputs)


def replace_forward(model: Any) -> None:
    """Wrap a forward, as offloading does."""
    model.model.layers[1].mlp.forward = model.model.layers[0].mlp.forward


class OtherLayer(nn.Module):
    """A layer with the parts of Llama's, that does something else with them."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        for name, part in layer.named_children():
            self.add_module(name, part)


def replace_layer(model: Any) -> None:
    """Put another layer around the same modules."""
    model.model.layers[1] = OtherLayer(model.model.layers[1])


CHANGES: dict[str, tuple[Callable[[Any], None], str]] = {
    "adapter": (adapt, r"layer 1's self_attn.q_proj \(Adapted\) was replaced, adapted or hooked"),
    "added": (add, "layer 1, LlamaDecoderLayer, is none of LlamaDecoderLayer"),
    "hook": (hook, r"layer 1's module \(LlamaDecoderLayer\) was replaced, adapted or hooked"),
    "hook before": (hook_before, r"layer 1's mlp \(LlamaMLP\) was replaced, adapted or hooked"),
    "forward": (replace_forward, r"layer 1's mlp \(LlamaMLP\) was replaced, adapted or hooked"),
    "layer": (replace_layer, "layer 1, OtherLayer, is none of LlamaDecoderLayer"),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_changed_layers_are_refused_where_rows_pass_through_them(kind: str) -> None:
    """Proves level=model is refused on layers it cannot repeat; other memories run there."""
    change, message = CHANGES[kind]
    model = tiny()
    change(model)
    with pytest.raises(UnsupportedError, match=rf"^fam:.*: {message}.*use level=kv"):
        PolicyCache(model, FEEDBACK)
    for spec in (*SLOTS, "fam:block=4,segments=1,slots=0,level=model"):
        PolicyCache(model, spec)


@torch.no_grad()
def test_what_transformers_records_is_no_obstacle() -> None:
    """Proves the hooks that output_hidden_states leaves behind are known to change nothing."""
    model, ids = tiny(), torch.arange(20)[None]
    before = model(ids, past_key_values=PolicyCache(model, FEEDBACK)).logits
    model(ids, output_hidden_states=True, use_cache=False)
    assert torch.equal(model(ids, past_key_values=PolicyCache(model, FEEDBACK)).logits, before)


def test_a_model_without_known_layers_has_a_reason() -> None:
    """Proves whoever asks without transformers' checks gets a reason, not an AttributeError."""
    from kvpolicy.memory.modules import reason_against

    reason = reason_against(nn.Linear(2, 2))
    assert reason is not None
    assert "no layers and embed_tokens" in reason


FILES: dict[str, tuple[str, dict[str, tuple[int, ...]], str]] = {
    "kernels of fewer layers": (
        "compressive:budget=8,fn=conv,weights={}",
        {"keys": (1, 2, 3, 8, 8), "values": (1, 2, 3, 8, 8)},
        "expected kernels 'keys'.*with layer 1 and 2 KV heads, got",
    ),
    "kernels of fewer heads": (
        "compressive:budget=8,fn=conv,weights={}",
        {"keys": (2, 2, 3, 8, 8), "values": (2, 1, 3, 8, 8)},
        "expected kernels 'values'.*with layer 0 and 2 KV heads, got",
    ),
    "kernels of another rate": (
        "compressive:budget=8,fn=conv,rate=2,weights={}",
        {"keys": (2, 2, 3, 8, 8), "values": (2, 2, 3, 8, 8)},
        r"expected kernels 'keys' \[layers, H_kv, \*\(2, 8, 8\)\]",
    ),
    "gates of fewer layers": (
        "infini:segment=4,gate={}",
        {"beta": (1, 2)},
        r"must hold gates 'beta' \[layers, 2\] with layer 1, got \(1, 2\)",
    ),
    "gates of nobody": ("infini:segment=4,gate={}", {"alpha": (2, 2)}, "got none"),
}


@pytest.mark.parametrize("kind", FILES)
def test_parameters_of_another_model_are_refused_at_once(kind: str, tmp_path: Path) -> None:
    """Proves a file is held against every layer when the cache is made, not when it is used."""
    spec, shapes, message = FILES[kind]
    path = tmp_path / "parameters.safetensors"
    save_file({name: torch.zeros(shape) for name, shape in shapes.items()}, path)
    with pytest.raises(PolicyError, match=message):
        PolicyCache(tiny(), spec.format(path))
