"""A reader and a builder of traces, written from docs/reference/trace-format.md alone.

They share no code with the package. The reader trusts its file; the builder writes what it is
told, however wrong, with checksums that are right.
"""

import struct
import zlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import msgpack
import numpy as np

PAGE = 4096
MAGIC = bytes.fromhex("894b5654310d0a1a")
END = bytes.fromhex("4b5654311a454e44")

# bfloat16 has no type in numpy: its bits are read as they are.
TYPES = {"float32": "<f4", "float16": "<f2", "bfloat16": "<u2", "uint32": "<u4"}

Stream = tuple[str, int, int | None]
"""Kind, sequence, layer."""


@dataclass
class Plain:
    """What a trace says: header and sequences as msgpack has them, an array for each stream."""

    header: dict[str, Any]
    sequences: list[list[Any]]
    arrays: dict[Stream, np.ndarray]


def read(data: bytes) -> Plain:
    """Read a complete and intact trace."""
    magic, length, crc = struct.unpack_from("<8sII", data)
    packed = data[16 : 16 + length]
    assert magic == MAGIC
    assert zlib.crc32(packed) == crc
    header = msgpack.unpackb(packed)
    assert header["version"] == 1
    offset, end = struct.unpack("<Q8s", data[-16:])
    assert end == END
    tag, length, crc = struct.unpack_from("<4sII", data, offset)
    meta = data[offset + 12 : offset + 12 + length]
    assert tag == b"INDX"
    assert zlib.crc32(packed + tag + struct.pack("<I", length) + meta) == crc
    unpacker = msgpack.Unpacker(max_buffer_size=len(meta))
    unpacker.feed(meta)
    num_sequences, num_chunks = unpacker.unpack()
    sequences = [unpacker.unpack() for _ in range(num_sequences)]
    parts: dict[Stream, dict[int, np.ndarray]] = defaultdict(dict)
    for _ in range(num_chunks):
        kind, sequence, layer, start, count, offset, nbytes, crc = unpacker.unpack()
        payload = data[offset : offset + nbytes]
        assert zlib.crc32(payload) == crc
        shape, dtype = shape_of(header, kind, count)
        rows = np.frombuffer(payload, TYPES[dtype]).reshape(shape)
        parts[kind, sequence, layer][start] = rows
    arrays: dict[Stream, np.ndarray] = {}
    for stream, found in parts.items():
        axis = 0 if stream[0] == "tokens" else 1
        arrays[stream] = np.concatenate([rows for _, rows in sorted(found.items())], axis=axis)
    return Plain(header, sequences, arrays)


def as_plain(header: Any) -> dict[str, Any]:
    """A header object's attributes as msgpack gives them back."""
    found = asdict(header)
    rope = found["rope"]
    if rope is not None:
        rope["inverse_frequencies"] = list(rope["inverse_frequencies"])
    return {key: list(x) if isinstance(x, tuple) else x for key, x in found.items()}


def shape_of(header: dict[str, Any], kind: str, rows: int) -> tuple[tuple[int, ...], str]:
    """Shape and type of some rows of a kind."""
    kv_heads = len(header["kv_heads"])
    heads = kv_heads * (header["num_query_heads"] // header["num_kv_heads"])
    return {
        "q": ((heads, rows, header["head_dim"]), header["dtype"]),
        "k": ((kv_heads, rows, header["head_dim"]), header["dtype"]),
        "v": ((kv_heads, rows, header["value_dim"]), header["dtype"]),
        "lse": ((heads, rows), "float32"),
        "out": ((heads, rows, header["value_dim"]), header["dtype"]),
        "tokens": ((rows,), "uint32"),
    }[kind]


@dataclass
class Frame:
    """A frame to build: its tag, its meta, and a chunk's payload."""

    tag: bytes
    meta: bytes
    payload: bytes | None = None


@dataclass
class Draft:
    """A trace in pieces that can be changed one by one.

    Attributes:
        header: Msgpack of the header.
        frames: Frames before the index.
        index: Objects of the index, or what is already packed.
        offset: Where the trailer says that the index is; None for where it is.
    """

    header: bytes
    frames: list[Frame]
    index: list[Any] = field(default_factory=list)
    offset: int | None = None

    @property
    def index_offset(self) -> int:
        """Where the index begins."""
        return len(self._frames())

    def build(self) -> bytes:
        """Put the pieces together, with right checksums."""
        data = self._frames()
        index = b"".join(x if isinstance(x, bytes) else msgpack.packb(x) for x in self.index)
        offset = len(data) if self.offset is None else self.offset
        return data + self.frame(Frame(b"INDX", index)) + struct.pack("<Q", offset) + END

    def _frames(self) -> bytes:
        """Everything before the index."""
        data = struct.pack("<8sII", MAGIC, len(self.header), zlib.crc32(self.header)) + self.header
        return padded(data) + b"".join(map(self.frame, self.frames))

    def frame(self, frame: Frame) -> bytes:
        """A frame's bytes, padded, with its payload."""
        length = struct.pack("<I", len(frame.meta))
        crc = zlib.crc32(self.header + frame.tag + length + frame.meta)
        data = padded(frame.tag + length + struct.pack("<I", crc) + frame.meta)
        return data if frame.payload is None else data + padded(frame.payload)

    def copy(self) -> "Draft":
        """The same pieces, to be changed independently."""
        frames = [replace(frame) for frame in self.frames]
        index = [list(x) if isinstance(x, list) else x for x in self.index]
        return Draft(self.header, frames, index, self.offset)


def take_apart(data: bytes) -> Draft:
    """The pieces of a complete trace."""
    _, length, _ = struct.unpack_from("<8sII", data)
    draft = Draft(data[16 : 16 + length], [])
    (end,) = struct.unpack_from("<Q", data, len(data) - 16)
    at = -(-(16 + length) // PAGE) * PAGE
    while at <= end:
        tag, length, _ = struct.unpack_from("<4sII", data, at)
        meta = data[at + 12 : at + 12 + length]
        at += -(-(12 + length) // PAGE) * PAGE
        if tag == b"INDX":
            unpacker = msgpack.Unpacker(max_buffer_size=len(meta))
            unpacker.feed(meta)
            draft.index = list(unpacker)
            break
        payload = None
        if tag == b"CHNK":
            nbytes = msgpack.unpackb(meta)[5]
            payload = data[at : at + nbytes]
            at += -(-nbytes // PAGE) * PAGE
        draft.frames.append(Frame(tag, meta, payload))
    return draft


def padded(data: bytes) -> bytes:
    """Fill up to a page."""
    return data + bytes(-len(data) % PAGE)


def hexdump(data: bytes) -> Sequence[str]:
    """Lines of a hex dump; `*` stands for lines of zeros."""
    lines: list[str] = []
    for at in range(0, len(data), 16):
        row = data[at : at + 16]
        if any(row):
            text = "".join(chr(byte) if 32 <= byte < 127 else "." for byte in row)
            lines.append(f"{at:08x}  {row.hex(' ')}  |{text}|")
        elif lines[-1] != "*":
            lines.append("*")
    return lines
