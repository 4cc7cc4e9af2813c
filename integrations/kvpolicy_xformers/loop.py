"""Attention of one layer under a policy, for loops that no host runs."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kvpolicy import CachePolicy, Ledger, PolicyError, parse
from kvpolicy.attention import Answer, AttentionLayer, Kernel
from kvpolicy.engine import step
from kvpolicy.lookahead import extend
from kvpolicy.slots import Slots
from kvpolicy_xformers.attention import attend


class PolicyAttention:
    """A layer's retained slots and its attention to them; rows advance together.

    A call appends tokens, attends, shows the policy what it looks at and evicts, as every host
    does (docs/explanation/semantics.md). It returns the log-sum-exp beside the output, so that
    other keys can be attended apart and merged.

    Args:
        policy: A policy that only evicts, or its spec, such as ``"h2o:budget=256"``.
        layer: Index of the layer in the model, of which random's sets depend.
        scale: Factor on query-key products; default 1 / sqrt(D).
        prompts: Tokens of each row's prompt, for ``prefill=bulk`` and ``protect=prompt``.
        kernel: Computes the attention; default xformers.

    Raises:
        PolicyError: The spec is wrong.
        UnsupportedError: The policy has a memory, or turns queries.
    """

    def __init__(
        self,
        policy: str | CachePolicy,
        *,
        layer: int = 0,
        scale: float | None = None,
        prompts: Sequence[int] | None = None,
        kernel: Kernel = attend,
    ) -> None:
        self.policy = parse(policy)
        if self.policy.occupancy.needs_prompt and prompts is None:
            raise PolicyError(f"{self.policy} sets the prompt apart; say how long it is: prompts=")
        self._scale, self._index, self._prompts = scale, layer, prompts
        self._kernel, self._answers = kernel, list[Tensor]()
        self._layer: AttentionLayer = self._make_layer(scale or 1.0)
        self._slots: Slots | None = None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Answer:
        """Process the next tokens of every row.

        Args:
            q: [B, H, Q, D] queries.
            k: [B, H_kv, Q, D] keys, rotated at the tokens' positions.
            v: [B, H_kv, Q, D] values.

        Raises:
            PolicyError: Shapes do not fit each other, or the rows seen so far.
        """
        self._require_shapes(q, k, v)
        self._answers.clear()
        with torch.no_grad():
            slots = self._slots
            if slots is None:
                self._layer = self._make_layer(self._scale or q.shape[-1] ** -0.5)
                slots = self._layer.new_slots(q, k, v, self._prompts)
            if q.shape[2] == 1:
                parts = (x[:, :, 0] for x in (q, k, v))
                output = step(self._layer, slots, *parts)[:, :, None]
            else:
                output = extend(self._layer, slots, q, k, v)
        self._slots = slots
        return Answer(output, torch.cat(self._answers, dim=-1))

    def retained_positions(self, row: int = 0) -> Tensor:
        """Positions that a row holds, [H_kv, kept] int64, ascending.

        Raises:
            PolicyError: There is no such row.
        """
        slots = self._require_row(row)
        held = slots.tokens[row] - slots.evicted[row]
        return slots.positions[row, :, :held].sort(dim=-1).values

    def ledger(self, row: int = 0) -> Ledger:
        """What a row's request cost and lost in this layer.

        Raises:
            PolicyError: There is no such row.
            LedgerError: The tokens evicted are not what the occupancy law demands.
        """
        slots = self._require_row(row)
        law, tokens = slots.laws(self._layer.occupancy)[row], slots.tokens[row]
        held, rows = tokens - slots.evicted[row], len(slots.tokens)
        cells = (slots.keys.shape[-1] + slots.values.shape[-1]) * slots.keys.element_size()
        return Ledger(
            policy=str(self.policy),
            logical_tokens=tokens,
            retained=held,
            evicted=slots.evicted[row],
            slots_held=held,
            blocks_held=0,
            bytes_held=slots.num_bytes // rows,
            bytes_saved=tokens * slots.keys.shape[1] * cells - slots.num_bytes // rows,
            evictions=law.evictions(tokens),
            policy_seconds=self._layer.stopwatch.seconds / rows,
        ).check(law)

    def _make_layer(self, scale: float) -> AttentionLayer:
        return AttentionLayer(self.policy, self._index, scale, kernel=self._remember)

    def _remember(
        self, q: Tensor, keys: Tensor, values: Tensor, visible: Sequence[int], scale: float
    ) -> Answer:
        """The kernel, whose log-sum-exps are kept for the caller."""
        answer = self._kernel(q, keys, values, visible, scale)
        self._answers.append(answer.lse)
        return answer

    def _require_row(self, row: int) -> Slots:
        count = 0 if self._slots is None else len(self._slots.tokens)
        if self._slots is None or not 0 <= row < count:
            raise PolicyError(f"there is no row {row}; {count} rows have been seen")
        return self._slots

    def _require_shapes(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        fits = (
            q.dim() == k.dim() == v.dim() == 4
            and k.shape[:3] == v.shape[:3]
            and (q.shape[0], q.shape[2], q.shape[3]) == (k.shape[0], k.shape[2], k.shape[3])
            and q.shape[1] % k.shape[1] == 0
            and q.shape[2] > 0
        )
        if fits and self._slots is not None:
            rows, heads, _, dim = self._slots.keys.shape
            fits = (rows, heads, dim) == (k.shape[0], k.shape[1], k.shape[3])
        if not fits:
            raise PolicyError(
                "expected q [B, H, Q, D], k and v [B, H_kv, Q, D] of the rows seen so far, got "
                f"{tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}"
            )
