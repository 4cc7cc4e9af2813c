"""Carries out a plan on one layer's pages: observe, evict, and walk prompts.

Axes: R rows, n blocks per row, S slots, P slots of a block, H heads, H_kv KV heads,
G query heads per KV head, D head dimension, Q tokens of a row.
"""

from time import perf_counter
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from kvpolicy.attention import AttentionLayer
from kvpolicy.lookahead import extend
from kvpolicy.memory.state import slots_of
from kvpolicy.selection import select_victims
from kvpolicy.slots import Slots
from kvpolicy_vllm import attention_rows
from kvpolicy_vllm.attention_rows import POOLS
from kvpolicy_vllm.kernel import Kernel
from kvpolicy_vllm.memory import PagedMemory
from kvpolicy_vllm.pages import Moves, Pages, fill_holes, put_rows, rows_of
from kvpolicy_vllm.parts import Decision, Eviction, InPlace, Placement, Walk
from kvpolicy_vllm.rows import Row

_MAX_LOGITS = 1 << 22
"""Query-key products held at once while attention is recorded."""


class LayerBatch(NamedTuple):
    """A batch's tensors in one layer.

    Attributes:
        query: [T, H, D].
        key: [T, H_kv, D], rotated.
        value: [T, H_kv, D].
        output: [T, H, D], to be written.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    output: Tensor


def place(part: Placement, kernel: Kernel, pages: Pages, batch: LayerBatch) -> None:
    """Append rows' tokens to their slots."""
    tokens = slice(0, len(part.slots)) if part.tokens is None else part.tokens
    kernel.append(batch.key[tokens], batch.value[tokens], part.slots)
    pages.begin(part.block, part.offset, part.fresh)


def attend_in_place(part: InPlace, kernel: Kernel, batch: LayerBatch, schedule: Tensor) -> None:
    """Run vLLM's kernel over rows whose tokens were placed."""
    num_tokens = int(part.query_start_loc[-1])
    tokens = slice(0, num_tokens) if part.tokens is None else part.tokens
    attended = (
        batch.output[tokens]
        if part.tokens is None
        else batch.output.new_empty(num_tokens, *batch.output.shape[1:])
    )
    kernel.attend(
        batch.query[tokens],
        attended,
        part.query_start_loc,
        part.seq_lens,
        part.block_table,
        schedule,
    )
    if part.tokens is not None:
        batch.output[tokens] = attended


def decide(decision: Decision, layer: AttentionLayer, pages: Pages, query: Tensor) -> None:
    """Observe the newest tokens' attention and evict where it is due.

    The rows' tokens were already appended and attended. Everything is decided before anything is
    stored: if the policy fails, the pages are as they were.

    Args:
        decision: Rows of one policy.
        layer: The attention layer under that policy.
        pages: The layer's pages; changed in place.
        query: [T, H, D] of the whole batch.
    """
    begin = perf_counter()
    weights = _weights(decision, layer, pages, query) if layer.needs_weights else None
    moves = [_moves(each, layer, pages, weights) for each in decision.evictions]
    if weights is not None and layer.accumulates:
        _fold_in_place(decision, pages, weights)
    for eviction, chosen in zip(decision.evictions, moves, strict=True):
        pages.move(chosen)
        for row, dropped in zip(eviction.rows, chosen.dropped, strict=True):
            row.account.evicted_cells += dropped
    post_time(decision.rows, perf_counter() - begin)


def _weights(decision: Decision, layer: AttentionLayer, pages: Pages, query: Tensor) -> Tensor:
    """Pooled attention rows of the newest tokens: [R, H_kv, S] float32."""
    policy, newest = decision.policy, query[decision.last_tokens]
    if pages.has_plain_keys:
        rows = _rows_in_place(decision, layer, pages, newest)
        # A head's group is reduced already; other heads are only of interest to scope=layer.
        return layer.pool(rows[:, :, None, None])[:, :, 0] if policy.scope_is_layer else rows
    logits = newest_logits(newest, decision.blocks, pages, layer.scale)
    slots = torch.arange(logits.shape[-1])
    hidden = (slots >= decision.visible[:, None])[:, None, None]
    weights = logits.masked_fill_(hidden, -torch.inf).softmax(dim=-1)
    return layer.pool(weights[:, :, :, None])[:, :, 0]


def _rows_in_place(
    decision: Decision, layer: AttentionLayer, pages: Pages, query: Tensor
) -> Tensor:
    """Attention rows of queries [R, H, D], reduced to KV heads, from keys as they lie.

    Returns:
        [R, H_kv, S] float32.
    """
    policy, kv_heads = decision.policy, pages.runs.shape[1]
    rows = torch.empty(len(query), kv_heads, decision.blocks.shape[1] * pages.block_size)
    attention_rows.pooled_rows(
        pages.memory,
        pages.key_runs,
        decision.blocks,
        decision.visible,
        (query * layer.scale).unflatten(1, (kv_heads, -1)),
        rows,
        POOLS["mean" if policy.scope_is_layer else policy.group_reduction],
    )
    return rows


def newest_logits(
    query: Tensor, blocks: Tensor, pages: Pages, scale: float, aside: Tensor | None = None
) -> Tensor:
    """Logits of one query per row over whole blocks.

    Args:
        query: [R, H, D].
        blocks: [R, n].
        pages: The layer's pages.
        scale: Factor on query-key products.
        aside: [R, H_kv, n', D, P] in the cache's dtype, receives the keys of the first blocks.

    Returns:
        [R, H_kv, G, n P] float32.
    """
    q = (query.float() * scale).unflatten(1, (pages.runs.shape[1], -1))[:, :, None]
    parts: list[Tensor] = []
    for row, keys in enumerate(pages.keys_by_row(blocks)):
        parts.append(q[row] @ keys.float())  # [H_kv, n, G, P]
        if aside is not None:
            aside[row] = keys[:, : aside.shape[2]]
    return torch.stack(parts).transpose(2, 3).flatten(3)


def _fold_in_place(decision: Decision, pages: Pages, weights: Tensor) -> None:
    """Fold the newest tokens' rows into the statistic where it lies."""
    attention_rows.fold_rows(
        pages.memory.numpy(),
        pages.statistic_runs,
        decision.written.numpy(),
        decision.visible.numpy(),
        weights.contiguous().numpy(),
        decision.fading.numpy(),
        decision.gain.numpy(),
    )


def _moves(
    eviction: Eviction, layer: AttentionLayer, pages: Pages, weights: Tensor | None
) -> Moves:
    """Which slots of rows that are due take the places of those that go."""
    if eviction.moves is not None:
        return eviction.moves
    victims = _victims(eviction, layer, pages, weights)
    retained = eviction.capacity - eviction.surplus
    moves = fill_holes(eviction.blocks, victims, retained, pages.block_size)
    if layer.eviction is not None and layer.eviction.reindexable:
        eviction.moves = moves
    return moves


def _victims(
    eviction: Eviction, layer: AttentionLayer, pages: Pages, weights: Tensor | None
) -> Tensor:
    """Victims among the slots of rows that are due; [R', H_kv, S'] bool.

    Args:
        eviction: The rows.
        layer: The attention layer under their policy.
        pages: The layer's pages.
        weights: [R, H_kv, S] of all rows of the decision, if the policy needs any.
    """
    policy, blocks, capacity = layer.eviction, eviction.blocks, eviction.capacity
    assert policy is not None, "decisions are made by policies that evict"
    positions = rows_of(pages.positions, blocks, capacity).long()
    accumulated = None
    if weights is not None:
        weights = weights[eviction.index, :, :capacity]
        accumulated = _folded(eviction, layer, pages, weights) if layer.accumulates else None
    view = layer.view(
        positions=positions,
        valid=torch.ones_like(positions, dtype=torch.bool),
        n=eviction.totals,
        visible=eviction.visible,
        weights=weights,
        accumulated=accumulated,
        keys=pages.read_keys(blocks)[:, :, :capacity] if "keys" in policy.needs else None,
        values=pages.read_values(blocks)[:, :, :capacity] if "values" in policy.needs else None,
        prompts=eviction.prompts,
    )
    return select_victims(policy, view, eviction.surplus, layer.ranks)


def _folded(eviction: Eviction, layer: AttentionLayer, pages: Pages, weights: Tensor) -> Tensor:
    """The statistic of rows that are due, with their newest tokens' weights [R', H_kv, S']."""
    before = rows_of(pages.accumulated, eviction.blocks, weights.shape[-1])
    ages = layer.window_ages(*zip(*((row.law, row.total) for row in eviction.rows), strict=True))
    ages = None if ages is None else ages.view(-1, 1, 1)
    return layer.fold(before, weights[:, :, None], eviction.visible.view(-1, 1, 1), ages)


def walk(
    part: Walk,
    layer: AttentionLayer,
    pages: Pages,
    batch: LayerBatch,
    memory: PagedMemory | None,
) -> None:
    """Process rows over a dense copy of their slots and memory, and write the copy back.

    Args:
        part: Rows in lockstep.
        layer: The attention layer under their policy.
        pages: The layer's pages; changed in place.
        batch: The whole batch; the output is written at the rows' tokens.
        memory: Where their memory lies; None if they have none.
    """
    spent = layer.stopwatch.seconds
    slots = _load(part, pages, memory)
    attended = extend(
        layer,
        slots,
        batch.query[part.tokens].transpose(1, 2),
        batch.key[part.tokens].transpose(1, 2),
        batch.value[part.tokens].transpose(1, 2),
    )  # [R, H, Q, D]
    batch.output[part.tokens] = attended.transpose(1, 2).to(batch.output.dtype)
    _store(part, slots, pages, memory)
    kv_heads = pages.positions.shape[1]
    for row, evicted in zip(part.rows, slots.evicted, strict=True):
        row.account.evicted_cells += evicted * kv_heads
        if memory is not None:
            row.account.memories[layer.index] = memory
    post_time(part.rows, layer.stopwatch.seconds - spent)


def _load(part: Walk, pages: Pages, memory: PagedMemory | None) -> Slots:
    """Dense copy of the rows' blocks: token slots, and what the memory holds."""
    cells, blocks = part.rows[0].allotment.cells, part.token_blocks
    keys, values = pages.read_keys(blocks), pages.read_values(blocks)
    capacity = keys.shape[2]
    slots = Slots(
        keys=keys[:, :, cells:],
        values=values[:, :, cells:],
        positions=rows_of(pages.positions, blocks, capacity)[..., cells:].long(),
        accumulated=rows_of(pages.accumulated, blocks, capacity)[..., cells:],
        tokens=[row.seen for row in part.rows],
        prompts=[row.allotment.prompt for row in part.rows],
    )
    if memory is None:
        return slots
    if part.rows[0].seen == 0:  # pages keep what their last owner left in them
        slots.memory = memory.empty(len(part.rows))
    elif cells:
        slots.memory = memory.slots(blocks, keys, values)
    else:
        slots.memory = memory.load(part.blocks)
    return slots


def _store(part: Walk, slots: Slots, pages: Pages, memory: PagedMemory | None) -> None:
    """Write the rows' slots and memory back into their blocks.

    Blocks that hold nothing but a prompt that is kept may be shared: they stay untouched. So do
    blocks behind the slots, which a prompt leaves when it ends.
    """
    keys, values, blocks = slots.keys, slots.values, part.token_blocks
    positions, accumulated = slots.positions, slots.accumulated
    if memory is not None and slots.memory is not None:
        if part.rows[0].allotment.cells:
            remembered = slots_of(slots.memory)
            keys, values = (
                torch.cat(parts, dim=2)
                for parts in ((remembered.keys, keys), (remembered.values, values))
            )
            positions = torch.cat([remembered.positions, positions], dim=-1)
            accumulated = torch.cat([remembered.mass, accumulated], dim=-1)
        else:
            memory.store_numbers(part.blocks, slots.memory)
    size, num_slots = pages.block_size, keys.shape[2]
    shared, count = part.rows[0].allotment.kept // size, -(-num_slots // size)
    blocks, first, missing = blocks[:, shared:count], shared * size, count * size - num_slots
    keys, values = (pad(x[:, :, first:], (0, 0, 0, missing)) for x in (keys, values))
    pages.write_blocks(blocks, keys, values)
    put_rows(pages.positions, blocks, positions[..., first:].int())
    put_rows(pages.accumulated, blocks, accumulated[..., first:])


def log_sum_exp(
    query: Tensor,
    pages: Pages,
    blocks: Tensor,
    kv_heads: list[int],
    *,
    seen: int,
    scale: float,
) -> Tensor:
    """Logarithm of the softmax's denominator over the full cache of one request.

    The request's tokens were already appended, and none was ever evicted, so that slots are
    positions.

    Args:
        query: [Q, H, D] of the tokens at positions `seen`, `seen` + 1, ..., with the query heads
            of `kv_heads` only.
        pages: The layer's pages.
        blocks: The request's blocks, at least those of its tokens.
        kv_heads: KV heads to look at.
        seen: Position of the first query.
        scale: Factor on query-key products.

    Returns:
        [Q, H] float32.
    """
    num_queries = len(query)
    num_slots = seen + num_queries
    held = blocks[None, : -(-num_slots // pages.block_size)]
    keys = pages.read_keys_transposed(held)[0, kv_heads].float()  # [H_kv, n, D, P]
    keys = keys.transpose(1, 2).flatten(2)[..., :num_slots]  # [H_kv, D, S]
    rows = (query.float() * scale).unflatten(1, (len(keys), -1))  # [Q, H_kv, G, D]
    # A prompt's logits would not fit into memory at once.
    step = max(1, _MAX_LOGITS // (query.shape[1] * num_slots))
    parts: list[Tensor] = []
    for first in range(0, num_queries, step):
        part = rows[first : first + step].permute(1, 2, 0, 3)  # [H_kv, G, q, D]
        last = seen + first + part.shape[2]  # slots that the part's last query sees
        logits = (part.flatten(1, 2) @ keys[..., :last]).unflatten(1, part.shape[1:3])
        hidden = torch.ones(part.shape[2], last, dtype=torch.bool).triu(last - part.shape[2] + 1)
        parts.append(logits.masked_fill_(hidden, -torch.inf).logsumexp(dim=-1))  # [H_kv, G, q]
    return torch.cat(parts, dim=2).permute(2, 0, 1).flatten(1)


def post_time(rows: list[Row], seconds: float) -> None:
    """Share the time of a policy's work evenly among its rows."""
    for row in rows:
        row.account.policy_seconds += seconds / len(rows)
