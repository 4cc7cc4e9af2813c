"""Writing a trace: append rows in any portions, in the background, with bounded memory."""

import os
import threading
import zlib
from collections import defaultdict
from collections.abc import Iterable
from collections.abc import Sequence as Ordered
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from kvpolicy.errors import TraceError
from kvpolicy.spec import shown
from kvpolicy.trace.contents import require_complete
from kvpolicy.trace.disk import Disk, beside
from kvpolicy.trace.frames import (
    CHUNK,
    CHUNK_ROWS,
    INDEX,
    PAGE,
    SEQUENCE,
    Chunk,
    Index,
    Stream,
    pack_chunk,
    pack_frame,
    pack_header,
    pack_index,
    pack_preamble,
    pack_sequence,
    pack_trailer,
    padded,
)
from kvpolicy.trace.header import (
    MAX_NUMBER,
    Header,
    Mark,
    Sequence,
    checked_sequence,
    name_stream,
    require_stream,
    row_axis,
)

SUFFIX = ".part"
"""What a trace's name ends with before it is complete."""

QUEUE_BYTES = 64 << 20
"""Bytes of complete chunks that wait for the disk before `append` waits for it."""


class TraceWriter:
    """Writes a trace; use it as a context manager.

    Rows go to ``PATH.part``, a chunk as soon as it is complete. `close` adds the index, syncs and
    renames to PATH, which until then stays as it was. If the process dies, or the block is left
    by an exception, ``PATH.part`` stays and ``kvpolicy inspect PATH.part --repair OUT`` recovers
    its complete chunks; if it has none, it is removed.

    Memory: the chunk being filled of every stream (kind, sequence, layer), and `queue_bytes`.
    All calls of `append` come from one thread.

    Args:
        path: Where the trace goes.
        header: What it says about itself.
        queue_bytes: Bytes that wait for the disk before `append` waits for it.
        part: Where rows go until the trace is complete; default ``PATH.part``.

    Raises:
        OSError: The file cannot be created.
        TraceError: Somebody else is writing this trace.
    """

    def __init__(
        self,
        path: str | Path,
        header: Header,
        *,
        queue_bytes: int = QUEUE_BYTES,
        part: Path | None = None,
    ) -> None:
        self.path, self.header = Path(path), header
        self._packed_header = pack_header(header)
        self._sequences: list[Sequence] = []
        self._open: dict[int, dict[tuple[str, int | None], _Filling]] = {}
        self._chunks: list[Chunk] = []
        self._spare: dict[str, list[Tensor]] = defaultdict(list)
        self._thread: tuple[int, int] | None = None
        self._has_chunks = False
        self._disk = Disk(self.path, part or beside(self.path, SUFFIX), queue_bytes)
        preamble = pack_preamble(self._packed_header)
        self._end = len(preamble)
        self._disk.put(lambda: [preamble], len(preamble))

    def begin(self, *, prompt_len: int, source: str = "", marks: Iterable[Mark] = ()) -> int:
        """Announce a sequence and return its index. Several may be open at the same time.

        Args:
            prompt_len: Tokens of the prompt; counts up to the sequence's end if that is shorter.
            source: Where it comes from.
            marks: Named half-open spans of positions; what lies behind the end is cut off.

        Raises:
            TraceError: An argument is impossible, the writer is closed, or the disk failed.
        """
        self._require_open()
        index = len(self._sequences)
        sequence = checked_sequence(Sequence(index, 0, prompt_len, source, tuple(marks)))
        frame = pack_frame(SEQUENCE, pack_sequence(sequence), self._packed_header)
        self._disk.put(lambda: [frame], len(frame))
        self._end += len(frame)
        self._sequences.append(sequence)
        self._open[index] = {}
        return index

    def append(self, sequence: int, layer: int | None, kind: str, start: int, rows: Tensor) -> None:
        """Add the next rows of a stream; they are copied, and may be on any device.

        Args:
            sequence: Index of the sequence.
            layer: Index of the layer in the model; None for ``tokens``.
            kind: ``q``, ``k``, ``v``, ``lse``, ``out``, or ``tokens``.
            start: Row of the first of them, which is the number of rows appended before. A row
                is a token for ``k``, ``v`` and ``tokens``, every `query_stride`-th token for the
                others.
            rows: [heads, rows, D] in the header's dtype; [heads, rows] float32 of ``lse``; [rows]
                uint32 of ``tokens``, the ids. Query heads are those of the first recorded KV
                head, then of the next.

        Raises:
            TraceError: Rows are of another shape or dtype, out of order, of a stream that this
                trace does not have; the writer is closed; or the disk failed. Nothing was added.
        """
        self._require_open()
        self._require_one_thread()
        filling = self._checked(sequence, layer, kind, start, rows)
        self._open[sequence][kind, layer] = filling
        axis = row_axis(kind)
        done, count = 0, rows.shape[axis]
        while done < count:
            if filling.buffer is None:
                filling.buffer = self._buffer(kind)
            at = filling.rows % CHUNK_ROWS
            size = min(CHUNK_ROWS - at, count - done)
            filling.buffer.narrow(axis, at, size).copy_(rows.detach().narrow(axis, done, size))
            filling.rows += size
            done += size
            if filling.rows % CHUNK_ROWS == 0:
                self._put((kind, sequence, layer), filling)

    def end(self, sequence: int) -> None:
        """Say that a sequence gets no more rows, which frees the memory of its last chunks.

        Raises:
            TraceError: The sequence is incomplete or unknown, or the disk failed.
        """
        self._require_open()
        self._require_begun(sequence)
        fillings = self._open.get(sequence)
        if fillings is None:
            return
        rows = {stream: filling.rows for stream, filling in fillings.items()}
        tokens = rows.get(("k", self.header.layers[0]), 0)
        ended = self._sequences[sequence].cut(0, tokens, sequence)
        require_complete(self.header, ended, lambda kind, _, layer: rows.get((kind, layer), 0))
        for (kind, layer), filling in fillings.items():
            if filling.buffer is not None:
                self._put((kind, sequence, layer), filling)
        self._sequences[sequence] = ended
        del self._open[sequence]

    def close(self) -> Path:
        """Complete the trace and return its path. Closing it again does nothing.

        Raises:
            TraceError: A sequence is incomplete, there is none, or the disk failed. PATH is as it
                was.
        """
        if self._disk.is_done:
            return self.path
        self._disk.raise_fault()
        if not self._sequences:
            raise TraceError(f"{self.path}: nothing was recorded; call begin and append")
        for sequence in list(self._open):
            self.end(sequence)
        self._disk.put(self._index, 0)
        self._disk.finish()
        return self.path

    def discard(self) -> None:
        """Give up: remove what was written. PATH is as it was; no effect after `close`."""
        self._disk.abandon(keep=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                self.close()
        finally:
            self._disk.abandon(keep=self._has_chunks)

    def _checked(
        self, sequence: int, layer: int | None, kind: str, start: int, rows: Tensor
    ) -> "_Filling":
        """The stream that some rows belong to, if they fit."""
        self._require_begun(sequence)
        if sequence not in self._open:
            raise TraceError(f"sequence {sequence} has ended")
        require_stream(self.header, kind, layer)
        what = name_stream(kind, sequence, layer)
        if not isinstance(rows, Tensor):
            raise TraceError(f"{what} must be a tensor, got {type(rows).__name__}")
        shape, dtype = tuple(rows.shape), getattr(torch, self.header.element(kind))
        axis = row_axis(kind)
        count = rows.shape[axis] if rows.dim() > axis else 0
        expected = self.header.shape(kind, count)
        if shape != expected:
            sizes = ("rows" if i == axis else str(size) for i, size in enumerate(expected))
            raise TraceError(f"{what} must have shape [{', '.join(sizes)}], got {list(shape)}")
        if rows.dtype != dtype:
            raise TraceError(f"{what} must be {dtype}, got {rows.dtype}")
        filling = self._open[sequence].get((kind, layer)) or _Filling()
        if type(start) is not int or start != filling.rows:
            raise TraceError(
                f"{what} has {filling.rows} rows, so that the next ones start at "
                f"{filling.rows}, got start={shown(start)}"
            )
        if start + count > MAX_NUMBER:
            raise TraceError(f"{what} would have more than {MAX_NUMBER} rows")
        return filling

    def _require_open(self) -> None:
        if self._disk.is_done:
            raise TraceError(f"{self.path}: this writer is closed")
        self._disk.raise_fault()

    def _require_begun(self, sequence: int) -> None:
        if type(sequence) is not int or not 0 <= sequence < len(self._sequences):
            raise TraceError(f"sequence {shown(sequence)} was not begun")

    def _require_one_thread(self) -> None:
        """Two threads in `append` would interleave their rows."""
        thread = (os.getpid(), threading.get_ident())
        if self._thread not in (None, thread):
            raise TraceError(
                f"{self.path}: append is called from a second thread or process; use one only"
            )
        self._thread = thread

    def _buffer(self, kind: str) -> Tensor:
        """Room for a chunk: memory that the disk is through with, if there is some."""
        spare = self._spare[kind]
        if spare:
            return spare.pop()
        dtype = getattr(torch, self.header.element(kind))
        return torch.empty(self.header.shape(kind, CHUNK_ROWS), dtype=dtype)

    def _put(self, stream: Stream, filling: "_Filling") -> None:
        """Hand a stream's chunk to the disk."""
        kind, sequence, layer = stream
        buffer, filling.buffer = filling.buffer, None
        assert buffer is not None
        count = filling.rows % CHUNK_ROWS or CHUNK_ROWS
        start, nbytes = filling.rows - count, count * self.header.row_bytes(kind)
        offset = self._end + PAGE
        self._end = offset + padded(nbytes)

        def frame() -> Ordered[bytes | memoryview]:
            whole = buffer.narrow(row_axis(kind), 0, count).contiguous()
            data = whole.view(torch.uint8).numpy().data.cast("B")
            chunk = Chunk(kind, sequence, layer, start, count, offset, nbytes, zlib.crc32(data))
            head = pack_frame(CHUNK, pack_chunk(chunk), self._packed_header)
            self._chunks.append(chunk)
            return head, data, bytes(padded(nbytes) - nbytes)

        self._has_chunks = True
        self._disk.put(frame, self._end - offset, lambda: self._spare[kind].append(buffer))

    def _index(self) -> Ordered[bytes]:
        """The index frame and the trailer, once all chunks are written."""
        packed = pack_index(Index(self._sequences, self._chunks))
        frame = pack_frame(INDEX, packed, self._packed_header)
        return frame, pack_trailer(self._end)


@dataclass
class _Filling:
    """A stream that is being written.

    Attributes:
        rows: Rows so far.
        buffer: The chunk being filled; None at the start of one.
    """

    rows: int = 0
    buffer: Tensor | None = None
