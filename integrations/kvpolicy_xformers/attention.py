"""Attention over retained slots: xformers' kernels, or on a CPU the same biases in torch.

Both give the log-sum-exp of the logits beside the output. With it, parts that were attended apart
can be merged, and a policy's weights follow from a product of queries and keys.

Axes: B rows, H query heads, H_kv KV heads, G query heads per KV head, C slots of capacity,
Q queries, M packed queries, S packed keys, D head dimension.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from xformers.ops.fmha import (  # pyright: ignore[reportMissingImports]
    memory_efficient_attention_partial,
)
from xformers.ops.fmha.attn_bias import AttentionBias  # pyright: ignore[reportMissingImports]

from kvpolicy.attention import Answer
from kvpolicy_xformers.bias import slot_bias


def attend(q: Tensor, keys: Tensor, values: Tensor, visible: Sequence[int], scale: float) -> Answer:
    """Attend to slots as they are stored; a `kvpolicy.attention.Kernel`.

    Keys and values are seen in place: a KV head of a row is a sequence of its own.

    Args:
        q: [B, H, Q, D] queries of consecutive tokens.
        keys: [B, H_kv, C, D]; slots from `visible` on are never read.
        values: [B, H_kv, C, D], likewise.
        visible: Slots that each row's last query sees, its own Q tokens last.
        scale: Factor on query-key products.
    """
    batch, heads, queries, dim = q.shape
    kv_heads, capacity, value_dim = *keys.shape[1:3], values.shape[-1]
    group, sequences = heads // kv_heads, batch * kv_heads
    bias = slot_bias(visible, kv_heads, capacity, queries, q.device)
    packed = q.reshape(sequences, group, queries, dim).transpose(1, 2)  # [B * H_kv, Q, G, D]
    output, lse = attend_packed(
        packed.reshape(1, sequences * queries, 1, group, dim),
        keys.reshape(1, sequences * capacity, 1, 1, dim).expand(-1, -1, -1, group, -1),
        values.reshape(1, sequences * capacity, 1, 1, value_dim).expand(-1, -1, -1, group, -1),
        bias,
        scale,
    )
    output = output.view(sequences, queries, group, value_dim).transpose(1, 2)
    lse = lse.view(group, sequences, queries).transpose(0, 1)
    return Answer(
        output.reshape(batch, heads, queries, value_dim), lse.reshape(batch, heads, queries)
    )


def attend_packed(
    q: Tensor, keys: Tensor, values: Tensor, bias: AttentionBias, scale: float
) -> Answer:
    """Attend to packed keys under one of `kvpolicy_xformers.bias`.

    Args:
        q: [1, M, H_kv, G, D], equally many queries of every sequence.
        keys: [1, S, H_kv, G, D], usually expanded over G.
        values: [1, S, H_kv, G, D], likewise.
        bias: Which queries see which keys.
        scale: Factor on query-key products.

    Returns:
        Output [1, M, H_kv, G, D] and log-sum-exp [1, H_kv, G, M] float32.
    """
    if q.device.type == "cpu":
        return _attend_materialised(q, keys, values, bias, scale)
    output, lse = memory_efficient_attention_partial(q, keys, values, attn_bias=bias, scale=scale)
    return Answer(output, _packed(lse.float(), q.shape[1], len(bias.q_seqinfo.seqstart_py) - 1))


def _packed(lse: Tensor, total: int, sequences: int) -> Tensor:
    """Log-sum-exps [1, H_kv, G, M], from that or from [sequences, H_kv, G, >= queries]."""
    if lse.shape[0] == 1 and lse.shape[-1] >= total:
        return lse[..., :total]
    return lse[..., : total // sequences].movedim(0, -2).flatten(-2)[None]


def _attend_materialised(
    q: Tensor, keys: Tensor, values: Tensor, bias: AttentionBias, scale: float
) -> Answer:
    """The definition: the bias as a tensor, and torch's own attention."""
    mask = _materialised(bias, q.shape[1], keys.shape[1])  # [M, S]
    read = (mask == 0).any(dim=0)[None, :, None, None, None]
    # Whatever unwritten slots hold, NaN included, must not reach a product.
    rows, k, v = (
        x[0].flatten(1, 2).transpose(0, 1)  # [H_kv * G, M or S, D]
        for x in (q, keys.where(read, 0), values.where(read, 0))
    )
    output = F.scaled_dot_product_attention(rows, k, v, attn_mask=mask.to(q.dtype), scale=scale)
    logits = (rows.float() * scale) @ k.float().transpose(-1, -2) + mask
    return Answer(
        output.transpose(0, 1).unflatten(1, q.shape[2:4])[None],
        logits.logsumexp(dim=-1).unflatten(0, q.shape[2:4])[None],
    )


def _materialised(bias: AttentionBias, num_queries: int, num_keys: int) -> Tensor:
    """The bias as [M, S] float32: zero where a query sees a key, otherwise -inf."""
    table = getattr(bias, "block_tables", None)
    if table is None:
        return bias.materialize((num_queries, num_keys))
    mask = bias.materialize((num_queries, table.numel() * bias.page_size))
    return F.pad(mask, (0, num_keys - mask.shape[1]), value=-torch.inf)
