"""What a replay reads: one layer of one sequence, in float32.

Axes: H_kv KV heads, G query heads per KV head, T tokens, r rows (tokens with queries), D head
dimension.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvpolicy import CachePolicy, Occupancy
from kvpolicy.errors import TraceError
from kvpolicy.trace.header import ITEM_BYTES
from kvpolicy_sim.dense import attend

if TYPE_CHECKING:
    from kvpolicy.trace import Trace

BLOCK = 64
"""Tokens whose logits are computed at once."""


@dataclass(frozen=True)
class LayerInputs:
    """The queries, keys and values of a layer, and what full attention makes of them.

    Attributes:
        layer: Index of the layer in the model.
        kv_heads: Index of each KV head in the model.
        tokens: T.
        stride: Rows are the tokens 0, stride, 2 * stride, ...
        queries: [H_kv, G, r, D], times the scale of query-key products.
        keys: [H_kv, T, D].
        values: [H_kv, T, D_v].
        lse: [H_kv, G, r] log-sum-exp of the full logits.
        outputs: [H_kv, G, r, D_v] of full attention; None if outputs are not compared.
        scale: Factor on query-key products that `queries` hold already.
        item_bytes: Bytes of one number of the traced cache.
        prompt: First tokens that are the sequence's prompt; 0 if it has none.
    """

    layer: int
    kv_heads: tuple[int, ...]
    tokens: int
    stride: int
    queries: Tensor
    keys: Tensor
    values: Tensor
    lse: Tensor
    outputs: Tensor | None
    scale: float = 1.0
    item_bytes: int = 4
    prompt: int = 0

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return self.queries.shape[1]

    def law(self, policy: CachePolicy) -> Occupancy:
        """A policy's occupancy law, settled by the sequence's prompt."""
        return policy.of_layer(self.layer).occupancy.of_prompt(self.prompt)

    def rows(self, first: int, last: int) -> slice:
        """Rows of the tokens [first, last)."""
        return slice(-(-first // self.stride), -(-last // self.stride))

    @classmethod
    def load(cls, trace: "Trace", sequence: int, layer: int, *, outputs: bool) -> "LayerInputs":
        """Read a layer; compute full attention where the trace does not have it.

        Raises:
            TraceError: The trace is damaged, or holds numbers that are not finite.
        """
        header, tokens = trace.header, trace.sequences[sequence].tokens
        kv_heads = len(header.kv_heads)

        def read(kind: str) -> Tensor:
            x = trace.read(kind, layer, sequence, dtype=torch.float32)
            require_finite(x, f"{trace.path}: {kind} of layer {layer}, sequence {sequence}")
            return x if x.shape[0] == kv_heads else x.unflatten(0, (kv_heads, -1))

        queries, keys, values = read("q").mul_(header.scale), read("k"), read("v")
        if queries.dim() == 3:
            queries = queries[:, None]
        shape = queries.shape[:3]
        lse = read("lse").view(shape) if trace.has("lse", layer, sequence) else None
        out = None
        if outputs and trace.has("out", layer, sequence):
            out = read("out").view(*shape, -1)
        if lse is None or (outputs and out is None):
            positions = torch.arange(0, tokens, header.query_stride)
            full = attend(queries.flatten(0, 1), keys, values, positions, 1.0, outputs=outputs)
            lse = full.lse.view(shape)
            out = None if full.out is None else full.out.view(*shape, -1)
            for x in (lse, out):
                where = f"{trace.path}: attention of layer {layer}, sequence {sequence}"
                require_finite(x, where)
        return cls(
            layer=layer,
            kv_heads=header.kv_heads,
            tokens=tokens,
            stride=header.query_stride,
            queries=queries,
            keys=keys,
            values=values,
            lse=lse,
            outputs=out,
            scale=header.scale,
            item_bytes=ITEM_BYTES[header.dtype],
            prompt=trace.sequences[sequence].prompt_len,
        )


def require_finite(x: Tensor | None, what: str) -> None:
    """Raise TraceError for infinities and NaN, which the extremes show at half the cost."""
    if x is not None and not bool(torch.stack(torch.aminmax(x)).isfinite().all()):
        raise TraceError(f"{what} has values that are not finite; capture the trace again")
