"""A small Llama in plain torch, with the parameter names of transformers."""

import math
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """Sizes of the model; `export` writes the same numbers into `config.json`."""

    vocabulary: int = 2048
    hidden: int = 256
    num_layers: int = 6
    num_query_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 64
    intermediate: int = 416
    rope_theta: float = 1e5
    norm_epsilon: float = 1e-5


class RMSNorm(nn.Module):
    """Root-mean-square normalisation, computed in float32."""

    def __init__(self, width: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.epsilon = epsilon

    def forward(self, hidden: Tensor) -> Tensor:
        wide = hidden.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.epsilon)
        return (wide * scale).to(hidden.dtype) * self.weight


def rotary_frequency(head_dim: int, theta: float) -> Tensor:
    """Return the angle per position of each pair of coordinates, fastest first."""
    return theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)


def rotary_tables(length: int, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Return cosines and sines, each [T, D], in the half-split layout of Llama."""
    positions = torch.arange(length, dtype=torch.float32)
    angle = torch.outer(positions, rotary_frequency(head_dim, theta))
    angle = torch.cat((angle, angle), dim=-1)  # [T, D]
    return angle.cos(), angle.sin()


def rotate(heads: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Apply rotary positions to `heads`, [B, H, T, D]."""
    left, right = heads.chunk(2, dim=-1)
    return heads * cosine + torch.cat((-right, left), dim=-1) * sine


class Projected(NamedTuple):
    """What attention works on, each [B, H, T, D]; queries and keys know their positions."""

    query: Tensor
    key: Tensor
    value: Tensor


class Attention(nn.Module):
    """Causal grouped-query attention."""

    def __init__(self, sizes: Architecture) -> None:
        super().__init__()
        self.sizes = sizes
        query_width = sizes.num_query_heads * sizes.head_dim
        kv_width = sizes.num_kv_heads * sizes.head_dim
        self.q_proj = nn.Linear(sizes.hidden, query_width, bias=False)
        self.k_proj = nn.Linear(sizes.hidden, kv_width, bias=False)
        self.v_proj = nn.Linear(sizes.hidden, kv_width, bias=False)
        self.o_proj = nn.Linear(query_width, sizes.hidden, bias=False)

    def forward(self, hidden: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        projected = self.project(hidden, cosine, sine)
        mixed = F.scaled_dot_product_attention(*projected, is_causal=True)
        return self.o_proj(mixed.transpose(1, 2).flatten(2))

    def project(self, hidden: Tensor, cosine: Tensor, sine: Tensor) -> Projected:
        """Return what each head works on; kv heads are repeated for their group."""
        sizes = self.sizes

        def split(projected: Tensor, num_heads: int) -> Tensor:
            return projected.unflatten(-1, (num_heads, sizes.head_dim)).transpose(1, 2)

        query = rotate(split(self.q_proj(hidden), sizes.num_query_heads), cosine, sine)
        key = rotate(split(self.k_proj(hidden), sizes.num_kv_heads), cosine, sine)
        value = split(self.v_proj(hidden), sizes.num_kv_heads)  # [B, H_kv, T, D]
        group = sizes.num_query_heads // sizes.num_kv_heads
        return Projected(
            query, key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
        )

    def activity(self, hidden: Tensor, cosine: Tensor, sine: Tensor, rows: Tensor) -> Tensor:
        """Return the share of attention that the queries at `rows` [R] give to others than BOS.

        One number, the mean over batch, heads and queries.
        """
        sizes = self.sizes
        asking = self.q_proj(hidden[:, rows]).unflatten(-1, (sizes.num_query_heads, sizes.head_dim))
        query = rotate(asking.transpose(1, 2), cosine[rows], sine[rows])  # [B, H, R, D]
        held = self.k_proj(hidden).unflatten(-1, (sizes.num_kv_heads, sizes.head_dim))
        key = rotate(held.transpose(1, 2), cosine, sine)
        key = key.repeat_interleave(sizes.num_query_heads // sizes.num_kv_heads, dim=1)
        scores = (query @ key.mT).float() / math.sqrt(sizes.head_dim)  # [B, H, R, T]
        is_future = torch.arange(hidden.shape[1]) > rows[:, None]
        return 1 - scores.masked_fill(is_future, -math.inf).softmax(-1)[..., 0].mean()


class FeedForward(nn.Module):
    """The gated SiLU network of Llama."""

    def __init__(self, sizes: Architecture) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(sizes.hidden, sizes.intermediate, bias=False)
        self.up_proj = nn.Linear(sizes.hidden, sizes.intermediate, bias=False)
        self.down_proj = nn.Linear(sizes.intermediate, sizes.hidden, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(hidden)) * self.up_proj(hidden))


class Layer(nn.Module):
    """Attention and feed-forward network, each behind a norm and a residual."""

    def __init__(self, sizes: Architecture) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(sizes.hidden, sizes.norm_epsilon)
        self.self_attn = Attention(sizes)
        self.post_attention_layernorm = RMSNorm(sizes.hidden, sizes.norm_epsilon)
        self.mlp = FeedForward(sizes)

    def forward(self, hidden: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        hidden = hidden + self.self_attn(self.input_layernorm(hidden), cosine, sine)
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class Llama(nn.Module):
    """Token ids [B, T] in, final hidden states [B, T, hidden] out; the embedding is tied."""

    def __init__(self, sizes: Architecture) -> None:
        super().__init__()
        self.sizes = sizes
        self.embed_tokens = nn.Embedding(sizes.vocabulary, sizes.hidden)
        self.layers = nn.ModuleList(Layer(sizes) for _ in range(sizes.num_layers))
        self.norm = RMSNorm(sizes.hidden, sizes.norm_epsilon)

    def layer(self, index: int) -> Layer:
        """Return one layer, with its type."""
        return cast(Layer, self.layers[index])

    def initialise(self, seed: int) -> None:
        """Draw the weights; both projections into the residual stream start at zero."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            self.embed_tokens.weight.normal_(0.0, 0.02, generator=generator)
            for name, weight in self.layers.named_parameters():
                if weight.dim() != 2:
                    continue
                if name.endswith(("o_proj.weight", "down_proj.weight")):
                    weight.zero_()
                else:
                    weight.normal_(0.0, weight.shape[1] ** -0.5, generator=generator)

    def compile_parts(self) -> None:
        """Compile the layers, which share one compiled code per length, and the losses.

        The model as one piece takes ten times as long to compile and runs no faster.
        """
        for layer in self.layers:
            layer.compile(dynamic=False)
        self.head_losses = torch.compile(self.head_losses, dynamic=False)

    def forward(self, tokens: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        hidden = self.embed_tokens(tokens)
        for layer in self.layers:
            hidden = layer(hidden, cosine, sine)
        return self.norm(hidden)

    def token_losses(self, tokens: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        """Return the next-token loss in nats per position, [B, T - 1], in float32."""
        return self.head_losses(self(tokens[:, :-1], cosine, sine), tokens[:, 1:])

    def losses_and_activity(
        self, tokens: Tensor, cosine: Tensor, sine: Tensor, rows: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the losses, and the attention given to others than BOS behind layer 0.

        The latter is the mean over the layers of what `Attention.activity` tells of `rows`.
        """
        hidden = self.embed_tokens(tokens[:, :-1])
        activities = []
        for index in range(self.sizes.num_layers):
            layer = self.layer(index)
            if index > 0:
                seen = layer.input_layernorm(hidden)
                activities.append(layer.self_attn.activity(seen, cosine, sine, rows))
            hidden = layer(hidden, cosine, sine)
        losses = self.head_losses(self.norm(hidden), tokens[:, 1:])
        return losses, torch.stack(activities).mean()

    def head_losses(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of `targets` [B, T] given final hidden states [B, T, hidden]."""
        logits = F.linear(hidden, self.embed_tokens.weight).float()  # [B, T, vocabulary]
        losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        return losses.view(targets.shape)
