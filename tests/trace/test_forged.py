"""Forgeries, one at a time: every rule of the format is checked, also with right checksums."""

import math
import re
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgpack
import pytest

from fixtures.small_traces import random_streams, read_streams, small_header, write_streams
from kvpolicy import TraceError
from kvpolicy.trace import Trace
from kvpolicy.trace.frames import read_frame
from oracles.trace_format import END, PAGE, Draft, take_apart

HEADER = small_header(dtype="bfloat16", query_stride=2, layers=(1,), head_dim=4)
KINDS = ("q", "k", "v", "lse", "tokens")


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A trace of sequences of 515 and 3 tokens."""
    path = tmp_path_factory.mktemp("original") / "t.kvtrace"
    streams = random_streams(HEADER, (515, 3), KINDS)
    return write_streams(path, HEADER, streams, marks=[("a", 0, 2)]).read_bytes()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where forged traces go."""
    return tmp_path / "t.kvtrace"


def read_all(path: Path) -> None:
    """Open a trace and read all of it.

    Raises:
        TraceError: It is refused.
    """
    with Trace.open(path) as trace:
        read_streams(trace)


def entry(draft: Draft, kind: str, sequence: int = 0, start: int = 0) -> list[Any]:
    """A chunk's entry in the index."""
    return next(x for x in draft.index if x[:2] == [kind, sequence] and x[3:4] == [start])


def sequence_entry(draft: Draft, index: int = 0) -> list[Any]:
    """A sequence's entry in the index."""
    return draft.index[1 + index]


def move(draft: Draft, distance: int) -> None:
    """Say that a payload lies elsewhere."""
    entry(draft, "k")[5] += distance


def overlap(draft: Draft, distance: int) -> None:
    """Put a payload at another one's place, or next to it."""
    entry(draft, "k")[5] = entry(draft, "v")[5] + distance


def set_chunk(draft: Draft, place: int, value: Any) -> None:
    """Change an item of a chunk's entry."""
    entry(draft, "k", start=512)[place] = value


def set_sequence(draft: Draft, place: int, value: Any) -> None:
    """Change an item of a sequence's entry."""
    sequence_entry(draft)[place] = value


def drop(draft: Draft, *chunks: tuple[str, int, int]) -> None:
    """Take chunks out of the index."""
    for chunk in chunks:
        draft.index.remove(entry(draft, *chunk))
    draft.index[0][1] -= len(chunks)


def repeat(draft: Draft) -> None:
    """Name a chunk twice."""
    draft.index.append(entry(draft, "k"))
    draft.index[0][1] += 1


def no_sequences(draft: Draft) -> None:
    """An index of nothing."""
    draft.index = [[0, 0]]


def shorten(draft: Draft) -> None:
    """A chunk in the middle with fewer rows, the following one where it should be."""
    chunk = entry(draft, "k")
    chunk[4], chunk[6] = 511, 511 * 16


FORGED_INDEX: list[tuple[Callable[[Draft], object], str]] = [
    (lambda x: move(x, 1), "where it cannot lie"),
    (lambda x: move(x, 2048), "where it cannot lie"),
    (lambda x: set_chunk(x, 5, entry(x, "k", start=512)[5] + 1), "where it cannot lie"),
    (lambda x: move(x, 1 << 40), "where it cannot lie"),
    (lambda x: overlap(x, 0), "where it cannot lie"),
    (lambda x: overlap(x, PAGE), "where it cannot lie"),
    (lambda x: overlap(x, -PAGE), "where it cannot lie"),
    (lambda x: set_chunk(x, 5, 0), "where it cannot lie"),
    (lambda x: set_chunk(x, 5, PAGE), "where it cannot lie"),
    (lambda x: set_chunk(x, 5, x.index_offset), "where it cannot lie"),
    (lambda x: set_chunk(x, 5, -PAGE), "offset of a chunk must be an integer from 0"),
    (lambda x: set_chunk(x, 5, 12288.0), "offset of a chunk must be"),
    (lambda x: set_chunk(x, 0, "x"), "kind must be one of q, k, v, lse, out, tokens"),
    (lambda x: set_chunk(x, 0, ["k"]), "kind must be one of"),
    (lambda x: set_chunk(x, 0, "tokens"), "of a layer that the header does not list"),
    (lambda x: set_chunk(x, 1, 2), "there is no such sequence"),
    (lambda x: set_chunk(x, 1, True), "sequence of a chunk must be an integer"),
    (lambda x: set_chunk(x, 2, 0), "of a layer that the header does not list"),
    (lambda x: set_chunk(x, 2, None), "of a layer that the header does not list"),
    (lambda x: set_chunk(x, 2, 1.0), "of a layer that the header does not list"),
    (lambda x: set_chunk(x, 3, 511), "chunks start at multiples of 512"),
    (lambda x: set_chunk(x, 3, 1024), "rows before it are missing or there twice"),
    (lambda x: set_chunk(x, 3, 0), "rows before it are missing or there twice"),
    (lambda x: set_chunk(x, 4, 0), "count of a chunk must be an integer from 1 to 512, got 0"),
    (lambda x: set_chunk(x, 4, 513), "count of a chunk must be"),
    (lambda x: set_chunk(x, 4, 4), "must have 64 bytes, is given another length"),
    (lambda x: set_chunk(x, 6, 47), "must have 48 bytes, is given another length"),
    (lambda x: set_chunk(x, 6, 48.0), "is given another length"),
    (lambda x: set_chunk(x, 7, -1), "checksum of a chunk must be an integer from 0"),
    (lambda x: set_chunk(x, 7, 1 << 32), "checksum of a chunk must be"),
    (lambda x: set_chunk(x, 7, 0), "its checksum does not match"),
    (lambda x: entry(x, "k", start=512).append(0), "a chunk must be a list of 8 items"),
    (lambda x: entry(x, "k", start=512).clear(), "a chunk must be a list of 8 items"),
    (shorten, "rows before it are missing or there twice"),
    (repeat, "where it cannot lie"),
    (lambda x: drop(x, ("k", 0, 0)), "rows before it are missing"),
    (lambda x: drop(x, ("k", 0, 512)), "k of layer 1, sequence 0 has 512 rows; 515 tokens"),
    (lambda x: drop(x, ("q", 1, 0)), "q of layer 1, sequence 1 has 0 rows; 3 tokens"),
    (lambda x: drop(x, ("tokens", 0, 512)), "tokens of sequence 0 has 512 rows; 515 tokens"),
    (no_sequences, "the trace has no sequence"),
    (lambda x: set_sequence(x, 0, 1), "sequence 0 is numbered 1"),
    (
        lambda x: set_sequence(x, 1, 514),
        "sequence 0 has 258 rows; 514 tokens need 257",
    ),
    (lambda x: set_sequence(x, 1, 0), "sequence 0 has no tokens"),
    (lambda x: set_sequence(x, 1, 1 << 48), "rows; 281474976710656 tokens"),
    (lambda x: set_sequence(x, 2, 516), "sequence 0 has 515 tokens, 516 of them prompt"),
    (lambda x: set_sequence(x, 3, None), "source must be text"),
    (lambda x: set_sequence(x, 4, [["a", 0, 516]]), "mark 'a' of sequence 0 ends behind"),
    (lambda x: set_sequence(x, 4, [["a", 2, 2]]), "mark must be"),
    (lambda x: set_sequence(x, 4, [["a" * 4000, 0, 1]] * 20), "the index has an entry of"),
    (lambda x: sequence_entry(x).append(0), "a sequence must be a list of 5 items"),
    (lambda x: x.index.append([0]), "the index has more entries than it says"),
    (lambda x: x.index.pop(), "the index has fewer entries than it says"),
    (lambda x: x.index[0].append(0), "the index must begin with two counts"),
    (lambda x: x.index.clear(), "not the msgpack that belongs there"),
    (lambda x: x.index.append(b"\xc1"), "not the msgpack that belongs there"),
    (lambda x: set_sequence(x, 3, b"bytes"), "not the msgpack that belongs there"),
    (lambda x: set_sequence(x, 3, msgpack.ExtType(1, b"x")), "not the msgpack that belongs there"),
    (lambda x: set_sequence(x, 3, {1: 2}), "not the msgpack that belongs there"),
]


@pytest.mark.parametrize(("forge", "message"), FORGED_INDEX)
def test_a_forged_index_is_refused(
    forge: Callable[[Draft], object],
    message: str,
    path: Path,
    original: bytes,
) -> None:
    """Every rule of the index is checked, and the error says which one was broken."""
    draft = take_apart(original)
    forge(draft)
    path.write_bytes(draft.build())
    with pytest.raises(TraceError, match=re.escape(message)):
        read_all(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head_dim": 5}, "must have"),
        ({"dtype": "float32"}, "must have"),
        ({"dtype": "int8"}, "dtype must be"),
        ({"scale": math.nan}, "scale must be"),
        ({"scale": -math.inf}, "scale must be"),
        ({"layers": [1, 1]}, "layers must be"),
        ({"layers": [0, 1]}, "q of layer 0, sequence 0 has 0 rows"),
        ({"layers": [2]}, "of a layer that the header does not list"),
        ({"layers": list(range(5000))}, "not the msgpack that belongs there"),
        ({"kv_heads": [0]}, "must have"),
        ({"kv_heads": None}, "kv_heads must be"),
        ({"query_stride": 1}, "q of layer 1, sequence 0 has 258 rows; 515 tokens"),
        ({"query_stride": 0}, "query_stride must be"),
        ({"num_query_heads": 1 << 16}, "must have"),
        ({"model": 7}, "model must be text"),
        ({"model": "x" * 5000}, "not the msgpack that belongs there"),
        ({"rope": []}, "rope must be a map"),
        ({"rope": {"kind": "default"}}, "the rope lacks inverse_frequencies"),
        ({"rope": {"kind": "x", "inverse_frequencies": [math.inf]}}, "rope.inverse_frequencies"),
        ({"rope": {"kind": "x", "inverse_frequencies": [1.0] * 3}}, "more than head_dim 4"),
        ({"rope": {"kind": "x", "inverse_frequencies": [1], "interleaved": 1}}, "true or false"),
    ],
)
def test_a_forged_header_is_refused(
    changes: dict[str, Any], message: str, path: Path, original: bytes
) -> None:
    """The header is checked, and then the index against it."""
    draft = take_apart(original)
    draft.header = msgpack.packb({**msgpack.unpackb(draft.header), **changes})
    path.write_bytes(draft.build())
    with pytest.raises(TraceError, match=re.escape(message)):
        read_all(path)


@pytest.mark.parametrize("tail", [b"\0", bytes(PAGE), bytes(PAGE - 16) + b"KVT1"])
def test_what_stands_behind_the_end_is_refused(tail: bytes, path: Path, original: bytes) -> None:
    """The trailer ends the file, and the index ends right before it."""
    data = original
    for broken in (data + tail, data[:-16] + tail + data[-16:]):
        path.write_bytes(broken)
        with pytest.raises(TraceError, match=r"its index is damaged|truncated or never"):
            Trace.open(path)


def test_a_trailer_between_pages_is_refused(path: Path, original: bytes) -> None:
    """The index begins at a page."""
    data = original
    (offset,) = struct.unpack_from("<Q", data, len(data) - 16)
    broken = data[:offset] + bytes(64) + data[offset:-80] + struct.pack("<Q", offset + 64) + END
    assert len(broken) == len(data)
    path.write_bytes(broken)
    with pytest.raises(TraceError, match="its index is damaged"):
        Trace.open(path)


def test_a_frame_longer_than_the_file_is_none() -> None:
    """A length that reaches behind the end is refused, also if a checksum fits to what is there."""
    header, meta = b"header", b"meta"
    crc = zlib.crc32(header + b"SEQN" + struct.pack("<I", len(meta)) + meta)
    for length, is_frame in ((len(meta), True), (len(meta) + 1, False), ((1 << 32) - 1, False)):
        data = b"SEQN" + struct.pack("<II", length, crc) + meta
        assert (read_frame(data, 0, header) is not None) == is_frame
