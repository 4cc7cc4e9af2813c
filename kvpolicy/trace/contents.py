"""What the chunks of a trace add up to: streams without gaps, sequences without holes."""

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from kvpolicy.errors import TraceError
from kvpolicy.spec import shown
from kvpolicy.trace.frames import (
    CHUNK_ROWS,
    END,
    INDEX,
    PAGE,
    PREAMBLE,
    TRAILER,
    Buffer,
    Chunk,
    Index,
    Stream,
    padded,
    read_frame,
    read_index,
    read_preamble,
)
from kvpolicy.trace.header import REQUIRED, Header, Sequence, name_stream


class Contents(NamedTuple):
    """Everything about a trace but the numbers in it.

    Attributes:
        header: The header.
        packed_header: The header as it is stored.
        sequences: The sequences.
        streams: Their chunks, in order. A last chunk may have more rows than its sequence needs.
    """

    header: Header
    packed_header: bytes
    sequences: tuple[Sequence, ...]
    streams: Mapping[Stream, list[Chunk]]


class IndexMissingError(TraceError):
    """The header is right but there is no intact index: frames may still be found by a scan."""


def read_contents(data: Buffer) -> Contents:
    """Read header and index of a complete trace.

    Raises:
        IndexMissingError: There is no index, or a damaged one.
        TraceError: The file is no trace, of another version, or contradicts itself.
    """
    header, packed = read_preamble(data)
    begin = padded(PREAMBLE.size + len(packed))
    end, meta = _find_index(data, packed)
    index = read_index(meta, header, most=len(data) // PAGE + 1)
    return Contents(header, packed, tuple(index.sequences), _streams(header, index, begin, end))


def require_complete(
    header: Header, sequence: Sequence, rows_of: Callable[[str, int, int | None], int]
) -> None:
    """Raise unless every layer has exactly the rows of a sequence's tokens.

    Args:
        header: The trace's header.
        sequence: The sequence.
        rows_of: Rows there are of a kind, sequence and layer.

    Raises:
        TraceError: Rows are missing, or the prompt or a mark is longer than the sequence.
    """
    at, tokens = f"sequence {sequence.index}", sequence.tokens
    if tokens < 1:
        raise TraceError(f"{at} has no tokens")
    if sequence.prompt_len > tokens:
        raise TraceError(f"{at} has {tokens} tokens, {sequence.prompt_len} of them prompt")
    for name, _, last in sequence.marks:
        if last > tokens:
            raise TraceError(f"mark {shown(name)} of {at} ends behind its last token")
    for kind, layer in header.streams():
        rows, needed = rows_of(kind, sequence.index, layer), header.num_rows(kind, tokens)
        if rows != needed and (rows or kind in REQUIRED):
            raise TraceError(
                f"{name_stream(kind, sequence.index, layer)} has {rows} rows; {tokens} tokens "
                f"need {needed}"
            )


def num_rows(chunks: Iterable[Chunk]) -> int:
    """Rows of some chunks together."""
    return sum(chunk.count for chunk in chunks)


def _find_index(data: Buffer, packed_header: bytes) -> tuple[int, Buffer]:
    """Where the index frame is, and its meta."""
    if len(data) < PREAMBLE.size + TRAILER.size:
        raise IndexMissingError("truncated or never completed: it has no index at its end")
    offset, magic = TRAILER.unpack_from(data, len(data) - TRAILER.size)
    if magic != END:
        raise IndexMissingError("truncated or never completed: it has no index at its end")
    frame = None if offset % PAGE else read_frame(data, offset, packed_header)
    if frame is None or frame.tag != INDEX or frame.end + TRAILER.size != len(data):
        raise IndexMissingError("its index is damaged")
    return offset, frame.meta


def _streams(header: Header, index: Index, begin: int, end: int) -> dict[Stream, list[Chunk]]:
    """Sort an index's chunks into streams.

    Args:
        header: The trace's header.
        index: Its sequences and chunks, each one possible by itself.
        begin: Where frames start in the file.
        end: Where they end.

    Raises:
        TraceError: Chunks overlap, are missing, are there twice, lie outside, or do not add up to
            what the sequences say.
    """
    _require_apart(index.chunks, begin, end)
    streams: dict[Stream, list[Chunk]] = {}
    for chunk in sorted(index.chunks, key=lambda chunk: chunk.start):
        if chunk.sequence >= len(index.sequences):
            raise TraceError(f"{chunk}: there is no such sequence")
        found = streams.setdefault(chunk.stream, [])
        if chunk.start != len(found) * CHUNK_ROWS or (found and found[-1].count < CHUNK_ROWS):
            raise TraceError(f"{chunk}: rows before it are missing or there twice")
        found.append(chunk)
    if not index.sequences:
        raise TraceError("the trace has no sequence")
    rows = {stream: num_rows(chunks) for stream, chunks in streams.items()}
    for position, sequence in enumerate(index.sequences):
        if sequence.index != position:
            raise TraceError(f"sequence {position} is numbered {sequence.index}")
        require_complete(header, sequence, lambda *stream: rows.get(stream, 0))
    return streams


def _require_apart(chunks: Iterable[Chunk], begin: int, end: int) -> None:
    """Raise unless every payload has pages of its own, behind its frame's page."""
    for chunk in sorted(chunks, key=lambda chunk: chunk.offset):
        if chunk.offset % PAGE or chunk.offset < begin + PAGE or chunk.end > end:
            raise TraceError(f"{chunk}: lies at {chunk.offset}, where it cannot lie")
        begin = chunk.end
