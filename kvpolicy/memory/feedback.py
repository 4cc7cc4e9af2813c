"""Feedback rows: hidden states that read a block, pass the layer, and are fed back to it.

TransformerFAM (arXiv 2404.09173), algorithm 2, for one layer. Axes as in
`kvpolicy.memory.state`; F memory rows, d_model the model's width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kvpolicy.attention import query_key_products, weighted_values
from kvpolicy.memory.state import Passage, Setting, Shape, SlotMemory


@dataclass(frozen=True)
class FeedbackMemory(SlotMemory):
    """Memory slots that are projections of hidden states.

    Attributes:
        hidden: [B, F, d_model] in the model's dtype.
    """

    hidden: Tensor


def first_rows(setting: Setting, shape: Shape, num_rows: int) -> FeedbackMemory:
    """Rows before the first block, at positions -F .. -1."""
    assert setting.decoder is not None, "hosts give it to policies that need it"
    hidden = setting.decoder.start(num_rows).expand(shape.rows, -1, -1)
    places = torch.arange(-num_rows, 0, device=shape.device)
    return _memory(hidden, setting, places, shape.dtype)


def reflect(
    memory: FeedbackMemory,
    newest: Passage,
    stand: Tensor,
    look: Tensor,
    is_first: Tensor,
) -> FeedbackMemory:
    """Let the rows read a block and be fed back.

    Args:
        memory: Rows F_{tau-1}, as the block's tokens saw them.
        newest: The block's tokens.
        stand: [B, 1, F] positions of the rows that summarise the block.
        look: [B, 1, F] positions of their queries while they read it.
        is_first: [B, 1, 1] bool, whether no block came before: there is no residual then.
    """
    setting, decoder = newest.setting, newest.setting.decoder
    assert decoder is not None, "there is a memory"
    projected = decoder.project(memory.hidden)
    q = setting.rotary.shift(projected.q.float(), look)
    keys = torch.cat([memory.keys.float(), newest.rotated_keys], dim=2)
    values = torch.cat([memory.values.float(), newest.values], dim=2)
    weights = query_key_products(q, keys, setting.scale).softmax(dim=-1)
    attended = weighted_values(weights, values).to(memory.hidden.dtype)
    residual = memory.hidden.masked_fill(is_first, 0)
    hidden = decoder.finish(attended, residual)
    return _memory(hidden, setting, stand, memory.keys.dtype)


def _memory(hidden: Tensor, setting: Setting, places: Tensor, dtype: torch.dtype) -> FeedbackMemory:
    """Project rows to slots at some places, [F] or [B, 1, F]."""
    assert setting.decoder is not None, "there is a memory"
    projected = setting.decoder.project(hidden)
    keys = setting.rotary.shift(projected.k.float(), places).to(dtype)
    positions = places.expand(keys.shape[:3])
    return FeedbackMemory(
        keys=keys,
        values=projected.v.to(dtype).clone(),
        positions=positions.clone(),
        mass=torch.ones(keys.shape[:3], device=keys.device),
        hidden=hidden.clone(),
    )
