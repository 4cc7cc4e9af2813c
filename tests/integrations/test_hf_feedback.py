"""fam:level=model is algorithm 2 of TransformerFAM over the whole model, at any schedule."""

import math
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn.functional import gelu, silu

from fixtures.caches import feed
from fixtures.models import (
    SMALL_SHAPE,
    random_gemma,
    random_llama,
    random_mistral,
    random_prompt,
    random_qwen3,
)
from kvpolicy.memory.feedback import FeedbackMemory
from kvpolicy_hf import PolicyCache

TOLERANCE = 1e-4
"""On logits of a few units; float32 noise reaches 1e-5."""

FAMILIES = {
    "llama": lambda: random_llama(**SMALL_SHAPE),
    "biased": lambda: with_biases(
        random_llama(**SMALL_SHAPE | {"attention_bias": True, "mlp_bias": True})
    ),
    "mistral": random_mistral,
    "qwen3": random_qwen3,
    "gemma": random_gemma,
}


class Sizes(NamedTuple):
    """Parameters of `fam`, as its spec names them."""

    block: int = 8
    segments: int = 1
    slots: int = 4
    sinks: int = 0
    query: str = "current"

    @property
    def spec(self) -> str:
        """The policy."""
        return "fam:level=model," + ",".join(f"{k}={v}" for k, v in self._asdict().items())


SIZES = (
    Sizes(),
    Sizes(query="previous"),
    Sizes(block=5, segments=2, slots=7, sinks=3),
    Sizes(block=6, segments=0, slots=1, sinks=2, query="previous"),
)


def with_biases(model: Any) -> Any:
    """Give every linear map a bias that is not zero."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if name.endswith("bias"):
                parameter.normal_(std=0.1, generator=generator)
    return model


@cache
def built(family: str) -> Any:
    """Build a model once."""
    return FAMILIES[family]()


class Layer:
    """One decoder layer in float64 from its parameters alone."""

    def __init__(self, model: Any, index: int) -> None:
        prefix = f"model.layers.{index}."
        parameters = model.state_dict().items()
        self.weights = {k.removeprefix(prefix): v.double() for k, v in parameters}
        self.config = model.config
        self.is_gemma = model.config.model_type == "gemma"

    def linear(self, name: str, x: Tensor) -> Tensor:
        """Apply a linear map."""
        return x @ self.weights[f"{name}.weight"].T + self.weights.get(f"{name}.bias", 0.0)

    def norm(self, name: str, x: Tensor) -> Tensor:
        """Apply an RMS norm; a layer without it leaves x alone."""
        if f"{name}.weight" not in self.weights:
            return x
        variance = x.square().mean(dim=-1, keepdim=True) + self.config.rms_norm_eps
        return x / variance.sqrt() * (self.weights[f"{name}.weight"] + self.is_gemma)

    def heads(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values [H, T, D] of hidden states [T, d_model], before rotation."""
        normed = self.norm("input_layernorm", hidden)
        q, k, v = (
            self.linear(f"self_attn.{name}_proj", normed).unflatten(-1, (-1, self.config.head_dim))
            for name in "qkv"
        )
        q, k = self.norm("self_attn.q_norm", q), self.norm("self_attn.k_norm", k)
        group = self.config.num_attention_heads // self.config.num_key_value_heads
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        return q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1)

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """Apply RoPE to [H, T, D]."""
        half = x.shape[-1] // 2
        theta = self.config.rope_parameters["rope_theta"]
        angles = positions.double()[:, None] * theta ** -(torch.arange(half).double() / half)
        first, second = x[..., :half], x[..., half:]
        cos, sin = angles.cos(), angles.sin()
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """W_O Attn(q, k, v) without a mask, [T, d_model]."""
        weights = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(dim=-1)
        return self.linear("self_attn.o_proj", (weights @ v).transpose(0, 1).flatten(1))

    def feed_forward(self, mixed: Tensor) -> Tensor:
        """FF(PreLN(mixed)) + mixed."""
        normed = self.norm("post_attention_layernorm", mixed)
        gate = self.linear("mlp.gate_proj", normed)
        gate = gelu(gate, approximate="tanh") if self.is_gemma else silu(gate)
        return mixed + self.linear("mlp.down_proj", gate * self.linear("mlp.up_proj", normed))


class Walk:
    """A layer's tokens and its memory rows over a whole text."""

    def __init__(self, layer: Layer, sizes: Sizes, hidden: Tensor, rows: Tensor) -> None:
        self.layer, self.sizes, self.hidden = layer, sizes, hidden
        self.rows, self.places = rows, torch.arange(-sizes.slots, 0)
        self.positions = torch.arange(len(hidden))
        q, k, self.v = layer.heads(hidden)
        self.q, self.k = (layer.rotate(x, self.positions) for x in (q, k))

    def outputs(self) -> Tensor:
        """Hidden states above the layer."""
        outputs, (block, segments, _, sinks, _) = [], self.sizes
        for t in range(len(self.hidden)):
            oldest = sinks + max(0, (t - sinks) // block - segments) * block
            seen = (self.positions <= t) & ((self.positions < sinks) | (self.positions >= oldest))
            _, k, v = self.layer.heads(self.rows)
            k = torch.cat([self.layer.rotate(k, self.places), self.k[:, seen]], dim=1)
            v = torch.cat([v, self.v[:, seen]], dim=1)
            attended = self.layer.attend(self.q[:, t : t + 1], k, v)
            outputs.append(self.layer.feed_forward(attended + self.hidden[t]))
            n = t + 1
            if n > sinks and (n - sinks) % block == 0:
                self.update(n)
        return torch.cat(outputs)

    def update(self, n: int) -> None:
        """Let the rows read the block that ends at n, and feed them back."""
        block, num_rows = self.sizes.block, self.sizes.slots
        is_first = n == self.sizes.sinks + block
        stand = torch.arange(n - num_rows, n)
        look = stand
        if self.sizes.query == "previous":
            look = torch.arange(-num_rows, 0) if is_first else stand - block
        q, k, v = self.layer.heads(self.rows)
        q, k = self.layer.rotate(q, look), self.layer.rotate(k, self.places)
        k, v = (
            torch.cat([rows, tokens[:, n - block : n]], dim=1)
            for rows, tokens in ((k, self.k), (v, self.v))
        )
        mixed = self.layer.attend(q, k, v) + (0 if is_first else self.rows)
        self.rows, self.places = self.layer.feed_forward(mixed), stand


@torch.no_grad()
def algorithm_2(model: Any, ids: list[int], sizes: Sizes) -> Tensor:
    """Logits after every token, [T, vocab] float64, by the definition and without a cache."""
    embeddings = model.get_input_embeddings().weight.double()
    if model.config.model_type == "gemma":
        embeddings = embeddings * math.sqrt(model.config.hidden_size)
    hidden = embeddings[ids]
    rows = embeddings.mean(dim=0).expand(sizes.slots, -1)
    for index in range(model.config.num_hidden_layers):
        layer = Layer(model, index)
        hidden = Walk(layer, sizes, hidden, rows).outputs()
        q, k, v = layer.heads(rows)
        places = torch.arange(-sizes.slots, 0)
        attended = layer.attend(layer.rotate(q, places), layer.rotate(k, places), v)
        rows = layer.feed_forward(attended + rows)
    top = Layer(model, 0)
    return top.norm("model.norm", hidden) @ model.lm_head.weight.double().T


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("sizes", SIZES, ids=lambda sizes: sizes.spec)
def test_a_forward_is_algorithm_2(family: str, sizes: Sizes) -> None:
    """Proves every logit equals the definition over the whole model, in every family."""
    model = built(family)
    ids = random_prompt(model, 40, 0)
    got = feed(model, PolicyCache(model, sizes.spec), ids, [])
    expected = algorithm_2(model, ids, sizes)
    torch.testing.assert_close(got.double(), expected, atol=TOLERANCE, rtol=0)


def test_the_rows_matter() -> None:
    """Proves the comparison could fail: without the rows, or with others, logits move."""
    model, sizes = built("llama"), Sizes()
    ids = random_prompt(model, 40, 0)
    expected = algorithm_2(model, ids, sizes)
    for spec in (Sizes(query="previous").spec, "bswa:block=8,segments=1"):
        got = feed(model, PolicyCache(model, spec), ids, [])
        assert (got.double() - expected)[16:].abs().max() > 1000 * TOLERANCE


def test_first_rows_are_made_once_for_a_model() -> None:
    """Proves later requests, copies and resets reuse them, and nobody writes into them."""
    model = built("llama")
    past = PolicyCache(model, Sizes().spec)
    decoder = past._policy_layers[1].attention.decoder
    assert decoder is not None
    rows = decoder.start(4)
    before = rows.clone()
    feed(model, past, random_prompt(model, 40, 0), [])
    past.reset()
    feed(model, past, random_prompt(model, 20, 0), [])
    assert decoder.start(4) is rows
    assert torch.equal(rows, before)
    assert not rows.requires_grad


@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_rows_have_the_models_dtype(family: str) -> None:
    """Proves rows are carried in bfloat16 by a bfloat16 model, and stay near the definition."""
    model, sizes = FAMILIES[family](), Sizes()
    ids = random_prompt(model, 24, 0)
    expected = algorithm_2(model, ids, sizes).log_softmax(-1)
    half = PolicyCache(model.bfloat16(), sizes.spec)
    got = feed(model, half, ids, [9]).double().log_softmax(-1)
    for layer in half._policy_layers:
        memory = layer.slots.memory if layer.slots is not None else None
        assert isinstance(memory, FeedbackMemory)
        assert {memory.hidden.dtype, memory.keys.dtype, memory.values.dtype} == {torch.bfloat16}
    others = feed(model, PolicyCache(model, "bswa:block=8,segments=1"), ids, [9])
    distance = (others.double().log_softmax(-1) - expected).abs().mean()
    assert (got - expected).abs().mean() < distance / 4
