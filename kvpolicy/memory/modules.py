"""Decoder layers of a torch model, taken apart for memories that pass rows through them.

Written against what Llama, Mistral, Qwen3 and Gemma 1 have in common in transformers, without
importing it. The model's own submodules are called, so that dtypes, biases, head norms and
activations are the model's.

Axes: B rows of a batch, F memory rows, H query heads, H_kv KV heads, D head dimension, d_model
the model's width.
"""

from collections.abc import Iterator
from typing import Any, Self

import torch
from torch import Tensor, nn

from kvpolicy.attention import query_key_products, weighted_values
from kvpolicy.memory.decoder import Projected
from kvpolicy.rotary import Rotary

LAYERS = ("LlamaDecoderLayer", "MistralDecoderLayer", "Qwen3DecoderLayer", "GemmaDecoderLayer")
"""Layers whose arithmetic is that of `LayerModules`."""

LAYER_PARTS = {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}
ATTENTION_PARTS = {"q_proj", "k_proj", "v_proj", "o_proj"}
HEAD_NORMS = {"q_norm", "k_norm"}

OWNERS = ("torch.nn.", "transformers.")
"""Packages whose modules do what their names say."""


def take_apart(model: Any, rotary: Rotary) -> list["LayerModules"]:
    """Give every layer of a model as a `Decoder`.

    The caller has asked `reason_against` before.

    Args:
        model: The stack of layers, without the language model's head.
        rotary: The model's rotation.
    """
    stack = Stack(model, rotary)
    return [LayerModules(stack, index) for index in range(len(model.layers))]


def reason_against(model: Any) -> str | None:
    """Say why a model's layers cannot be taken apart exactly, and what to do; None if they can.

    Args:
        model: The stack of layers, without the language model's head.
    """
    instead = "use level=kv, or the model without them"
    layers: list[Any] = list(getattr(model, "layers", None) or ())
    if not layers or not isinstance(getattr(model, "embed_tokens", None), nn.Embedding):
        return "it has no layers and embed_tokens to take rows through; use level=kv"
    rope = getattr(model.config, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") != "default":
        return f"rows of level=model are rotated by plain RoPE only, got {rope}; use level=kv"
    for index, layer in enumerate(layers):
        if type(layer).__name__ not in LAYERS or not _has_parts(layer):
            return (
                f"layer {index}, {type(layer).__name__}, is none of {', '.join(LAYERS)} as "
                f"transformers builds them; {instead}"
            )
        for name, module in layer.named_modules():
            if _is_replaced(module) or _has_hooks(module):
                what = f"layer {index}'s {name or 'module'} ({type(module).__name__})"
                return f"{what} was replaced, adapted or hooked; {instead}"
    return None


class LayerModules:
    """One layer of a model, as the `kvpolicy.memory.decoder.Decoder` protocol wants it.

    Args:
        stack: The model.
        index: The layer's index.
    """

    def __init__(self, stack: "Stack", index: int) -> None:
        self._stack = stack
        self._index = index
        self._layer = stack.model.layers[index]

    def project(self, hidden: Tensor) -> Projected:
        """Normalise hidden states [B, F, d_model] and project them.

        Returns:
            Queries [B, H, F, D], keys and values [B, H_kv, F, D], before rotation.
        """
        attention = self._layer.self_attn
        normed = self._layer.input_layernorm(hidden)
        q, k, v = (
            projection(normed).unflatten(-1, (-1, attention.head_dim))  # [B, F, heads, D]
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        if hasattr(attention, "q_norm"):
            q, k = attention.q_norm(q), attention.k_norm(k)
        return Projected(*(x.transpose(1, 2) for x in (q, k, v)))

    def finish(self, attended: Tensor, residual: Tensor | None) -> Tensor:
        """Give FF(PreLN(A)) + A for A = W_O attended + residual; [B, F, d_model].

        Args:
            attended: [B, H, F, D] in the model's dtype.
            residual: [B, F, d_model], or None for zero.
        """
        layer = self._layer
        mixed = layer.self_attn.o_proj(attended.transpose(1, 2).flatten(2))
        if residual is not None:
            mixed = residual + mixed
        return mixed + layer.mlp(layer.post_attention_layernorm(mixed))

    def start(self, num_rows: int) -> Tensor:
        """First states of so many memory rows in this layer, [num_rows, d_model]."""
        return self._stack.first_rows(num_rows)[self._index]

    def pass_through(self, hidden: Tensor, rotary: Rotary) -> Tensor:
        """Take rows through the layer, with full attention among themselves.

        Args:
            hidden: [B, F, d_model], rows at positions -F .. -1.
            rotary: The model's rotation.
        """
        q, k, v = self.project(hidden)
        places = torch.arange(-hidden.shape[1], 0, device=hidden.device)
        q, k = (rotary.shift(x.float(), places) for x in (q, k))
        weights = query_key_products(q, k, self._layer.self_attn.scaling).softmax(dim=-1)
        return self.finish(weighted_values(weights, v).to(hidden.dtype), hidden)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Give the layer itself: copies of a request share the model."""
        return self


class Stack:
    """The layers of a model, and the states in which memory rows begin.

    Args:
        model: With `layers` and `embed_tokens`.
        rotary: Its rotation.
    """

    def __init__(self, model: Any, rotary: Rotary) -> None:
        self.model = model
        self._rotary = rotary
        self._first: dict[int, tuple[Tensor, ...]] = {}

    def first_rows(self, num_rows: int) -> tuple[Tensor, ...]:
        """First states per layer, [num_rows, d_model] each: what enters it from below.

        They depend on the model alone, so they are computed once, when first asked for.
        """
        if num_rows not in self._first:
            # Kept for good, so they must not be tied to the caller's inference mode or graph.
            with torch.inference_mode(False), torch.no_grad():
                self._first[num_rows] = tuple(self._rise(num_rows))
        return self._first[num_rows]

    def _rise(self, num_rows: int) -> Iterator[Tensor]:
        """The mean token embedding on its way up."""
        hidden = mean_embedding(self.model.embed_tokens).expand(1, num_rows, -1)
        for index in range(len(self.model.layers)):
            yield hidden[0]
            hidden = LayerModules(self, index).pass_through(hidden, self._rotary)


def mean_embedding(embedding: nn.Embedding) -> Tensor:
    """What the model would see of the mean token, [d_model] in its dtype."""
    weight = embedding.weight
    mean = weight.mean(dim=0, dtype=torch.float32).to(weight.dtype)
    scale = getattr(embedding, "embed_scale", None)
    return mean if scale is None else mean * scale.to(weight.dtype)


def _has_parts(layer: nn.Module) -> bool:
    """Whether a layer and its attention consist of the known submodules and nothing else."""
    parts = dict(layer.named_children())
    if set(parts) != LAYER_PARTS:
        return False
    attention = {name for name, _ in parts["self_attn"].named_children()}
    return attention in (ATTENTION_PARTS, ATTENTION_PARTS | HEAD_NORMS)


def _is_replaced(module: nn.Module) -> bool:
    """Whether a module is a stranger's, or its forward is."""
    return not type(module).__module__.startswith(OWNERS) or "forward" in vars(module)


def _has_hooks(module: nn.Module) -> bool:
    """Whether something may change what a module is given or gives; transformers only records."""
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    return any(not str(hook.__module__).startswith("transformers.") for hook in hooks)
