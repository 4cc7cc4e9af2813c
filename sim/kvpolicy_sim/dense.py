"""Full causal attention of some rows, in float32 and in bounded memory.

Axes: H query heads, H_kv KV heads, G query heads per KV head, r rows (tokens with queries),
S keys, D head dimension.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

LOGITS = 1 << 19
"""Most logits held at a time, if at least `LEAST_ROWS` rows fit: what a processor's cache holds."""

LEAST_ROWS = 8


@dataclass(frozen=True)
class Attended:
    """What attention made of rows.

    Attributes:
        lse: [H, r] float32, log-sum-exp of the scaled logits of what each row sees.
        out: [H, r, D_v] float32; None if it was not asked for.
    """

    lse: Tensor
    out: Tensor | None


def attend(
    q: Tensor, k: Tensor, v: Tensor, positions: Tensor, scale: float, *, outputs: bool = True
) -> Attended:
    """Attend from rows to all keys up to their own position.

    Args:
        q: [H, r, D] of the rows.
        k: [H_kv, S, D] of the positions 0 to S.
        v: [H_kv, S, D_v].
        positions: [r] of the rows, ascending, below S.
        scale: Factor on query-key products.
        outputs: Whether to compute the outputs too.
    """
    kv_heads, rows = k.shape[0], q.shape[1]
    grouped = q.unflatten(0, (kv_heads, -1))  # [H_kv, G, r, D]
    lse = q.new_empty(grouped.shape[:3], dtype=torch.float32)
    out = lse.new_empty(*lse.shape, v.shape[-1]) if outputs else None
    step = max(LEAST_ROWS, LOGITS // (grouped.shape[1] * k.shape[1]))
    for head in range(kv_heads):
        queries, keys = grouped[head].float() * scale, k[head].float()
        values = v[head].float() if outputs else None
        for begin in range(0, rows, step):
            some = slice(begin, begin + step)
            seen = positions[some] + 1
            least, most = int(seen[0]), int(seen[-1])
            weights = queries[:, some] @ keys[:most].T  # [G, n, S]
            columns = torch.arange(least, most, device=seen.device)
            weights[..., least:].masked_fill_(columns >= seen[:, None], -torch.inf)
            top = weights.amax(dim=-1, keepdim=True)
            total = weights.sub_(top).exp_().sum(dim=-1)
            lse[head, :, some] = total.log() + top[..., 0]
            if out is not None and values is not None:
                out[head, :, some] = weights @ values[:most] / total[..., None]
    return Attended(lse.flatten(0, 1), None if out is None else out.flatten(0, 1))
