"""The reference step engine: one token per row, the definition of what every host computes.

A step appends the new key and value, attends over everything held, lets the policy observe,
and evicts if the occupancy law says so. Eviction comes after attention for every policy, so
that all policies see equally many slots. Rows may differ in length; none influences another.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from kvpolicy.attention import (
    AttentionLayer,
    Kernel,
    query_key_products,
    weighted_values,
    weights_of,
)
from kvpolicy.memory.answers import absorbed, reflected
from kvpolicy.memory.state import Memory
from kvpolicy.occupancy import Occupancy
from kvpolicy.selection import new_statistic, select_victims
from kvpolicy.slots import Slots, survivors


def step(layer: AttentionLayer, slots: Slots, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Process one token of every row and return its attention output.

    Everything is decided before anything is stored: if the policy fails, `slots` holds what
    it held before.

    Args:
        layer: The attention layer and its policy.
        slots: State of the rows; changed in place.
        q: [B, H, D] query of the new token.
        k: [B, H_kv, D] key, rotated at the token's position.
        v: [B, H_kv, D] value.

    Returns:
        [B, H, D] in the dtype of q.
    """
    laws = slots.laws(layer.occupancy)
    evicted = [law.evicted(n) for law, n in zip(laws, slots.tokens, strict=True)]
    tokens = [n + 1 for n in slots.tokens]
    due = due_together(laws, tokens)
    visible = [slot + 1 for slot in slots.append(k, v, layer.occupancy)]
    valid = _valid(visible, max(visible), slots.positions)
    if layer.kernel is None:
        attended = _attend(layer, slots, q, valid, visible, evicted)
    else:
        attended = _attend_by(layer.kernel, layer, slots, q, valid, visible, is_due=bool(due))
    output, weights, lse = attended
    held = max(visible)

    with layer.stopwatch:
        pooled = None if weights is None else layer.pool(weights)[:, :, 0]  # [B, H_kv, S]
        now = _Moment(tokens, visible, valid, pooled, q, lse)
        accumulated = _observe(layer, slots, now)
        memory = _reflect(layer, slots, now)
        kept = [
            (rows, _evict(layer, slots, now, rows, surplus, accumulated, memory))
            for rows, surplus in due
        ]

        slots.tokens = tokens
        if pooled is not None:
            slots.accumulated[:, :, :held] = accumulated
        if memory is not slots.memory:
            slots.memory = memory
        for rows, part in kept:
            slots.put_rows(rows, part, layer.occupancy)
    return output[:, :, 0].to(q.dtype)


def due_together(laws: list[Occupancy], tokens: list[int]) -> list[tuple[list[int], int]]:
    """Rows that evict after these many tokens, by slots held, with the slots that each drops."""
    groups: dict[tuple[int, int], list[int]] = {}
    for row, (law, n) in enumerate(zip(laws, tokens, strict=True)):
        if surplus := law.surplus(n):
            groups.setdefault((law.held(n), surplus), []).append(row)
    return [(rows, surplus) for (_, surplus), rows in groups.items()]


class _Attended(NamedTuple):
    """What the new tokens' attention gave.

    Attributes:
        output: [B, H, 1, D].
        weights: [B, H_kv, G, 1, S] over tokens; None if the policy does not look at them.
        lse: [B, H_kv, G] of the logits, if there is a memory.
    """

    output: Tensor
    weights: Tensor | None
    lse: Tensor | None


def _attend(
    layer: AttentionLayer,
    slots: Slots,
    q: Tensor,
    valid: Tensor,
    visible: list[int],
    evicted: list[int],
) -> _Attended:
    """Attend to the slots that are valid, and to a memory."""
    held = valid.shape[-1]
    logits = layer.logits(
        q[:, :, None],
        slots.keys[:, :, :held],
        torch.tensor(evicted, device=q.device)[:, None, None],
    )
    values = slots.values[:, :, :held]
    if min(visible) < held:
        logits = logits.masked_fill(~valid[:, :, None, None], -torch.inf)
        values = values.masked_fill(~valid[..., None], 0)  # 0 x NaN of unwritten memory is NaN
    if slots.memory is None:
        weights = logits.softmax(dim=-1)
        shown = weights if layer.needs_weights else None
        return _Attended(weighted_values(weights, values), shown, None)
    attended = layer.attend(
        slots.memory,
        q[:, :, None],
        logits,
        values,
        positions=torch.tensor(slots.tokens, device=q.device)[:, None, None],
        evicted=torch.tensor(evicted, device=q.device)[:, None, None],
    )
    shown = attended.weights if layer.needs_weights else None
    return _Attended(attended.output, shown, attended.lse[..., 0])


def _attend_by(
    kernel: Kernel,
    layer: AttentionLayer,
    slots: Slots,
    q: Tensor,
    valid: Tensor,
    visible: list[int],
    *,
    is_due: bool,
) -> _Attended:
    """Let a kernel attend; weights that the policy looks at follow from its log-sum-exp."""
    queries, held = q[:, :, None], valid.shape[-1]
    output, lse = kernel(queries, slots.keys, slots.values, visible, layer.scale)
    if not layer.reads_weights(due=is_due):
        return _Attended(output, None, None)
    logits = query_key_products(queries, slots.keys[:, :, :held], layer.scale)
    weights = weights_of(logits.masked_fill(~valid[:, :, None, None], -torch.inf), lse)
    return _Attended(output, weights, None)


@dataclass(frozen=True)
class _Moment:
    """What a step has found out after its attention.

    Attributes:
        tokens: Tokens seen per row, the new one included.
        visible: Slots that each row's new token attended to.
        valid: [B, H_kv, S] bool, which slots these are.
        pooled: [B, H_kv, S] weights, if the policy needs them.
        query: [B, H, D].
        lse: [B, H_kv, G] of the query's logits, if there is a memory.
    """

    tokens: list[int]
    visible: list[int]
    valid: Tensor
    pooled: Tensor | None
    query: Tensor
    lse: Tensor | None


def _observe(layer: AttentionLayer, slots: Slots, now: _Moment) -> Tensor:
    """Give the slots' accumulated statistic after one attention row; [B, H_kv, S]."""
    held = now.valid.shape[-1]
    before = slots.accumulated[:, :, :held]
    if now.pooled is None:
        return before
    seen = torch.tensor(now.visible, device=before.device)
    policy = layer.eviction
    if policy is not None and policy.observes_every_token:
        view = layer.view(
            positions=slots.positions[:, :, :held],
            valid=now.valid,
            n=torch.tensor(now.tokens, device=before.device),
            visible=seen,
            weights=now.pooled,
            accumulated=before,
            keys=slots.keys[:, :, :held],
            values=slots.values[:, :, :held],
            prompts=slots.prompts,
        )
        return new_statistic(policy, view)
    if layer.accumulates:
        ages = layer.window_ages(slots.laws(layer.occupancy), now.tokens)
        ages = None if ages is None else ages.view(-1, 1, 1)
        return layer.fold(before, now.pooled[:, :, None], seen.view(-1, 1, 1), ages)
    return before


def _reflect(layer: AttentionLayer, slots: Slots, now: _Moment) -> Memory | None:
    """The rows' memory after those at a block boundary had theirs rewritten."""
    policy, memory = layer.memory_policy, slots.memory
    if policy is None or memory is None:
        return None
    rows = [row for row, n in enumerate(now.tokens) if policy.next_boundary(n - 1) == n]
    if not rows:
        return memory
    assert now.lse is not None, "there is a memory"
    index, held = torch.tensor(rows, device=now.query.device), now.valid.shape[-1]
    part, n = slots.rows(rows, held), torch.tensor(now.tokens, device=now.query.device)[index]
    assert part.memory is not None, "a copy of the memory's rows"
    newest = part.positions >= (n - policy.boundary_tokens)[:, None, None]
    passage = layer.passage(
        part,
        newest & now.valid[index],
        policy.boundary_tokens,
        n=n,
        query=now.query[index],
        lse=now.lse[index],
    )
    changed = memory.rows(torch.arange(len(now.tokens), device=now.query.device))
    changed.put_rows(index, reflected(policy, part.memory, passage))
    return changed


def _evict(
    layer: AttentionLayer,
    slots: Slots,
    now: _Moment,
    rows: list[int],
    surplus: int,
    accumulated: Tensor,
    memory: Memory | None,
) -> Slots:
    """What rows keep that hold equally many slots and drop `surplus` of them."""
    policy, held = layer.eviction, now.visible[rows[0]]
    assert policy is not None, "only policies that evict are ever due"
    part = slots.rows(rows, held)
    index = torch.tensor(rows, device=part.positions.device)
    part.tokens = [now.tokens[row] for row in rows]
    part.accumulated = accumulated[index, :, :held]
    view = layer.view(
        positions=part.positions,
        valid=_valid([held] * len(rows), held, part.positions),
        n=torch.tensor(part.tokens, device=part.positions.device),
        visible=torch.tensor([held] * len(rows), device=part.positions.device),
        weights=None if now.pooled is None else now.pooled[index, :, :held],
        accumulated=part.accumulated,
        keys=part.keys,
        values=part.values,
        prompts=part.prompts,
    )
    victims = select_victims(policy, view, surplus, layer.ranks)
    kept = part.keep(survivors(victims, held, surplus))
    if memory is not None and layer.memory_policy is not None:
        assert now.lse is not None, "there is a memory"
        passage = layer.passage(
            part, victims, surplus, n=view.n, query=now.query[index], lse=now.lse[index]
        )
        kept.memory = absorbed(layer.memory_policy, memory.rows(index), passage)
    return kept


def _valid(visible: list[int], held: int, positions: Tensor) -> Tensor:
    """Which of the first `held` slots each row holds; [B, H_kv, held] bool."""
    device = positions.device
    mask = torch.arange(held, device=device) < torch.tensor(visible, device=device)[:, None]
    return mask[:, None].expand(-1, positions.shape[1], -1)
