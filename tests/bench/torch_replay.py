"""What a replay is compared to: steps outer, all heads of some layers at once, in plain torch.

This is the loop that one writes without look-ahead, written as well as torch allows: no Python
loop over heads, slots overwritten in place instead of gathered, keys transposed so that the
products need no strided reads, and buffers allocated once. It decides as `h2o`, `tova` and
`window` do with an interval of one token.

Axes: N heads of all layers, G query heads per KV head, T tokens, S = budget + 1 slots, D head
dimension.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from kvpolicy import EvictionPolicy
from kvpolicy_sim.inputs import LayerInputs


class TorchReplay:
    """Some layers on their way through one policy.

    Attributes:
        evicted: Positions evicted at each step from the first eviction on, [N] each.
    """

    def __init__(self, layers: Sequence[LayerInputs], policy: EvictionPolicy) -> None:
        assert policy.interval == 1
        self.policy, self.num_layers = policy, len(layers)
        self.evicted: list[Tensor] = []
        heads, budget = len(layers) * len(layers[0].kv_heads), policy.budget
        # Time is the outermost axis, so that a step reads contiguous memory.
        self._queries, self._new_keys, self._new_values = (
            torch.cat([x[..., budget:, :] for x in kind]).movedim(-2, 0).contiguous()
            for kind in zip(*((x.queries, x.keys, x.values) for x in layers), strict=True)
        )  # [T - budget, N, G, D], [T - budget, N, D] twice
        slots = budget + 1
        self._heads = torch.arange(heads)
        self._free = torch.full((heads,), budget)  # the slot that the next token takes, [N]
        self._keys = torch.zeros(heads, self._new_keys.shape[2], slots)
        self._values = torch.zeros(heads, slots, self._new_values.shape[2])
        self._positions = torch.arange(slots, dtype=torch.int32).repeat(heads, 1)
        self._accumulated = torch.zeros(heads, slots)
        self._logits = torch.empty(heads, self._queries.shape[2], slots)
        self._weights = torch.empty_like(self._logits)
        self._outputs = torch.empty(*self._logits.shape[:2], self._values.shape[2])
        self._fill(layers)

    def step(self, token: int) -> Tensor:
        """Take a token; return the attention outputs [N, G, D], valid until the next step."""
        self._write(token)
        torch.bmm(self._queries[token - self.policy.budget], self._keys, out=self._logits)
        torch.softmax(self._logits, dim=-1, out=self._weights)
        torch.bmm(self._weights, self._values, out=self._outputs)
        self._free = self._choose(token + 1)
        self.evicted.append(self._positions[self._heads, self._free])
        return self._outputs

    def evicted_at(self, tokens: int) -> Tensor:
        """Tokens seen when each of the first `tokens` was evicted, 0 if it never was; [N, T]."""
        times = torch.zeros(len(self._heads), tokens, dtype=torch.int32)
        for index, positions in enumerate(self.evicted):
            times[self._heads, positions.long()] = self.policy.budget + 1 + index
        return times

    def _fill(self, layers: Sequence[LayerInputs]) -> None:
        """Take the first `budget` tokens at once: nothing is evicted among them."""
        budget = self.policy.budget
        future = torch.ones(budget, budget, dtype=torch.bool).triu(1)
        for head in range(len(self._heads)):
            layer, index = layers[head // len(layers[0].kv_heads)], head % len(layers[0].kv_heads)
            self._keys[head, :, :budget] = layer.keys[index, :budget].T
            self._values[head, :budget] = layer.values[index, :budget]
            logits = layer.queries[index, :, :budget] @ self._keys[head, :, :budget]
            weights = logits.masked_fill_(future, -torch.inf).softmax(dim=-1)  # [G, T, T]
            self._accumulated[head, :budget] = weights.sum(dim=1).mean(dim=0)

    def _write(self, token: int) -> None:
        """Overwrite the slot that the last eviction freed."""
        new = token - self.policy.budget
        self._keys[self._heads, :, self._free] = self._new_keys[new]
        self._values[self._heads, self._free] = self._new_values[new]
        self._positions[self._heads, self._free] = token
        self._accumulated[self._heads, self._free] = 0.0

    def _choose(self, seen: int) -> Tensor:
        """The slot of each head that is evicted after `seen` tokens, [N]."""
        if self.policy.name == "window":
            return (self._free + 1) % self._positions.shape[1]  # the oldest is the next one
        if self.policy.name == "tova":
            weights = self._weights.view(self.num_layers, -1, self._weights.shape[-1])
            lowest = weights.mean(dim=1).argmin(dim=-1)  # [layers]
            return lowest.repeat_interleave(len(self._heads) // self.num_layers)
        self._accumulated.add_(self._weights.sum(dim=1), alpha=1 / self._weights.shape[1])
        is_recent = self._positions >= seen - self.policy.recent_slots
        return self._accumulated.masked_fill(is_recent, torch.inf).argmin(dim=-1)
