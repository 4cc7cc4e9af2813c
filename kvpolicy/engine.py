"""The reference step engine: one token per row, the definition of what every host computes.

A step appends the new key and value, attends over everything held, lets the policy observe,
and evicts if the occupancy law says so. Eviction comes after attention for every policy, so
that all policies see equally many slots. Rows may differ in length; none influences another.
"""

import torch
from torch import Tensor

from kvpolicy.attention import AttentionLayer, weighted_values
from kvpolicy.selection import select_victims
from kvpolicy.slots import Slots, survivors


def step(layer: AttentionLayer, slots: Slots, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Process one token of every row and return its attention output.

    Args:
        layer: The attention layer and its policy.
        slots: State of the rows; changed in place.
        q: [B, H, D] query of the new token.
        k: [B, H_kv, D] key, rotated at the token's position.
        v: [B, H_kv, D] value.

    Returns:
        [B, H, D] in the dtype of q.
    """
    evicted = [layer.occupancy.evicted(n) for n in slots.tokens]
    visible = [slot + 1 for slot in slots.append(k, v, layer.occupancy)]
    slots.tokens = [n + 1 for n in slots.tokens]
    held = max(visible)
    valid = _valid(visible, held, slots.positions)
    logits = layer.logits(
        q[:, :, None], slots.keys[:, :, :held], torch.tensor(evicted, device=q.device)[:, None, None]
    )
    if min(visible) < held:
        logits = logits.masked_fill(~valid[:, :, None, None], -torch.inf)
    weights = logits.softmax(dim=-1)  # [B, H_kv, G, 1, S]
    output = weighted_values(weights, _zeroed(slots.values[:, :, :held], valid))

    pooled = layer.pool(weights)[:, :, 0] if layer.needs_weights else None  # [B, H_kv, S]
    if pooled is not None:
        _observe(layer, slots, pooled, valid, visible)
    due = [row for row, n in enumerate(slots.tokens) if layer.occupancy.is_due(n)]
    if due:
        _evict(layer, slots, due, pooled, visible)
    return output[:, :, 0].to(q.dtype)


def _observe(
    layer: AttentionLayer, slots: Slots, pooled: Tensor, valid: Tensor, visible: list[int]
) -> None:
    """Update the accumulated statistic of the slots by one attention row."""
    held = pooled.shape[-1]
    before = slots.accumulated[:, :, :held]
    seen = torch.tensor(visible, device=pooled.device)
    policy = layer.eviction
    if policy is not None and policy.observes_every_token:
        view = layer.view(
            positions=slots.positions[:, :, :held],
            valid=valid,
            n=torch.tensor(slots.tokens, device=pooled.device),
            visible=seen,
            weights=pooled,
            accumulated=before,
            keys=slots.keys[:, :, :held],
            values=slots.values[:, :, :held],
        )
        slots.accumulated[:, :, :held] = policy.observe(view)
    elif layer.accumulates:
        slots.accumulated[:, :, :held] = layer.fold(before, pooled[:, :, None], seen.view(-1, 1, 1))


def _evict(
    layer: AttentionLayer, slots: Slots, rows: list[int], pooled: Tensor | None, visible: list[int]
) -> None:
    """Evict the surplus of the rows that are due; they all hold `capacity` slots."""
    policy, held = layer.eviction, visible[rows[0]]
    assert policy is not None, "only policies that evict are ever due"
    part = slots.rows(rows, held)
    index = torch.tensor(rows, device=part.positions.device)
    view = layer.view(
        positions=part.positions,
        valid=_valid([held] * len(rows), held, part.positions),
        n=torch.tensor(part.tokens, device=part.positions.device),
        visible=torch.tensor([held] * len(rows), device=part.positions.device),
        weights=None if pooled is None else pooled[index, :, :held],
        accumulated=part.accumulated,
        keys=part.keys,
        values=part.values,
    )
    surplus = layer.occupancy.interval
    victims = select_victims(policy, view, surplus)
    kept = part.keep(survivors(victims, held, surplus))
    slots.put_rows(rows, kept, layer.occupancy.capacity)


def _valid(visible: list[int], held: int, positions: Tensor) -> Tensor:
    """Which of the first `held` slots each row holds; [B, H_kv, held] bool."""
    device = positions.device
    mask = torch.arange(held, device=device) < torch.tensor(visible, device=device)[:, None]
    return mask[:, None].expand(-1, positions.shape[1], -1)


def _zeroed(values: Tensor, valid: Tensor) -> Tensor:
    """Values with unheld slots cleared: 0 x NaN of unwritten memory is NaN."""
    return values.masked_fill(~valid[..., None], 0) if not bool(valid.all()) else values
