"""`PolicyCache`: a transformers cache whose layers hold what a retention policy keeps."""

import copy
from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

from kvpolicy import CachePolicy, Ledger, UnsupportedError, parse
from kvpolicy.attention import AttentionLayer
from kvpolicy.engine import step
from kvpolicy.lookahead import extend
from kvpolicy.slots import Slots
from kvpolicy_hf.attention import install, is_installed, mark
from kvpolicy_hf.batch import Batch, Chunk
from kvpolicy_hf.support import (
    attention_modules,
    decoders_of,
    position_limit,
    require_parameters_fit,
    require_supported,
    rotary_of,
)


class PolicyCache(Cache):
    """A cache for `model.generate(ids, past_key_values=cache)` under a retention policy.

    It holds at most budget + interval slots per KV head, whatever the length. Rows may be
    left-padded: padding takes no slot and has no position. The model's attention
    implementation becomes ``kvpolicy``, which serves every other cache as before.

    ``prefill=bulk`` and ``protect=prompt`` set the prompt apart. It is the first forward's real
    tokens, row by row; what comes later is generated, second turns included. A prompt that takes
    several forwards, as under ``prefill_chunk_size``, needs `prompt_tokens`.

    Args:
        model: A model of a tested architecture with full attention.
        policy: A policy or its spec, such as ``"h2o:budget=256"``.
        prompt_tokens: Real tokens of the prompts, of every row or one number for each; by
            default what the first forward brings.

    Raises:
        PolicyError: The spec is wrong, or `prompt_tokens` is not a length.
        UnsupportedError: The policy cannot be honoured exactly on this model.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        policy: str | CachePolicy,
        prompt_tokens: int | Sequence[int] | None = None,
    ) -> None:
        self.policy = parse(policy)
        require_supported(model, self.policy)
        self._config = model.config
        modules = attention_modules(model)
        self._batch = Batch(
            num_layers=len(modules),
            limit=position_limit(model, self.policy),
            policy=str(self.policy),
            sets_prompts_apart=self.policy.occupancy.needs_prompt,
            prompt_tokens=prompt_tokens,
        )
        rotary = rotary_of(model)
        decoders = decoders_of(model, self.policy, rotary)
        self._policy_layers = [
            PolicyLayer(
                AttentionLayer(self.policy, index, module.scaling, rotary, decoder=decoder),
                self._batch,
            )
            for index, (module, decoder) in enumerate(zip(modules, decoders, strict=True))
        ]
        require_parameters_fit([layer.attention for layer in self._policy_layers], model)
        super().__init__(layers=list(self._policy_layers))
        install(model)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Hand new keys and values, [B, H_kv, Q, D], on to the attention function."""
        if not is_installed(self._config):
            raise UnsupportedError(
                f"the model's attention implementation is {self._config._attn_implementation!r}, "
                "so its policy would not run; make the PolicyCache after changing it"
            )
        if torch.compiler.is_compiling():
            raise _refusal("torch.compile", "run the model uncompiled")
        self._batch.require_turn(layer_idx)
        return super().update(key_states, value_states, layer_idx)

    def ledger(self, row: int = 0) -> Ledger:
        """What a row's request cost and lost, as counted in its storage.

        Raises:
            LedgerError: The tokens evicted are not what the occupancy law demands.
        """
        self._batch.require_row(row)
        layers = [layer.slots for layer in self._policy_layers if layer.slots is not None]
        if not layers:
            return Ledger(str(self.policy), 0, 0, 0, 0, 0, 0, 0, 0, 0.0)
        rows, tokens = len(self._batch.tokens), self._batch.tokens[row]
        law = self.policy.occupancy.of_prompt(self._batch.prompts[row])
        counts = [slots.evicted[row] for slots in layers]
        # One layer that disagrees is enough to fail the check below.
        evicted = max(counts, key=lambda n: abs(n - law.evicted(tokens)))
        bytes_held = sum(slots.num_bytes for slots in layers) // rows
        bytes_full = tokens * sum(_bytes_per_token(slots) for slots in layers)
        seconds = sum(layer.attention.stopwatch.seconds for layer in self._policy_layers)
        return Ledger(
            policy=str(self.policy),
            logical_tokens=tokens,
            retained=tokens - evicted,
            evicted=evicted,
            slots_held=tokens - evicted + law.state_slots,
            blocks_held=0,
            bytes_held=bytes_held,
            bytes_saved=bytes_full - bytes_held,
            evictions=law.evictions(tokens),
            policy_seconds=seconds / rows,
            merged=self._merged(row, evicted),
        ).check(law)

    def _merged(self, row: int, evicted: int) -> int | float:
        """Evicted tokens that memories stand for, mean over layers and KV heads."""
        counts = [
            layer.attention.memory_policy.merged(layer.slots.memory, row, evicted)
            for layer in self._policy_layers
            if layer.attention.memory_policy is not None
            and layer.slots is not None
            and layer.slots.memory is not None
        ]
        mean = sum(counts) / max(len(counts), 1)
        return int(mean) if float(mean).is_integer() else mean

    def retained_positions(self, layer: int, row: int = 0) -> Tensor:
        """Positions that a layer holds of a row, [H_kv, kept] int64, ascending."""
        self._batch.require_row(row)
        slots = self._policy_layers[layer].slots
        if slots is None:
            return torch.empty(self._config.num_key_value_heads, 0, dtype=torch.int64)
        held = slots.tokens[row] - slots.evicted[row]
        return slots.positions[row, :, :held].sort(dim=-1).values

    def reset(self, prompt_tokens: int | Sequence[int] | None = None) -> None:
        """Forget all rows and their prompts, and free their storage; as a new cache."""
        super().reset()
        self._batch.reset(prompt_tokens)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Copy the rows; the copy serves the same model."""
        memo[id(self._config)] = self._config
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        new.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return new

    def activate_past_recording(self) -> None:
        """Refuse assisted generation, which takes tokens back."""
        raise _refusal("assisted generation (rollback)", "generate without an assistant")

    def early_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Refuse static shapes."""
        raise _refusal("static shapes and export", "run the model uncompiled")


class PolicyLayer(CacheLayerMixin):
    """One layer's slots, for all rows.

    Attributes:
        attention: The attention layer and its policy.
        slots: State of the rows; None before the first token.
    """

    is_compileable = False
    is_croppable = False
    is_sliding = False
    supports_early_init = False

    def __init__(self, attention: AttentionLayer, batch: Batch) -> None:
        super().__init__()
        self.attention = attention
        self.slots: Slots | None = None
        self._batch = batch

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
        raise _refusal("early initialization", "let the first forward make the storage")

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Announce the new tokens only, behind everything seen."""
        return query_length, self._batch.columns

    def get_seq_length(self) -> int:
        """Columns seen, evicted tokens and padding included."""
        return self._batch.columns

    def get_max_length(self) -> int:
        """-1: transformers' word for any length."""
        return -1

    def reset(self) -> None:
        """Free the storage."""
        self.slots = None
        self.is_initialized = False

    def offload(self) -> None:
        """Refuse offloading."""
        raise _refusal("offloading", "keep the cache on the model's device")

    def prefetch(self) -> None:
        """Refuse offloading."""
        raise _refusal("offloading", "keep the cache on the model's device")

    def crop(self, tokens_to_remove: int) -> None:
        """Refuse to take tokens back: what they evicted is gone."""
        raise _refusal("crop (rollback)", "keep a copy.deepcopy of the cache to return to")

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Refuse beam search."""
        raise _refusal("beam search (reorder_cache)", "use num_beams=1, greedy or sampling")

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Refuse to multiply rows."""
        raise _refusal("batch_repeat_interleave", "repeat the prompts before the first forward")

    def batch_select_indices(self, indices: Tensor) -> None:
        """Refuse to select rows."""
        raise _refusal("batch_select_indices", "use one PolicyCache per batch")


def _refusal(what: str, instead: str) -> UnsupportedError:
    return UnsupportedError(
        f"a PolicyCache does not support {what}: evicted tokens cannot be brought back and rows "
        f"are fixed; {instead}"
    )


def _bytes_per_token(slots: Slots) -> int:
    """Bytes of keys and values that one token takes in a full cache."""
    return sum(x.shape[1] * x.shape[-1] * x.element_size() for x in (slots.keys, slots.values))
