"""How a policy moves through one layer: a compiled lane, or the core's own look-ahead.

A lane belongs to a unit: the KV heads that decide together, which is one head, or all heads of
the layer under ``scope=layer``. It holds positions and statistics only: a trace has the keys
and values of every token, so slots are looked up, never moved.

Axes: h KV heads of the unit, G query heads per KV head, T tokens, r rows (tokens with queries),
n rows of a block, C columns of a block, D head dimension.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor

from kvpolicy import CachePolicy, EvictionPolicy, KVPolicyError, PolicyError
from kvpolicy.attention import query_key_products
from kvpolicy.lookahead import Block
from kvpolicy.memory.decoder import Decoder
from kvpolicy.rotary import Rotary
from kvpolicy_sim.inputs import BLOCK, LayerInputs
from kvpolicy_sim.memories import WatchedLayer, bytes_beside_slots
from kvpolicy_sim.rules import rule_for

if TYPE_CHECKING:
    from kvpolicy_sim.kernels import Columns

Level = Literal["layer-local", "open-loop"]
"""What policies observe: attention renormalised over what they retained, or full attention."""


@dataclass
class Outcome:
    """What became of a unit's tokens under a policy.

    Attributes:
        evicted_at: [h, T] int32, tokens seen when a token was evicted; 0 if it never was.
        lse: [h, G, r] log-sum-exp of each row's logits over what was retained.
        squared_error: [r] float64, of the outputs against full attention's, summed over the
            unit's heads and D; None if outputs are not compared.
        memory_share: [h, G, r] share of each row's own attention that went to a memory; None
            without one.
        merged: Evicted tokens that the memory stands for at the end, mean over the unit's heads.
        beside_bytes: Bytes of what the memory holds beside slots at the end.
        seconds: Time taken.
    """

    evicted_at: np.ndarray
    lse: Tensor
    squared_error: np.ndarray | None
    memory_share: Tensor | None = None
    merged: float = 0.0
    beside_bytes: int = 0
    seconds: float = 0.0

    @classmethod
    def blank(cls, inputs: LayerInputs, heads: slice) -> "Outcome":
        """Before the first token."""
        h, group, rows = inputs.queries[heads].shape[:3]
        return cls(
            evicted_at=np.zeros((h, inputs.tokens), np.int32),
            lse=torch.zeros(h, group, rows),
            squared_error=None if inputs.outputs is None else np.zeros(rows),
        )

    def compare(self, rows: slice, outputs: Tensor, ideal: Tensor) -> None:
        """Add the error of outputs [h, G, n, D] of some rows."""
        if self.squared_error is not None:
            error = outputs.sub_(ideal).square_().sum(dim=(0, 1, 3))
            self.squared_error[rows] = error.double().numpy()


class Lane(ABC):
    """One policy on its way through one unit.

    Attributes:
        outcome: What has become of the unit's tokens so far.
    """

    def __init__(self, inputs: LayerInputs, heads: slice, level: Level) -> None:
        self.inputs, self.heads, self.level = inputs, heads, level
        self.outcome = Outcome.blank(inputs, heads)

    def run(self, advance: Callable[[int], object]) -> Outcome:
        """Take all tokens, block by block."""
        began, first = perf_counter(), 0
        while first < self.inputs.tokens:
            size = min(BLOCK - first % BLOCK, self.inputs.tokens - first)
            taken = self.take(first, size)
            advance(taken * len(self.outcome.evicted_at))
            first += taken
        self.finish()
        self.outcome.seconds = perf_counter() - began
        return self.outcome

    @abstractmethod
    def take(self, first: int, size: int) -> int:
        """Take up to `size` tokens, at least one; return how many were taken."""

    def finish(self) -> None:
        """Note what is left to be noted after the last token."""
        return


class CompiledLane(Lane):
    """A policy that has a rule: GEMMs around the compiled walk."""

    def __init__(
        self, policy: CachePolicy, inputs: LayerInputs, heads: slice, level: Level
    ) -> None:
        super().__init__(inputs, heads, level)
        law, kv_head = inputs.law(policy), inputs.kv_heads[heads.start]
        self.rule = rule_for(policy, law, inputs.layer, kv_head)
        self.spans = policy.spans if isinstance(policy, EvictionPolicy) else ()
        if isinstance(policy, EvictionPolicy) and policy.keeps_prompt:
            self.spans = ((0, inputs.prompt),)
        self._positions = np.empty(0, np.int64)
        self._accumulated = np.empty(0, np.float32)

    def take(self, first: int, size: int) -> int:
        """Take up to `size` tokens at once: fewer if a row's weights underflow."""
        from kvpolicy_sim import kernels

        columns = self._columns(first, size)
        held = len(self._positions)
        index, rows = torch.from_numpy(columns.positions), self.inputs.rows(first, first + size)
        offsets = np.arange(rows.start, rows.stop) * self.inputs.stride - first
        weights = self._logits(rows, index)  # [h, G, n, C]
        future = torch.arange(size) > torch.from_numpy(offsets)[:, None]
        weights[..., held:].masked_fill_(future, -torch.inf)
        peak = weights.amax(dim=-1, keepdim=True)  # [h, G, n, 1]
        weights.sub_(peak).exp_()
        sums = torch.empty(peak.shape[:3])
        taken = kernels.walk(
            weights.flatten(0, 1).numpy(),
            offsets,
            self._scales(peak[..., 0], rows).flatten(0, 1).numpy(),
            sums.flatten(0, 1).numpy(),
            columns,
            first,
            size,
            self.rule,
        )
        done = slice(rows.start, self.inputs.rows(first, first + taken).stop)
        count = done.stop - done.start
        self.outcome.lse[:, :, done] = peak[:, :, :count, 0] + sums[:, :, :count].log()
        if self.inputs.outputs is not None:
            self._attend(weights[:, :, :count], sums[:, :, :count, None], index, done)
        self._compact(columns, held + taken)
        return taken

    def _columns(self, first: int, size: int) -> "Columns":
        """The held slots and the tokens [first, first + size)."""
        from kvpolicy_sim import kernels

        positions = np.concatenate([self._positions, np.arange(first, first + size)])
        is_pinned = np.zeros(len(positions), np.bool_)
        for begin, end in self.spans:
            is_pinned |= (positions >= begin) & (positions < end)
        return kernels.Columns(
            positions=positions,
            is_pinned=is_pinned,
            alive=np.ones(len(positions), np.float32),
            accumulated=np.concatenate([self._accumulated, np.zeros(size, np.float32)]),
            evicted_at=np.zeros(len(positions), np.int64),
        )

    def _logits(self, rows: slice, index: Tensor) -> Tensor:
        """Logits of rows over the columns, [h, G, n, C]."""
        queries = self.inputs.queries[self.heads, :, rows]
        keys = self.inputs.keys[self.heads].index_select(1, index)
        products = torch.bmm(queries.flatten(1, 2), keys.transpose(1, 2))
        return products.view(*queries.shape[:3], len(index))

    def _scales(self, peak: Tensor, rows: slice) -> Tensor:
        """Factors from weights to what the policy observes; negative means renormalised."""
        if self.level == "layer-local":
            return torch.full_like(peak, -1.0)
        return (peak - self.inputs.lse[self.heads, :, rows]).exp()

    def _attend(self, weights: Tensor, sums: Tensor, index: Tensor, rows: slice) -> None:
        """Compare the attention output of rows with full attention's.

        Outputs are normalised rather than weights: there are fewer of them.
        """
        assert self.inputs.outputs is not None
        values = self.inputs.values[self.heads].index_select(1, index)
        outputs = torch.bmm(weights.flatten(1, 2), values).view(*weights.shape[:3], -1).div_(sums)
        self.outcome.compare(rows, outputs, self.inputs.outputs[self.heads, :, rows])

    def _compact(self, columns: "Columns", count: int) -> None:
        """Keep what is alive of the first `count` columns; note what is not."""
        is_alive = columns.alive[:count] != 0
        self._positions = columns.positions[:count][is_alive]
        self._accumulated = columns.accumulated[:count][is_alive]
        gone = columns.positions[:count][~is_alive]
        self.outcome.evicted_at[:, gone] = columns.evicted_at[:count][~is_alive]


class CoreLane(Lane):
    """Any policy, through the core's look-ahead: the policy's own `score` decides."""

    def __init__(
        self,
        policy: CachePolicy,
        inputs: LayerInputs,
        heads: slice,
        level: Level,
        rotary: Rotary | None,
        decoder: Decoder | None = None,
    ) -> None:
        super().__init__(inputs, heads, level)
        self.layer = WatchedLayer(
            policy,
            inputs.layer,
            inputs.scale,
            rotary,
            first_kv_head=inputs.kv_heads[heads.start],
            decoder=decoder,
        )
        queries = inputs.queries[heads].flatten(0, 1)
        self._slots = self.layer.new_slots(
            queries[None], inputs.keys[None, heads], inputs.values[None, heads], [inputs.prompt]
        )
        if self._slots.memory is not None:
            self.outcome.memory_share = torch.zeros_like(self.outcome.lse)

    def take(self, first: int, size: int) -> int:
        """Take `size` tokens at once."""
        rows = slice(first, first + size)
        queries = self.inputs.queries[self.heads, :, rows].flatten(0, 1)[None] / self.inputs.scale
        keys, values = (x[None, self.heads, rows] for x in (self.inputs.keys, self.inputs.values))
        block = _Block(self.layer, self._slots, queries, keys, values)
        if self.level == "open-loop":
            block.full_lse = self.inputs.lse[None, self.heads, :, rows]
        outputs = self._run(block)  # [1, H, Q, D]
        self.outcome.lse[:, :, rows] = seen = block.visible_lse(queries)
        if self.inputs.outputs is not None:
            ideal = self.inputs.outputs[self.heads, :, rows]
            self.outcome.compare(rows, outputs.view_as(ideal), ideal)
        if self.outcome.memory_share is not None:
            self.outcome.memory_share[:, :, rows] = self.layer.drain_shares(seen)
        self._note(block)
        self._slots = block.kept()
        return size

    def finish(self) -> None:
        """Note what the memory has come to."""
        memory, policy = self._slots.memory, self.layer.memory_policy
        if memory is None or policy is None:
            return
        evicted = self.inputs.law(policy).evicted(self.inputs.tokens)
        self.outcome.merged = policy.merged(memory, 0, evicted)
        self.outcome.beside_bytes = bytes_beside_slots(memory, self.inputs.item_bytes)

    def _run(self, block: Block) -> Tensor:
        """Let the policy decide the block; a failure of its own code names it."""
        try:
            return block.run()
        except KVPolicyError:
            raise
        except Exception as error:
            raise PolicyError(
                f"{self.layer.policy} failed: {type(error).__name__}: {error}"
            ) from error

    def _note(self, block: Block) -> None:
        """Note what the block evicted."""
        positions, death = block.columns.slots.positions[0], block.columns.death[0]  # [h, C]
        head, column = (death <= block.size).nonzero(as_tuple=True)
        # numpy would take a tensor of one element for a plain index.
        evicted_at = torch.from_numpy(self.outcome.evicted_at)
        evicted_at[head, positions[head, column]] = (block.seen + death[head, column]).int()


class _Block(Block):
    """A block that can show full attention, and tells how much of a row it saw."""

    full_lse: Tensor | None = None

    def observed(self, weights: Tensor, first: int, last: int) -> Tensor:
        """Under open-loop, the full attention's weights of what is visible."""
        if self.full_lse is None:
            return weights
        full = self.logits[:, :, :, first:last] - self.full_lse[:, :, :, first:last, None]
        return full.exp() * (weights > 0)

    def visible_lse(self, queries: Tensor) -> Tensor:
        """Log-sum-exp over what each query saw, at original positions; [h, G, Q]."""
        logits, policy = self.logits, self.layer.eviction
        if policy is not None and policy.rope == "reindex":
            logits = query_key_products(queries, self.columns.slots.keys, self.layer.scale)
        hidden = ~self.columns.visible(0, self.size)[:, :, None]
        return logits.masked_fill(hidden, -torch.inf).logsumexp(dim=-1)[0]
