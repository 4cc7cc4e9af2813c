"""Float64 closed-loop oracle of Llama-like decoders under a retention policy.

One token at a time through every layer, each layer's attention being a
`LayerOracle`. Covers Llama, Mistral, Qwen3 (QK-norm) and Gemma 1.

Axes: H query heads, H_kv KV heads, T tokens, D head_dim.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from oracles.arithmetic import Array
from oracles.decoder import (
    Decoder,
    Function,
    gated_mlp,
    gelu_tanh,
    linear,
    rms_norm,
    silu,
    unchanged,
)
from oracles.dense import LayerOracle, Retained, Spec
from oracles.feedback import first_rows
from oracles.memory import Given
from oracles.specs import by_layer

FAMILIES = ("llama", "mistral", "qwen3", "gemma")


def read_linear(module: Any) -> Function:
    """Read a linear map over the last axis."""
    bias = 0.0 if module.bias is None else to_float64(module.bias)
    return linear(to_float64(module.weight), bias)


def read_norm(module: Any, config: Any) -> Function:
    """Read an RMS norm over the last axis; Gemma stores its weight minus one."""
    weight = to_float64(module.weight) + (1.0 if config.model_type == "gemma" else 0.0)
    return rms_norm(weight, config.rms_norm_eps)


def to_float64(parameter: Tensor) -> Array:
    """Copy a parameter out of torch."""
    return parameter.detach().double().cpu().numpy()


def read_decoder(module: Any, config: Any) -> Decoder:
    """Read one decoder layer."""
    attention, mlp = module.self_attn, module.mlp
    has_qk_norm = config.model_type == "qwen3"
    return Decoder(
        num_query_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        input_norm=read_norm(module.input_layernorm, config),
        q_proj=read_linear(attention.q_proj),
        k_proj=read_linear(attention.k_proj),
        v_proj=read_linear(attention.v_proj),
        o_proj=read_linear(attention.o_proj),
        q_norm=read_norm(attention.q_norm, config) if has_qk_norm else unchanged,
        k_norm=read_norm(attention.k_norm, config) if has_qk_norm else unchanged,
        mlp_norm=read_norm(module.post_attention_layernorm, config),
        mlp=gated_mlp(
            read_linear(mlp.gate_proj),
            read_linear(mlp.up_proj),
            read_linear(mlp.down_proj),
            gelu_tanh if config.model_type == "gemma" else silu,
        ),
    )


class DecoderLayer:
    """One decoder layer of one sequence; maps hidden [hidden] to hidden [hidden]."""

    def __init__(self, decoder: Decoder, attention: LayerOracle) -> None:
        self.decoder = decoder
        self.attention = attention

    def step(self, x: Array, host_retained: Sequence[Sequence[int]] | None) -> Array:
        """Run one token; `host_retained` is what a host's layer holds after it."""
        q, k, v = self.decoder.project(x)
        attended = self.attention.step(q, k, v, host_retained=host_retained)  # [H, D]
        return self.decoder.finish(attended, x)


@dataclass(frozen=True)
class GreedyRun:
    """A greedy generation; the last token is never fed, as in every host.

    `logit_margins` holds top1 - top2 of the logits behind each token; `retained`
    what each layer holds at the end.
    """

    tokens: list[int]
    logit_margins: list[float]
    retained: list[Retained]
    min_margin: float
    near_ties: int


class ClosedLoop(ABC):
    """A whole model over one sequence, which continues from its own answers."""

    @property
    @abstractmethod
    def attentions(self) -> list[LayerOracle]:
        """The layers under the policy."""

    @abstractmethod
    def feed(self, token_id: int) -> Array:
        """Append one token and return the logits after it, [vocab]."""

    def greedy(self, prompt_ids: Sequence[int], max_new_tokens: int) -> Iterator[Array]:
        """Feed the prompt, then the best token each time; yield the logits after each token."""
        ids = list(prompt_ids)
        for step in range(len(prompt_ids) + max_new_tokens - 1):
            logits = self.feed(ids[step])
            if step + 1 == len(ids):
                ids.append(int(logits.argmax()))
            yield logits

    def generate(self, prompt_ids: Sequence[int], max_new_tokens: int) -> GreedyRun:
        """Run a whole greedy generation."""
        return self.summarise(list(self.greedy(prompt_ids, max_new_tokens))[-max_new_tokens:])

    def summarise(self, logits: Sequence[Array]) -> GreedyRun:
        """Describe the generation that these logits decided, one per new token."""
        tokens = [int(row.argmax()) for row in logits]
        margins = [logit_margin(row) for row in logits]
        return GreedyRun(tokens, margins, self.retained, self.min_margin, self.near_ties)

    @property
    def retained(self) -> list[Retained]:
        """Positions held now, per layer and KV head."""
        return [attention.retained for attention in self.attentions]

    @property
    def min_margin(self) -> float:
        """The closest eviction so far in any layer."""
        return min(attention.min_margin for attention in self.attentions)

    @property
    def near_ties(self) -> int:
        """How often a host's choice was adopted."""
        return sum(attention.near_ties for attention in self.attentions)


class ModelOracle(ClosedLoop):
    """A whole model over one sequence.

    Args:
        model: a transformers causal LM of one of `FAMILIES`, with default RoPE.
        spec: the policy of every layer; a mix says which.
        parameters: tensors of the file that the spec names, if it names one.
        prompt: tokens of the prompt, for prefill=bulk and protect=prompt.
    """

    def __init__(
        self,
        model: Any,
        spec: Spec | str,
        parameters: Mapping[str, Array] | None = None,
        prompt: int = 0,
    ) -> None:
        config, decoder = model.config, model.model
        check_is_supported(config)
        num_layers = len(decoder.layers)
        specs = by_layer(spec, num_layers) if isinstance(spec, str) else [spec] * num_layers
        is_scaled = config.model_type == "gemma"
        self.embeddings = to_float64(decoder.embed_tokens.weight)
        self.embedding_scale = math.sqrt(config.hidden_size) if is_scaled else 1.0
        theta = config.rope_parameters["rope_theta"]
        decoders = [read_decoder(module, config) for module in decoder.layers]
        mean = self.embeddings.mean(axis=0) * self.embedding_scale
        needs_rows = all(each.level == "model" and each.has_memory for each in specs)
        rows = first_rows(decoders, mean, specs[0], theta) if needs_rows else [None] * num_layers
        self.layers = [
            DecoderLayer(
                layer,
                LayerOracle(specs[index], layer=index, theta=theta, given=given, prompt=prompt),
            )
            for index, layer in enumerate(decoders)
            for given in [Given(parameters or {}, layer, rows[index])]
        ]
        self.norm = read_norm(decoder.norm, config)
        self.lm_head = read_linear(model.lm_head)

    def feed(
        self, token_id: int, host_retained: Sequence[Sequence[Sequence[int]] | None] | None = None
    ) -> Array:
        """Append one token and return the logits after it, [vocab].

        Args:
            token_id: the token.
            host_retained: per layer and KV head, what a host holds after this
                token; followed at near-ties, refused elsewhere.
        """
        x = self.embeddings[token_id] * self.embedding_scale
        for index, layer in enumerate(self.layers):
            x = layer.step(x, host_retained[index] if host_retained is not None else None)
        return self.lm_head(self.norm(x))

    @property
    def attentions(self) -> list[LayerOracle]:
        """Every layer."""
        return [layer.attention for layer in self.layers]


def check_is_supported(config: Any) -> None:
    """Refuse models whose definition this file does not contain."""
    if config.model_type not in FAMILIES:
        raise ValueError(f"the oracle knows {FAMILIES}; got {config.model_type!r}")
    if config.rope_parameters.get("rope_type", "default") != "default":
        raise ValueError(f"the oracle knows default RoPE only; got {config.rope_parameters}")
    is_sliding = "sliding_attention" in (getattr(config, "layer_types", None) or ())
    if is_sliding or (config.model_type == "mistral" and config.sliding_window is not None):
        raise ValueError("the oracle has no sliding window; set sliding_window=None")


def logit_margin(logits: Array) -> float:
    """Return how far the best logit lies above the second."""
    second, first = np.partition(logits, -2)[-2:]
    return float(first - second)
