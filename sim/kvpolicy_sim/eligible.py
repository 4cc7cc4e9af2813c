"""Which transformers models can be captured, and what a trace says about them."""

import hashlib
import json
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import PurePath
from typing import Any, TypeAlias

from kvpolicy import PolicyError, UnsupportedError, __version__, bundled_model
from kvpolicy.trace import Header, Rope
from kvpolicy_sim.interception import Call

# transformers' types: it is imported only where a model is at hand.
PreTrainedModel: TypeAlias = Any
PretrainedConfig: TypeAlias = Any

TESTED = ("gemma", "llama", "mistral", "qwen2", "qwen3")
"""Model types whose traces are tested, rotation included."""

MOVING_ROPE = ("dynamic", "longrope")
"""RoPE types whose frequencies depend on how long a forward is."""

_LOCAL = frozenset(
    (
        "_attn_implementation",
        "_experts_implementation",
        "_name_or_path",
        "attn_implementation",
        "dtype",
        "torch_dtype",
        "transformers_version",
    )
)
"""Entries of a config that say how or where a model was loaded, not what it is."""


def require_plain(model: PreTrainedModel) -> None:
    """Raise UnsupportedError unless the model is a causal decoder with full attention.

    What a config cannot tell is found out while the model runs: see `interception`.
    """
    config = getattr(model, "config", None)
    if config is None or not hasattr(model, "set_attn_implementation"):
        raise UnsupportedError(
            f"capture needs a transformers PreTrainedModel, got {type(model).__name__}; of a "
            "wrapped model give the model inside"
        )
    for applies, reason in (*_config_reasons(config), *_setup_reasons(model)):
        if applies:
            raise UnsupportedError(
                f"{type(model).__name__} cannot be captured: {reason}; a trace holds full causal "
                f"attention, as models of type {', '.join(TESTED)} have"
            )


def describe(
    model: PreTrainedModel,
    calls: Sequence[Call],
    *,
    layers: Sequence[int] | None,
    kv_heads: Sequence[int] | None,
    query_stride: int,
    tokenizer: str,
) -> Header:
    """The header of a trace of a model.

    Args:
        model: A model that `require_plain` accepts.
        calls: Its attention calls in one forward.
        layers: Layers to record, ascending; None means all.
        kv_heads: KV heads to record, ascending; None means all.
        query_stride: Tokens between two recorded queries.
        tokenizer: SHA-256 of the tokenizer, or empty.

    Raises:
        UnsupportedError: Layers do not all attend once, in the same shape.
        PolicyError: There are no such layers or heads, or the stride is not positive.
    """
    config, num_layers = model.config, model.config.num_hidden_layers
    found = [call.layer for call in calls]
    if found != list(range(num_layers)):
        raise UnsupportedError(
            f"{type(model).__name__} has {num_layers} layers, and attention was called for "
            f"{found}; a trace holds one full attention per layer"
        )
    shapes = {(c.q.shape[1], *c.k.shape[1::2], c.v.shape[3], c.q.dtype, c.scale) for c in calls}
    if len(shapes) > 1:
        raise UnsupportedError(
            f"the layers of {type(model).__name__} attend in different shapes or scales: "
            f"{sorted(map(str, shapes))}; a trace has one"
        )
    ((heads, num_kv_heads, head_dim, value_dim, dtype, scale),) = shapes
    element = str(dtype).removeprefix("torch.")
    if element not in ("float32", "float16", "bfloat16"):
        raise UnsupportedError(f"the model computes in {element}; load it in float32 or bfloat16")
    if query_stride < 1:
        raise PolicyError(f"query_stride must be at least 1: got {query_stride}")
    return Header(
        model=name_of(config),
        model_type=config.model_type,
        fingerprint=fingerprint_of(config),
        num_layers=num_layers,
        num_query_heads=heads,
        num_kv_heads=num_kv_heads,
        layers=_chosen("layers", layers, num_layers),
        kv_heads=_chosen("kv_heads", kv_heads, num_kv_heads),
        head_dim=head_dim,
        value_dim=value_dim,
        dtype=element,
        scale=scale,
        query_stride=query_stride,
        rope=rope_of(model),
        tokenizer=tokenizer,
        producer=f"kvpolicy {__version__}, transformers {version('transformers')}",
    )


def name_of(config: PretrainedConfig) -> str:
    """The last part of where the model came from; its type if it came from nowhere."""
    path = _get(config, "_name_or_path") or config.model_type
    return "bundled" if path == bundled_model() else PurePath(path).name


def fingerprint_of(config: PretrainedConfig) -> str:
    """SHA-256 of the config's content, in hexadecimal: the same wherever the model lies."""
    entries = {key: value for key, value in config.to_dict().items() if key not in _LOCAL}
    text = json.dumps(entries, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def rope_of(model: PreTrainedModel) -> Rope | None:
    """The rotation of the model's keys; None where it is not known how it pairs dimensions."""
    rotary = _get(model.get_decoder(), "rotary_emb")
    if model.config.model_type not in TESTED or rotary is None:
        return None
    return Rope(
        _rope_type(model.config),
        tuple(rotary.inv_freq.float().tolist()),
        scaling=float(rotary.attention_scaling),
    )


def _chosen(name: str, indices: Sequence[int] | None, count: int) -> tuple[int, ...]:
    if indices is None:
        return tuple(range(count))
    if not indices or not all(0 <= index < count for index in indices):
        raise PolicyError(f"{name} must be among 0 to {count - 1}: got {list(indices)}")
    return tuple(indices)


def _rope_type(config: PretrainedConfig) -> str:
    return (_get(config, "rope_parameters") or {}).get("rope_type", "default")


def _config_reasons(config: PretrainedConfig) -> list[tuple[Any, str]]:
    """Features of an architecture that a trace cannot express, and whether it has them."""
    window = _get(config, "sliding_window")
    rope_type = _rope_type(config)
    return [
        (_get(config, "is_encoder_decoder"), "it is an encoder-decoder, which keeps two caches"),
        (bool(config.sub_configs), "it is multimodal and attends in more ways than one"),
        (
            set(_get(config, "layer_types") or ()) - {"full_attention"},
            "it has layers of other types than full attention (hybrid)",
        ),
        (_get(config, "kv_lora_rank"), "its multi-head latent attention (MLA) caches no keys"),
        (_get(config, "attn_logit_softcapping"), "it caps attention logits (soft-capping)"),
        (_get(config, "add_cross_attention"), "it has cross-attention"),
        (
            # Where layers have types, these have been judged above, and a window is an idle one's.
            window is not None and not _get(config, "layer_types"),
            f"it has a sliding_window of {window} tokens; load it with sliding_window=None to "
            "capture full attention",
        ),
        (_get(config, "is_causal") is False, "its attention is not causal"),
        (
            rope_type in MOVING_ROPE,
            f"its RoPE of type {rope_type!r} changes with the length of a forward, so a trace "
            "would depend on chunks",
        ),
    ]


def _setup_reasons(model: PreTrainedModel) -> list[tuple[Any, str]]:
    """Ways of loading a model that capture cannot follow, and whether it was loaded so."""
    return [
        (model.training, "it is in training mode; call model.eval() first"),
        (model.get_output_embeddings() is None, "it has no language-model head"),
        (
            any(parameter.device.type == "meta" for parameter in model.parameters()),
            "some of its weights are on the meta device; load them first",
        ),
        (
            (_get(model, "tp_size") or 1) > 1,
            "its heads are split over processes; load it without a tensor-parallel plan",
        ),
        (
            _get(model, "_compiled_call_impl") is not None,
            "it is compiled; use it without compile()",
        ),
    ]


def _get(holder: Any, name: str) -> Any:
    return getattr(holder, name, None)
