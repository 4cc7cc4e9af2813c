"""Carries out a plan on one layer's pages: append, attend, evict, and walk prompts.

Axes: R rows, n blocks per row, S slots, P slots of a block, H heads, H_kv KV heads,
D head dimension, Q tokens of a row.
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
from kvpolicy_vllm.kernel import Kernel
from kvpolicy_vllm.memory import PagedMemory
from kvpolicy_vllm.observation import catch_up, fold, pooled_weights
from kvpolicy_vllm.pages import Moves, Pages, fill_holes, put_rows, rows_of
from kvpolicy_vllm.parts import (
    Decision,
    Eviction,
    InPlace,
    Placement,
    Walk,
    without_prompts,
)
from kvpolicy_vllm.rows import post_time

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
    """Observe the newest tokens' attention and evict.

    The rows' tokens were already appended and attended. Everything is decided before anything is
    stored: if the policy fails, the pages are as they were, but for what was observed before.

    Args:
        decision: Rows of one policy.
        layer: The attention layer under that policy.
        pages: The layer's pages; changed in place.
        query: [T, H, D] of the whole batch.
    """
    begin = perf_counter()
    visible, weights = decision.visible[:, None], None
    if layer.accumulates:
        catch_up(decision.rows, decision.blocks, decision.written, layer, pages)
    if layer.needs_weights:
        newest = query[decision.last_tokens][:, None]
        weights = pooled_weights(newest, decision.blocks, visible, layer, pages)
    moves = [_moves(each, layer, pages, weights) for each in decision.evictions]
    if weights is not None and layer.accumulates:
        fading, gain = decision.fading[:, None], decision.gain[:, None]
        fold(pages, decision.written, visible, weights, fading, gain)
    for eviction, chosen in zip(decision.evictions, moves, strict=True):
        pages.move(chosen)
        for row, dropped in zip(eviction.rows, chosen.dropped, strict=True):
            row.account.evicted_cells += dropped
    post_time(decision.rows, perf_counter() - begin)


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
        weights: [R, H_kv, 1, S] of all rows of the decision, if the policy needs any.
    """
    policy, blocks, capacity = layer.eviction, eviction.blocks, eviction.capacity
    assert policy is not None, "decisions are made by policies that evict"
    positions = rows_of(pages.positions, blocks, capacity).long()
    accumulated = None
    if weights is not None:
        weights = weights[eviction.index, :, 0, :capacity]
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
    spent, blocks = layer.stopwatch.seconds, part.token_blocks
    if layer.accumulates:
        written = without_prompts(part.rows, blocks, pages.block_size)
        catch_up(part.rows, blocks, written, layer, pages)
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
