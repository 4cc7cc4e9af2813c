"""One pre-norm decoder layer in float64, all of it but its attention.

Axes: H query heads, H_kv KV heads, F rows, D head_dim.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from oracles.arithmetic import Array

Function = Callable[[Array], Array]


def linear(weight: Array, bias: Array | float = 0.0) -> Function:
    """A linear map over the last axis; weight is [out, in]."""
    return lambda x: x @ weight.T + bias


def rms_norm(weight: Array, epsilon: float) -> Function:
    """An RMS norm over the last axis."""
    return lambda x: x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + epsilon) * weight


def gated_mlp(gate: Function, up: Function, down: Function, activation: Function) -> Function:
    """A feed-forward network whose hidden units are multiplied by a gate: SwiGLU, GeGLU."""
    return lambda x: down(activation(gate(x)) * up(x))


def plain_mlp(up: Function, down: Function, activation: Function) -> Function:
    """A feed-forward network of two maps with an activation between them."""
    return lambda x: down(activation(up(x)))


def unchanged(x: Array) -> Array:
    """Return x: the norm of queries and keys where a model has none."""
    return x


def silu(x: Array) -> Array:
    """Return x * sigmoid(x)."""
    return x / (1 + np.exp(-x))


def gelu_tanh(x: Array) -> Array:
    """Return the tanh approximation of GELU."""
    return x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


@dataclass(frozen=True, kw_only=True)
class Decoder:
    """The layer's weights as functions over the last axis."""

    num_query_heads: int
    num_kv_heads: int
    input_norm: Function
    q_proj: Function
    k_proj: Function
    v_proj: Function
    o_proj: Function
    mlp_norm: Function
    mlp: Function
    q_norm: Function = unchanged
    k_norm: Function = unchanged

    def project(self, x: Array) -> tuple[Array, Array, Array]:
        """Normalise hidden states [..., hidden] and project them, before rotation.

        Returns:
            Queries [..., H, D], keys and values [..., H_kv, D].
        """
        h = self.input_norm(x)
        q = self.q_proj(h).reshape(*x.shape[:-1], self.num_query_heads, -1)
        k = self.k_proj(h).reshape(*x.shape[:-1], self.num_kv_heads, -1)
        v = self.v_proj(h).reshape(*x.shape[:-1], self.num_kv_heads, -1)
        return self.q_norm(q), self.k_norm(k), v

    def finish(self, attended: Array, residual: Array | float) -> Array:
        """Project attention outputs [..., H, D], add the residual, and apply the MLP."""
        a = residual + self.o_proj(attended.reshape(*attended.shape[:-2], -1))
        return a + self.mlp(self.mlp_norm(a))
