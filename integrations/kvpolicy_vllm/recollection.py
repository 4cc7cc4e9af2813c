"""Reads memories for decoding rows whose slots stay as they are: nothing is written back.

Axes: R rows, n blocks per row, P slots of a block, H heads, H_kv KV heads, G query heads per KV
head, S token slots, D head dimension.
"""

from time import perf_counter

import torch
from torch import Tensor

from kvpolicy.attention import AttentionLayer
from kvpolicy.memory.linear import LinearMemory, recall
from kvpolicy.policies.infini import Infini
from kvpolicy_vllm.execution import LayerBatch
from kvpolicy_vllm.memory import PagedMemory
from kvpolicy_vllm.observation import logits_of
from kvpolicy_vllm.pages import Pages, put_rows, rows_of
from kvpolicy_vllm.parts import Recollection
from kvpolicy_vllm.rows import post_time


def recollect(part: Recollection, memory: PagedMemory, batch: LayerBatch) -> None:
    """Let the rows' tokens read their memory.

    The tokens were placed, and attended by vLLM's kernel where the memory is no slots.

    Args:
        part: The rows.
        memory: Where their memory lies.
        batch: The whole batch; the output is written at the rows' tokens.
    """
    if part.allotment.cells:
        _attend_jointly(part, memory, batch)
    else:
        _mix_in(part, memory, batch)


def _attend_jointly(part: Recollection, memory: PagedMemory, batch: LayerBatch) -> None:
    """Attend to memory slots and tokens in one softmax, and observe it."""
    layer, pages, cells = memory.layer, memory.pages, part.allotment.cells
    query = batch.query[part.tokens][:, None]
    keys = _room_for_slots(part, pages)
    logits = logits_of(query, part.blocks, pages, layer.scale, aside=keys.transpose(2, 3))
    logits = logits[..., cells:]  # [R, H_kv, G, 1, S]
    values = pages.read_values(part.blocks, reuse=True)
    slots = memory.slots(part.blocks, keys.flatten(3).transpose(-1, -2), values)
    values = values[:, :, cells:]
    hidden = _hide(logits, part.visible)
    # What unwritten slots hold may be no number, which a weight of zero would not hide.
    values[:, :, -hidden.shape[-1] :].masked_fill_(hidden[:, None, :, None], 0)
    attended = layer.attend(
        slots,
        query.transpose(1, 2),
        logits,
        values,
        positions=part.seen[:, None, None],
        evicted=part.allotment.law.evicted(part.seen)[:, None, None],
    )
    batch.output[part.tokens] = attended.output[:, :, 0].to(batch.output.dtype)
    if layer.accumulates:
        begin = perf_counter()
        _accumulate(part, layer, pages, layer.pool(attended.weights))
        post_time(part.rows, perf_counter() - begin)


def _room_for_slots(part: Recollection, pages: Pages) -> Tensor:
    """Room for the keys of memory slots, whole blocks side by side: [R, H_kv, D, n, P]."""
    num_blocks = -(-part.allotment.cells // pages.block_size)
    shape = (len(part.rows), pages.runs.shape[1], pages.head_dim, num_blocks, pages.block_size)
    return pages.scratch.take("slots", shape, pages.runs.dtype)


def _accumulate(part: Recollection, layer: AttentionLayer, pages: Pages, weights: Tensor) -> None:
    """Fold the tokens' rows [R, H_kv, 1, S] into the statistic kept with token slots."""
    cells = part.allotment.cells
    whole = rows_of(pages.accumulated, part.blocks, cells + weights.shape[-1])
    after = layer.fold(whole[..., cells:], weights, part.visible.view(-1, 1, 1))
    put_rows(pages.accumulated, part.blocks, torch.cat([whole[..., :cells], after], dim=-1))


def _mix_in(part: Recollection, memory: PagedMemory, batch: LayerBatch) -> None:
    """Mix what the memory answers into what vLLM's kernel found among the tokens."""
    policy, stored = part.policy, memory.load(part.blocks)
    assert isinstance(policy, Infini), "other policies' rows are walked"
    assert isinstance(stored, LinearMemory), "made by the policy"
    query, rotary = batch.query[part.tokens].float()[:, :, None], memory.layer.setting.rotary
    raw = rotary.shift(query, -part.seen[:, None, None])  # [R, H, 1, D]
    recalled = recall(stored, raw.unflatten(1, (-1, memory.group)))
    lse = _log_sum_exp(part, memory, query[:, :, 0]) if policy.is_calibrated else None
    share = policy.share(stored, recalled, memory.layer.setting, lse)
    local = batch.output[part.tokens].float()[:, :, None]
    mixed = policy.mix(local, recalled, share)[:, :, 0]
    batch.output[part.tokens] = mixed.to(batch.output.dtype)


def _log_sum_exp(part: Recollection, memory: PagedMemory, query: Tensor) -> Tensor:
    """Log-sum-exp of each row's logits over its tokens, [R, H_kv, G, 1]."""
    blocks = part.blocks[:, part.allotment.state_blocks :]
    logits = logits_of(query[:, None], blocks, memory.pages, memory.layer.scale)
    _hide(logits, part.visible)
    return logits.logsumexp(dim=-1)


def _hide(logits: Tensor, visible: Tensor) -> Tensor:
    """Set logits [R, H_kv, G, 1, S] of slots that are not visible to -inf, in place.

    Returns:
        [R, S'] bool, which of the last S' slots these are; all slots before them are visible.
    """
    num_slots = logits.shape[-1]
    first = min(int(visible.min()), num_slots - 1)
    hidden = torch.arange(first, num_slots) >= visible[:, None]
    logits[..., first:].masked_fill_(hidden[:, None, None, None], -torch.inf)
    return hidden
