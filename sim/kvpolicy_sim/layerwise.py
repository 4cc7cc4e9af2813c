"""One layer of one sequence under all policies: the unit of work of a replay.

Heads are outer, tokens inner: a head's keys and statistics stay in the processor's cache while
a policy walks them. All policies share what was read, and full attention's results.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from kvpolicy import CachePolicy, EvictionPolicy
from kvpolicy.memory.decoder import Decoder
from kvpolicy.rotary import Rotary
from kvpolicy_sim.inputs import LayerInputs
from kvpolicy_sim.lanes import CompiledLane, CoreLane, Lane, Level, Outcome
from kvpolicy_sim.rules import is_compiled

Advance = Callable[[int], object]
"""Told the tokens done, counted per policy and KV head."""


@dataclass(frozen=True)
class PolicyOutcome:
    """What a policy did to one layer of one sequence.

    Attributes:
        evicted_at: [H_kv, T] int32, tokens seen when a token was evicted; 0 if it never was.
        retained_mass: [H_kv, G, r] float32, share of full attention that each row still saw.
        output_error: [r] float64, relative error of the layer's outputs, a memory's part
            included; None if not compared.
        seconds: Time taken, summed over threads.
        memory_share: [r] float32, share of a row's own attention that went to a memory, mean over
            query heads; None without one.
        merged: Evicted tokens that the memory stands for at the end, mean over KV heads.
        beside_bytes: Bytes of what the memory holds beside slots at the end.
    """

    evicted_at: np.ndarray
    retained_mass: np.ndarray
    output_error: np.ndarray | None
    seconds: float
    memory_share: np.ndarray | None = None
    merged: float = 0.0
    beside_bytes: int = 0

    @classmethod
    def join(cls, inputs: LayerInputs, parts: Sequence[Outcome]) -> "PolicyOutcome":
        """Put the units of a layer together, in the order of heads."""
        lse = torch.cat([part.lse for part in parts])
        return cls(
            evicted_at=np.concatenate([part.evicted_at for part in parts]),
            retained_mass=(lse - inputs.lse).exp().numpy(),
            output_error=_relative_error(inputs, parts),
            seconds=sum(part.seconds for part in parts),
            memory_share=_memory_share(parts),
            merged=float(
                np.average([p.merged for p in parts], weights=[len(p.evicted_at) for p in parts])
            ),
            beside_bytes=sum(part.beside_bytes for part in parts),
        )


def _memory_share(parts: Sequence[Outcome]) -> np.ndarray | None:
    """Share of each row's attention that went to a memory, mean over query heads; [r]."""
    shares = [part.memory_share for part in parts if part.memory_share is not None]
    return torch.cat(shares).mean(dim=(0, 1)).numpy() if shares else None


def _relative_error(inputs: LayerInputs, parts: Sequence[Outcome]) -> np.ndarray | None:
    """||o' - o|| / ||o|| of each row, heads concatenated; [r]."""
    errors = [part.squared_error for part in parts if part.squared_error is not None]
    if inputs.outputs is None or not errors:
        return None
    norm = inputs.outputs.square().sum(dim=(0, 1, 3)).double().sqrt().numpy()
    return np.sqrt(np.sum(errors, axis=0)) / np.maximum(norm, 1e-6)


def walk_layer(
    inputs: LayerInputs,
    policies: Sequence[CachePolicy],
    level: Level,
    rotary: Rotary | None,
    advance: Advance,
    decoder: Decoder | None = None,
) -> dict[CachePolicy, PolicyOutcome]:
    """Take a layer's tokens under every policy.

    Args:
        inputs: The layer.
        policies: Policies that the trace supports.
        level: What they observe.
        rotary: The model's RoPE, for ``rope=reindex`` and memories.
        advance: Progress.
        decoder: The layer's weights, for policies that need them.
    """

    def lane(policy: CachePolicy, heads: slice) -> Lane:
        if is_compiled(policy):
            return CompiledLane(policy, inputs, heads, level)
        return CoreLane(policy, inputs, heads, level, rotary, decoder)

    outcomes: dict[CachePolicy, PolicyOutcome] = {}
    for policy in policies:
        member = policy.of_layer(inputs.layer)
        parts = [lane(member, heads).run(advance) for heads in _units(member, inputs)]
        outcomes[policy] = PolicyOutcome.join(inputs, parts)
    return outcomes


def _units(policy: CachePolicy, inputs: LayerInputs) -> list[slice]:
    """KV heads that are walked together: those that decide together.

    The core's look-ahead is vectorised over heads, but counts them from one first head.
    """
    num_heads, first = len(inputs.kv_heads), inputs.kv_heads[0]
    decides_together = isinstance(policy, EvictionPolicy) and policy.scope_is_layer
    is_contiguous = inputs.kv_heads == tuple(range(first, first + num_heads))
    if decides_together or (is_contiguous and not is_compiled(policy)):
        return [slice(0, num_heads)]
    return [slice(head, head + 1) for head in range(num_heads)]
