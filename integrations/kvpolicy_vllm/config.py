"""Reads the policy from vLLM's configuration and refuses what it cannot honour.

The setting lives in ``VllmConfig.additional_config``, which travels to every process and
enters the compile hash: ``{"kv_policy": SPEC}``, and beside it ``{"kv_policy_allow": NAMES}``
where requests may bring others, ``{"kv_policy_capture": SETTINGS}`` where they are recorded and
``{"kv_policy_log": true}`` where each is logged.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvpolicy import CachePolicy, EvictionPolicy, PolicyError, UnsupportedError, parse
from kvpolicy.features import Refused, feature
from kvpolicy.policies.mix import Mix
from kvpolicy.ranks import check_spread
from kvpolicy_vllm.admission import ALLOW_KEY, allowed_names, check_name
from kvpolicy_vllm.allotment import memory_policy
from kvpolicy_vllm.capture import Capture

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.sampling_params import SamplingParams

KEY = "kv_policy"
"""Key of the policy's spec in `additional_config` and in a request's `extra_args`."""

CAPTURE_KEY = "kv_policy_capture"
"""Key of a capture's settings in `additional_config`, of a request's wish in `extra_args`."""

LOG_KEY = "kv_policy_log"
"""Key in `additional_config`: whether every finished request gets a line in the log."""

WORKER = "kvpolicy_vllm.worker.PolicyWorker"
"""The worker class that knows requests by id."""

PLAIN_DTYPES = ("auto", "float16", "bfloat16", "float32")
"""Cache types whose slots hold the model's own numbers."""

_WISHES = {"true": True, "1": True, "false": False, "0": False}
"""A request's wish as text; JSON's true reaches vLLM as 1."""


def configured_policy(vllm_config: "VllmConfig | None") -> CachePolicy | None:
    """The engine's policy, or None when it runs stock vLLM.

    Raises:
        PolicyError: The spec is wrong, a setting that starts with kv_policy is unknown, or a
            capture or a list of what requests may bring has no policy.
    """
    settings = _settings(vllm_config)
    known = (KEY, ALLOW_KEY, CAPTURE_KEY, LOG_KEY)
    unknown = [key for key in settings if key.startswith(KEY) and key not in known]
    if unknown:
        raise PolicyError(
            f"unknown setting {unknown[0]!r}; the settings are called {', '.join(known)}"
        )
    spec = settings.get(KEY)
    if spec is None and settings.get(CAPTURE_KEY) is not None:
        raise PolicyError(f"{CAPTURE_KEY} records what policies run on: add {KEY}=full")
    if spec is None and settings.get(ALLOW_KEY) is not None:
        raise PolicyError(f"{ALLOW_KEY} lets requests to a policy's server bring others: add {KEY}")
    return None if spec is None else parse(spec)


def configured_names(vllm_config: "VllmConfig", policy: CachePolicy) -> tuple[str, ...]:
    """Names of the policies that requests of an engine may bring.

    Raises:
        PolicyError: The setting is no list of known names.
    """
    return allowed_names(_settings(vllm_config).get(ALLOW_KEY), policy)


def configured_capture(vllm_config: "VllmConfig") -> Capture | None:
    """What the engine records, or None.

    Raises:
        PolicyError: The settings are wrong, or depend on where a process was started.
    """
    settings = _settings(vllm_config).get(CAPTURE_KEY)
    if settings is None:
        return None
    directory = settings.get("directory") if isinstance(settings, dict) else None
    if not isinstance(directory, str) or not Path(directory).is_absolute():
        raise PolicyError(
            f"{CAPTURE_KEY} needs a directory as an absolute path, because several processes "
            f"read it: got {settings!r}; or use engine_args(SPEC, capture=...)"
        )
    return Capture.of(settings)


def logs_requests(vllm_config: "VllmConfig") -> bool:
    """Whether every finished request gets a line in vLLM's log.

    Raises:
        PolicyError: The setting is neither true nor false.
    """
    value = _settings(vllm_config).get(LOG_KEY, False)
    if not isinstance(value, bool):
        raise PolicyError(f"{LOG_KEY} must be true or false, got {value!r}")
    return value


def _settings(vllm_config: "VllmConfig | None") -> dict[str, Any]:
    settings = None if vllm_config is None else vllm_config.additional_config
    return settings if isinstance(settings, dict) else {}


def check_policy(policy: CachePolicy) -> None:
    """Refuse policies whose settings this host does not implement.

    Raises:
        UnsupportedError: With the setting to change.
    """
    _ = policy.occupancy  # refuses layers that hold different numbers of slots
    is_composed = policy.members != (policy,)
    if is_composed and any(memory_policy(member) is not None for member in policy.members):
        raise UnsupportedError(
            f"{policy}: in vLLM's blocks a memory cannot be a part of a mix; use the policy with "
            "the memory by itself, or run the mix in transformers or the simulator"
        )
    remembering = memory_policy(policy)
    if remembering is not None and remembering.needs_decoder:
        raise UnsupportedError(
            f"{policy}: its memory goes through the layer's own weights, which vLLM does not show "
            "its attention; run it in transformers or in the simulator, or use fam:level=kv"
        )


def check_engine(vllm_config: "VllmConfig", policy: CachePolicy) -> None:
    """Refuse engine features under which a policy could not keep its promises.

    Raises:
        UnsupportedError: With the feature and what to change.
    """
    check_policy(policy)
    configured_names(vllm_config, policy)
    for name, is_used in features_in_use(vllm_config).items():
        if is_used:
            raise UnsupportedError(f"kv_policy={policy} does not work with {refusal(name)}")
    _check_length(vllm_config, policy)
    if vllm_config.parallel_config.tensor_parallel_size > 1:
        check_spread(policy)
    capture = configured_capture(vllm_config)
    if capture is not None:
        check_capture(policy)
        _check_recorded(vllm_config, capture)


def refusal(name: str) -> str:
    """A refused feature with the reason and what to do, as its row in FEATURES has them."""
    answer = feature(name).vllm
    assert isinstance(answer, Refused), f"{name} is not refused"
    return f"{name} ({answer.reason}); {answer.remedy}"


def check_capture(policy: CachePolicy) -> None:
    """Refuse to record under a policy that evicts.

    Raises:
        UnsupportedError: With the policy to use instead.
    """
    if not keeps_everything(policy):
        raise UnsupportedError(
            f"{policy} evicts, so that queries, keys and values are not those of the full cache "
            "that a trace holds; capture with kv_policy=full and replay other policies over it"
        )


def reindexes(policy: CachePolicy) -> bool:
    """Whether positions of a policy's tokens are their ranks in the cache."""
    return isinstance(policy, EvictionPolicy) and policy.rope == "reindex"


def keeps_everything(policy: CachePolicy) -> bool:
    """Whether requests under a policy can be recorded."""
    return policy.occupancy.capacity is None


def _check_recorded(vllm_config: "VllmConfig", capture: Capture) -> None:
    """Refuse layers and heads that the model has not, and engines that know no requests."""
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    if parallel.world_size > 1:
        raise UnsupportedError(
            f"{CAPTURE_KEY} records all layers and heads in one process, and here they are spread "
            f"over {parallel.world_size}; drop --tensor-parallel-size and --pipeline-parallel-size"
        )
    if vllm_config.lora_config is not None:
        raise UnsupportedError(
            f"{CAPTURE_KEY} records what the model computes by itself, and a trace does not say "
            "which adapter a request had; drop --enable-lora"
        )
    for what, asked, count in (
        ("layers", capture.layers, model.get_num_layers(parallel)),
        ("kv_heads", capture.kv_heads, model.get_total_num_kv_heads()),
    ):
        if asked is not None and asked[-1] >= count:
            raise PolicyError(
                f"capture: {what} has {asked[-1]}, but the model's go from 0 to {count - 1}"
            )
    if not _knows_requests(vllm_config):
        raise UnsupportedError(
            f"{CAPTURE_KEY} needs a worker that knows requests by id; use "
            f"engine_args(SPEC, capture=...), or set worker_cls={WORKER!r}"
        )


def _knows_requests(vllm_config: "VllmConfig") -> bool:
    """Whether the engine's workers know requests by id."""
    from vllm.utils.import_utils import resolve_obj_by_qualname

    from kvpolicy_vllm.worker import PolicyWorker

    worker = resolve_obj_by_qualname(vllm_config.parallel_config.worker_cls)
    return issubclass(worker, PolicyWorker)


def check_request(policy: CachePolicy, server: CachePolicy) -> None:
    """Refuse a request's policy that does not fit the server's.

    Raises:
        PolicyError: It needs more slots than the server allots, or other positions.
    """
    check_policy(policy)
    _check_prompts(policy, server)
    _check_room(policy, server)
    for key in ("rope", "rope_beyond"):
        asked = getattr(policy, key, None)
        given = getattr(server, key, "keep" if key == "rope" else None)
        if asked is not None and asked != given:
            raise PolicyError(
                f"{policy}: requests share the server's {key}={given}; "
                f"got {key}={asked}, leave it out or start a server with it"
            )


def _check_prompts(policy: CachePolicy, server: CachePolicy) -> None:
    """Refuse a request's policy that treats its prompt as the server's blocks do not allow."""
    asked, given = policy.occupancy.prompts, server.occupancy.prompts
    if given == "keep" and asked != "keep":
        raise PolicyError(
            f"{policy} would rewrite blocks of its prompt, which requests of the server's {server} "
            "share; add protect=prompt, or start a server without it"
        )
    if asked in ("stream", given) or keeps_everything(server):
        return
    setting = "prefill=bulk" if asked == "bulk" else "protect=prompt"
    raise PolicyError(
        f"{policy} holds its whole prompt, for which the server's {server} allots no blocks; "
        f"drop {setting}, or start a server with it"
    )


def _check_room(policy: CachePolicy, server: CachePolicy) -> None:
    """Refuse a request's policy that needs more than the server's law allots.

    What a memory of numbers takes depends on the model, which is not known where requests enter.
    So it is left out on both sides, and requests may have one where the server's policy is of
    the same class; the worker, which knows the model, compares again.
    """
    needed, allotted = policy.occupancy.capacity, server.occupancy.capacity
    if allotted is not None and (needed is None or needed > allotted):
        raise PolicyError(
            f"{policy} needs {'unboundedly many' if needed is None else needed} slots, "
            f"the server's {server} allots {allotted} (budget + interval); lower the budget"
        )
    needed, allotted = policy.occupancy.state_slots, server.occupancy.state_slots
    if needed > allotted:
        raise PolicyError(
            f"{policy} keeps {needed} memory slots beside its tokens, the server's {server} "
            f"allots {allotted}: blocks follow the server's policy from a request's first token "
            "on; ask for fewer memory slots, or start the server with a policy that has as many"
        )
    if _keeps_numbers(policy) and not (_keeps_numbers(server) and type(policy) is type(server)):
        raise PolicyError(
            f"{policy} keeps a memory of numbers, for which the server's {server} allots no "
            f"blocks: they follow the server's policy from a request's first token on; start the "
            f"server with {policy.label} and a gate that is open"
        )


def _keeps_numbers(policy: CachePolicy) -> bool:
    """Whether a policy's memory is numbers, not slots."""
    remembering = memory_policy(policy)
    return remembering is not None and remembering.memory_floats(1, 1) > 0


def request_policy(params: "SamplingParams", allowed: Sequence[str] | None) -> CachePolicy | None:
    """The policy that a request asks for by itself, None if it does not.

    Args:
        params: The request's.
        allowed: Names of the policies that it may ask for; None where that is not known.

    Raises:
        PolicyError: It is not a spec with an allowed policy's name, or it names a file.
    """
    spec = (params.extra_args or {}).get(KEY)
    if spec is None:
        return None
    if not isinstance(spec, str) or "." in spec.partition(":")[0]:
        raise PolicyError(
            f"{KEY} of a request must be a spec string with a policy's name, got {spec!r}; "
            "import paths are for the server's own policy only"
        )
    name = spec.partition(":")[0].strip()
    if allowed is not None:
        check_name(name, allowed)
    if name == Mix.name:  # its parts could be any policies, import paths included
        raise PolicyError(
            f"{KEY} of a request must not be a {name}, got {spec!r}; policies by layers are for "
            "the server's own policy only"
        )
    policy = parse(spec)
    path = policy.parameter_file
    if path is not None:
        raise PolicyError(
            f"{KEY} of a request must not name a file, got {path!r}; files of parameters are for "
            "the server's own policy only"
        )
    return policy


def request_capture(params: "SamplingParams") -> bool | None:
    """Whether a request asks to be recorded (True) or not to be (False), None if neither.

    Raises:
        PolicyError: It says something else.
    """
    wish = (params.extra_args or {}).get(CAPTURE_KEY)
    if wish is None:
        return None
    known = _WISHES.get(str(wish).lower())
    if known is None:
        raise PolicyError(f"{CAPTURE_KEY} of a request must be true or false, got {wish!r}")
    return known


def features_in_use(vllm_config: "VllmConfig") -> dict[str, bool]:
    """Whether an engine uses each of the features that are refused, by their names in FEATURES."""
    from vllm.platforms import current_platform

    parallel, model = vllm_config.parallel_config, vllm_config.model_config
    cache, events = vllm_config.cache_config, vllm_config.kv_events_config
    is_ours, has_lora = _knows_requests(vllm_config), vllm_config.lora_config is not None
    return {
        "platforms other than vLLM's CPU": not current_platform.is_cpu(),
        "speculative decoding": vllm_config.speculative_config is not None,
        "KV connectors": vllm_config.kv_transfer_config is not None,
        "KV events": events is not None and events.enable_kv_cache_events,
        "quantised KV caches": cache.cache_dtype not in PLAIN_DTYPES,
        "fast prefill of layers that share KV caches": cache.kv_sharing_fast_prefill,
        "sleep mode": model.enable_sleep_mode,
        "more ranks than KV heads": (
            parallel.tensor_parallel_size > model.get_total_num_kv_heads()
        ),
        "data parallelism of mixtures of experts": (
            model.is_moe and (parallel.data_parallel_size > 1 or parallel.data_parallel_index > 0)
        ),
        "context parallelism": (
            parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1
        ),
        "prompts as embeddings without PolicyWorker": model.enable_prompt_embeds and not is_ours,
        "LoRA adapters without PolicyWorker": has_lora and not is_ours,
        "LoRA adapters in mixtures of experts": vllm_config.lora_config is not None
        and model.is_moe,
        "pipeline parallelism without PolicyWorker": (
            parallel.pipeline_parallel_size > 1 and not is_ours
        ),
        "multi-head latent attention": model.use_mla,
        "encoder-decoder models": model.is_encoder_decoder,
        "hybrid models": model.is_hybrid,
        "models without attention": model.is_attention_free,
        "multimodal models": model.is_multimodal_model,
        "pooling models": model.runner_type == "pooling",
        "sliding windows without the hybrid KV cache manager": (
            bool(vllm_config.scheduler_config.disable_hybrid_kv_cache_manager)
            and "sliding_attention" in (getattr(model.hf_text_config, "layer_types", None) or ())
        ),
        "layers that share KV caches": (
            getattr(model.hf_text_config, "num_kv_shared_layers", 0) > 0
        ),
    }


def _check_length(vllm_config: "VllmConfig", policy: CachePolicy) -> None:
    """Refuse contexts past the trained length unless the policy says how to go there."""
    config = vllm_config.model_config.hf_text_config
    trained = getattr(config, "max_position_embeddings", None)
    longest = vllm_config.model_config.max_model_len
    is_bound = policy.rope_beyond == "refuse" and not reindexes(policy)
    if trained and longest > trained and is_bound:
        raise UnsupportedError(
            f"max_model_len={longest} exceeds the model's trained length of {trained} positions; "
            f"lower it, or write {policy.name}:...,rope_beyond=allow to run past it"
        )
