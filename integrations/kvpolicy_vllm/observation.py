"""Attention rows of decoding tokens, and the statistic that they are folded into.

Only evictions ask for the statistic, and the keys that a query sees stay where they are until
then. So queries are kept, and a request's are answered together: its keys are read once for
`MAX_BACKLOG` tokens, not once for each. The sums are the same, in the same order.

Axes: R rows, n blocks per row, Q queries of a row, H heads, H_kv KV heads, G query heads per KV
head, D head dimension, P slots of a block, S = n P slots of a row.
"""

from collections.abc import Sequence
from time import perf_counter

import torch
from torch import Tensor

from kvpolicy.attention import AttentionLayer
from kvpolicy_vllm import attention_rows
from kvpolicy_vllm.attention_rows import POOLS
from kvpolicy_vllm.book import Observed
from kvpolicy_vllm.pages import Pages
from kvpolicy_vllm.parts import Observation
from kvpolicy_vllm.rows import Row, post_time

MAX_BACKLOG = 16
"""Queries that a request keeps in a layer; reading keys for more at once saves nothing."""

_MAX_WEIGHTS = 1 << 22
"""Attention weights held at once while several rows catch up."""


def observe(part: Observation, layer: AttentionLayer, pages: Pages, query: Tensor) -> None:
    """Keep the newest tokens' queries; rows that have kept enough catch up.

    Nothing is kept if the policy fails.

    Args:
        part: Rows of one policy, none of which evicts now.
        layer: The attention layer under that policy.
        pages: The layer's pages; the statistic is changed in place.
        query: [T, H, D] of the whole batch.
    """
    begin = perf_counter()
    full: list[int] = []
    newest = query[part.last_tokens].unbind()
    for index, (row, one, terms) in enumerate(zip(part.rows, newest, part.terms, strict=True)):
        backlog = row.account.backlogs[layer.index]
        backlog.append(Observed(one, *terms))
        if len(backlog) == MAX_BACKLOG:
            full.append(index)
    if full:
        rows = [part.rows[index] for index in full]
        catch_up(rows, part.blocks[full], part.written[full], layer, pages)
    post_time(part.rows, perf_counter() - begin)


def catch_up(
    rows: Sequence[Row], blocks: Tensor, written: Tensor, layer: AttentionLayer, pages: Pages
) -> None:
    """Fold the attention of all queries that rows have kept into their statistic.

    Args:
        rows: R rows.
        blocks: [R, n] blocks that hold what the queries see.
        written: Like `blocks`, with the null block for those that others may share.
        layer: The attention layer under the rows' policy.
        pages: The layer's pages; the statistic is changed in place.
    """
    groups: dict[int, list[int]] = {}
    for index, row in enumerate(rows):
        if count := len(row.account.backlogs[layer.index]):
            groups.setdefault(count, []).append(index)
    for count, members in groups.items():
        num_heads = rows[members[0]].account.backlogs[layer.index][0].query.shape[0]
        weights = count * num_heads * blocks.shape[1] * pages.block_size
        step = max(1, _MAX_WEIGHTS // weights)
        for first in range(0, len(members), step):
            some = members[first : first + step]
            backlogs = [rows[index].account.backlogs[layer.index] for index in some]
            _fold_all(backlogs, blocks[some], written[some], layer, pages)


def _fold_all(
    backlogs: list[list[Observed]],
    blocks: Tensor,
    written: Tensor,
    layer: AttentionLayer,
    pages: Pages,
) -> None:
    """Fold backlogs of R rows, Q queries each, and empty them."""
    kept = [observed for backlog in backlogs for observed in backlog]
    rows = len(backlogs)
    query = torch.stack([observed.query for observed in kept]).unflatten(0, (rows, -1))
    visible = torch.tensor([observed.visible for observed in kept]).view(rows, -1)
    fading = torch.tensor([observed.fading for observed in kept]).view(rows, -1)
    gain = torch.tensor([observed.gain for observed in kept]).view(rows, -1)
    weights = pooled_weights(query, blocks, visible, layer, pages)
    fold(pages, written, visible, weights, fading, gain)
    for backlog in backlogs:
        backlog.clear()


def fold(
    pages: Pages, blocks: Tensor, visible: Tensor, weights: Tensor, fading: Tensor, gain: Tensor
) -> None:
    """Fold rows of weights into the statistic where it lies.

    Args:
        pages: A layer's pages; the statistic is changed in place.
        blocks: [R, n], with the null block for those that must stay as they are.
        visible: [R, Q] slots that each query attends to.
        weights: [R, H_kv, Q, S] float32.
        fading: [R, Q] float32 factor on the statistic before each query.
        gain: [R, Q] float32 factor on each query's weights.
    """
    attention_rows.fold_rows(
        pages.memory.numpy(),
        pages.statistic_runs,
        blocks.numpy(),
        visible.numpy(),
        weights.contiguous().numpy(),
        fading.numpy(),
        gain.numpy(),
    )


def pooled_weights(
    query: Tensor, blocks: Tensor, visible: Tensor, layer: AttentionLayer, pages: Pages
) -> Tensor:
    """Attention rows of queries, reduced over query heads as the policy wants them.

    Args:
        query: [R, Q, H, D].
        blocks: [R, n].
        visible: [R, Q] slots that each query attends to.
        layer: The attention layer under the policy.
        pages: The layer's pages.

    Returns:
        [R, H_kv, Q, S] float32, zero for what is not visible.
    """
    if pages.has_plain_keys:
        return _rows_in_place(query, blocks, visible, layer, pages)
    logits = logits_of(query, blocks, pages, layer.scale)
    hidden = torch.arange(logits.shape[-1]) >= visible[:, :, None]  # [R, Q, S]
    weights = logits.masked_fill_(hidden[:, None, None], -torch.inf).softmax(dim=-1)
    return layer.pool(weights)


def _rows_in_place(
    query: Tensor, blocks: Tensor, visible: Tensor, layer: AttentionLayer, pages: Pages
) -> Tensor:
    """The same from keys as they lie."""
    policy, kv_heads = layer.eviction, pages.runs.shape[1]
    assert policy is not None, "only policies that evict look at weights"
    num_slots = blocks.shape[1] * pages.block_size
    rows = torch.empty(len(query), kv_heads, query.shape[1], num_slots)
    attention_rows.pooled_rows(
        pages.memory,
        pages.key_runs,
        blocks,
        visible,
        (query.float() * layer.scale).unflatten(2, (kv_heads, -1)),
        rows,
        POOLS["mean" if policy.scope_is_layer else policy.group_reduction],
    )
    # A head's group is reduced already; other heads are only of interest to scope=layer.
    return layer.pool(rows[:, :, None]) if policy.scope_is_layer else rows


def logits_of(
    query: Tensor, blocks: Tensor, pages: Pages, scale: float, aside: Tensor | None = None
) -> Tensor:
    """Logits of queries over whole blocks.

    Args:
        query: [R, Q, H, D].
        blocks: [R, n].
        pages: The layer's pages.
        scale: Factor on query-key products.
        aside: [R, H_kv, n', D, P] in the cache's dtype, receives the keys of the first blocks.

    Returns:
        [R, H_kv, G, Q, S] float32.
    """
    heads = (query.float() * scale).unflatten(2, (pages.runs.shape[1], -1))
    rows = heads.permute(0, 2, 3, 1, 4)  # [R, H_kv, G, Q, D]
    q = rows.flatten(2, 3)[:, :, None]
    parts: list[Tensor] = []
    for row, keys in enumerate(pages.keys_by_row(blocks)):
        parts.append(q[row] @ keys.float())  # [H_kv, n, G Q, P]
        if aside is not None:
            aside[row] = keys[:, : aside.shape[2]]
    return torch.stack(parts).transpose(2, 3).flatten(3).unflatten(2, rows.shape[2:4])
