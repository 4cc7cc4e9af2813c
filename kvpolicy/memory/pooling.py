"""Compression functions: from the tokens of one eviction to fewer memory slots.

A group of c consecutive tokens becomes one slot. Keys are pooled before rotation and rotated
once, at the group's mean position: pooling rotated keys would scale each frequency w by
sin(c w / 2) / (c sin(w / 2)) even for equal tokens.

Axes as in `kvpolicy.memory.state`; N groups of c tokens, E = N c.
"""

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from kvpolicy.errors import PolicyError
from kvpolicy.memory.parameters import load_parameters
from kvpolicy.memory.state import Passage, Setting, SlotMemory

if TYPE_CHECKING:
    from kvpolicy.policies.compressive import Compressive

_TINY = torch.finfo(torch.float32).tiny

_LARGEST_BIAS = 80.0
"""The exponential of more than 88 is infinite in float32; heads that disagree may ask for it."""

RIDGE = 1e-2
"""Pull of fitted taps towards the mean's 1 / c, relative to the mean squared regressor."""


class Groups(NamedTuple):
    """Tokens of one eviction in groups, float32.

    Attributes:
        keys: [B, H_kv, N, c, D] before rotation.
        values: [B, H_kv, N, c, D].
        centres: [B, H_kv, N] mean positions.
        newest: [B, H_kv, N] int64, last positions.
    """

    keys: Tensor
    values: Tensor
    centres: Tensor
    newest: Tensor


def compress(policy: "Compressive", passage: Passage) -> SlotMemory:
    """Give the slots of one eviction, oldest first; zero mass where a group is dropped."""
    if policy.fn == "most-used":
        return most_used(passage, passage.positions.shape[-1] // policy.rate)
    groups = _groups(passage, policy.rate)
    match policy.fn:
        case "mean":
            pooled = pool(passage, groups, torch.full((policy.rate,), 1 / policy.rate))
        case "max":
            pooled = _slots(passage, groups, groups.keys.amax(dim=3), groups.values.amax(dim=3))
        case "attention":
            pooled = preserve_attention(passage, groups)
        case "conv" if policy.weights is not None:
            pooled = convolve(passage, groups, policy.weights)
        case "conv":
            pooled = pool(passage, groups, fitted_taps(passage, groups))
    if policy.min_similarity == -1.0:  # no cosine is lower
        return pooled
    is_alike = similarity(groups.keys) >= policy.min_similarity
    return SlotMemory(pooled.keys, pooled.values, pooled.positions, pooled.mass * is_alike)


def most_used(passage: Passage, count: int) -> SlotMemory:
    """Keep the `count` tokens with most attention per step; equal ones: the newest."""
    observations = passage.n - passage.positions
    use = passage.accumulated / observations
    best = use.argsort(dim=-1, stable=True)[..., -count:]
    kept = best.sort(dim=-1).values

    def take(x: Tensor) -> Tensor:
        return x.gather(2, kept[..., None].expand(*kept.shape, x.shape[-1]))

    return SlotMemory(
        keys=take(passage.rotated_keys),
        values=take(passage.values),
        positions=passage.positions.gather(2, kept),
        mass=torch.ones(kept.shape, device=kept.device),
    )


def pool(passage: Passage, groups: Groups, taps: Tensor) -> SlotMemory:
    """Mix each group's keys and values by taps, [c] or [B, H_kv, 1, c] float32."""
    mix = taps.to(groups.keys.device)[..., None]
    return _slots(passage, groups, (groups.keys * mix).sum(dim=3), (groups.values * mix).sum(dim=3))


def fitted_taps(passage: Passage, groups: Groups) -> Tensor:
    """Taps [B, H_kv, 1, c] that best give the newest token's outputs back (least squares).

    With a_gj the attention of query head g to token j, every group asks for
    sum_j a_gj v_j = (sum_j a_gj) sum_i w_i v_i; the ridge keeps taps near 1 / c where the
    attention says little.
    """
    rate = groups.values.shape[3]
    relative = passage.logits(passage.rotated_keys) - passage.lse[..., None]
    relative = relative - relative.amax(dim=(2, 3), keepdim=True)  # no common factor matters
    weights = relative.exp().unflatten(-1, groups.values.shape[2:4])  # [B, H_kv, G, N, c]
    asked = torch.einsum("bhgnc,bhncd->bhgnd", weights, groups.values)
    share = weights.sum(dim=-1)  # [B, H_kv, G, N]
    energy = (share**2).sum(dim=2)  # [B, H_kv, N]
    gram = torch.einsum("bhn,bhncd,bhned->bhce", energy, groups.values, groups.values)
    moment = torch.einsum("bhgn,bhgnd,bhncd->bhc", share, asked, groups.values)
    pull = RIDGE * gram.diagonal(dim1=-2, dim2=-1).mean(dim=-1) + _TINY
    gram = gram + pull[..., None, None] * torch.eye(rate, device=gram.device)
    taps = torch.linalg.solve(gram, moment + (pull / rate)[..., None])
    return taps[:, :, None]


def convolve(passage: Passage, groups: Groups, path: str) -> SlotMemory:
    """Strided convolution by kernels from a file: [layers, H_kv, c, D, D] for keys and values."""
    keys, values = load_kernels(path, passage.setting, groups.keys.shape[1], groups.keys.shape[-2:])
    return _slots(
        passage,
        groups,
        torch.einsum("bhncd,hcde->bhne", groups.keys, keys),
        torch.einsum("bhncd,hcde->bhne", groups.values, values),
    )


def preserve_attention(passage: Passage, groups: Groups) -> SlotMemory:
    """Slots that answer the newest token's query heads as their groups do.

    Key and value are means weighted by the attention that the newest token gives, and the bias
    makes up for the log-mass: exact for one query head, a compromise for several. Keys are
    mixed as rotated: then the bias of one head is the entropy of its weights, between 0 and
    log c. A mean of keys that ignores the attention takes biases without bound, with which other
    queries find slots that they should not (see docs/experiments.md).
    """
    grouped = groups.values.shape[2:4]
    logits = passage.logits(passage.rotated_keys)  # [B, H_kv, G, E]
    received = (logits - passage.lse[..., None]).logsumexp(dim=2)  # [B, H_kv, E], no underflow
    weights = received.unflatten(-1, grouped).softmax(dim=-1)  # [B, H_kv, N, c]
    keys = (passage.rotated_keys.unflatten(2, grouped) * weights[..., None]).sum(dim=3)
    values = (groups.values * weights[..., None]).sum(dim=3)
    mass = logits.unflatten(-1, grouped).logsumexp(dim=-1)  # [B, H_kv, G, N]
    bias = (mass - passage.logits(keys)).mean(dim=2).clamp(max=_LARGEST_BIAS)
    return SlotMemory(keys, values, groups.newest, bias.exp())


def similarity(keys: Tensor) -> Tensor:
    """Mean cosine of each group's keys [B, H_kv, N, c, D] to their mean; [B, H_kv, N]."""
    centre = keys.mean(dim=3, keepdim=True)
    return torch.cosine_similarity(keys, centre, dim=-1).mean(dim=-1)


def _groups(passage: Passage, rate: int) -> Groups:
    positions = passage.positions.unflatten(-1, (-1, rate))
    return Groups(
        keys=passage.keys.unflatten(2, (-1, rate)),
        values=passage.values.unflatten(2, (-1, rate)),
        centres=positions.double().mean(dim=-1),
        newest=positions[..., -1],
    )


def _slots(passage: Passage, groups: Groups, keys: Tensor, values: Tensor) -> SlotMemory:
    """Slots of pooled keys, which are rotated here, and values; each counts for its group."""
    mass = torch.full(groups.newest.shape, float(groups.keys.shape[3]), device=keys.device)
    return SlotMemory(
        passage.setting.rotary.shift(keys, groups.centres), values, groups.newest, mass
    )


def load_kernels(
    path: str, setting: Setting, kv_heads: int, shape: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """Kernels for keys and for values of a layer's heads here, [H_kv, c, D, D] float32 each.

    Args:
        path: The file.
        setting: The layer.
        kv_heads: H_kv.
        shape: (c, D).

    Raises:
        PolicyError: The file does not fit the model or the rate.
    """
    kernels = load_parameters(path)
    heads = slice(setting.first_kv_head, setting.first_kv_head + kv_heads)
    keys, values = (
        _kernel(kernels, path, name, setting.layer, heads, (*shape, shape[-1]))
        for name in ("keys", "values")
    )
    return keys, values


def _kernel(
    kernels: dict[str, Tensor],
    path: str,
    name: str,
    layer: int,
    heads: slice,
    shape: tuple[int, ...],
) -> Tensor:
    kernel = kernels.get(name)
    if (
        kernel is None
        or kernel.dim() != 5
        or layer >= kernel.shape[0]
        or heads.stop > kernel.shape[1]
        or kernel.shape[2:] != shape
    ):
        got = "none" if kernel is None else tuple(kernel.shape)
        raise PolicyError(
            f"{path}: expected kernels {name!r} [layers, H_kv, *{tuple(shape)}] with layer {layer} "
            f"and {heads.stop} KV heads, got {got}; fit them to this model and rate"
        )
    return kernel[layer, heads]
