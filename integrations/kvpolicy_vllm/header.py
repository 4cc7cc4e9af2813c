"""What the traces of an engine say about its model."""

import hashlib
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

import torch
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding
from vllm.model_executor.layers.rotary_embedding.llama3_rope import Llama3RotaryEmbedding

import kvpolicy
from kvpolicy import CachePolicy, UnsupportedError
from kvpolicy.trace import Header, Rope
from kvpolicy_vllm.backend import PLAIN_ROTARY
from kvpolicy_vllm.capture import Capture
from kvpolicy_vllm.plugin import vllm_version

if TYPE_CHECKING:
    from vllm.config import VllmConfig

_ROPE_KINDS = {RotaryEmbedding: "default", Llama3RotaryEmbedding: "llama3"}
"""Rotary embeddings that are inverse frequencies and nothing else."""


def header_of(
    policy: CachePolicy, capture: Capture, vllm_config: "VllmConfig", model: torch.nn.Module
) -> Header:
    """Describe a loaded model and what of it is recorded.

    Raises:
        UnsupportedError: Its layers differ in their dimensions, or some of them attend to a
            sliding window.
    """
    config = vllm_config.model_config
    context = vllm_config.compilation_config.static_forward_context
    layers: list[Any] = [layer for layer in context.values() if isinstance(layer, Attention)]
    if any(layer.sliding_window is not None for layer in layers):
        raise UnsupportedError(
            f"capture records what attends to all tokens, and some layers of {config.model} attend "
            "to a sliding window; choose another model"
        )
    shapes = {(x.num_heads, x.num_kv_heads, x.head_size, float(x.impl.scale)) for x in layers}
    if len(shapes) != 1:
        raise UnsupportedError(
            f"capture needs layers that are alike, {config.model} has heads, KV heads, sizes and "
            f"scales of {sorted(shapes)}; choose another model"
        )
    [(num_heads, num_kv_heads, head_dim, scale)] = shapes
    return Header(
        model=PurePath(config.model).name,
        model_type=config.hf_text_config.model_type,
        num_layers=len(layers),
        num_query_heads=num_heads,
        num_kv_heads=num_kv_heads,
        layers=tuple(range(len(layers))) if capture.layers is None else capture.layers,
        kv_heads=tuple(range(num_kv_heads)) if capture.kv_heads is None else capture.kv_heads,
        head_dim=head_dim,
        value_dim=head_dim,
        dtype=str(config.dtype).removeprefix("torch."),
        scale=scale,
        rope=_rope(config.hf_text_config.model_type, model),
        tokenizer=_tokenizer_hash(Path(config.tokenizer or config.model)),
        policy=str(policy),
        producer=f"kvpolicy {kvpolicy.__version__}, vllm {vllm_version()}",
    )


def _tokenizer_hash(folder: Path) -> str:
    """SHA-256 of the tokenizer's file; empty if it lies somewhere else."""
    file = folder / "tokenizer.json"
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else ""


def _rope(model_type: str, model: torch.nn.Module) -> Rope | None:
    """The rotary embedding of every layer, where it is certain that every layer has this one."""
    rotaries = [x for x in model.modules() if isinstance(x, RotaryEmbedding)]
    if model_type not in PLAIN_ROTARY or not rotaries:
        return None
    kinds = {_ROPE_KINDS.get(type(x)) for x in rotaries}
    settings = {(x.base, x.rotary_dim, x.is_neox_style) for x in rotaries}
    if len(kinds) != 1 or None in kinds or len(settings) != 1:
        return None
    [kind] = kinds
    frequencies = rotaries[0]._compute_inv_freq(rotaries[0].base)  # pyright: ignore[reportPrivateUsage]
    return Rope(
        kind=str(kind),
        inverse_frequencies=tuple(frequencies.tolist()),
        interleaved=not rotaries[0].is_neox_style,
    )
