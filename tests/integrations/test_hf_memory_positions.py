"""Memories undo rotations, so that tokens must have been rotated at their own positions."""

from functools import cache
from typing import Any

import pytest
import torch

from fixtures.models import random_llama
from kvpolicy import UnsupportedError
from kvpolicy_hf import PolicyCache

MEMORIES = (
    "compressive:budget=8,fn=max",
    "centroid:budget=8",
    "fam:block=4,segments=1,slots=2,level=model",
    "infini:segment=4,gate=0.5",
)
MASK = torch.tensor([[1] * 12, [0] * 5 + [1] * 7])
IDS = torch.arange(24).view(2, 12)


@cache
def model() -> Any:
    """Build a Llama of two layers."""
    return random_llama(
        num_hidden_layers=2,
        hidden_size=16,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        intermediate_size=16,
        vocab_size=32,
        max_position_embeddings=256,
        pad_token_id=None,
    )


@pytest.mark.parametrize("spec", MEMORIES)
@torch.no_grad()
def test_padded_rows_without_position_ids_are_refused(spec: str) -> None:
    """Proves padding cannot shift a row: it is refused, and the cache can be used still."""
    past = PolicyCache(model(), spec)
    with pytest.raises(UnsupportedError, match="row 1 has seen 0 tokens and goes on at 5"):
        model()(IDS, attention_mask=MASK, past_key_values=past)
    positions = (MASK.cumsum(-1) - 1).clamp(min=0)
    model()(IDS, attention_mask=MASK, position_ids=positions, past_key_values=past)
    assert past.ledger(1).logical_tokens == 7


@torch.no_grad()
def test_steps_of_padded_rows_need_position_ids_too() -> None:
    """Proves a single new token is held to its row's position as a prompt is."""
    past = PolicyCache(model(), MEMORIES[0])
    positions = (MASK.cumsum(-1) - 1).clamp(min=0)
    model()(IDS, attention_mask=MASK, position_ids=positions, past_key_values=past)
    mask = torch.cat([MASK, torch.ones(2, 1, dtype=torch.int64)], dim=1)
    with pytest.raises(UnsupportedError, match="row 1 has seen 7 tokens and goes on at 12"):
        model()(IDS[:, :1], attention_mask=mask, past_key_values=past)


@torch.no_grad()
def test_policies_without_a_memory_see_distances_only() -> None:
    """Proves padded rows need no position_ids where nothing is rotated back."""
    past, alone = (PolicyCache(model(), "window:budget=4") for _ in range(2))
    padded = model()(IDS, attention_mask=MASK, past_key_values=past).logits[1, 5:]
    single = model()(IDS[1:, 5:], past_key_values=alone).logits[0]
    torch.testing.assert_close(padded, single, rtol=0, atol=1e-4)
