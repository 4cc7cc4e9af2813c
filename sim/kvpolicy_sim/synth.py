"""Synthetic traces: attention of a known kind, for tests and for seeing what a policy is bad at."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from kvpolicy import PolicyError, __version__
from kvpolicy.trace import Header, Trace, TraceWriter
from kvpolicy_sim.dense import attend
from kvpolicy_sim.patterns import LEAST_HEAD_DIM, PATTERNS, Head, needle_span


def synth(
    path: str | Path,
    *,
    pattern: str,
    tokens: int,
    layers: int = 1,
    kv_heads: int = 2,
    group: int = 4,
    head_dim: int = 64,
    seed: int = 0,
    dtype: str = "float32",
    prompt_len: int | None = None,
    outputs: bool = True,
    lse: bool = True,
    advance: Callable[[int], object] = lambda _: None,
) -> Trace:
    """Write a trace whose full attention shows a pattern.

    - ``sink``: about half of the weight lies on the first tokens, much of the rest on recent ones.
    - ``heavy``: a few tokens keep a Zipf-like share for good, the others matter while recent.
    - ``drift``: topics come, go and return, and with them tokens that were of no use for long.
    - ``needle``: a span that only the last queries attend to; the mark ``needle`` names it.

    The same arguments give the same trace. Layers are made one after the other and a block of
    tokens at a time: memory holds one layer's keys and values, and none with neither outputs nor
    lse.

    Args:
        path: The trace to write.
        pattern: One of `kvpolicy_sim.patterns.PATTERNS`.
        tokens: Length of its only sequence.
        layers: Layers, independent of each other.
        kv_heads: KV heads of a layer, independent but for what the text decides.
        group: Query heads per KV head.
        head_dim: Size of keys and of values.
        seed: Of everything random.
        dtype: float32, bfloat16 or float16.
        prompt_len: Tokens that count as the prompt; default all.
        outputs: Write attention's outputs, which takes the square of the length in time.
        lse: Write the log-sum-exp of attention's logits; so does this.
        advance: Told the tokens of every block done, counted per layer.

    Raises:
        PolicyError: An argument has no possible value.
        TraceError: So has one that goes into the header.
    """
    _require_possible(pattern, tokens, head_dim)
    header = synth_header(
        pattern, layers=layers, kv_heads=kv_heads, group=group, head_dim=head_dim, dtype=dtype
    )
    with TraceWriter(path, header) as writer:
        sequence = writer.begin(
            prompt_len=tokens if prompt_len is None else prompt_len,
            source=f"{pattern}, seed {seed}",
            marks=[("needle", *needle_span(tokens, seed))] if pattern == "needle" else [],
        )
        for layer in header.layers:
            heads = [
                Head(
                    pattern,
                    tokens=tokens,
                    group=group,
                    head_dim=head_dim,
                    seed=seed,
                    layer=layer,
                    kv_head=kv_head,
                )
                for kv_head in header.kv_heads
            ]
            made = _Layer(writer, sequence, layer, tokens, outputs=outputs, lse=lse)
            for blocks in zip(*(head.blocks() for head in heads), strict=True):
                q = torch.cat([block.q for block in blocks])  # [H, n, D]
                k = torch.stack([block.k for block in blocks])  # [H_kv, n, D]
                v = torch.stack([block.v for block in blocks])
                made.add(q, k, v)
                advance(k.shape[1])
    return Trace.open(path)


def synth_header(
    pattern: str, *, layers: int, kv_heads: int, group: int, head_dim: int, dtype: str
) -> Header:
    """What a synthetic trace says about itself; it has no rotation.

    Raises:
        TraceError: An argument has no possible value.
    """
    return Header(
        model=f"synth-{pattern}",
        model_type="synth",
        num_layers=layers,
        num_query_heads=kv_heads * group,
        num_kv_heads=kv_heads,
        layers=tuple(range(layers)),
        kv_heads=tuple(range(kv_heads)),
        head_dim=head_dim,
        value_dim=head_dim,
        dtype=dtype,
        scale=head_dim**-0.5,
        producer=f"kvpolicy {__version__}",
    )


class _Layer:
    """One layer being written, with the keys and values that its attention needs."""

    def __init__(
        self,
        writer: TraceWriter,
        sequence: int,
        layer: int,
        tokens: int,
        *,
        outputs: bool,
        lse: bool,
    ) -> None:
        self._writer, self._sequence, self._layer = writer, sequence, layer
        self._outputs, self._lse = outputs, lse
        self._dtype: torch.dtype = getattr(torch, writer.header.dtype)
        self._seen = 0
        room = tokens if outputs or lse else 0
        self._keys = torch.empty(writer.header.shape("k", room), dtype=self._dtype)
        self._values = torch.empty(writer.header.shape("v", room), dtype=self._dtype)

    def add(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        """Write the next tokens, rounded to the trace's dtype, and what attention makes of them."""
        q, k, v = (x.to(self._dtype) for x in (q, k, v))
        for kind, rows in (("q", q), ("k", k), ("v", v)):
            self._write(kind, rows)
        first, last = self._seen, self._seen + k.shape[1]
        if self._outputs or self._lse:
            self._keys[:, first:last], self._values[:, first:last] = k, v
            keys, values = self._keys[:, :last], self._values[:, :last]
            scale, rows = self._writer.header.scale, torch.arange(first, last)
            full = attend(q, keys, values, rows, scale, outputs=self._outputs)
            if self._lse:
                self._write("lse", full.lse)
            if full.out is not None:
                self._write("out", full.out.to(self._dtype))
        self._seen = last

    def _write(self, kind: str, rows: Tensor) -> None:
        self._writer.append(self._sequence, self._layer, kind, self._seen, rows)


def _require_possible(pattern: str, tokens: int, head_dim: int) -> None:
    if pattern not in PATTERNS:
        raise PolicyError(f"unknown pattern {pattern!r}; choose from {', '.join(PATTERNS)}")
    if head_dim < LEAST_HEAD_DIM:
        raise PolicyError(f"head_dim must be at least {LEAST_HEAD_DIM}: got {head_dim}")
    least = 64
    if tokens < least:
        raise PolicyError(f"a pattern shows from {least} tokens on: got {tokens}")
