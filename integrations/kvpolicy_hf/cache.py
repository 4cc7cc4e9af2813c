"""`PolicyCache`: a transformers cache whose layers hold what a retention policy keeps."""

import copy
from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from kvpolicy import CachePolicy, Ledger, PolicyError, UnsupportedError, parse
from kvpolicy.attention import AttentionLayer, Kernel
from kvpolicy.ledger import check_evicted, mean
from kvpolicy.model_facts import windows_of
from kvpolicy.slots import Slots
from kvpolicy_hf.attention import install, is_installed
from kvpolicy_hf.batch import Batch
from kvpolicy_hf.layers import PolicyLayer, SlidingLayer, refusal
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

    In models whose layers are some full attention, some a sliding window, the policy rules the
    former; the latter stay transformers' own.

    ``prefill=bulk`` and ``protect=prompt`` set the prompt apart. It is the first forward's real
    tokens, row by row; what comes later is generated, second turns included. A prompt that takes
    several forwards, as under ``prefill_chunk_size``, needs `prompt_tokens`.

    Args:
        model: A model of a tested architecture.
        policy: A policy or its spec, such as ``"h2o:budget=256"``.
        prompt_tokens: Real tokens of the prompts, of every row or one number for each; by
            default what the first forward brings.
        kernel: Computes the attention of layers under the policy, from eviction to eviction, such
            as `kvpolicy_xformers.attend`; default the core's own.

    Raises:
        PolicyError: The spec is wrong, or `prompt_tokens` is not a length.
        UnsupportedError: The policy cannot be honoured exactly on this model.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        policy: str | CachePolicy,
        prompt_tokens: int | Sequence[int] | None = None,
        *,
        kernel: Kernel | None = None,
    ) -> None:
        self.policy = parse(policy)
        require_supported(model, self.policy)
        self._config = model.config
        modules, windows = attention_modules(model), windows_of(model.config)
        self._batch = Batch(
            num_layers=len(modules),
            limit=position_limit(model, self.policy),
            policy=str(self.policy),
            sets_prompts_apart=self.policy.needs_prompt,
            has_windows=any(windows),
            prompt_tokens=prompt_tokens,
        )
        rotary = rotary_of(model)
        decoders = decoders_of(model, self.policy, rotary)
        layers = [
            PolicyLayer(
                AttentionLayer(
                    self.policy, index, module.scaling, rotary, decoder=decoder, kernel=kernel
                ),
                self._batch,
            )
            if window is None
            else SlidingLayer(index, window, self._batch)
            for index, (module, decoder, window) in enumerate(
                zip(modules, decoders, windows, strict=True)
            )
        ]
        self._policy_layers = [layer for layer in layers if isinstance(layer, PolicyLayer)]
        self._sliding_layers = [layer for layer in layers if isinstance(layer, SlidingLayer)]
        require_parameters_fit([layer.attention for layer in self._policy_layers], model)
        super().__init__(layers=list(layers))
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
            raise refusal("torch.compile", "run the model uncompiled")
        self._batch.require_turn(layer_idx)
        return super().update(key_states, value_states, layer_idx)

    def ledger(self, row: int = 0) -> Ledger:
        """What a row's request cost and lost, as counted in its storage.

        Tokens are those of layers under the policy. Bytes held are those of all layers, and bytes
        saved are against the policy ``full``, under which sliding layers hold as much.

        Raises:
            LedgerError: The tokens evicted are not what the occupancy law demands.
        """
        self._batch.require_row(row)
        ruled = [layer for layer in self._policy_layers if layer.slots is not None]
        layers = [layer.slots for layer in ruled if layer.slots is not None]
        if not layers:
            return Ledger(str(self.policy), 0, 0, 0, 0, 0, 0, 0, 0, 0.0)
        rows, tokens = len(self._batch.tokens), self._batch.tokens[row]
        prompt = self._batch.prompts[row]
        laws = [layer.attention.occupancy.of_prompt(prompt) for layer in ruled]
        for slots, law in zip(layers, laws, strict=True):
            check_evicted(str(self.policy), tokens, slots.evicted[row], law)
        evicted = mean(slots.evicted[row] for slots in layers)
        bytes_ruled = sum(slots.num_bytes for slots in layers) // rows
        bytes_full = tokens * sum(_bytes_per_token(slots) for slots in layers)
        bytes_sliding = sum(layer.num_bytes for layer in self._sliding_layers) // rows
        seconds = sum(layer.attention.stopwatch.seconds for layer in self._policy_layers)
        return Ledger(
            policy=str(self.policy),
            logical_tokens=tokens,
            retained=tokens - evicted,
            evicted=evicted,
            slots_held=tokens - evicted + mean(law.state_slots for law in laws),
            blocks_held=0,
            bytes_held=bytes_ruled + bytes_sliding,
            bytes_saved=bytes_full - bytes_ruled,
            evictions=max(law.evictions(tokens) for law in laws),
            policy_seconds=seconds / rows,
            merged=self._merged(row),
        )

    def _merged(self, row: int) -> int | float:
        """Evicted tokens that memories stand for, mean over layers and KV heads."""
        return mean(
            0
            if layer.attention.memory_policy is None or layer.slots.memory is None
            else layer.attention.memory_policy.merged(
                layer.slots.memory, row, layer.slots.evicted[row]
            )
            for layer in self._policy_layers
            if layer.slots is not None
        )

    def retained_positions(self, layer: int, row: int = 0) -> Tensor:
        """Positions that a layer holds of a row, [H_kv, kept] int64, ascending.

        Raises:
            PolicyError: The layer slides and no policy rules it.
        """
        self._batch.require_row(row)
        chosen = self.layers[layer]
        if not isinstance(chosen, PolicyLayer):
            ruled = [layer.attention.index for layer in self._policy_layers]
            raise PolicyError(
                f"layer {layer} attends to a sliding window, whatever the policy; the layers under "
                f"it are {', '.join(map(str, ruled))}"
            )
        slots = chosen.slots
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
        raise refusal("assisted generation (rollback)", "generate without an assistant")

    def early_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Refuse static shapes."""
        raise refusal("static shapes and export", "run the model uncompiled")


def _refusal(what: str, instead: str) -> UnsupportedError:
    return UnsupportedError(
        f"a PolicyCache does not support {what}: evicted tokens cannot be brought back and rows "
        f"are fixed; {instead}"
    )


def _bytes_per_token(slots: Slots) -> int:
    """Bytes of keys and values that one token takes in a full cache."""
    return sum(x.shape[1] * x.shape[-1] * x.element_size() for x in (slots.keys, slots.values))
