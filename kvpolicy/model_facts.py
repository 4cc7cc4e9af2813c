"""What a model's config.json says about its KV cache, read without running anything.

Plain JSON of bounded size; no model code, no pickle, no network. A model type's own defaults
are unknown here, so what cannot be read safely is refused rather than guessed.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from kvpolicy.errors import PolicyError, UnsupportedError
from kvpolicy.spec import shown

MAX_CONFIG_BYTES = 4 << 20
"""Larger than any config.json; what is larger is something else."""

ELEMENT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Dtypes that policies keep keys and values in."""

HYBRIDS = ("gemma3_text", "qwen2", "qwen3")
"""Model types of which some layers may attend to a sliding window."""

FULL, SLIDING = "full_attention", "sliding_attention"
"""transformers' words for kinds of layers."""

_LARGEST = 1 << 31


_NESTED_DEFAULTS = {
    "num_key_value_heads": ("llama",),
    "head_dim": ("llama", "mistral", "qwen2"),
}
"""Model types whose default is the usual one. A nested config leaves out what equals it."""

_OTHER_KV_HEADS = (
    "n_head_kv num_kv_heads multi_query multi_query_attention multi_query_group_num "
    "new_decoder_architecture num_attention_groups num_key_value_heads_per_layer"
).split()
"""Other ways to say how many KV heads there are."""

_HYBRID = (
    "attention_chunk_size attention_types attn_layer_indices attn_layer_period attn_type_list "
    "block_configs block_types compress_ratios conv_L_cache cross_attention_every_n_layers "
    "cross_attention_layers full_attention_interval full_attn_idxs hybrid_layer_ids "
    "hybrid_override_pattern layers_block_type linear_attn_config mamba_d_state "
    "sliding_window_pattern ssm_cfg ssm_state_size state_size"
).split()
"""Keys of models whose layers are not all full attention, or not all alike."""

_ENCODERS = (
    "albert bert camembert distilbert electra longformer modernbert roberta xlm-roberta"
).split()


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """The sizes that decide what a KV cache costs.

    Attributes:
        model_type: What transformers calls the architecture.
        num_layers: Layers.
        num_query_heads: Query heads of a layer.
        num_kv_heads: KV heads of a layer.
        head_dim: Size of one head's key, and of its value.
        positions: Positions the model was trained for; None if it does not say.
        dtype: As written, such as ``bfloat16``; None if it does not say.
        num_sliding: Layers that attend to a sliding window; the others are full attention.
        window: Tokens that these attend to, the newest included; 1 if there are none.
        notes: What the hosts refuse although the sizes are clear, one line each.
    """

    model_type: str
    num_layers: int
    num_query_heads: int
    num_kv_heads: int
    head_dim: int
    positions: int | None
    dtype: str | None
    num_sliding: int = 0
    window: int = 1
    notes: tuple[str, ...] = ()

    def kv_heads_per_rank(self, ranks: int) -> int:
        """KV heads on each of `ranks` tensor-parallel ranks, replicated if there are too few.

        Raises:
            PolicyError: The heads cannot be split so.
        """
        heads = self.num_kv_heads
        if self.num_query_heads % ranks or (heads % ranks and ranks % heads):
            raise PolicyError(
                f"{self.num_query_heads} query heads and {heads} KV heads cannot be split over "
                f"{ranks} tensor-parallel ranks; choose a number that divides both"
            )
        return max(1, heads // ranks)


def read_model_facts(model: str) -> ModelFacts:
    """Read the config.json of a model folder.

    Raises:
        PolicyError: There is none, or its fields are missing or make no sense.
        UnsupportedError: No policy can run on such a model, or its layers differ in size.
    """
    path = Path(model) / "config.json"
    if not path.is_file():
        raise PolicyError(
            f"no config.json in {shown(model)}; give a model's folder (nothing is downloaded)"
        )
    return model_facts(_load(path))


def model_facts(config: Mapping[str, Any]) -> ModelFacts:
    """Make sense of a config.json's content; raises as `read_model_facts` does."""
    nested = config.get("text_config")
    if nested is not None and not isinstance(nested, dict):
        raise PolicyError(f"text_config: got {shown(nested)}, expected an object")
    text = config if nested is None else cast("dict[str, Any]", nested)
    fields = _Fields(text, "config.json" if nested is None else "config.json's text_config")
    _refuse(config)
    _refuse(text)
    num_layers = _num_layers(fields)
    num_sliding = _num_sliding(text, num_layers)
    query_heads = fields.count("num_attention_heads")
    kv_heads = fields.count("num_key_value_heads", default=lambda: _all_heads(fields, query_heads))
    if query_heads % kv_heads:
        raise PolicyError(
            f"{fields.where}: num_attention_heads={query_heads} is no multiple of "
            f"num_key_value_heads={kv_heads}"
        )
    head_dim = fields.count("head_dim", default=lambda: _split_width(fields, query_heads))
    if text.get("v_head_dim") not in (None, head_dim):
        raise UnsupportedError(
            f"values of {shown(text['v_head_dim'])} numbers beside keys of {head_dim}: policies "
            "need keys and values of one size"
        )
    return ModelFacts(
        model_type=fields.name("model_type"),
        num_layers=num_layers,
        num_query_heads=query_heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        positions=fields.optional_count("max_position_embeddings"),
        dtype=_dtype(config) or _dtype(text),
        num_sliding=num_sliding,
        window=fields.count("sliding_window") if num_sliding else 1,
        notes=tuple(_notes(config, text, num_sliding)),
    )


def windows_of(config: Any) -> list[int | None]:
    """Tokens that each layer of a transformers config attends to, newest included; None: all."""
    kinds = getattr(config, "layer_types", None) or [FULL] * config.num_hidden_layers
    return [config.sliding_window if kind == SLIDING else None for kind in kinds]


def _load(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        data = file.read(MAX_CONFIG_BYTES + 1)
    if len(data) > MAX_CONFIG_BYTES:
        raise PolicyError(f"{path}: larger than {MAX_CONFIG_BYTES:,} bytes, so no config.json")
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise PolicyError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise PolicyError(f"{path}: got {shown(content)}, expected an object of fields")
    return cast("dict[str, Any]", content)


@dataclass(frozen=True)
class _Fields:
    """A config's fields, checked one by one; null counts as absent."""

    config: Mapping[str, Any]
    where: str

    @property
    def is_nested(self) -> bool:
        return self.where != "config.json"

    def optional_count(self, key: str) -> int | None:
        """A positive integer, or None."""
        value = self.config.get(key)
        if value is None:
            return None
        if type(value) is not int or not 0 < value < _LARGEST:
            raise PolicyError(f"{self.where}: {key} must be a positive integer, got {shown(value)}")
        return value

    def count(self, key: str, default: Callable[[], int] | None = None) -> int:
        """A positive integer; the default is asked for where it is safe to assume."""
        value = self.optional_count(key)
        if value is not None:
            return value
        is_safe = not self.is_nested or self.config.get("model_type") in _NESTED_DEFAULTS.get(
            key, ()
        )
        if default is not None and is_safe:
            return default()
        remedy = (
            "it equals a default of the model type, which is not known here; write it into the file"
            if self.is_nested
            else "only decoders with the field names of Llama, Qwen or Mistral are understood"
        )
        raise PolicyError(f"{self.where} has no {key}: {remedy}")

    def name(self, key: str) -> str:
        """A plain word; ``unknown`` if absent."""
        value = self.config.get(key) or "unknown"
        if isinstance(value, str) and re.fullmatch(r"[\w.+-]{1,64}", value):
            return value
        raise PolicyError(f"{self.where}: {key} must be a name, got {shown(value)}")


def _all_heads(fields: _Fields, query_heads: int) -> int:
    """KV heads where none are named: as many as query heads, unless it says so otherwise."""
    other = next((key for key in _OTHER_KV_HEADS if fields.config.get(key)), None)
    if other is None:
        return query_heads
    raise UnsupportedError(
        f"{fields.where} names its KV heads by {other}, which is not understood; "
        "write num_key_value_heads into the file"
    )


def _split_width(fields: _Fields, query_heads: int) -> int:
    """Head size where none is named: the hidden size, split among the query heads."""
    width = fields.count("hidden_size")
    if width % query_heads:
        raise PolicyError(
            f"{fields.where}: hidden_size={width} is no multiple of "
            f"num_attention_heads={query_heads}, and there is no head_dim"
        )
    return width // query_heads


def _num_layers(fields: _Fields) -> int:
    layers, types = fields.count("num_hidden_layers"), fields.config.get("layer_types")
    if isinstance(types, list) and len(cast("list[Any]", types)) != layers:
        raise PolicyError(
            f"{fields.where}: {len(cast('list[Any]', types))} layer_types for "
            f"num_hidden_layers={layers}"
        )
    return layers


def _num_sliding(config: Mapping[str, Any], num_layers: int) -> int:
    """Layers that attend to a sliding window, some but not all."""
    if not _may_slide(config):
        return 0
    types, pattern = config.get("layer_types"), config.get("sliding_window_pattern")
    if isinstance(types, list):
        num_full = cast("list[Any]", types).count(FULL)
    elif type(pattern) is int and 0 < pattern < _LARGEST:
        num_full = num_layers // pattern  # every so many layers, one is full attention
    else:
        num_full = num_layers
    if num_full:
        return num_layers - num_full
    raise UnsupportedError(
        "no policy runs on this model: every layer attends to a sliding window, which leaves "
        "nothing to rule; choose a model with full attention"
    )


def _may_slide(config: Mapping[str, Any]) -> bool:
    """Whether layers are full attention or a sliding window, as the config says by layer."""
    types = config.get("layer_types")
    known = (
        all(kind in (FULL, SLIDING) for kind in cast("list[Any]", types))
        if isinstance(types, list)
        else types is None and config.get("model_type") == "gemma3_text"
    )
    return known and config.get("model_type") in HYBRIDS


def _dtype(config: Mapping[str, Any]) -> str | None:
    """The dtype by its new or its old key, without the ``torch.`` of old files."""
    value = config.get("dtype") or config.get("torch_dtype")
    if value is None:
        return None
    if not isinstance(value, str):
        raise PolicyError(f"config.json: dtype must be a name, got {shown(value)}")
    return value.removeprefix("torch.")


def _refuse(config: Mapping[str, Any]) -> None:
    """Refuse models whose cache is not one key and value per token, layer and KV head."""
    window, hybrid = config.get("sliding_window"), _hybrid(config)
    reasons = (
        (
            config.get("is_encoder_decoder") is True,
            "encoder-decoder models keep two caches; choose a decoder-only model",
        ),
        (_is_encoder(config), "an encoder keeps no KV cache; choose a decoder-only model"),
        (
            bool(config.get("kv_lora_rank")),
            "multi-head latent attention (MLA, kv_lora_rank) caches no keys; "
            "choose a model with plain attention",
        ),
        (
            bool(config.get("num_kv_shared_layers")),
            "layers share KV caches (num_kv_shared_layers); choose another model",
        ),
        (
            hybrid is not None,
            f"not all of its layers are full attention (hybrid, {hybrid}); "
            "choose a model with plain attention",
        ),
        (
            bool(window)
            and config.get("use_sliding_window") is not False
            and not _may_slide(config),
            f"a sliding_window of {shown(window)} tokens is a retention rule of its own; if you "
            "mean to run without it, set it to null in a copy of the file",
        ),
    )
    for applies, reason in reasons:
        if applies:
            raise UnsupportedError(f"no policy runs on this model: {reason}")


def _is_encoder(config: Mapping[str, Any]) -> bool:
    names = config.get("architectures")
    return config.get("model_type") in _ENCODERS or (
        isinstance(names, list)
        and any(
            isinstance(name, str) and name.endswith("ForMaskedLM")
            for name in cast("list[Any]", names)
        )
    )


def _hybrid(config: Mapping[str, Any]) -> str | None:
    """Name the key, if any, that makes some layers neither full attention nor a known window."""
    if _may_slide(config):
        others = (key for key in _HYBRID if key != "sliding_window_pattern")
        return next((key for key in others if config.get(key)), None)
    types = config.get("layer_types")
    is_plain = types is None or (
        isinstance(types, list) and all(kind == FULL for kind in cast("list[Any]", types))
    )
    if not is_plain:
        return "layer_types"
    return next((key for key in _HYBRID if config.get(key)), None)


def _notes(config: Mapping[str, Any], text: Mapping[str, Any], num_sliding: int) -> Iterator[str]:
    """Say what the hosts refuse although the arithmetic holds."""
    if num_sliding:
        yield (
            "layers with a sliding window are under no policy and counted as their window decodes; "
            "vLLM's own maximum concurrency adds a chunk of prompt (--max-num-batched-tokens)"
        )
    if num_sliding and text.get("model_type") != "gemma3_text":
        yield "vLLM itself refuses models of this type with a sliding window in some layers"
    if config is not text or any(config.get(key) for key in ("vision_config", "audio_config")):
        yield "the hosts refuse multimodal models so far; this is the text model's arithmetic"
    if text.get("max_position_embeddings") is None:
        yield "no max_position_embeddings is stated, so nothing but the pool limits contexts here"
    if text.get("attn_logit_softcapping"):
        yield "the hosts refuse models that cap attention logits (attn_logit_softcapping)"
    if text.get("alibi") or text.get("use_alibi"):
        yield "the hosts refuse models with ALiBi"
    quantisation = config.get("quantization_config")
    if isinstance(quantisation, dict):
        scheme = cast("dict[str, Any]", quantisation)
        if scheme.get("kv_cache_scheme") or scheme.get("kv_cache_quant_algo"):
            yield "the hosts refuse the quantised KV cache that the config asks for"
