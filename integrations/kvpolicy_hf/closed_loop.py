"""Samples of an evaluation, run in transformers under a policy.

A sample goes through the model at once, and its cache evicts as it would one token at a time, so
that every prediction sees exactly what the policy had retained. Answers are part of the sample:
where all their tokens are the likeliest ones, greedy generation would have written them.
"""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvpolicy import CachePolicy
from kvpolicy.evaluation.sample import Sample
from kvpolicy.footprint import Layout, floats_beside, peak_slots
from kvpolicy.memory.policy import MemoryPolicy
from kvpolicy.model_facts import windows_of
from kvpolicy_hf.cache import PolicyCache
from kvpolicy_hf.support import attention_modules

MOST_ROWS = 8

MOST_LOGITS = 1 << 25
"""Logits held at a time per policy; bounds the rows for long texts and large vocabularies."""


@dataclass(frozen=True)
class ClosedLoop:
    """A model that `PolicyCache` supports, as the host of an evaluation."""

    model: PreTrainedModel

    def batch_size(self, samples: Sequence[Sample]) -> int:
        """As many rows as their logits allow."""
        most = max(sample.num_predicted for sample in samples)
        return max(1, min(MOST_ROWS, MOST_LOGITS // (most * self.model.config.vocab_size)))

    @torch.inference_mode()
    def predict(self, batch: Sequence[Sample], policy: CachePolicy) -> list[Tensor]:
        """Log-probabilities [n, V] of each sample's n tokens to be predicted.

        Raises:
            LedgerError: A cache evicted other than its occupancy law demands.
        """
        longest = max(len(sample.tokens) for sample in batch)
        # Rows of one length advance together. What fills a shorter one up comes behind whatever
        # is predicted, and so changes nothing.
        rows = [s.tokens + s.tokens[-1:] * (longest - len(s.tokens)) for s in batch]
        prompts = [sample.prompt_tokens for sample in batch]
        cache = PolicyCache(self.model, policy, prompts)
        asked = [[index - 1 for index in sample.predicted()] for sample in batch]
        kept = sorted({index for indices in asked for index in indices})
        place = {index: i for i, index in enumerate(kept)}
        logits = self.model(
            torch.tensor(rows, device=self.model.device),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=torch.tensor(kept, device=self.model.device),
        ).logits  # [B, kept, V]
        for row in range(len(batch)):
            cache.ledger(row)
        return [
            logits[row, [place[index] for index in indices]].float().log_softmax(dim=-1).cpu()
            for row, indices in enumerate(asked)
        ]

    def fingerprint(self) -> str:
        """Tell the model from any other: SHA-256 of its configuration and its weights."""
        digest = hashlib.sha256(self.model.config.to_json_string().encode())
        for name, weights in sorted(self.model.state_dict().items()):
            digest.update(name.encode())
            digest.update(weights.cpu().contiguous().flatten().view(torch.uint8).numpy())
        return digest.hexdigest()

    def bytes_per_request(self, policy: CachePolicy, tokens: int, prompt: int) -> int:
        """What a request takes at its fullest moment, memory and state included.

        Args:
            policy: The policy.
            tokens: Of the whole request.
            prompt: How many of them are its prompt.
        """
        config, element_bytes = self.model.config, self.model.dtype.itemsize
        heads, head_dim = config.num_key_value_heads, attention_modules(self.model)[0].head_dim
        windows = windows_of(config)
        sliding = [window for window in windows if window is not None]
        ruled = Counter(policy.of_layer(i) for i, window in enumerate(windows) if window is None)
        layout = Layout(
            num_layers=ruled.total(),
            num_kv_heads=heads,
            head_dim=head_dim,
            element_bytes=element_bytes,
            num_sliding=len(sliding),
            window=max(sliding, default=1),
        )
        total = layout.dense_window_bytes(tokens)
        for member, num_layers in ruled.items():
            floats = floats_beside(member, head_dim, config.num_attention_heads // heads)
            slots = peak_slots(member.occupancy.of_prompt(prompt), tokens)
            rows = member.hidden_rows if isinstance(member, MemoryPolicy) else 0
            total += num_layers * rows * config.hidden_size * element_bytes
            total += replace(layout, num_layers=num_layers).dense_bytes(slots, floats)
        return total
