"""When two runs of a policy agree: equal sets and outputs, but for noise at near-ties."""

import math

import torch
from torch import Tensor

from kvpolicy.errors import ContractError
from kvpolicy.rehearsal import Row, Run, margin

NEAR_TIE = 1e-3
"""Relative score difference below which two schedules may legally decide differently."""

TOLERANCE = 2e-5
"""Largest difference of two attention outputs that counts as floating-point noise."""


class NearTie(Exception):  # noqa: N818  (not an error: the case decides nothing)
    """Two schedules differ where scores differ by less than `NEAR_TIE`."""


def require(condition: bool, message: str) -> None:
    """Raise ContractError with the message unless the condition holds."""
    if not condition:
        raise ContractError(message)


def require_same(expected: Run, got: Run, how: str) -> None:
    """Require equal sets and outputs, unless a near-tie may have parted the runs."""
    for row, (ours, theirs) in enumerate(zip(expected.retained, got.retained, strict=True)):
        for n in sorted(ours.keys() & theirs.keys()):
            if ours[n] != theirs[n]:
                _excuse(expected, got, row, n)
                head = next(i for i, kept in enumerate(ours[n]) if kept != theirs[n][i])
                raise ContractError(
                    f"after {n} tokens KV head {head} kept {[*ours[n][head]]}, {how} "
                    f"{[*theirs[n][head]]}"
                )
        apart = (expected.outputs[row] - got.outputs[row]).abs().amax(dim=(0, 2))  # [T]
        off = (~(apart <= TOLERANCE)).nonzero().flatten().tolist()
        if off:
            _excuse(expected, got, row, off[0])
            raise ContractError(f"{how}, the output at position {off[0]} is off by {apart[off[0]]}")


def _excuse(expected: Run, got: Run, row: int, n: int) -> None:
    """Raise NearTie if noise may have turned a decision of the row within its first n tokens.

    Then the decision was close in both runs. Exact ties in both are no noise: the position
    decides them.
    """
    for moment in expected.decisions.keys() & got.decisions.keys():
        if moment[0] == row and moment[1] <= n:
            margins = margin(expected.decisions[moment]), margin(got.decisions[moment])
            if 0 < max(margins) < NEAR_TIE:
                raise NearTie


def is_close(got: Tensor, expected: Tensor, where: Tensor) -> bool:
    """Whether scores agree at some slots: floats up to noise, integers exactly."""
    got, expected = got[where], expected[where]
    if not got.is_floating_point():
        return torch.equal(got, expected)
    return torch.allclose(got, expected, rtol=1e-4, atol=1e-6)


def is_equal(got: Tensor | None, expected: Tensor) -> bool:
    """Whether tensors agree to the bit, NaN included."""
    return got is not None and torch.equal(got.nan_to_num(), expected.nan_to_num())


def causal_attention(row: Row) -> Tensor:
    """Dense attention in float64, written without the core; [H, T, D]."""
    group = row.q.shape[0] // row.k.shape[0]
    k, v = (x.double().repeat_interleave(group, dim=0) for x in (row.k, row.v))
    logits = row.q.double() @ k.transpose(1, 2) / math.sqrt(row.q.shape[-1])
    future = torch.ones(row.length, row.length, dtype=torch.bool).triu(1)
    return (logits.masked_fill(future, -math.inf).softmax(dim=-1) @ v).float()
