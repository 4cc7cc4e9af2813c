"""Reading traces: without copying, checked on first touch, and refused where it must be."""

import os
import re
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import kvpolicy.trace.reader
from fixtures.small_traces import (
    Stream,
    equal_bits,
    random_streams,
    read_streams,
    same,
    small_header,
    write_streams,
)
from kvpolicy import TraceError
from kvpolicy.trace import Trace
from kvpolicy.trace.frames import PAGE

HEADER = small_header(query_stride=2, dtype="bfloat16")
LENGTHS = (1100, 40)


@pytest.fixture(scope="module")
def streams() -> dict[Stream, Tensor]:
    """What the trace holds."""
    return random_streams(HEADER, LENGTHS)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory, streams: dict[Stream, Tensor]) -> Path:
    """A trace of two sequences with all kinds."""
    return write_streams(tmp_path_factory.mktemp("traces") / "t.kvtrace", HEADER, streams)


def damaged(path: Path, target: Path, *places: int) -> Path:
    """A copy with one bit flipped at each place."""
    data = bytearray(path.read_bytes())
    for place in places:
        data[place] ^= 1
    target.write_bytes(data)
    return target


def chunk_of(path: Path, kind: str, layer: int | None, number: int = 0) -> Any:
    """Where a chunk of the first sequence is."""
    with Trace.open(path) as trace:
        return trace._contents.streams[kind, 0, layer][number]


# --- views and copies -------------------------------------------------------------------------


def test_views_share_the_map(path: Path, streams: dict[Stream, Tensor]) -> None:
    """A view is the file's memory: at the same address each time, one for every 512 rows."""
    with Trace.open(path) as trace:
        views = trace.views("k", 2)
        assert [view.shape[1] for view in views] == [512, 512, 76]
        again = trace.views("k", 2)
        assert [x.data_ptr() for x in views] == [x.data_ptr() for x in again]
        offsets = [chunk_of(path, "k", 2, number).offset for number in range(3)]
        assert len({view.data_ptr() - at for view, at in zip(views, offsets, strict=True)}) == 1
        assert all(view.data_ptr() % PAGE == 0 for view in views)
        assert equal_bits(torch.cat(views, dim=1), streams["k", 0, 2])


def test_views_outlive_the_trace(path: Path, streams: dict[Stream, Tensor]) -> None:
    """The map stays as long as a view does, although the trace is closed and gone."""
    with Trace.open(path) as trace:
        (view,) = trace.views("v", 0, 1)
    with pytest.raises(TraceError, match="this trace is closed"):
        trace.read("v", 0, 1)
    del trace
    assert equal_bits(view, streams["v", 1, 0])


def test_writing_to_a_view_does_not_reach_the_file(path: Path) -> None:
    """A careless in-place operation changes neither the file nor crashes the process."""
    before = path.read_bytes()
    with Trace.open(path) as trace:
        for view in trace.views("k", 0):
            view.zero_()
        trace.release()
        with Trace.open(path) as other:
            assert same(read_streams(trace), read_streams(other))
    assert path.read_bytes() == before


def test_a_copy_belongs_to_the_caller(path: Path, streams: dict[Stream, Tensor]) -> None:
    """What `read` gives may be changed, in any dtype."""
    with Trace.open(path) as trace:
        found = trace.read("k", 0, dtype=torch.float32).mul_(2)
        assert found.dtype == torch.float32
        assert torch.equal(found, streams["k", 0, 0].float() * 2)
        assert equal_bits(trace.read("k", 0), streams["k", 0, 0])


@settings(max_examples=100)
@given(
    kind=st.sampled_from(["q", "k", "v", "lse", "out", "tokens"]),
    sequence=st.integers(0, 1),
    ends=st.tuples(st.integers(0, 1100), st.integers(0, 1100)).map(sorted),
    head=st.none() | st.integers(0, 1),
)
def test_any_rows_of_any_head_can_be_read(
    path: Path, streams: dict[Stream, Tensor], kind: str, sequence: int, ends: Any, head: int | None
) -> None:
    """Parts are parts of the whole, across chunks and empty ones too."""
    layer = None if kind == "tokens" else 2
    whole = streams[kind, sequence, layer]
    axis = 0 if kind == "tokens" else 1
    first, last = (min(end, whole.shape[axis]) for end in ends)
    expected = whole.narrow(axis, first, last - first)
    with Trace.open(path) as trace:
        if head is None or kind == "tokens":
            found = trace.read(kind, layer, sequence, first=first, last=last)
        else:
            found = trace.read(kind, layer, sequence, first=first, last=last, head=head)
            expected = expected[head]
        assert equal_bits(found, expected)
        views = trace.views(kind, layer, sequence, first=first, last=last)
        assert sum(view.shape[axis] for view in views) == last - first


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (("x", 0), {}, "unknown kind 'x'"),
        (("k", 1), {}, r"layer 1 is not recorded; it has \[0, 2\]"),
        (("k", None), {}, "layer None is not recorded"),
        (("tokens", 0), {}, "tokens belong to no layer"),
        (("k", 0, 2), {}, "there is no sequence 2; it has 2, counted from 0"),
        (("k", 0, -1), {}, "there is no sequence -1"),
        (("k", 0), {"first": -1}, "has the rows 0:1100, not -1:1100"),
        (("q", 0), {"last": 551}, "has the rows 0:550, not 0:551"),
        (("k", 0), {"first": 5, "last": 4}, "not 5:4"),
        (("k", 0), {"head": 2}, "k has 2 heads, not 2"),
        (("tokens", None), {"head": 0}, "tokens has 0 heads"),
    ],
)
def test_what_is_not_there_is_named(path: Path, arguments: Any, options: Any, message: str) -> None:
    """A wrong kind, layer, sequence, row or head is an error with the file's name."""
    with Trace.open(path) as trace, pytest.raises(TraceError, match=message) as caught:
        trace.read(*arguments, **options)
    assert str(path) in str(caught.value)


def test_several_threads_read_the_same_trace(path: Path, streams: dict[Stream, Tensor]) -> None:
    """Reading needs no lock."""
    with Trace.open(path) as trace:
        wrong: list[bool] = []
        threads = [
            threading.Thread(target=lambda: wrong.append(not same(read_streams(trace), streams)))
            for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == [False] * 4


# --- checksums --------------------------------------------------------------------------------


def test_opening_reads_the_index_only(path: Path, tmp_path: Path) -> None:
    """Damage in one chunk is found when that chunk is read; all others can be used."""
    chunk = chunk_of(path, "k", 2, 1)
    broken = damaged(path, tmp_path / "t.kvtrace", chunk.offset + chunk.nbytes - 1)
    with Trace.open(broken) as trace:
        trace.read("k", 0)
        trace.read("k", 2, last=512)
        message = "k of layer 2, sequence 0, rows 512:1024: its checksum does not match.*--repair"
        for _ in range(2):
            with pytest.raises(TraceError, match=message):
                trace.read("k", 2)
        with pytest.raises(TraceError, match=message):
            trace.views("k", 2, first=1000)
        assert trace.verify() == [
            "k of layer 2, sequence 0, rows 512:1024: its checksum does not match"
        ]


def test_a_chunk_is_checked_once(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second read of a chunk costs no checksum."""
    crc32, checked = kvpolicy.trace.reader.zlib.crc32, []
    with Trace.open(path) as trace:
        monkeypatch.setattr(
            kvpolicy.trace.reader.zlib, "crc32", lambda x: (checked.append(len(x)), crc32(x))[1]
        )
        trace.read("k", 0, last=600)
        assert len(checked) == 2
        trace.read("k", 0)
        trace.views("k", 0)
        assert len(checked) == 3


def test_verify_counts_every_byte(path: Path) -> None:
    """Progress adds up to the numbers of the trace."""
    done: list[int] = []
    with Trace.open(path) as trace:
        assert trace.verify(done.append) == []
        assert sum(done) == sum(
            trace.payload_bytes(kind, layer, sequence.index)
            for sequence in trace.sequences
            for kind, layer in HEADER.streams()
        )
        assert sum(done) < trace.num_bytes == path.stat().st_size


def test_verify_finds_a_damaged_frame(path: Path, tmp_path: Path) -> None:
    """A frame that only a repair would read is verified too."""
    chunk = chunk_of(path, "q", 0)
    broken = damaged(path, tmp_path / "t.kvtrace", chunk.offset - PAGE + 13)
    with Trace.open(broken) as trace:
        assert trace.verify() == ["q of layer 0, sequence 0, rows 0:512: its frame is damaged"]
        trace.read("q", 0)


# --- refusals ---------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.2, 0.5, 0.99])
def test_a_truncated_trace_says_what_can_be_recovered(
    path: Path, tmp_path: Path, share: float
) -> None:
    """The error says that it is truncated, how many chunks there are, and the command."""
    data = path.read_bytes()
    part = tmp_path / "t.kvtrace.part"
    part.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(TraceError) as caught:
        Trace.open(part)
    found = re.search(
        r"truncated or never completed: .*; (\d+) complete chunks can be recovered with: "
        r"kvpolicy inspect (\S+) --repair OUT",
        str(caught.value),
    )
    assert found
    assert found[2] == str(part)
    assert 0 < int(found[1]) <= data.count(b"CHNK")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "it is empty or no file"),
        (b"\x89KVT1", "it does not begin as one"),
        (b"PK\x03\x04" + bytes(9000), "it does not begin as one"),
        (b"\x89KVT1\r\n\x1a" + b"\xff" * 8, "the header's length is given as 4294967295 bytes"),
        (b"\x89KVT1\r\n\x1a" + bytes([1, 0, 0, 0, 0, 0, 0, 0, 1]), "the header is damaged"),
    ],
)
def test_what_is_no_trace_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    """Other files and stubs are told apart from damaged traces."""
    path = tmp_path / "t.kvtrace"
    path.write_bytes(content)
    with pytest.raises(TraceError, match=message) as caught:
        Trace.open(path)
    assert str(path) in str(caught.value)


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    """A missing file and a directory are the system's errors; a pipe does not block."""
    with pytest.raises(FileNotFoundError):
        Trace.open(tmp_path / "no")
    with pytest.raises(IsADirectoryError):
        Trace.open(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(TraceError, match="it is empty or no file"):
        Trace.open(tmp_path / "pipe")


def test_text_mode_transfer_is_recognised(path: Path, tmp_path: Path) -> None:
    """A transfer that converts line ends destroys the magic, not just some numbers."""
    broken = tmp_path / "t.kvtrace"
    broken.write_bytes(path.read_bytes().replace(b"\r\n", b"\n"))
    with pytest.raises(TraceError, match="it does not begin as one"):
        Trace.open(broken)


def test_a_damaged_index_is_told_from_a_missing_one(path: Path, tmp_path: Path) -> None:
    """A flipped bit in the index is damage, not truncation; chunks can be recovered."""
    size = path.stat().st_size
    broken = damaged(path, tmp_path / "t.kvtrace", size - 16 - PAGE + 100)
    with pytest.raises(TraceError, match=r"its index is damaged; \d+ complete chunks"):
        Trace.open(broken)
