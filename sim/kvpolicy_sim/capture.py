"""Capture: a trace of what a transformers model's attention receives and returns.

The model runs under its own full cache, in chunks, sequence by sequence. Its attention function
is listened to, not replaced: what the model computes stays the same to the last bit.

Axes: B rows, H query heads, H_kv KV heads, n new tokens, r recorded rows (tokens with queries),
S keys so far, D head dimension.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from kvpolicy import PolicyError, UnsupportedError
from kvpolicy.trace import Header, Mark, Trace, TraceWriter
from kvpolicy_sim.dense import attend
from kvpolicy_sim.eligible import describe, require_plain
from kvpolicy_sim.interception import Call, listening

# transformers' type: it is imported only where a model is at hand.
PreTrainedModel: TypeAlias = Any

CHUNK = 512

TOLERANCE = {"float32": 1e-2, "float16": 0.1, "bfloat16": 0.1}
"""Largest relative difference of a model's outputs from attention over what is recorded.

Wide enough for implementations that round logits to the model's dtype.
"""


def capture(
    model: PreTrainedModel,
    input_ids: Tensor | Sequence[Tensor],
    path: str | Path,
    *,
    layers: Iterable[int] | None = None,
    kv_heads: Iterable[int] | None = None,
    query_stride: int = 1,
    prompt_len: int | Sequence[int] | None = None,
    new_tokens: int = 0,
    chunk: int = CHUNK,
    outputs: bool = True,
    lse: bool = True,
    tokens: bool = True,
    tokenizer: str = "",
    sources: Sequence[str] = (),
    marks: Sequence[Iterable[Mark]] = (),
    advance: Callable[[int], object] = lambda _: None,
) -> Trace:
    """Run a model over sequences and record its attention.

    Queries and keys are recorded as the attention function gets them, rotated and normalised, in
    the model's dtype. Memory stays at the model's own cache, a chunk of tokens, and the writer's
    queue. The model is afterwards as it was before, also if this fails; what had been recorded
    by then stays in ``PATH.part``.

    Args:
        model: A causal language model of transformers with full attention.
        input_ids: Tokens [T] or [B, T], or 1-D tensors of any lengths; each row is a sequence.
        path: The trace to write; an existing one is replaced once the new one is complete.
        layers: Layers to record; default all.
        kv_heads: KV heads to record, each with its group of query heads; default all.
        query_stride: Record the queries, log-sum-exps and outputs of every so-manieth token.
        prompt_len: Tokens of each sequence that are its prompt; default all of `input_ids`.
        new_tokens: Tokens to continue each sequence by, greedily, past any end of sequence.
        chunk: Tokens per forward.
        outputs: Record attention's outputs.
        lse: Record the log-sum-exp of attention's logits, which replays need: computing it here
            doubles the attention's work, leaving it out makes every replay compute it.
        tokens: Record the token ids. Keys and values tell much about the text without them, too.
        tokenizer: SHA-256 of the tokenizer that made the ids, if it is known.
        sources: Where each sequence comes from.
        marks: Named spans of each sequence, (name, first, past the last).
        advance: Told the tokens of every chunk done.

    Raises:
        UnsupportedError: The model does other things than full causal attention.
        PolicyError: An argument has no possible value.
        TraceError: The trace cannot be written.
    """
    sequences = _sequences(input_ids)
    prompts = [prompt_len] * len(sequences) if isinstance(prompt_len, int) else prompt_len
    for name, given in (("prompt_len", prompts), ("sources", sources), ("marks", marks)):
        if given and len(given) != len(sequences):
            raise PolicyError(f"{name} has {len(given)} entries for {len(sequences)} sequences")
    for ids, length in zip(sequences, prompts or (), strict=False):
        if not 0 < length <= len(ids) + new_tokens:
            raise PolicyError(
                f"prompt_len must lie in 1..{len(ids) + new_tokens}, the sequence's length: "
                f"got {length}"
            )
    header = plan(
        model,
        layers=layers,
        kv_heads=kv_heads,
        query_stride=query_stride,
        tokenizer=tokenizer,
    )
    _require_possible(model, sequences, new_tokens, chunk)
    with TraceWriter(path, header) as writer:
        recorder = _Recorder(writer, outputs=outputs, lse=lse)
        with torch.no_grad(), listening(model, recorder.hear):
            for index, ids in enumerate(sequences):
                recorder.begin(
                    prompt_len=prompts[index] if prompts else len(ids),
                    source=sources[index] if sources else "",
                    marks=marks[index] if marks else (),
                )
                for part in _run(model, ids, new_tokens, chunk):
                    if tokens:
                        recorder.note(part)
                    advance(len(part))
                recorder.end()
    return Trace.open(path)


def plan(
    model: PreTrainedModel,
    *,
    layers: Iterable[int] | None = None,
    kv_heads: Iterable[int] | None = None,
    query_stride: int = 1,
    tokenizer: str = "",
) -> Header:
    """The header that a capture will have, learned from a forward of one token.

    Raises:
        UnsupportedError: The model does other things than full causal attention.
        PolicyError: There are no such layers or heads.
    """
    require_plain(model)
    calls: list[Call] = []
    with torch.no_grad(), listening(model, calls.append):
        model(torch.zeros(1, 1, dtype=torch.long, device=model.device), use_cache=False)
    return describe(
        model,
        calls,
        layers=None if layers is None else sorted(set(layers)),
        kv_heads=None if kv_heads is None else sorted(set(kv_heads)),
        query_stride=query_stride,
        tokenizer=tokenizer,
    )


def bytes_per_token(
    header: Header, *, outputs: bool = True, lse: bool = True, tokens: bool = True
) -> float:
    """Bytes that a token takes in a trace, without the file's padding."""
    kinds = ["q", *(["out"] if outputs else []), *(["lse"] if lse else [])]
    sparse = sum(header.row_bytes(kind) for kind in kinds) / header.query_stride
    layer = sparse + header.row_bytes("k") + header.row_bytes("v")
    return len(header.layers) * layer + (header.row_bytes("tokens") if tokens else 0)


class _Recorder:
    """Writes what attention does, one sequence at a time."""

    def __init__(self, writer: TraceWriter, *, outputs: bool, lse: bool) -> None:
        self._writer, self._header = writer, writer.header
        self._outputs, self._lse = outputs, lse
        self._sequence, self._noted = 0, 0
        self._seen: dict[int, int] = {}
        group = self._header.group
        self._kv_heads = list(self._header.kv_heads)
        self._heads = [head * group + i for head in self._kv_heads for i in range(group)]

    def begin(self, *, prompt_len: int, source: str, marks: Iterable[Mark]) -> None:
        """Start a sequence."""
        self._sequence = self._writer.begin(prompt_len=prompt_len, source=source, marks=marks)
        self._seen, self._noted = dict.fromkeys(self._header.layers, 0), 0

    def note(self, ids: Tensor) -> None:
        """Write the ids of the latest tokens, [n]."""
        ids = ids.cpu().to(torch.uint32)
        self._writer.append(self._sequence, None, "tokens", self._noted, ids)
        self._noted += len(ids)

    def end(self) -> None:
        """End the sequence."""
        self._writer.end(self._sequence)

    def hear(self, call: Call) -> None:
        """Write one layer's new tokens.

        Raises:
            UnsupportedError: The model attended otherwise than a trace can say.
        """
        if call.layer not in self._seen:
            return
        first, last = self._seen[call.layer], call.k.shape[2]
        self._seen[call.layer] = last
        self._require_as_planned(call, first, last)
        k, v = _pick(call.k[0], self._kv_heads), _pick(call.v[0], self._kv_heads)  # [H_kv, S, D]
        q, out = _pick(call.q[0], self._heads), _pick(call.out[0], self._heads)  # [H, n, D]
        self._require_plain(call, q, k, v, out, first)
        rows = torch.arange(first, last, device=k.device)
        rows = rows[rows % self._header.query_stride == 0]  # [r]
        self._write(call.layer, "k", first, k[:, first:])
        self._write(call.layer, "v", first, v[:, first:])
        if rows.numel() == 0:
            return
        row = int(rows[0]) // self._header.query_stride
        q = q[:, rows - first]
        self._write(call.layer, "q", row, q)
        if self._lse:
            full = attend(q, k, v, rows, call.scale, outputs=False)
            self._write(call.layer, "lse", row, full.lse)
        if self._outputs:
            self._write(call.layer, "out", row, out[:, rows - first])

    def _write(self, layer: int, kind: str, start: int, rows: Tensor) -> None:
        self._writer.append(self._sequence, layer, kind, start, rows)

    def _require_as_planned(self, call: Call, first: int, last: int) -> None:
        """Refuse models that do not attend once per layer to all tokens, or rescale."""
        if call.q.shape[0] != 1 or call.q.shape[2] != last - first:
            raise UnsupportedError(
                f"layer {call.layer} attended from {call.q.shape[2]} new tokens to {last} after "
                f"{first}; a trace holds one full attention per layer"
            )
        if call.scale != self._header.scale:
            raise UnsupportedError(
                f"layer {call.layer} scales its logits by {call.scale}, others by "
                f"{self._header.scale}; a trace has one scale"
            )

    def _require_plain(
        self, call: Call, q: Tensor, k: Tensor, v: Tensor, out: Tensor, first: int
    ) -> None:
        """Refuse models whose outputs are not those of plain attention.

        Checked for the chunk's first row, which sees all others if attention is not causal, and
        its last one, which sees most.
        """
        rows = torch.tensor([0, q.shape[1] - 1], device=q.device).unique()
        plain = attend(q[:, rows], k, v, first + rows, call.scale).out
        assert plain is not None
        error = (out[:, rows].float() - plain).norm() / plain.norm().clamp(min=1e-30)
        if not float(error) <= TOLERANCE[self._header.dtype]:
            raise UnsupportedError(
                f"the outputs of layer {call.layer} differ by {float(error):.2g} from plain causal "
                "attention over its queries, keys and values; the model does something that a "
                "trace cannot say, such as biases, sinks or capped logits"
            )


def _pick(x: Tensor, heads: list[int]) -> Tensor:
    """Some heads of [H, n, D], without a copy if they are all."""
    return x if len(heads) == x.shape[0] else x[heads]


def _run(model: PreTrainedModel, ids: Tensor, new_tokens: int, chunk: int) -> Iterator[Tensor]:
    """Take a sequence through the model, continue it greedily, and yield the ids of each part."""
    from transformers import DynamicCache

    cache: Any = DynamicCache(config=model.config)
    latest = ids[:0]

    def forward(part: Tensor) -> Tensor:
        row = part[None].to(model.device)
        logits = model(row, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        return logits[0, -1].argmax()[None]

    for part in ids.split(chunk):
        latest = forward(part)
        yield part
    for _ in range(new_tokens):
        part, latest = latest, forward(latest)
        yield part


def _sequences(input_ids: Tensor | Sequence[Tensor]) -> list[Tensor]:
    """One 1-D tensor per sequence."""
    if isinstance(input_ids, Tensor) and input_ids.dim() == 1:
        input_ids = [input_ids]
    found = list(input_ids)
    for ids in found:
        is_row = isinstance(ids, Tensor) and ids.dim() == 1 and ids.numel() > 0
        if not is_row or ids.is_floating_point():
            got = list(ids.shape) if isinstance(ids, Tensor) else type(ids).__name__
            raise PolicyError(
                f"input_ids must be token ids [T] or [B, T], or a list of 1-D tensors, none of "
                f"them empty; got a row of {got}"
            )
    if not found:
        raise PolicyError("input_ids has no sequence")
    return found


def _require_possible(
    model: PreTrainedModel, sequences: Sequence[Tensor], new_tokens: int, chunk: int
) -> None:
    if chunk < 1 or new_tokens < 0:
        raise PolicyError(
            f"chunk must be at least 1 and new_tokens at least 0: got {chunk}, {new_tokens}"
        )
    longest = max(len(ids) for ids in sequences) + new_tokens
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and longest > limit:
        raise UnsupportedError(
            f"a sequence has {longest} tokens, the model was trained for {limit} positions; "
            "shorten it"
        )
