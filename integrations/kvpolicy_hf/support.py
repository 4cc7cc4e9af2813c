"""Which models a `PolicyCache` is right for, and why the others are refused."""

from collections.abc import Sequence
from typing import Any

from transformers import PretrainedConfig, PreTrainedModel

from kvpolicy import CachePolicy, UnsupportedError
from kvpolicy.attention import AttentionLayer
from kvpolicy.memory.decoder import Decoder
from kvpolicy.memory.modules import reason_against, take_apart
from kvpolicy.memory.policy import MemoryPolicy
from kvpolicy.memory.state import Shape
from kvpolicy.model_facts import FULL, HYBRIDS, SLIDING
from kvpolicy.policy import NEEDS
from kvpolicy.rotary import Rotary
from kvpolicy_hf.attention import DELEGATES, NAME

TESTED = {
    "llama": "LlamaAttention",
    "mistral": "MistralAttention",
    "qwen3": "Qwen3Attention",
    "gemma": "GemmaAttention",
    "qwen2": "Qwen2Attention",
    "qwen3_moe": "Qwen3MoeAttention",
    "mixtral": "MixtralAttention",
    "phi": "PhiAttention",
    "phi3": "Phi3Attention",
    "gemma3_text": "Gemma3Attention",
}
"""Model types that are tested against the oracle, and their attention modules."""

MOVING_ROPE = ("dynamic", "longrope")
"""RoPE types whose frequencies depend on how long a forward is."""


def require_supported(model: PreTrainedModel, policy: CachePolicy) -> None:
    """Raise UnsupportedError unless the policy is honoured exactly on this model."""
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedError(
            f"PolicyCache needs a transformers PreTrainedModel, got {type(model).__name__}; of a "
            "wrapped model give the model inside"
        )
    require_config_supported(model.config, policy, type(model).__name__)
    for member in policy.members:
        reason = (
            _unsupported_modules(model)
            or _unsupported_setup(model)
            or _unsupported_memory(model, member)
        )
        if reason:
            raise UnsupportedError(f"{member} on {type(model).__name__}: {reason}")


def require_config_supported(config: PretrainedConfig, policy: CachePolicy, name: str) -> None:
    """Raise UnsupportedError if a model's configuration alone shows that the policy is not.

    Args:
        config: The configuration.
        policy: The policy.
        name: What to call the model.
    """
    for member in policy.members:
        reason = (
            _unsupported_policy(member)
            or _unsupported_config(config)
            or _unsupported_hybrid(config, member)
            or _unsupported_rope(config, member)
        )
        if reason:
            raise UnsupportedError(f"{member} on {name}: {reason}")


def attention_modules(model: PreTrainedModel) -> list[Any]:
    """The model's attention modules in the order of their layers."""
    name = TESTED[model.config.model_type]
    found: list[Any] = [m for m in model.modules() if type(m).__name__ == name]
    return sorted(found, key=lambda module: module.layer_idx)


def rotary_of(model: PreTrainedModel) -> Rotary:
    """The rotation of keys in layers with full attention, in the frequencies that they hold."""
    embedding: Any = model.get_decoder().rotary_emb
    name = "inv_freq" if hasattr(embedding, "inv_freq") else f"{FULL}_inv_freq"
    return Rotary(getattr(embedding, name).detach().float().clone())


def decoders_of(
    model: PreTrainedModel, policy: CachePolicy, rotary: Rotary
) -> Sequence[Decoder | None]:
    """Each layer's weights for a policy whose memory needs them, otherwise None."""
    if any(map(_needs_decoder, policy.members)):
        return take_apart(model.get_decoder(), rotary)
    return [None] * model.config.num_hidden_layers


def require_parameters_fit(layers: Sequence[AttentionLayer], model: PreTrainedModel) -> None:
    """Raise PolicyError if parameters that a policy reads from a file are of another model."""
    kv_heads, modules = model.config.num_key_value_heads, attention_modules(model)
    for layer in layers:
        policy, module = layer.memory_policy, modules[layer.index]
        if policy is not None and not policy.needs_decoder:
            shape = Shape(
                rows=1,
                kv_heads=kv_heads,
                group=model.config.num_attention_heads // kv_heads,
                head_dim=module.head_dim,
                value_dim=module.head_dim,
                dtype=model.dtype,
                device=model.device,
            )
            policy.new_memory(shape, layer.setting)


def position_limit(model: PreTrainedModel, policy: CachePolicy) -> int | None:
    """Most tokens a row may see; None where positions may run on or are cache ranks."""
    if all(each.rope_beyond == "allow" or _is_reindexed(each) for each in policy.members):
        return None
    return model.config.max_position_embeddings


def _is_reindexed(policy: CachePolicy) -> bool:
    return getattr(policy, "rope", "keep") == "reindex"


def _unsupported_policy(policy: CachePolicy) -> str | None:
    """Say what of the policy this host cannot do."""
    unknown = sorted(set(policy.needs) - set(NEEDS))
    if unknown:
        return f"it needs {unknown}, and this host shows {NEEDS}; declare needs among these"
    return None


def _unsupported_config(config: PretrainedConfig) -> str | None:
    """Say which feature of the model breaks the rules of retention."""
    reasons = (
        (config.is_encoder_decoder, "encoder-decoder models keep two caches"),
        (bool(config.sub_configs), "multimodal models attend in more ways than one"),
        (
            _kinds(config) - {FULL, SLIDING},
            f"it has layers of types {sorted(_kinds(config) - {FULL, SLIDING})}, which hold other "
            "things than all keys or those of a window (hybrid)",
        ),
        (_get(config, "kv_lora_rank"), "multi-head latent attention (MLA) caches no keys"),
        (_get(config, "attn_logit_softcapping"), "it caps attention logits (soft-capping)"),
        (
            _kinds(config) == {SLIDING},
            "every layer attends to a sliding window, which leaves a policy nothing to rule",
        ),
        (
            _is_hybrid(config) and config.model_type not in HYBRIDS,
            f"some of its layers attend to a sliding window, which is tested in models of type "
            f"{', '.join(HYBRIDS)}",
        ),
        (
            _get(config, "sliding_window") and not _is_hybrid(config),
            f"it has a sliding_window of {_get(config, 'sliding_window')} tokens, which is a "
            "retention rule of its own; if you want the policy instead, load the model with "
            "sliding_window=None",
        ),
        (
            _get(config, "is_causal") is False or _get(config, "use_bidirectional_attention"),
            "its attention is not causal",
        ),
    )
    for applies, reason in reasons:
        if applies:
            return f"{reason}; {_use_tested()}"
    if config.model_type not in TESTED:
        return f"model type {config.model_type!r} is not tested; {_use_tested()}"
    return None


def _unsupported_hybrid(config: PretrainedConfig, policy: CachePolicy) -> str | None:
    """Say why the policy cannot rule some layers of the model only."""
    if not _is_hybrid(config):
        return None
    if _is_reindexed(policy):
        return (
            "rope=reindex lets texts go on past the model's positions, and layers that attend to "
            "a sliding window do not; use rope=keep"
        )
    if isinstance(policy, MemoryPolicy) and policy.has_memory:
        return (
            "memories are not tested beside layers that attend to a sliding window; use a policy "
            "that only evicts"
        )
    return None


def _unsupported_rope(config: PretrainedConfig, policy: CachePolicy) -> str | None:
    """Say why the model's positions cannot be honoured."""
    parameters = _get(config, "rope_parameters") or {}
    # Gemma 3 has parameters of each kind of layers.
    every = [parameters.get(kind) or parameters for kind in (FULL, SLIDING)]
    rope_types = [each.get("rope_type", "default") for each in every]
    parameters = every[0]  # keys are reindexed in layers with full attention only
    rope_type = next((x for x in rope_types if x in MOVING_ROPE), rope_types[0])
    if rope_type in MOVING_ROPE:
        return (
            f"RoPE of type {rope_type!r} rotates cached keys by frequencies that change with the "
            "length of a forward, so results would depend on chunking; use rope_type=default, "
            "linear, yarn or llama3"
        )
    if not _is_reindexed(policy):
        return None
    if rope_type != "default" or parameters.get("partial_rotary_factor", 1.0) != 1.0:
        return (
            f"rope=reindex needs plain RoPE over whole heads, got {parameters}; use rope=keep, "
            "with rope_beyond=allow if the text is longer than the model's positions"
        )
    return None


def _unsupported_modules(model: PreTrainedModel) -> str | None:
    """Say why the model's modules are not what its config promises."""
    modules = attention_modules(model)
    layers = model.config.num_hidden_layers
    indices = [module.layer_idx for module in modules]
    own = all(type(m).__module__.startswith("transformers.models.") for m in modules)
    if indices != list(range(layers)) or not own:
        return (
            f"expected {layers} {TESTED[model.config.model_type]} modules of transformers, found "
            f"{len(modules)}; custom or replaced attention is not tested"
        )
    implementation = model.config._attn_implementation
    if implementation not in (NAME, *DELEGATES):
        return (
            f"attention implementation {implementation!r} makes no masks that show padding; call "
            f"model.set_attn_implementation({DELEGATES[0]!r}) first"
        )
    return None


def _unsupported_setup(model: PreTrainedModel) -> str | None:
    """Say why the model is set up in a way that its cache cannot follow."""
    if any(parameter.device.type == "meta" for parameter in model.parameters()):
        return "some of its weights are on the meta device; load them before making a cache"
    if (model.tp_size or 1) > 1:
        return "its heads are split over processes; load it without a tensor-parallel plan"
    if model._compiled_call_impl is not None:
        return "it is compiled, which needs static shapes; use it without compile()"
    return None


def _unsupported_memory(model: PreTrainedModel, policy: CachePolicy) -> str | None:
    """Say why the policy's memory would not be exact on the model."""
    if not (isinstance(policy, MemoryPolicy) and policy.has_memory):
        return None
    rotated = 2 * rotary_of(model).inverse_frequencies.numel()
    head_dims = {module.head_dim for module in attention_modules(model)}
    if head_dims != {rotated}:
        return (
            f"its memory turns whole heads back to before their rotation, but RoPE rotates "
            f"{rotated} of {sorted(head_dims)} dimensions; use a policy that only evicts"
        )
    return reason_against(model.get_decoder()) if _needs_decoder(policy) else None


def _needs_decoder(policy: CachePolicy) -> bool:
    return isinstance(policy, MemoryPolicy) and policy.has_memory and policy.needs_decoder


def _is_hybrid(config: PretrainedConfig) -> bool:
    return _kinds(config) == {FULL, SLIDING}


def _kinds(config: PretrainedConfig) -> set[str]:
    return set(_get(config, "layer_types") or [FULL])


def _get(config: PretrainedConfig, name: str) -> Any:
    return getattr(config, name, None)


def _use_tested() -> str:
    return (
        f"use a model of type {', '.join(TESTED)} with full attention in every layer, or of type "
        f"{', '.join(HYBRIDS)} with a sliding window in some"
    )
