"""The attention function that transformers calls where a model asks for ``kvpolicy``.

transformers calls attention with the cache's answer to `update` but without the cache. So
the cache layer travels on that answer, as an attribute of the key tensor; keys without it
belong to another cache or to none, and go to the implementation that the model had before.
"""

from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.models.llama.modeling_llama import eager_attention_forward

from kvpolicy import UnsupportedError

NAME = "kvpolicy"
"""The attention implementation's name in both registries of transformers."""

DELEGATES = ("sdpa", "eager")
"""Implementations that can be handed what is not ours."""

_LAYER = "_kvpolicy_layer"

INERT = frozenset(
    (
        "cache_position",
        "dropout",
        "is_causal",
        "logits_to_keep",
        "num_items_in_batch",
        "output_hidden_states",
        "position_ids",
        "return_dict",
        "use_cache",
    )
)
"""Keyword arguments of attention functions that change nothing for a causal decoder."""


class Implementation(str):
    """The name ``kvpolicy`` in a config, remembering the implementation it replaced.

    Configs cannot be looked up by identity (they compare by value and may be copied), and
    their other attributes are written to disk; this one is not.
    """

    replaced: str = DELEGATES[0]


class AttendingLayer(Protocol):
    """What a cache layer offers to the attention function."""

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, positions: Tensor | None
    ) -> Tensor:
        """Append the tokens of q [B, H, Q, D] and return their attention output."""
        ...


def install(model: PreTrainedModel) -> None:
    """Register the function and make the model use it; doing so again changes nothing."""
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, make_mask)
    if model.config._attn_implementation != NAME:
        implementation = Implementation(NAME)
        implementation.replaced = model.config._attn_implementation or Implementation.replaced
        model.set_attn_implementation(implementation)


def is_installed(config: PretrainedConfig) -> bool:
    """Whether models of this config call `attend`."""
    return config._attn_implementation == NAME


def mark(keys: Tensor, layer: AttendingLayer) -> Tensor:
    """Keys to be returned by `update`, naming the layer that is to attend."""
    setattr(keys, _LAYER, layer)
    return keys


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attend under the policy of the cache that `key` came from.

    Args:
        module: The model's attention module, an `nn.Module` with a config.
        query: [B, H, Q, D].
        key: [B, H_kv, Q, D], the new tokens only; marked by a `PolicyCache`.
        value: [B, H_kv, Q, D].
        attention_mask: What `make_mask` made.
        **kwargs: As transformers passes them; those with an effect are refused.

    Returns:
        The output, [B, Q, H, D] as transformers wants it, and no weights.
    """
    layer: AttendingLayer | None = getattr(key, _LAYER, None)
    if layer is None:
        delegate = ALL_ATTENTION_FUNCTIONS.get_interface(
            _replaced(module.config), eager_attention_forward
        )
        return delegate(module, query, key, value, attention_mask, **kwargs)
    _require_inert(module, kwargs)
    output = layer.attend(query, key, value, attention_mask, kwargs.get("position_ids"))
    if torch.is_grad_enabled() and query.requires_grad:
        output = _ForwardOnly.apply(output, query)
    return output.transpose(1, 2), None


def make_mask(
    *,
    kv_length: int,
    kv_offset: int,
    attention_mask: Tensor | None,
    config: PretrainedConfig,
    **kwargs: Any,
) -> Tensor | None:
    """Make the replaced implementation's mask.

    A `PolicyCache` announces the new tokens as its keys, behind an offset that no other cache
    has; so the mask is None or [B, 1, Q, Q] and its diagonal marks what is not padding.
    """
    if kv_offset and attention_mask is not None:
        _require_whole_history(attention_mask, kv_offset + kv_length)
    make = ALL_MASK_ATTENTION_FUNCTIONS[_replaced(config)]
    return make(
        kv_length=kv_length,
        kv_offset=kv_offset,
        attention_mask=attention_mask,
        config=config,
        **kwargs,
    )


def _replaced(config: PretrainedConfig) -> str:
    """The implementation that the model had before."""
    return getattr(config._attn_implementation, "replaced", Implementation.replaced)


def _require_whole_history(attention_mask: Tensor, total: int) -> None:
    if attention_mask.shape[-1] != total:
        raise UnsupportedError(
            f"attention_mask covers {attention_mask.shape[-1]} columns, but the cache's history "
            f"and the new tokens are {total}; pass the mask of the whole history, evicted tokens "
            "and padding included, as transformers' own caches need it"
        )


def _require_inert(module: nn.Module, kwargs: dict[str, Any]) -> None:
    """Refuse whatever would change the attention's result and is not done here."""
    if module.training and kwargs.get("dropout"):
        raise UnsupportedError(
            f"attention dropout {kwargs['dropout']} is active; call model.eval() before "
            "generating with a PolicyCache"
        )
    unknown = {
        name: value
        for name, value in kwargs.items()
        if name not in INERT and name != "scaling" and value is not None and value is not False
    }
    if unknown or kwargs.get("is_causal") is False:
        raise UnsupportedError(
            f"{type(module).__name__} asks for {sorted(unknown) or ['is_causal=False']}, which "
            "attention under a retention policy does not do; call the model without it, or use "
            "another cache"
        )


class _ForwardOnly(torch.autograd.Function):
    """Identity that refuses gradients, which cannot flow into evicted tokens."""

    @staticmethod
    def forward(_ctx: Any, output: Tensor, _query: Tensor) -> Tensor:
        """Pass the output on; the query makes the result part of the graph."""
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *_gradients: Any) -> Any:  # noqa: ARG004  torch names it so
        """Refuse."""
        raise UnsupportedError(
            "a PolicyCache has no gradients: evicted tokens are gone; train without it, or "
            "call the model under torch.no_grad()"
        )
