"""Greedy generation under a policy, with the positions that were retained at its end."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from kvpolicy import CachePolicy, Ledger
from kvpolicy.model_facts import windows_of
from kvpolicy_hf.cache import PolicyCache


@dataclass(frozen=True)
class GreedyRun:
    """One generated sequence.

    Attributes:
        tokens: The new tokens.
        retained: Positions held at the end, by layer and KV head, ascending.
        ledger: What the request cost.
    """

    tokens: list[int]
    retained: list[list[list[int]]]
    ledger: Ledger


def generate_greedy(
    model: PreTrainedModel, prompt: Sequence[int], policy: str | CachePolicy, new_tokens: int
) -> GreedyRun:
    """Generate exactly `new_tokens` tokens after one prompt, past any end of sequence.

    Raises:
        LedgerError: The tokens evicted are not what the occupancy law demands.
    """
    cache = PolicyCache(model, policy)
    ids, tokens = torch.tensor([list(prompt)]), list[int]()
    with torch.inference_mode():
        while True:
            logits = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
            tokens.append(int(logits[0, -1].argmax()))
            if len(tokens) == new_tokens:
                break
            ids = torch.tensor([tokens[-1:]])
    ruled = [layer for layer, window in enumerate(windows_of(model.config)) if window is None]
    retained = [cache.retained_positions(layer).tolist() for layer in ruled]
    return GreedyRun(tokens, retained, cache.ledger())
