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
    model: PreTrainedModel,
    tokens: Sequence[int],
    policy: str | CachePolicy,
    new_tokens: int,
    prompt_tokens: int | None = None,
) -> GreedyRun:
    """Generate exactly `new_tokens` tokens after some others, past any end of sequence.

    Args:
        model: The model.
        tokens: What it reads.
        policy: What its cache keeps.
        new_tokens: How many to generate.
        prompt_tokens: How many of `tokens` are the prompt, where policies set it apart; default
            all.

    Raises:
        LedgerError: The tokens evicted are not what the occupancy law demands.
    """
    cache = PolicyCache(model, policy, prompt_tokens)
    ids, written = torch.tensor([list(tokens)]), list[int]()
    with torch.inference_mode():
        while True:
            logits = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
            written.append(int(logits[0, -1].argmax()))
            if len(written) == new_tokens:
                break
            ids = torch.tensor([written[-1:]])
    ruled = [layer for layer, window in enumerate(windows_of(model.config)) if window is None]
    retained = [cache.retained_positions(layer).tolist() for layer in ruled]
    return GreedyRun(written, retained, cache.ledger())
