"""Kernels of compressive memory, fitted by the attention-reconstruction loss.

Following the Compressive Transformer (arXiv 1911.05507, section 3.2), without the rest of the
network. A passage is a run of consecutive tokens in whole groups of `rate`, with keys K and
values V before rotation; q are queries, before rotation, of tokens that come after it. What is
minimised, per layer and KV head, is the mean over passages, later queries and query heads of

    | softmax(s q K^T) V  -  softmax(s q K'^T) V' |^2

with K', V' the passage's groups convolved by the kernels, and s the model's scale. Attention is
content-based: nothing is rotated, and only the passage is attended to. A bias that all slots
share cancels out. Gradients move kernels alone.

A sequence's tokens are split in order: passages for gradients, passages that say when to stop,
and passages held out, on which the losses are reported. A passage and its queries never lie in
two parts. Kernels begin as averages, and stay where no step is better on the second part.

Axes: H_kv KV heads, G query heads per KV head, P passages, N groups of c tokens, n queries, D
head dimension.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from kvpolicy import UnsupportedError
from kvpolicy.policies.compressive import Compressive
from kvpolicy.rotary import Rotary
from kvpolicy.trace import Header, Trace
from kvpolicy_sim.fit import LayerFit, Losses
from kvpolicy_sim.inputs import require_finite

PARTS = (0.6, 0.2, 0.2)
"""Shares of a sequence for gradients, for stopping, and held out."""

MOST_TOKENS = 384
"""Of a passage."""

MOST_PASSAGES = 128
"""Of a part of a sequence."""

QUERIES = 32
"""Later queries that ask a passage, evenly spaced over as many tokens as it has."""

BATCH = 4
"""Passages of a gradient step."""

RATE = 2e-3
"""Adam's."""

_CHECK_EVERY = 10
_SEED = 0


class Kernels(NamedTuple):
    """Both [H_kv, c, D, D]."""

    keys: Tensor
    values: Tensor


@dataclass(frozen=True)
class Passages:
    """Passages of one layer, and what their queries get from the tokens themselves.

    Attributes:
        keys: [P, H_kv, N, c, D] before rotation.
        values: [P, H_kv, N, c, D].
        queries: [P, H_kv, G n, D] before rotation, times the scale.
        outputs: [P, H_kv, G n, D].
    """

    keys: Tensor
    values: Tensor
    queries: Tensor
    outputs: Tensor

    def take(self, index: Tensor) -> "Passages":
        """Some of them."""
        return Passages(
            self.keys[index], self.values[index], self.queries[index], self.outputs[index]
        )

    def errors(self, kernels: Kernels) -> Tensor:
        """Squared error per KV head, summed over passages and queries; [H_kv]."""
        keys = torch.einsum("phncd,hcde->phne", self.keys, kernels.keys)
        values = torch.einsum("phncd,hcde->phne", self.values, kernels.values)
        return (_attend(self.queries, keys, values) - self.outputs).square().sum(dim=(0, 2, 3))

    @property
    def energy(self) -> Tensor:
        """Squared outputs per KV head; [H_kv]."""
        return self.outputs.square().sum(dim=(0, 2, 3)).clamp(min=1e-30)


class KernelFitter:
    """Fits the kernels of a trace's layers."""

    def __init__(
        self,
        trace: Trace,
        policy: Compressive,
        sequences: Sequence[int],
        rotary: Rotary,
        steps: int,
    ) -> None:
        self.trace, self.policy, self.rotary, self.steps = trace, policy, rotary, steps
        self.sequences, rate = sequences, policy.rate
        if trace.header.head_dim != trace.header.value_dim:
            raise UnsupportedError(f"{policy}: kernels need keys and values of one size")
        longest = max(trace.sequences[index].tokens for index in sequences) - policy.sinks
        # A passage and as many tokens with its queries must fit into the smallest part, which
        # may begin up to two groups late.
        room = (int(longest * min(PARTS)) // 2 // rate - 1) * rate
        slots = policy.occupancy.state_slots
        self.length = min(slots * rate, MOST_TOKENS // rate * rate, room)
        if self.length < 2 * rate:
            raise UnsupportedError(
                f"{policy}: its memory and a sequence of {longest + policy.sinks} tokens leave no "
                f"two groups of {rate} tokens to fit to; capture at least "
                f"{policy.sinks + int(6 * rate / min(PARTS)) + 1} tokens, with at least two slots "
                "of memory"
            )

    def run(self, layer: int) -> tuple[LayerFit, dict[str, Tensor]]:
        """Fit the kernels of a layer's KV heads."""
        training, stopping, held_out = self._parts(layer)
        before = averages(training.keys.shape[1], self.policy.rate, training.keys.shape[-1])
        after = self._descend(training, stopping, before, layer)
        made = LayerFit(layer, _losses(training, before, after), _losses(held_out, before, after))
        return made, {"keys": after.keys, "values": after.values}

    def blank(self, header: Header) -> dict[str, Tensor]:
        """Averages for the whole model."""
        mean = averages(header.num_kv_heads, self.policy.rate, header.head_dim).keys
        whole = mean.expand(header.num_layers, -1, -1, -1, -1)
        return {"keys": whole.clone(), "values": whole.clone()}

    def place(self, header: Header) -> Sequence[int]:
        """The KV heads recorded."""
        return header.kv_heads

    def _descend(
        self, training: Passages, stopping: Passages, start: Kernels, layer: int
    ) -> Kernels:
        """Adam from the averages; every head keeps its best kernels on the second part."""
        moving = Kernels(*(kernel.clone().requires_grad_() for kernel in start))
        optimiser = torch.optim.Adam(moving, lr=RATE)
        batches = _batches(len(training.keys), _SEED + layer)
        unit = training.energy / len(training.keys)
        best, least = start, stopping.errors(start)
        for step in range(1, self.steps + 1):
            batch = training.take(next(batches))
            optimiser.zero_grad()
            loss = (batch.errors(moving) / (unit * len(batch.keys))).sum()
            loss.backward()  # pyright: ignore[reportUnknownMemberType]
            optimiser.step()
            if step % _CHECK_EVERY == 0 or step == self.steps:
                with torch.no_grad():
                    errors = stopping.errors(moving)
                    better = (errors < least)[:, None, None, None]
                    best = Kernels(
                        *(x.detach().where(better, y) for x, y in zip(moving, best, strict=True))
                    )
                    least = torch.minimum(errors, least)
        return best

    def _parts(self, layer: int) -> list[Passages]:
        """Passages of all sequences for gradients, for stopping, and held out."""
        found: list[list[Passages]] = [[] for _ in PARTS]
        for sequence in self.sequences:
            q, k, v = (self._read(kind, layer, sequence) for kind in ("q", "k", "v"))
            places = torch.arange(k.shape[1])
            raw = self.rotary.shift(k, -places)
            first, tokens = self.policy.sinks, k.shape[1]
            for share, part in zip(PARTS, found, strict=True):
                last = min(first + int((tokens - self.policy.sinks) * share), tokens)
                part.extend(self._passages(q, raw, v, first, last))
                first += -(-(last - first) // self.policy.rate) * self.policy.rate
        return [_join(part) for part in found]

    def _read(self, kind: str, layer: int, sequence: int) -> Tensor:
        x = self.trace.read(kind, layer, sequence, dtype=torch.float32)
        require_finite(x, f"{self.trace.path}: {kind} of layer {layer}, sequence {sequence}")
        return x

    def _passages(
        self, q: Tensor, raw: Tensor, v: Tensor, first: int, last: int
    ) -> Iterator[Passages]:
        """Passages of the tokens [first, last), half overlapping, each with its queries."""
        rate, length = self.policy.rate, self.length
        stride = max(rate, length // 2 // rate * rate)
        scale, kv_heads = self.trace.header.scale, raw.shape[0]
        begins = range(first, last - 2 * length + 1, stride)
        for begin in begins[:: -(-len(begins) // MOST_PASSAGES) or 1]:
            taken = slice(begin, begin + length)
            asking = (
                begin
                + length
                + (torch.arange(QUERIES) * length).div(QUERIES, rounding_mode="floor")
            )
            asking = asking.unique()
            queries = self.rotary.shift(q[:, asking], -asking) * scale  # [H, n, D]
            queries = queries.unflatten(0, (kv_heads, -1)).flatten(1, 2)
            yield Passages(
                keys=raw[:, taken].unflatten(1, (-1, rate))[None],
                values=v[:, taken].unflatten(1, (-1, rate))[None],
                queries=queries[None],
                outputs=_attend(queries, raw[:, taken], v[:, taken])[None],
            )


def averages(kv_heads: int, rate: int, dim: int) -> Kernels:
    """Kernels that give a group's mean."""
    mean = (torch.eye(dim) / rate).expand(kv_heads, rate, dim, dim)
    return Kernels(mean.clone(), mean.clone())


def _attend(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Content-based attention of scaled queries [..., n, D] to [..., S, D]."""
    return (queries @ keys.transpose(-1, -2)).softmax(dim=-1) @ values


def _losses(passages: Passages, before: Kernels, after: Kernels) -> Losses:
    energy = float(passages.energy.sum())
    with torch.no_grad():
        ours, theirs = (float(passages.errors(kernels).sum()) for kernels in (before, after))
    return Losses(ours / energy, theirs / energy)


def _join(parts: list[Passages]) -> Passages:
    return Passages(
        torch.cat([part.keys for part in parts]),
        torch.cat([part.values for part in parts]),
        torch.cat([part.queries for part in parts]),
        torch.cat([part.outputs for part in parts]),
    )


def _batches(count: int, seed: int) -> Iterator[Tensor]:
    """Passages of one gradient step after the other: seeded orders of all of them."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(count, generator=generator).split(BATCH)
