"""How bytes are laid out in a trace: a header, frames in a row, an index, a trailer.

Everything starts at a multiple of the page size, so that payloads can be mapped and so that a
scan finds the frames again behind a damaged one. Loads no torch.

[ header | frame | frame | ... | index frame | trailer ]
frame = tag, length, checksum, meta, padding, and behind a chunk's meta its payload, padding
"""

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass, fields
from struct import Struct
from typing import Any, NamedTuple, TypeAlias

import msgpack

from kvpolicy.errors import TraceError
from kvpolicy.trace.header import (
    KINDS,
    MAX_ITEMS,
    MAX_TEXT,
    TOKENS,
    Header,
    Sequence,
    checked_sequence,
    name_stream,
    require_count,
)

PAGE = 4096

MAGIC = b"\x89KVT1\r\n\x1a"
"""First bytes of a trace. Line-end conversion or a seven-bit channel would destroy them."""

END = b"KVT1\x1aEND"
"""Last bytes of a complete trace."""

CHUNK_ROWS = 512
"""Rows of a chunk; the last chunk of a stream may have fewer."""

CHUNK, SEQUENCE, INDEX = b"CHNK", b"SEQN", b"INDX"

PREAMBLE = Struct("<8sII")
"""Magic, length and checksum of the header."""

HEAD = Struct("<4sII")
"""Tag, length of the meta, checksum."""

TRAILER = Struct("<Q8s")
"""Offset of the index frame, `END`."""

MAX_HEADER = 1 << 17
"""Bytes of a header: more than the most layers, heads and frequencies take."""

MAX_SEQUENCE = 1 << 16
"""Bytes of a sequence's announcement, which bounds its marks."""

MAX_RECORD = {SEQUENCE: MAX_SEQUENCE + 64, CHUNK: 96}
"""Bytes of an entry in the index: its meta, and a few more numbers."""

Buffer: TypeAlias = bytes | memoryview

Stream: TypeAlias = tuple[str, int, int | None]
"""Kind, sequence, layer."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """Some consecutive rows of one kind in one layer of one sequence.

    Attributes:
        kind: One of `KINDS`, or `TOKENS`.
        sequence: Index of the sequence.
        layer: Index of the layer in the model; None for `TOKENS`.
        start: First row.
        count: Rows.
        offset: Where the payload starts in the file.
        nbytes: Its length.
        crc: Its checksum.
    """

    kind: str
    sequence: int
    layer: int | None
    start: int
    count: int
    offset: int
    nbytes: int
    crc: int

    @property
    def stream(self) -> Stream:
        """What it is a part of."""
        return self.kind, self.sequence, self.layer

    @property
    def end(self) -> int:
        """Offset of the page behind its payload."""
        return padded(self.offset + self.nbytes)

    def __str__(self) -> str:
        """Name it in an error message."""
        stream = name_stream(self.kind, self.sequence, self.layer)
        return f"{stream}, rows {self.start}:{self.start + self.count}"


_CHUNK_ITEMS, _SEQUENCE_ITEMS = len(fields(Chunk)), len(fields(Sequence))


class Frame(NamedTuple):
    """A frame's tag and meta, and the offset of the page behind the meta."""

    tag: bytes
    meta: Buffer
    end: int


def padded(offset: int) -> int:
    """Round up to a multiple of the page size."""
    return -(-offset // PAGE) * PAGE


def pad(data: bytes) -> bytes:
    """Fill up to a multiple of the page size with zeros."""
    return data.ljust(padded(len(data)), b"\0")


# --- header -----------------------------------------------------------------------------------


def pack_header(header: Header) -> bytes:
    """The header as it is stored, without preamble."""
    return _pack(header.as_dict())


def pack_preamble(packed: bytes) -> bytes:
    """The first pages of a trace."""
    return pad(PREAMBLE.pack(MAGIC, len(packed), zlib.crc32(packed)) + packed)


def read_preamble(data: Buffer) -> tuple[Header, bytes]:
    """Read the header from the start of a file; also as it is stored.

    Raises:
        TraceError: It is no trace, damaged, of another version, or impossible.
    """
    if len(data) < PREAMBLE.size or bytes(data[: len(MAGIC)]) != MAGIC:
        raise TraceError("not a kvpolicy trace: it does not begin as one")
    _, length, crc = PREAMBLE.unpack_from(data)
    if length > min(MAX_HEADER, len(data) - PREAMBLE.size):
        raise TraceError(f"the header's length is given as {length} bytes, which it cannot have")
    packed = bytes(data[PREAMBLE.size : PREAMBLE.size + length])
    if zlib.crc32(packed) != crc:
        raise TraceError("the header is damaged: its checksum does not match")
    return Header.of(unpack(packed, "header")), packed


# --- frames -----------------------------------------------------------------------------------


def pack_frame(tag: bytes, meta: bytes, packed_header: bytes) -> bytes:
    """A frame's pages, without payload."""
    return pad(HEAD.pack(tag, len(meta), _meta_crc(tag, meta, packed_header)) + meta)


def read_frame(
    data: Buffer,
    offset: int,
    packed_header: bytes,
    tags: tuple[bytes, ...] = (CHUNK, SEQUENCE, INDEX),
) -> Frame | None:
    """The frame that starts at an offset; None if none does, or a damaged one, or another tag."""
    if not 0 <= offset <= len(data) - HEAD.size:
        return None
    tag, length, crc = HEAD.unpack_from(data, offset)
    begin = offset + HEAD.size
    if tag not in tags or length > len(data) - begin:
        return None
    if tag != INDEX and length > (MAX_SEQUENCE if tag == SEQUENCE else PAGE - HEAD.size):
        return None
    meta = data[begin : begin + length]
    if _meta_crc(tag, meta, packed_header) != crc:
        return None
    return Frame(tag, meta, padded(begin + length))


def _meta_crc(tag: bytes, meta: Buffer, packed_header: bytes) -> int:
    """Checksum over header, tag, length and meta: a frame belongs to one header only."""
    head = tag + len(meta).to_bytes(4, "little")
    return zlib.crc32(meta, zlib.crc32(head, zlib.crc32(packed_header)))


def pack_chunk(chunk: Chunk) -> bytes:
    """A chunk's meta in its frame, whose place says where the payload is."""
    kind, sequence, layer, start, count, _, nbytes, crc = astuple(chunk)
    return _pack([kind, sequence, layer, start, count, nbytes, crc])


def read_chunk(meta: Buffer, offset: int, header: Header) -> Chunk:
    """Read `pack_chunk`, for a payload at an offset.

    Raises:
        TraceError: It is malformed or contradicts the header.
    """
    found = unpack(meta, "chunk")
    if not isinstance(found, list) or len(found) != 7:
        raise TraceError("a chunk's meta must be a list of 7 items")
    return checked_chunk([*found[:5], offset, *found[5:]], header)


def checked_chunk(found: Any, header: Header) -> Chunk:
    """Read a chunk's entry in the index.

    Raises:
        TraceError: It is malformed or contradicts the header.
    """
    if not isinstance(found, list) or len(found) != _CHUNK_ITEMS:
        raise TraceError(f"a chunk must be a list of {_CHUNK_ITEMS} items")
    chunk = Chunk(*found)
    if not isinstance(chunk.kind, str) or chunk.kind not in (*KINDS, TOKENS):
        raise TraceError(f"a chunk's kind must be one of {', '.join((*KINDS, TOKENS))}")
    if chunk.kind == TOKENS:
        is_known = chunk.layer is None
    else:
        is_known = type(chunk.layer) is int and chunk.layer in header.layers
    if not is_known:
        raise TraceError(f"a chunk of {chunk.kind} is of a layer that the header does not list")
    for name in ("sequence", "start", "offset"):
        require_count(f"{name} of a chunk", getattr(chunk, name), 0)
    require_count("count of a chunk", chunk.count, 1, CHUNK_ROWS)
    require_count("checksum of a chunk", chunk.crc, 0, 0xFFFFFFFF)
    nbytes = chunk.count * header.row_bytes(chunk.kind)
    if type(chunk.nbytes) is not int or chunk.nbytes != nbytes:
        raise TraceError(f"{chunk}: must have {nbytes} bytes, is given another length")
    if chunk.start % CHUNK_ROWS:
        raise TraceError(f"{chunk}: chunks start at multiples of {CHUNK_ROWS} rows")
    return chunk


def pack_sequence(sequence: Sequence) -> bytes:
    """A sequence's announcement: all but its length, which is not known yet.

    Raises:
        TraceError: It has too many marks.
    """
    index, _, prompt_len, source, marks = astuple(sequence)
    packed = _pack([index, prompt_len, source, marks])
    if len(packed) > MAX_SEQUENCE:
        raise TraceError(
            f"{len(marks)} marks take {len(packed)} bytes, more than {MAX_SEQUENCE}; use fewer or "
            "shorter names"
        )
    return packed


def read_sequence(meta: Buffer) -> Sequence:
    """Read `pack_sequence`; the sequence has no tokens yet.

    Raises:
        TraceError: It is malformed.
    """
    found = unpack(meta, "sequence")
    if not isinstance(found, list) or len(found) != 4:
        raise TraceError("a sequence's announcement must be a list of 4 items")
    index, prompt_len, source, marks = found
    return checked_sequence(Sequence(index, 0, prompt_len, source, marks))


# --- index ------------------------------------------------------------------------------------


class Index(NamedTuple):
    """What a trace holds and where."""

    sequences: list[Sequence]
    chunks: list[Chunk]


def pack_index(index: Index) -> bytes:
    """The index: msgpack objects one after the other, their numbers first."""
    records = [astuple(record) for record in (*index.sequences, *index.chunks)]
    return b"".join(map(_pack, [(len(index.sequences), len(index.chunks)), *records]))


def read_index(meta: Buffer, header: Header, *, most: int) -> Index:
    """Read `pack_index`.

    Args:
        meta: The index.
        header: The trace's header.
        most: Sequences and chunks for which the file is large enough.

    Raises:
        TraceError: It is malformed or contradicts the header.
    """
    records = _records(meta)
    counts = unpack(next(records, b""), "index")
    if not isinstance(counts, list) or len(counts) != 2:
        raise TraceError("the index must begin with two counts")
    num_sequences, num_chunks = (require_count("count in the index", n, 0, most) for n in counts)
    found = Index([], [])
    for record in records:
        is_sequence = len(found.sequences) < num_sequences
        if len(record) > MAX_RECORD[SEQUENCE if is_sequence else CHUNK]:
            raise TraceError(f"the index has an entry of {len(record)} bytes")
        entry = unpack(record, "index", is_whole=True)
        if is_sequence:
            if not isinstance(entry, list) or len(entry) != _SEQUENCE_ITEMS:
                raise TraceError(f"a sequence must be a list of {_SEQUENCE_ITEMS} items")
            found.sequences.append(checked_sequence(Sequence(*entry)))
        elif len(found.chunks) < num_chunks:
            found.chunks.append(checked_chunk(entry, header))
        else:
            raise TraceError("the index has more entries than it says")
    if (len(found.sequences), len(found.chunks)) != (num_sequences, num_chunks):
        raise TraceError("the index has fewer entries than it says")
    return found


def _records(meta: Buffer) -> Iterator[Buffer]:
    """Cut an index into its entries without unpacking them: their lengths come first.

    Raises:
        TraceError: The last is not complete.
    """
    unpacker = msgpack.Unpacker(max_buffer_size=max(len(meta), 1))
    unpacker.feed(meta)
    begin = 0
    while begin < len(meta):
        with _refusals("index"):
            unpacker.skip()
        yield meta[begin : unpacker.tell()]
        begin = unpacker.tell()


def pack_trailer(index_offset: int) -> bytes:
    """The last bytes of a trace."""
    return TRAILER.pack(index_offset, END)


# --- msgpack ----------------------------------------------------------------------------------


def _pack(record: Any) -> bytes:
    packed = msgpack.packb(record)
    assert packed is not None
    return packed


def unpack(data: Buffer, what: str, *, is_whole: bool = False) -> Any:
    """Unpack one msgpack object and nothing behind it.

    Args:
        data: The object.
        what: What it is a part of.
        is_whole: Whether all that it says it holds is known to be there.

    Raises:
        TraceError: It is not complete, or contains what traces do not contain.
    """
    with _refusals(what):
        if not is_whole:
            # Unpacking reserves memory for what an array says that it holds: skip over it first.
            unpacker = msgpack.Unpacker(max_buffer_size=max(len(data), 1))
            unpacker.feed(data)
            unpacker.skip()
        return msgpack.unpackb(
            data,
            raw=False,
            strict_map_key=True,
            max_str_len=MAX_TEXT,
            max_bin_len=0,
            max_array_len=MAX_ITEMS,
            max_map_len=64,
            max_ext_len=0,
        )


@contextmanager
def _refusals(what: str) -> Iterator[None]:
    """Say which part of a file msgpack refuses."""
    try:
        yield
    except (ValueError, msgpack.UnpackException) as error:
        reason = str(error) or type(error).__name__
        raise TraceError(f"the {what} is not the msgpack that belongs there: {reason}") from error
