"""Listening to a transformers model's attention without changing what it computes.

transformers asks two registries for the implementation that a model's config names: one makes
masks, the other attends. While a model is listened to, its config names ours, which does what
the former one does and shows the listener what went in and what came out.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from kvpolicy import UnsupportedError

# transformers' types: it is imported only where a model is at hand.
PreTrainedModel: TypeAlias = Any

NAME = "kvpolicy_capture"
"""The implementation's name in both registries of transformers."""

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
        "scaling",
        "use_cache",
    )
)
"""Keyword arguments of attention functions that change nothing for a causal decoder."""


@dataclass(frozen=True)
class Call:
    """One layer's attention in one forward, as its attention function saw it.

    Attributes:
        layer: Index of the layer.
        q: [B, H, Q, D] of the new tokens.
        k: [B, H_kv, S, D], cached tokens first.
        v: [B, H_kv, S, D_v].
        scale: Factor on query-key products.
        out: [B, H, Q, D_v].
    """

    layer: int
    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    out: Tensor


Listener = Callable[[Call], object]


class Implementation(str):
    """The name in a config, with who listens and what the config named before."""

    replaced: str
    listener: Listener
    seen_mask: Tensor | None = None


@contextmanager
def listening(model: PreTrainedModel, listener: Listener) -> Iterator[None]:
    """Tell `listener` every attention call of the model; afterwards the model is as before.

    Raises:
        UnsupportedError: The model does not let its attention be chosen, or it attends to
            something other than all tokens so far.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    former = model.config._attn_implementation
    if former == NAME:
        raise UnsupportedError("the model is being captured already; wait until that has ended")
    implementation = Implementation(NAME)
    implementation.listener = listener
    # An implementation that itself stands for another one is passed over: nothing is retained.
    implementation.replaced = getattr(former, "replaced", former) or "eager"
    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, _make_mask)
    try:
        model.set_attn_implementation(implementation)
        if model.config._attn_implementation is not implementation:
            raise UnsupportedError(
                f"{type(model).__name__} does not let its attention function be chosen; capture "
                "a model whose code in transformers uses AttentionInterface"
            )
        yield
    finally:
        model.config._attn_implementation = former


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attend as the model would, and tell the listener."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    implementation: Implementation = module.config._attn_implementation
    _require_plain_arguments(module, kwargs)
    if attention_mask is not implementation.seen_mask:
        _require_causal(module, attention_mask, query.shape[2], key.shape[2])
        implementation.seen_mask = attention_mask  # the layers of a forward share one
    eager: Any = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    attend: Any = ALL_ATTENTION_FUNCTIONS.get_interface(implementation.replaced, eager)
    out, weights = attend(module, query, key, value, attention_mask, **kwargs)
    scale = kwargs.get("scaling")
    implementation.listener(
        Call(
            layer=module.layer_idx,
            q=query,
            k=key,
            v=value,
            scale=query.shape[-1] ** -0.5 if scale is None else float(scale),
            out=out.transpose(1, 2),
        )
    )
    return out, weights


def _make_mask(*, config: Any, **kwargs: Any) -> Any:
    """Make the replaced implementation's mask."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    make: Any = ALL_MASK_ATTENTION_FUNCTIONS[config._attn_implementation.replaced]
    return make(config=config, **kwargs)


def _require_plain_arguments(module: Any, kwargs: dict[str, Any]) -> None:
    """Refuse whatever changes attention beyond its scale."""
    unknown = {
        name: value
        for name, value in kwargs.items()
        if name not in INERT and value is not None and value is not False
    }
    if unknown or kwargs.get("is_causal") is False or getattr(module, "is_causal", True) is False:
        raise UnsupportedError(
            f"{type(module).__name__} attends with {sorted(unknown) or ['is_causal=False']}; a "
            "trace holds plain causal attention only"
        )


def _require_causal(module: Any, mask: Any, queries: int, keys: int) -> None:
    """Refuse masks that hide more or less than the future, or that add to logits."""
    if mask is None:
        return
    if isinstance(mask, Tensor):
        ahead = torch.ones(queries, keys, dtype=torch.bool, device=mask.device)
        ahead = ahead.triu(keys - queries + 1)  # [Q, S]
        if mask.dtype == torch.bool:
            hidden, added = ~mask, False
        else:
            hidden = mask < 0
            added = bool((mask[hidden] > torch.finfo(mask.dtype).min / 2).any() | (mask > 0).any())
        if not added and torch.equal(hidden.expand(-1, -1, queries, keys), ahead.expand_as(hidden)):
            return
    raise UnsupportedError(
        f"{type(module).__name__} masks more than the future, as sliding windows, chunks and "
        "biases do; a trace holds full causal attention only"
    )
