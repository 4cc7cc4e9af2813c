"""The layers of a `PolicyCache`: those that a policy rules, and those that slide.

A layer that slides keeps what its model says, by transformers' own code. Only what it shares with
the others is here: it takes its turn, and gives back the tokens of a forward that was refused.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin, DynamicSlidingWindowLayer

from kvpolicy import UnsupportedError
from kvpolicy.attention import AttentionLayer
from kvpolicy.engine import step
from kvpolicy.lookahead import extend
from kvpolicy.slots import Slots
from kvpolicy_hf.attention import mark
from kvpolicy_hf.batch import Batch, Chunk


def refusal(what: str, instead: str) -> UnsupportedError:
    """What a cache under a policy answers to an operation that it cannot do."""
    return UnsupportedError(
        f"a PolicyCache does not support {what}: evicted tokens cannot be brought back and rows "
        f"are fixed; {instead}"
    )


class FixedRows(CacheLayerMixin):
    """A layer whose rows are fixed and whose tokens are never taken back."""

    is_compileable = False
    is_croppable = False
    supports_early_init = False

    def __init__(self, batch: Batch, **options: Any) -> None:
        super().__init__(**options)
        self._batch = batch

    def get_seq_length(self) -> int:
        """Columns seen, evicted tokens and padding included."""
        return self._batch.columns

    def offload(self) -> None:
        """Refuse offloading."""
        raise refusal("offloading", "keep the cache on the model's device")

    def prefetch(self) -> None:
        """Refuse offloading."""
        raise refusal("offloading", "keep the cache on the model's device")

    def crop(self, tokens_to_remove: int) -> None:
        """Refuse to take tokens back: what they evicted is gone."""
        raise refusal("crop (rollback)", "keep a copy.deepcopy of the cache to return to")

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Refuse beam search."""
        raise refusal("beam search (reorder_cache)", "use num_beams=1, greedy or sampling")

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Refuse to multiply rows."""
        raise refusal("batch_repeat_interleave", "repeat the prompts before the first forward")

    def batch_select_indices(self, indices: Tensor) -> None:
        """Refuse to select rows."""
        raise refusal("batch_select_indices", "use one PolicyCache per batch")


class PolicyLayer(FixedRows):
    """One layer's slots, for all rows.

    Attributes:
        attention: The attention layer and its policy.
        slots: State of the rows; None before the first token.
    """

    is_sliding = False

    def __init__(self, attention: AttentionLayer, batch: Batch) -> None:
        super().__init__(batch)
        self.attention = attention
        self.slots: Slots | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Return the new keys and values, marked; `attend` stores them."""
        return mark(key_states, self), value_states

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, positions: Tensor | None
    ) -> Tensor:
        """Append the tokens of q [B, H, Q, D] and return their attention output.

        Args:
            q: Queries.
            k: [B, H_kv, Q, D] keys, rotated.
            v: [B, H_kv, Q, D] values.
            mask: None or [B, 1, Q, Q]; its diagonal is False (or negative) at padding.
            positions: [B or 1, Q] at which the model rotated q and k; None if it does not say.

        Returns:
            [B, H, Q, D], zero at padding.
        """
        index = self.attention.index
        chunk = self._batch.begin(index, (q.shape[0], q.shape[2]), mask)
        try:
            if self.attention.memory_policy is not None and positions is not None and index == 0:
                self._batch.require_positions(positions)
            # Storage outlives the caller's inference mode, and gradients cannot enter it.
            with torch.inference_mode(False), torch.no_grad():
                slots = self.slots
                if slots is None:
                    slots = self.attention.new_slots(q, k, v, chunk.prompts)
                output = self._advance(slots, chunk, q, k, v)
        except BaseException:
            self._batch.fail(index)
            raise
        self.slots, self.is_initialized = slots, True
        self._batch.finish(index)
        return output

    def _advance(self, slots: Slots, chunk: Chunk, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Feed the chunk to the core in pieces of rows that advance in lockstep.

        Nothing is stored before every piece is decided.
        """
        if chunk.groups is None and q.shape[2] == 1:
            return step(self.attention, slots, q[:, :, 0], k[:, :, 0], v[:, :, 0])[:, :, None]
        if chunk.groups is None:
            return extend(self.attention, slots, q, k, v)
        output, laws = torch.zeros_like(q), slots.laws(self.attention.occupancy)
        parts: list[Slots] = []
        for group in chunk.groups:
            rows = torch.tensor(group.rows, device=q.device)[:, None]
            columns = torch.tensor(group.columns, device=q.device)
            held = laws[group.rows[0]].held(slots.tokens[group.rows[0]])
            parts.append(slots.rows(group.rows, held))
            new = (x[rows, :, columns].transpose(1, 2) for x in (q, k, v))  # [rows, H, T, D]
            output[rows, :, columns] = extend(self.attention, parts[-1], *new).transpose(1, 2)
        for group, part in zip(chunk.groups, parts, strict=True):
            slots.put_rows(group.rows, part, self.attention.occupancy)
        return output

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Refuse storage before the first token."""
        raise refusal("early initialization", "let the first forward make the storage")

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Announce the new tokens only, behind everything seen."""
        return query_length, self._batch.columns

    def get_max_length(self) -> int:
        """-1: transformers' word for any length."""
        return -1

    def reset(self) -> None:
        """Free the storage."""
        self.slots = None
        self.is_initialized = False


@dataclass(frozen=True)
class _Held:
    """What a sliding layer held before a forward.

    Attributes:
        forwards: Forwards done by then.
        keys: [B, H_kv, T, D]; None before the first token.
        values: [B, H_kv, T, D]; None before the first token.
    """

    forwards: int = 0
    keys: Tensor | None = None
    values: Tensor | None = None


class SlidingLayer(FixedRows, DynamicSlidingWindowLayer):
    """A layer that attends to a sliding window: transformers' own, whatever the policy.

    It comes before layers that may refuse a forward, so that it keeps what it held until the
    forward is done.

    Attributes:
        index: The layer's index in the model.
    """

    is_sliding = True

    def __init__(self, index: int, sliding_window: int, batch: Batch) -> None:
        super().__init__(batch, sliding_window=sliding_window)
        self.index = index
        self._before = _Held()

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append new keys and values, [B, H_kv, Q, D]; return those that queries may see."""
        self._batch.require_rows(key_states.shape[0])
        self._before = held = self._held()
        self.keys, self.values = held.keys, held.values
        self.is_initialized = held.keys is not None
        self.cumulative_length = self._batch.columns
        # Storage outlives the caller's inference mode, and gradients cannot enter it.
        with torch.inference_mode(False), torch.no_grad():
            seen = super().update(key_states, value_states)
        self._batch.finish(self.index)
        return seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Number of keys that `update` will return, and the column of the first."""
        held = min(self._batch.columns, self.sliding_window - 1)
        return held + query_length, self._batch.columns - held

    @property
    def num_bytes(self) -> int:
        """Bytes of keys and values, over all rows."""
        held = self._held()
        return sum(x.numel() * x.element_size() for x in (held.keys, held.values) if x is not None)

    def reset(self) -> None:
        """Free the storage."""
        self.keys = self.values = None
        self.is_initialized, self._before = False, _Held()

    def _held(self) -> _Held:
        """What the layer holds since the last forward that was done."""
        if self._before.forwards == self._batch.forwards:
            return self._before
        return _Held(self._batch.forwards, self.keys, self.values)
