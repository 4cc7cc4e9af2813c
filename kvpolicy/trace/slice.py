"""A part of a trace as a trace of its own."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from kvpolicy.errors import TraceError
from kvpolicy.spec import shown
from kvpolicy.trace.disk import beside
from kvpolicy.trace.header import KINDS, MAX_NUMBER, TOKENS, Header, Sequence, row_axis
from kvpolicy.trace.reader import Trace
from kvpolicy.trace.writer import TraceWriter

Advance = Callable[[int], object]

Ranges = tuple[range, ...]

_KEYS = {"layers": "layers", "kv_heads": "kv_heads", "sequence": "sequences", "tokens": "tokens"}
"""Keys of a selection's text; ``sequences`` is also understood."""


@dataclass(frozen=True, kw_only=True)
class Selection:
    """What of a trace to take; None takes everything.

    Attributes:
        layers: Layers of the model.
        kv_heads: KV heads of the model, with their query heads.
        sequences: Sequences of the trace; they are numbered anew.
        tokens: Tokens of every sequence, one range. Behind a beginning that is cut off,
            positions count from 0 again, and ``lse`` and ``out`` are left out, because they
            belong to attention that reaches further back.
    """

    layers: Ranges | None = None
    kv_heads: Ranges | None = None
    sequences: Ranges | None = None
    tokens: range | None = None

    @classmethod
    def parse(cls, text: str) -> "Selection":
        """Read ``layers=0:2,5,tokens=0:512,sequence=0,kv_heads=1``: half-open ranges and indices.

        Raises:
            TraceError: The text is malformed.
        """
        found: dict[str, list[range]] = {}
        key = ""
        for item in text.split(","):
            name, equals, value = item.rpartition("=")
            if equals:
                key = name.strip()
                key = "sequence" if key == "sequences" else key
                if key not in _KEYS:
                    raise TraceError(
                        f"a slice has no {shown(key)}; choose from {', '.join(_KEYS)}, as in "
                        "layers=0:2,tokens=0:512"
                    )
                if key in found:
                    raise TraceError(f"{key} is given twice; join its ranges: {key}=0:2,5")
            if not key:
                raise TraceError(f"a slice is KEY=FIRST:LAST,..., got {shown(text)}")
            found.setdefault(key, []).append(_range(key, value))
        tokens = found.pop("tokens", None)
        if tokens is not None and len(tokens) > 1:
            raise TraceError("tokens takes one range, such as 0:512")
        ranges = {_KEYS[key]: tuple(value) for key, value in found.items()}
        return cls(**ranges, tokens=tokens[0] if tokens else None)


class Part(NamedTuple):
    """Rows of one stream of a selection, sharing memory with the trace where they can.

    Attributes:
        sequence: Index of the sequence in the selection.
        layer: Index of the layer in the model; None for ``tokens``.
        kind: The kind.
        start: First row, in the selection.
        rows: [heads, rows, D], [heads, rows] of ``lse``, or [rows] of ``tokens``.
    """

    sequence: int
    layer: int | None
    kind: str
    start: int
    rows: Tensor


class Sliced:
    """A selection of a trace.

    Args:
        trace: The trace.
        selection: What to take of it; default everything.

    Attributes:
        header: The header of the selection.
        sequences: Its sequences.
        notes: What it leaves out beyond what was asked for.

    Raises:
        TraceError: The trace does not have it.
    """

    def __init__(self, trace: Trace, selection: Selection | None = None) -> None:
        self._trace, old = trace, trace.header
        selection = selection or Selection()
        layers = _chosen("layers", selection.layers, old.layers)
        kv_heads = _chosen("kv_heads", selection.kv_heads, old.kv_heads)
        chosen = _chosen("sequence", selection.sequences, range(len(trace.sequences)))
        self.header = replace(old, layers=layers, kv_heads=kv_heads)
        places = [old.kv_heads.index(head) for head in kv_heads]
        self._heads = _heads(old, places)
        self._old = tuple(trace.sequences[index] for index in chosen)
        self._tokens = [_tokens(old, sequence, selection.tokens) for sequence in self._old]
        self.sequences = tuple(
            sequence.cut(tokens.start, tokens.stop, index)
            for index, (sequence, tokens) in enumerate(zip(self._old, self._tokens, strict=True))
        )
        self.notes: list[str] = []
        self._left_out: tuple[str, ...] = ()
        if any(tokens.start for tokens in self._tokens):
            self._left_out = ("lse", "out")
            self.notes.append("lse and out are left out: they belong to tokens that are cut off")

    def streams(self) -> Iterator[tuple[int, int | None, str]]:
        """Sequence (of the selection), layer and kind of everything that it has."""
        for sequence, old in zip(self.sequences, self._old, strict=True):
            for kind, layer in self.header.streams():
                if kind not in self._left_out and self._trace.has(kind, layer, old.index):
                    yield sequence.index, layer, kind

    def rows(self, kind: str, sequence: int) -> int:
        """Rows of a kind in a sequence of the selection."""
        return self.header.num_rows(kind, self.sequences[sequence].tokens)

    @property
    def num_bytes(self) -> int:
        """Bytes of all numbers selected."""
        return sum(
            self.rows(kind, sequence) * self.header.row_bytes(kind)
            for sequence, _, kind in self.streams()
        )

    def parts(self, sequence: int, layer: int | None, kind: str) -> Iterator[Part]:
        """The rows of a stream, a chunk of the trace at a time.

        Raises:
            TraceError: The trace is damaged.
        """
        first = self.header.num_rows(kind, self._tokens[sequence].start)
        last = first + self.rows(kind, sequence)
        heads, start = self._heads[kind], 0
        for view in self._trace.views(
            kind, layer, self._old[sequence].index, first=first, last=last
        ):
            yield Part(sequence, layer, kind, start, view if heads is None else view[heads])
            start += view.shape[row_axis(kind)]


def write_slice(sliced: Sliced, path: str | Path, advance: Advance = lambda _: None) -> None:
    """Write a part of a trace as a new trace.

    Args:
        sliced: The part.
        path: The new trace; an existing one is replaced once the new one is complete.
        advance: Told the bytes done.

    Raises:
        OSError: The new trace cannot be created.
        TraceError: The trace is damaged, or the new one cannot be written.
    """
    path = Path(path)
    # Not PATH.part, which may be the very file that is read.
    with TraceWriter(path, sliced.header, part=beside(path, ".slice")) as writer:
        for sequence in sliced.sequences:
            writer.begin(
                prompt_len=sequence.prompt_len, source=sequence.source, marks=sequence.marks
            )
        done = 0
        for sequence, layer, kind in sliced.streams():
            if sequence != done:
                writer.end(done)
                done = sequence
            for part in sliced.parts(sequence, layer, kind):
                writer.append(*part)
                advance(part.rows.nbytes)


def _range(key: str, text: str) -> range:
    """Read ``3`` or ``2:5``."""
    first, colon, last = text.partition(":")
    try:
        begin = int(first or "0") if colon else int(first)
        end = (int(last) if last.strip() else MAX_NUMBER) if colon else begin + 1
    except ValueError:
        begin, end = 0, 0
    if not 0 <= begin < end <= MAX_NUMBER:
        raise TraceError(f"{key} must be FIRST:LAST or an index, got {shown(text)}")
    return range(begin, end)


def _chosen(key: str, ranges: Ranges | None, known: "tuple[int, ...] | range") -> tuple[int, ...]:
    """Indices that exist and lie in ranges, each of which must have one."""
    if ranges is None:
        return tuple(known)
    for asked in ranges:
        is_open = asked.stop == MAX_NUMBER
        missing = not any(index in asked for index in known) or not (
            is_open or len(asked) == sum(index in asked for index in known)
        )
        if missing:
            text = str(asked.start) if len(asked) == 1 else f"{asked.start}:{asked.stop}"
            raise TraceError(f"{key}={text} is not all in the trace, which has {list(known)}")
    return tuple(index for index in known if any(index in asked for asked in ranges))


def _tokens(header: Header, sequence: Sequence, asked: range | None) -> range:
    """Tokens of a sequence that lie in a range."""
    if asked is None:
        return range(sequence.tokens)
    if asked.start >= sequence.tokens:
        raise TraceError(
            f"tokens={asked.start}:... begins behind sequence {sequence.index}, which has "
            f"{sequence.tokens} tokens"
        )
    if asked.start % header.query_stride:
        raise TraceError(
            f"tokens={asked.start}:... must begin at a multiple of {header.query_stride}, because "
            "the trace has every so-manieth query only"
        )
    return range(asked.start, min(asked.stop, sequence.tokens))


def _heads(header: Header, places: list[int]) -> dict[str, Tensor | None]:
    """Indices of the selected heads by kind; None where all are."""
    whole: dict[str, Tensor | None] = dict.fromkeys((*KINDS, TOKENS))
    if len(places) == len(header.kv_heads):
        return whole
    kv = torch.tensor(places)
    query = (kv[:, None] * header.group + torch.arange(header.group)).flatten()
    return whole | {kind: kv if kind in ("k", "v") else query for kind in KINDS}
