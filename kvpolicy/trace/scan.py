"""Finding the frames of a trace without its index."""

from typing import NamedTuple

from kvpolicy.errors import TraceError
from kvpolicy.trace.frames import (
    CHUNK,
    PAGE,
    PREAMBLE,
    SEQUENCE,
    Buffer,
    Chunk,
    padded,
    read_chunk,
    read_frame,
    read_preamble,
    read_sequence,
)
from kvpolicy.trace.header import Header, Sequence


class Scan(NamedTuple):
    """What a scan found.

    Attributes:
        header: The header.
        packed_header: The header as it is stored.
        sequences: Announcements of sequences, in the order of the file; they have no tokens yet.
        chunks: Chunks whose payload is there; their checksums are not compared yet.
    """

    header: Header
    packed_header: bytes
    sequences: list[Sequence]
    chunks: list[Chunk]


def scan(data: Buffer, *, is_stubborn: bool = True) -> Scan:
    """Walk from frame to frame; behind a damaged one, from page to page up to the next.

    Args:
        data: The file.
        is_stubborn: Go on behind a damaged frame, however far the next one is.

    Raises:
        TraceError: The header cannot be read, without which nothing can.
    """
    header, packed = read_preamble(data)
    found = Scan(header, packed, [], [])
    offset = padded(PREAMBLE.size + len(packed))
    while offset < len(data):
        end = _take(data, offset, found)
        if end is None and not is_stubborn:
            break
        offset = offset + PAGE if end is None else end
    return found


def _take(data: Buffer, offset: int, found: Scan) -> int | None:
    """Add the frame that starts at an offset and return its end; None if none does."""
    # Not the index, whose length nothing bounds: checking it at every page would take too long.
    frame = read_frame(data, offset, found.packed_header, (CHUNK, SEQUENCE))
    if frame is None:
        return None
    try:
        if frame.tag == SEQUENCE:
            found.sequences.append(read_sequence(frame.meta))
            return frame.end
        chunk = read_chunk(frame.meta, frame.end, found.header)
    except TraceError:
        return None
    if chunk.offset + chunk.nbytes > len(data):
        return None
    found.chunks.append(chunk)
    return chunk.end
