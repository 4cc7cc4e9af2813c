"""Reading a trace: a memory map, an index, and checksums on first touch."""

import hashlib
import zlib
from collections.abc import Callable
from dataclasses import astuple
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from kvpolicy.errors import TraceError
from kvpolicy.spec import shown
from kvpolicy.trace.contents import Contents, IndexMissingError, num_rows, read_contents
from kvpolicy.trace.frames import CHUNK, CHUNK_ROWS, PAGE, Chunk, Frame, read_chunk, read_frame
from kvpolicy.trace.header import TOKENS, Header, name_stream, require_stream, row_axis
from kvpolicy.trace.mapping import Mapping
from kvpolicy.trace.scan import scan

Advance = Callable[[int], object]


class Trace:
    """A recorded trace; open it with `Trace.open`, and use it as a context manager.

    Opening reads header and index, nothing else before it is asked for. A chunk's checksum is
    compared when the chunk is first read. Several threads may read at the same time. A file that
    is changed while it is open gives damaged data, and ends the process if it shrinks.

    Attributes:
        path: The file.
        header: What the trace says about itself.
        sequences: The sequences, each at its own index.
    """

    def __init__(self, path: Path, mapping: Mapping, contents: Contents) -> None:
        self.path, self.header, self.sequences = path, contents.header, contents.sequences
        self._contents = contents
        self._mapping: Mapping | None = mapping
        self._verified: set[int] = set()

    @classmethod
    def open(cls, path: str | Path) -> "Trace":
        """Open a trace.

        Raises:
            OSError: The file cannot be opened.
            TraceError: It is no trace, was not completed, is damaged, or is of another version;
                where chunks can be recovered, the message says how many, and how.
        """
        path = Path(path)
        mapping = Mapping(path)
        try:
            return cls(path, mapping, read_contents(mapping.data))
        except IndexMissingError as error:
            found = len(scan(mapping.data, is_stubborn=False).chunks)
            raise TraceError(
                f"{path}: {error}; {found} complete chunks can be recovered with: "
                f"kvpolicy inspect {path} --repair OUT"
            ) from error
        except TraceError as error:
            raise TraceError(f"{path}: {error}") from error

    def has(self, kind: str, layer: int | None, sequence: int = 0) -> bool:
        """Whether a kind is recorded in a layer of a sequence.

        Raises:
            TraceError: There is no such kind, layer or sequence.
        """
        return bool(self._chunks(kind, layer, sequence))

    def read(
        self,
        kind: str,
        layer: int | None,
        sequence: int = 0,
        *,
        dtype: torch.dtype | None = None,
        first: int = 0,
        last: int | None = None,
        head: int | None = None,
    ) -> Tensor:
        """Copy rows into a new tensor: [heads, rows, D], [heads, rows] of ``lse``.

        Args:
            kind: ``q``, ``k``, ``v``, ``lse``, ``out``; or ``tokens``, which gives ids [rows].
            layer: Index of the layer in the model; None for ``tokens``.
            sequence: Index of the sequence.
            dtype: Of the tensor; default as recorded.
            first: First row. A row is a token for ``k``, ``v`` and ``tokens``, every
                `query_stride`-th token for the others.
            last: Row past the last; default all there are.
            head: One head among those recorded of this kind: then [rows, D], or [rows].

        Raises:
            TraceError: It is not recorded, or damaged.
        """
        chosen = self._require_rows(kind, layer, sequence, first, last)
        num_heads = 0 if kind == TOKENS else self.header.num_heads(kind)
        if head is not None and not (type(head) is int and 0 <= head < num_heads):
            raise TraceError(f"{self.path}: {kind} has {num_heads} heads, not {shown(head)}")
        shape = self.header.shape(kind, len(chosen))
        found = torch.empty(
            shape if head is None else shape[1:],
            dtype=dtype or getattr(torch, self.header.element(kind)),
        )
        axis = row_axis(kind) if head is None else 0
        done = 0
        for view in self.views(kind, layer, sequence, first=first, last=last):
            part = view if head is None else view[head]
            found.narrow(axis, done, part.shape[axis]).copy_(part)
            done += part.shape[axis]
        return found

    def views(
        self,
        kind: str,
        layer: int | None,
        sequence: int = 0,
        *,
        first: int = 0,
        last: int | None = None,
    ) -> list[Tensor]:
        """Rows as tensors that share memory with the map, one for each chunk of 512 rows.

        They stay valid after `close`. Writing to one changes neither the file nor other traces,
        but what this trace reads from now on, until `release`.

        Args:
            kind: As for `read`.
            layer: As for `read`.
            sequence: Index of the sequence.
            first: First row.
            last: Row past the last; default all there are.

        Raises:
            TraceError: It is not recorded, or damaged.
        """
        chosen = self._require_rows(kind, layer, sequence, first, last)
        chunks = self._chunks(kind, layer, sequence)
        found: list[Tensor] = []
        for chunk in chunks[chosen.start // CHUNK_ROWS : -(-chosen.stop // CHUNK_ROWS)]:
            begin, end = max(chosen.start, chunk.start), min(chosen.stop, chunk.start + chunk.count)
            view = self._view(chunk)
            found.append(view.narrow(row_axis(kind), begin - chunk.start, end - begin))
        return found

    def verify(self, advance: Advance = lambda _: None) -> list[str]:
        """Compare every checksum; give a line on each that is wrong, none if all is well.

        Args:
            advance: Told the bytes done.
        """
        data = self._data
        found: list[str] = []
        for chunk in chain.from_iterable(self._contents.streams.values()):
            frame = read_frame(data, chunk.offset - PAGE, self._contents.packed_header)
            if frame is None or not _announces(frame, chunk, self.header):
                found.append(f"{chunk}: its frame is damaged")
            if zlib.crc32(data[chunk.offset : chunk.offset + chunk.nbytes]) != chunk.crc:
                found.append(f"{chunk}: its checksum does not match")
            advance(chunk.nbytes)
        return found

    @property
    def identity(self) -> str:
        """Tell the contents from any others: SHA-256 of header, sequences and checksums.

        Reads no numbers. They are held to their checksums when they are read.
        """
        digest = hashlib.sha256(self._contents.packed_header)
        digest.update(repr([astuple(sequence) for sequence in self.sequences]).encode())
        for stream, chunks in sorted(self._contents.streams.items(), key=str):
            digest.update(repr((stream, [(c.count, c.crc) for c in chunks])).encode())
        return digest.hexdigest()

    @property
    def num_bytes(self) -> int:
        """Bytes of the file."""
        return len(self._data)

    def payload_bytes(self, kind: str, layer: int | None, sequence: int = 0) -> int:
        """Bytes of the numbers of a kind in a layer of a sequence.

        Raises:
            TraceError: There is no such kind, layer or sequence.
        """
        return num_rows(self._chunks(kind, layer, sequence)) * self.header.row_bytes(kind)

    def release(self) -> None:
        """Give back the memory of what was read so far; what is read again comes from the file."""
        if self._mapping is not None:
            self._mapping.release()

    def close(self) -> None:
        """Let the file go, as soon as no view is left. Reading raises TraceError from now on."""
        self._mapping = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def _data(self) -> memoryview:
        if self._mapping is None:
            raise TraceError(f"{self.path}: this trace is closed")
        return self._mapping.data

    def _chunks(self, kind: str, layer: int | None, sequence: int) -> list[Chunk]:
        """The chunks of a stream that may be absent."""
        try:
            require_stream(self.header, kind, layer)
        except TraceError as error:
            raise TraceError(f"{self.path}: {error}") from None
        if type(sequence) is not int or not 0 <= sequence < len(self.sequences):
            raise TraceError(
                f"{self.path}: there is no sequence {shown(sequence)}; it has "
                f"{len(self.sequences)}, counted from 0"
            )
        return self._contents.streams.get((kind, sequence, layer), [])

    def _require_rows(
        self, kind: str, layer: int | None, sequence: int, first: int, last: int | None
    ) -> range:
        """Rows of a stream that must be there."""
        if not self._chunks(kind, layer, sequence):
            raise TraceError(f"{self.path}: {name_stream(kind, sequence, layer)} is not recorded")
        rows = self.header.num_rows(kind, self.sequences[sequence].tokens)
        last = rows if last is None else last
        if not (type(first) is type(last) is int and 0 <= first <= last <= rows):
            raise TraceError(
                f"{self.path}: {name_stream(kind, sequence, layer)} has the rows 0:{rows}, not "
                f"{shown(first)}:{shown(last)}"
            )
        return range(first, last)

    def _view(self, chunk: Chunk) -> Tensor:
        """A chunk in the map, once its checksum is known to be right."""
        data = self._data
        if chunk.offset not in self._verified:
            if zlib.crc32(data[chunk.offset : chunk.offset + chunk.nbytes]) != chunk.crc:
                raise TraceError(
                    f"{self.path}: {chunk}: its checksum does not match; what is intact can be "
                    f"recovered with: kvpolicy inspect {self.path} --repair OUT"
                )
            self._verified.add(chunk.offset)
        shape = self.header.shape(chunk.kind, chunk.count)
        dtype = getattr(torch, self.header.element(chunk.kind))
        count = chunk.nbytes // dtype.itemsize
        return torch.frombuffer(data, dtype=dtype, count=count, offset=chunk.offset).view(shape)


def _announces(frame: Frame, chunk: Chunk, header: Header) -> bool:
    """Whether a frame is the one that the index says it is."""
    try:
        return frame.tag == CHUNK and read_chunk(frame.meta, chunk.offset, header) == chunk
    except TraceError:
        return False
