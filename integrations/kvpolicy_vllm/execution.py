"""Carries out a plan on one layer's pages: observe, evict, and walk prompts.

Axes: R rows, n blocks per row, S slots, P slots of a block, H heads, H_kv KV heads,
G query heads per KV head, D head dimension, Q tokens of a row.
"""

from time import perf_counter
from typing import NamedTuple

import torch
from torch import Tensor

from kvpolicy.attention import AttentionLayer
from kvpolicy.lookahead import extend
from kvpolicy.selection import select_victims
from kvpolicy.slots import Slots
from kvpolicy_vllm.kernel import Kernel
from kvpolicy_vllm.pages import Cells, Pages, put_rows, rows_of
from kvpolicy_vllm.plan import Decision, InPlace, Row, Walk

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


def attend_in_place(
    part: InPlace, kernel: Kernel, pages: Pages, batch: LayerBatch, schedule: Tensor
) -> None:
    """Append rows' tokens to their slots and run vLLM's kernel over them."""
    tokens = slice(0, len(part.slots)) if part.tokens is None else part.tokens
    kernel.append(batch.key[tokens], batch.value[tokens], part.slots)
    pages.begin(part.block, part.offset, part.positions)
    attended = (
        batch.output[tokens]
        if part.tokens is None
        else batch.output.new_empty(len(part.slots), *batch.output.shape[1:])
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

    The rows' tokens were already appended and attended.

    Args:
        decision: Rows of one policy.
        layer: The attention layer under that policy.
        pages: The layer's pages; changed in place.
        query: [T, H, D] of the whole batch.
    """
    begin = perf_counter()
    weights = None
    if layer.needs_weights:
        weights = _weights(decision, layer, pages, query)
        if layer.accumulates:
            _accumulate(decision, layer, pages, weights)
    if decision.due:
        _evict(decision, layer, pages, weights)
    _post_time(decision.rows, perf_counter() - begin)


def _weights(decision: Decision, layer: AttentionLayer, pages: Pages, query: Tensor) -> Tensor:
    """Pooled attention rows of the newest tokens: [R, H_kv, S] float32."""
    keys = pages.read_keys_transposed(decision.blocks).float()  # [R, n, H_kv, D, P]
    rows, num_blocks, kv_heads, _, size = keys.shape
    q = query[decision.last_tokens].float() * layer.scale
    q = q.unflatten(1, (kv_heads, -1))[:, None]  # [R, 1, H_kv, G, D]
    logits = (q @ keys).permute(0, 2, 3, 1, 4).reshape(rows, kv_heads, -1, num_blocks * size)
    slots = torch.arange(num_blocks * size)
    hidden = (slots >= decision.visible[:, None])[:, None, None]
    weights = logits.masked_fill(hidden, -torch.inf).softmax(dim=-1)
    return layer.pool(weights[:, :, :, None])[:, :, 0]


def _accumulate(decision: Decision, layer: AttentionLayer, pages: Pages, weights: Tensor) -> None:
    """Fold the newest tokens' rows into the statistic kept with the slots."""
    before = rows_of(pages.accumulated, decision.blocks, weights.shape[-1])
    after = layer.fold(before, weights[:, :, None], decision.visible.view(-1, 1, 1))
    put_rows(pages.accumulated, decision.blocks, after)


def _evict(decision: Decision, layer: AttentionLayer, pages: Pages, weights: Tensor | None) -> None:
    """Choose the victims of the rows that are due and fill the holes they leave."""
    due = torch.tensor(decision.due)
    blocks, capacity = decision.blocks[due], int(decision.visible[due[0]])
    positions = rows_of(pages.positions, blocks, capacity).long()
    view = layer.view(
        positions=positions,
        valid=torch.ones_like(positions, dtype=torch.bool),
        n=decision.totals[due],
        visible=decision.visible[due],
        weights=None if weights is None else weights[due][..., :capacity],
        accumulated=rows_of(pages.accumulated, blocks, capacity),
    )
    surplus = layer.occupancy.interval
    victims = select_victims(decision.policy, view, surplus)
    fill_holes(pages, blocks, victims, capacity - surplus)
    for row, dropped in zip(decision.due, victims.sum(dim=(1, 2)).tolist(), strict=True):
        decision.rows[row].account.evicted_cells += dropped


def fill_holes(pages: Pages, blocks: Tensor, victims: Tensor, retained: int) -> None:
    """Move surviving slots at or above `retained` into the victims' slots below it.

    Every head has as many survivors above as victims below, and both come in the same
    order of rows and heads, so they pair up one to one.

    Args:
        pages: The layer's pages.
        blocks: [R, n] blocks of the rows.
        victims: [R, H_kv, S] bool, S - retained of them per row and head.
        retained: Slots that stay occupied, [0, retained).
    """
    row, head, hole = victims[..., :retained].nonzero(as_tuple=True)
    _, _, above = (~victims[..., retained:]).nonzero(as_tuple=True)
    above = above + retained
    size = pages.block_size
    pages.move(
        source=Cells(blocks[row, above // size], head, above % size),
        target=Cells(blocks[row, hole // size], head, hole % size),
    )


def walk(part: Walk, layer: AttentionLayer, pages: Pages, batch: LayerBatch) -> None:
    """Process rows over a dense copy of their slots, and write the copy back.

    Args:
        part: Rows in lockstep.
        layer: The attention layer under their policy.
        pages: The layer's pages; changed in place.
        batch: The whole batch; the output is written at the rows' tokens.
    """
    spent = layer.stopwatch.seconds
    slots = _load(part, pages)
    attended = extend(
        layer,
        slots,
        batch.query[part.tokens].transpose(1, 2),
        batch.key[part.tokens].transpose(1, 2),
        batch.value[part.tokens].transpose(1, 2),
    )  # [R, H, Q, D]
    batch.output[part.tokens] = attended.transpose(1, 2).to(batch.output.dtype)
    _store(part, slots, pages)
    kv_heads = pages.positions.shape[1]
    for row, evicted in zip(part.rows, slots.evicted, strict=True):
        row.account.evicted_cells += evicted * kv_heads
    _post_time(part.rows, layer.stopwatch.seconds - spent)


def _load(part: Walk, pages: Pages) -> Slots:
    """Dense copy of the rows' blocks."""
    capacity = part.blocks.shape[1] * pages.block_size
    keys = pages.read_keys_transposed(part.blocks).permute(0, 2, 1, 4, 3).flatten(2, 3)
    values = pages.read_values(part.blocks).transpose(1, 2).flatten(2, 3)
    return Slots(
        keys=keys,
        values=values,
        positions=rows_of(pages.positions, part.blocks, capacity).long(),
        accumulated=rows_of(pages.accumulated, part.blocks, capacity),
        tokens=[row.seen for row in part.rows],
    )


def _store(part: Walk, slots: Slots, pages: Pages) -> None:
    """Write the rows' slots back into their blocks."""
    shape = (part.blocks.shape[1], pages.block_size)
    pages.write_blocks(
        part.blocks,
        slots.keys.unflatten(2, shape).transpose(1, 2),
        slots.values.unflatten(2, shape).transpose(1, 2),
    )
    put_rows(pages.positions, part.blocks, slots.positions.int())
    put_rows(pages.accumulated, part.blocks, slots.accumulated)


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
    keys = pages.read_keys_transposed(held)[0, :, kv_heads].float()  # [n, H_kv, D, P]
    keys = keys.permute(1, 2, 0, 3).flatten(2)[..., :num_slots]  # [H_kv, D, S]
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


def _post_time(rows: list[Row], seconds: float) -> None:
    """Share the time of a policy's work evenly among its rows."""
    for row in rows:
        row.account.policy_seconds += seconds / len(rows)
