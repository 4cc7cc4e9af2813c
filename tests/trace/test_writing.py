"""Writing traces: what is appended is what is read, or an error says why not."""

import errno
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fixtures.small_traces import (
    ALL,
    equal_bits,
    random_streams,
    read_streams,
    same,
    small_header,
    write_streams,
)
from kvpolicy import TraceError
from kvpolicy.trace import Header, Trace, TraceWriter
from oracles import trace_format
from strategies import SEEDS


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where a trace goes."""
    return tmp_path / "t.kvtrace"


def rows_of(header: Header, kind: str, count: int) -> torch.Tensor:
    """Zeros of the right shape and type."""
    return torch.zeros(header.shape(kind, count), dtype=getattr(torch, header.element(kind)))


# --- round trips ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("query_stride", [1, 3])
def test_what_was_written_is_read(path: Path, dtype: str, query_stride: int) -> None:
    """Every bit of every stream, the header and the sequences come back."""
    header = small_header(dtype=dtype, query_stride=query_stride)
    lengths = (1, 511, 512, 513, 1030)
    streams = random_streams(header, lengths)
    for x in streams.values():
        if x.is_floating_point():
            x.view(-1)[0] = float("nan")
    write_streams(path, header, streams, portion=100, marks=[("start", 0, 1)])
    with Trace.open(path) as trace:
        assert trace.header == header
        assert [sequence.tokens for sequence in trace.sequences] == list(lengths)
        assert trace.sequences[1].source == "source 1"
        assert trace.sequences[1].marks == (("start", 0, 1),)
        assert same(read_streams(trace), streams)
        assert trace.verify() == []
    assert [file.name for file in path.parent.iterdir()] == ["t.kvtrace"]


@settings(max_examples=50)
@given(
    portions=st.lists(st.integers(0, 700), min_size=1, max_size=6),
    tokens=st.integers(1, 1100),
    query_stride=st.sampled_from([1, 2, 7]),
    dtype=st.sampled_from(["float32", "float16", "bfloat16"]),
    kinds=st.lists(st.sampled_from(["lse", "out", "tokens"]), unique=True),
    seed=SEEDS,
)
def test_any_split_of_appends_gives_the_same_trace(
    tmp_path_factory: pytest.TempPathFactory,
    portions: list[int],
    tokens: int,
    query_stride: int,
    dtype: str,
    kinds: list[str],
    seed: int,
) -> None:
    """Portions of any sizes, empty ones too, give the chunks that one append gives."""
    folder = tmp_path_factory.mktemp("split")
    header = small_header(dtype=dtype, query_stride=query_stride, layers=(1,))
    streams = random_streams(header, [tokens], kinds=("q", "k", "v", *kinds), seed=seed)
    whole = write_streams(folder / "whole", header, streams, portion=2000)
    with TraceWriter(folder / "split", header) as writer:
        writer.begin(prompt_len=1, source="source 0")
        for (kind, sequence, layer), rows in streams.items():
            axis = 0 if kind == "tokens" else 1
            start, turn = 0, 0
            while start < rows.shape[axis]:
                # Lists of empty portions alone would never end.
                size = portions[turn % len(portions)] if sum(portions) else 300
                size = min(size, rows.shape[axis] - start)
                part = rows.narrow(axis, start, size)
                if turn % 2 and part.dim() == 3:  # as vLLM has it, [rows, heads, D] in memory
                    part = part.transpose(0, 1).contiguous().transpose(0, 1)
                writer.append(sequence, layer, kind, start, part)
                start, turn = start + size, turn + 1
    assert (folder / "split").read_bytes() == whole.read_bytes()


@settings(max_examples=50)
@given(
    dtype=st.sampled_from(["float32", "float16", "bfloat16"]),
    lengths=st.lists(st.integers(1, 1100), min_size=1, max_size=3),
    kv_heads=st.sampled_from([(0,), (1,), (0, 1)]),
    head_dim=st.integers(4, 9),
    value_dim=st.integers(1, 9),
    query_stride=st.integers(1, 5),
    kinds=st.lists(st.sampled_from(["lse", "out", "tokens"]), unique=True),
)
def test_the_document_alone_reads_the_same(
    tmp_path_factory: pytest.TempPathFactory,
    dtype: str,
    lengths: list[int],
    kinds: list[str],
    **changes: Any,
) -> None:
    """A reader that was written from the format's description finds the same numbers."""
    header = small_header(dtype=dtype, **changes)
    streams = random_streams(header, lengths, kinds=("q", "k", "v", *kinds))
    path = tmp_path_factory.mktemp("plain") / "t"
    plain = trace_format.read(write_streams(path, header, streams).read_bytes())
    assert plain.header == {"version": 1, **trace_format.as_plain(header)}
    assert [entry[1] for entry in plain.sequences] == lengths
    assert plain.arrays.keys() == streams.keys()
    for stream, array in plain.arrays.items():
        expected = streams[stream].contiguous()
        as_bits = expected.view(torch.uint8).numpy().view(array.dtype)
        assert array.tobytes() == as_bits.tobytes()
        assert array.shape == tuple(expected.shape)


def test_several_sequences_may_be_open_together(path: Path) -> None:
    """Sequences grow in turn, and one that has ended gives back its memory."""
    header = small_header()
    streams = random_streams(header, [600, 30], kinds=("q", "k", "v"))
    with TraceWriter(path, header) as writer:
        first, second = (writer.begin(prompt_len=n) for n in (600, 30))
        for start in (0, 10, 20):
            for (kind, sequence, layer), rows in streams.items():
                if sequence == second:
                    writer.append(second, layer, kind, start, rows[:, start : start + 10])
                elif start == 0:
                    writer.append(first, layer, kind, 0, rows)
        writer.end(second)
        writer.end(second)
        with pytest.raises(TraceError, match="sequence 1 has ended"):
            writer.append(second, 0, "k", 30, rows_of(header, "k", 1))
    with Trace.open(path) as trace:
        assert same(read_streams(trace), streams)


def test_the_prompt_and_marks_end_with_the_sequence(path: Path) -> None:
    """A recording that stops early keeps the part of its prompt and marks that it has."""
    header = small_header()
    streams = random_streams(header, [5], kinds=("q", "k", "v"))
    write_streams(
        path, header, streams, prompt_len=9, marks=[("a", 1, 3), ("b", 4, 8), ("c", 5, 6)]
    )
    with Trace.open(path) as trace:
        assert trace.sequences[0].prompt_len == 5
        assert trace.sequences[0].marks == (("a", 1, 3), ("b", 4, 5))


def test_rows_are_copied(path: Path) -> None:
    """The caller may reuse its memory at once, and gradients do not matter."""
    header = small_header(layers=(0,))
    with TraceWriter(path, header) as writer:
        writer.begin(prompt_len=1)
        for kind in ("q", "k", "v"):
            rows = torch.ones(header.shape(kind, 700), requires_grad=True)
            writer.append(0, 0, kind, 0, rows)
            rows.data.zero_()
    with Trace.open(path) as trace:
        assert bool((trace.read("k", 0) == 1).all())


# --- refusals ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 0, "k", 0, torch.zeros(2, 5, 3)), r"must have shape \[2, rows, 4\], got \[2, 5, 3\]"),
        ((0, 0, "k", 0, torch.zeros(4, 5, 4)), r"must have shape \[2, rows, 4\]"),
        ((0, 0, "q", 0, torch.zeros(2, 5, 4)), r"must have shape \[4, rows, 4\]"),
        ((0, 0, "v", 0, torch.zeros(2, 5, 4)), r"must have shape \[2, rows, 3\]"),
        ((0, 0, "k", 0, torch.zeros(())), r"must have shape \[2, rows, 4\], got \[\]"),
        ((0, 0, "k", 0, torch.zeros(1, 2, 5, 4)), r"must have shape"),
        ((0, 0, "lse", 0, torch.zeros(4, 5, 1)), r"must have shape \[4, rows\]"),
        ((0, None, "tokens", 0, torch.zeros(1, 5).to(torch.uint32)), r"must have shape \[rows\]"),
        ((0, None, "tokens", 0, torch.zeros(5).long()), "must be torch.uint32, got torch.int64"),
        ((0, 0, "k", 0, torch.zeros(2, 5, 4).half()), "must be torch.float32, got torch.float16"),
        ((0, 0, "lse", 0, torch.zeros(4, 5).double()), "must be torch.float32"),
        ((0, 0, "k", 0, [[0.0]]), "must be a tensor, got list"),
        ((0, 0, "k", 1, torch.zeros(2, 5, 4)), "has 0 rows, so that the next ones start at 0"),
        ((0, 0, "k", 0.0, torch.zeros(2, 5, 4)), r"got start=0.0"),
        ((0, 1, "k", 0, torch.zeros(2, 5, 4)), r"layer 1 is not recorded; it has \[0, 2\]"),
        ((0, None, "k", 0, torch.zeros(2, 5, 4)), "layer None is not recorded"),
        ((0, True, "k", 0, torch.zeros(2, 5, 4)), "layer True is not recorded"),
        ((0, 0, "tokens", 0, torch.zeros(5)), "tokens belong to no layer"),
        ((0, 0, "x", 0, torch.zeros(2, 5, 4)), "unknown kind 'x'; choose from q, k, v, lse, out"),
        ((1, 0, "k", 0, torch.zeros(2, 5, 4)), "sequence 1 was not begun"),
        ((-1, 0, "k", 0, torch.zeros(2, 5, 4)), "sequence -1 was not begun"),
    ],
)
def test_rows_that_do_not_fit_are_refused(path: Path, arguments: Any, message: str) -> None:
    """A wrong shape, type, order, stream or sequence is named, and nothing was added."""
    header = small_header()
    streams = random_streams(header, [5], kinds=("q", "k", "v"))
    with TraceWriter(path, header) as writer:
        writer.begin(prompt_len=1)
        with pytest.raises(TraceError, match=message):
            writer.append(*arguments)
        for (kind, sequence, layer), rows in streams.items():
            writer.append(sequence, layer, kind, 0, rows)
    with Trace.open(path) as trace:
        assert same(read_streams(trace), streams)


def test_rows_come_in_order(path: Path) -> None:
    """A portion that comes twice, or too early, is refused."""
    header = small_header()
    with TraceWriter(path, header) as writer:
        writer.begin(prompt_len=1)
        writer.append(0, 0, "k", 0, rows_of(header, "k", 5))
        for start in (0, 4, 6):
            with pytest.raises(TraceError, match=f"start at 5, got start={start}"):
                writer.append(0, 0, "k", start, rows_of(header, "k", 5))
        writer.append(0, 0, "k", 5, rows_of(header, "k", 5))
        writer.discard()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt_len": -1}, "prompt_len must be an integer from 0"),
        ({"prompt_len": 1.0}, "prompt_len must be an integer"),
        ({"prompt_len": 1, "source": "x" * 5000}, "source must be text of at most 4096 bytes"),
        ({"prompt_len": 1, "source": "\ud800"}, "source must be text"),
        ({"prompt_len": 1, "source": None}, "source must be text"),
        ({"prompt_len": 1, "marks": [("a", 3, 3)]}, "mark must be .name, first, last. with"),
        ({"prompt_len": 1, "marks": [("a", 3)]}, "mark must be"),
        ({"prompt_len": 1, "marks": [("a", -1, 3)]}, "first of a mark must be"),
        ({"prompt_len": 1, "marks": [(7, 1, 3)]}, "name of a mark must be text"),
        ({"prompt_len": 1, "marks": [("a" * 100, 1, 3)] * 2000}, "2000 marks take"),
        ({"prompt_len": 1, "marks": [("a", 1, 3)] * 5000}, "marks must be 0 to 4096 spans"),
    ],
)
def test_an_impossible_sequence_is_refused(
    path: Path, arguments: dict[str, Any], message: str
) -> None:
    """What a sequence says about itself is checked when it begins."""
    with TraceWriter(path, small_header()) as writer:
        with pytest.raises(TraceError, match=message):
            writer.begin(**arguments)
        writer.discard()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "float64"}, "dtype must be float32 or float16 or bfloat16, got 'float64'"),
        ({"dtype": []}, "dtype must be"),
        ({"scale": 0}, "scale must be a finite number > 0, got 0"),
        ({"scale": float("nan")}, "scale must be a finite number > 0, got nan"),
        ({"scale": float("inf")}, "scale must be"),
        ({"scale": 10**400}, "scale must be a finite number"),
        ({"scale": True}, "scale must be"),
        ({"head_dim": 0}, "head_dim must be an integer from 1 to 65536, got 0"),
        ({"head_dim": 4.0}, "head_dim must be"),
        ({"value_dim": 1 << 40}, "value_dim must be"),
        ({"num_query_heads": 5}, "num_query_heads must be a multiple of num_kv_heads, 2, got 5"),
        ({"num_kv_heads": True}, "num_kv_heads must be"),
        ({"layers": ()}, "layers must be 1 to 4096 different integers from 0 to 2, ascending"),
        ({"layers": (0, 3)}, "layers must be"),
        ({"layers": (2, 0)}, "layers must be"),
        ({"layers": (0, 0)}, "layers must be"),
        ({"layers": 0}, "layers must be"),
        ({"kv_heads": (2,)}, "kv_heads must be"),
        ({"kv_heads": ("0",)}, "kv_heads must be"),
        ({"query_stride": 0}, "query_stride must be"),
        ({"model": None}, "model must be text"),
        ({"rope": "default"}, "rope must be a Rope or None"),
        ({"head_dim": 3}, "rope.inverse_frequencies has 2 pairs, more than head_dim 3"),
    ],
)
def test_an_impossible_header_is_refused(changes: dict[str, Any], message: str) -> None:
    """A header cannot say what no trace can be."""
    with pytest.raises(TraceError, match=message):
        small_header(**changes)


def test_an_incomplete_sequence_cannot_be_closed(path: Path) -> None:
    """Closing names what is missing; the missing rows can still be appended."""
    header = small_header(layers=(1,), query_stride=2)
    writer = TraceWriter(path, header)
    with pytest.raises(TraceError, match="nothing was recorded"):
        writer.close()
    writer.begin(prompt_len=3)
    with pytest.raises(TraceError, match="sequence 0 has no tokens"):
        writer.close()
    for kind, count in (("q", 1), ("k", 3), ("v", 3), ("lse", 2)):
        writer.append(0, 1, kind, 0, rows_of(header, kind, count))
    with pytest.raises(TraceError, match="q of layer 1, sequence 0 has 1 rows; 3 tokens"):
        writer.close()
    assert not path.exists()
    writer.append(0, 1, "q", 1, rows_of(header, "q", 1))
    assert writer.close() == path
    assert writer.close() == path
    assert path.exists()
    with pytest.raises(TraceError, match="this writer is closed"):
        writer.append(0, 1, "q", 2, rows_of(header, "q", 1))
    with pytest.raises(TraceError, match="this writer is closed"):
        writer.begin(prompt_len=1)
    writer.discard()
    assert path.exists()


def test_a_second_thread_cannot_append(path: Path) -> None:
    """Two threads would interleave their rows, so the second one is told."""
    header = small_header()
    errors: list[TraceError] = []
    with TraceWriter(path, header) as writer:
        writer.begin(prompt_len=1)
        writer.append(0, 0, "k", 0, rows_of(header, "k", 1))

        def append() -> None:
            try:
                writer.append(0, 0, "k", 1, rows_of(header, "k", 1))
            except TraceError as error:
                errors.append(error)

        thread = threading.Thread(target=append)
        thread.start()
        thread.join()
        writer.discard()
    assert "called from a second thread" in str(errors[0])


# --- the file ---------------------------------------------------------------------------------


def test_an_existing_trace_is_replaced_only_by_a_complete_one(path: Path) -> None:
    """Until the rename the old file stays, byte by byte, also if writing fails."""
    header = small_header()
    old = write_streams(path, header, random_streams(header, [3])).read_bytes()
    streams = random_streams(header, [600], seed=1)
    with pytest.raises(RuntimeError), TraceWriter(path, header) as writer:  # noqa: PT012
        writer.begin(prompt_len=1)
        writer.append(0, 0, "k", 0, rows_of(header, "k", 600))
        raise RuntimeError
    assert path.read_bytes() == old
    write_streams(path, header, streams)
    with Trace.open(path) as trace:
        assert same(read_streams(trace), streams)


def test_an_exception_leaves_complete_chunks_behind(path: Path) -> None:
    """What was recorded until then can be repaired; where that is nothing, nothing is left."""
    header = small_header()
    part = path.with_name("t.kvtrace.part")
    for rows, is_left in ((511, False), (512, True)):
        with pytest.raises(RuntimeError), TraceWriter(path, header) as writer:  # noqa: PT012
            writer.begin(prompt_len=1)
            writer.append(0, 0, "k", 0, rows_of(header, "k", rows))
            raise RuntimeError
        assert part.exists() == is_left
        assert not path.exists()
    with TraceWriter(path, header) as writer:
        writer.begin(prompt_len=1)
        writer.append(0, 0, "k", 0, rows_of(header, "k", 512))
        writer.discard()
    assert not part.exists()


def test_two_writers_cannot_have_the_same_file(path: Path) -> None:
    """The second one is refused instead of destroying what the first one writes."""
    with TraceWriter(path, small_header()) as writer:
        with pytest.raises(TraceError, match="is being written by somebody else"):
            TraceWriter(path, small_header())
        writer.discard()
    TraceWriter(path, small_header()).discard()


def test_a_missing_directory_is_the_systems_error(tmp_path: Path) -> None:
    """Where no file can be created, the writer says so at once."""
    with pytest.raises(FileNotFoundError):
        TraceWriter(tmp_path / "no" / "t.kvtrace", small_header())


@pytest.mark.parametrize("after", [0, 1, 5])
def test_a_full_disk_is_one_clear_error(
    path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    """The background's error comes out of the next call, with what to do, and again at close."""
    write, calls = os.writev, iter(range(100))

    def writev(file: int, parts: Any) -> int:
        if next(calls) >= after:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(file, parts)

    monkeypatch.setattr(os, "writev", writev)
    header = small_header()
    writer = TraceWriter(path, header, queue_bytes=1)
    message = r"cannot write .*t\.kvtrace\.part: .*No space left.*--repair OUT"
    with pytest.raises(TraceError, match=message):  # noqa: PT012
        writer.begin(prompt_len=1)
        for start in range(0, 100 * 512, 512):
            writer.append(0, 0, "k", start, rows_of(header, "k", 512))
    with pytest.raises(TraceError, match=message):
        writer.close()
    assert not path.exists()
    writer.discard()
    assert list(path.parent.iterdir()) == []


def test_a_slow_disk_holds_appends_back(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No more than the queue's bytes wait in memory: append waits for the disk instead."""
    write, gate, waiting = os.writev, threading.Event(), threading.Event()

    def writev(file: int, parts: Any) -> int:
        waiting.set()
        gate.wait()
        return write(file, parts)

    monkeypatch.setattr(os, "writev", writev)
    header, appended = small_header(layers=(0,)), 0
    writer = TraceWriter(path, header, queue_bytes=5 * 4096)

    def fill() -> None:
        nonlocal appended
        writer.begin(prompt_len=1)
        for start in range(0, 50 * 512, 512):
            for kind in ("q", "k", "v"):
                writer.append(0, 0, kind, start, rows_of(header, kind, 512))
            appended += 1

    thread = threading.Thread(target=fill)
    thread.start()
    waiting.wait()
    thread.join(0.3)
    assert thread.is_alive()
    assert appended <= 2
    gate.set()
    thread.join()
    writer.close()
    with Trace.open(path) as trace:
        assert trace.sequences[0].tokens == 50 * 512


def test_partial_writes_are_continued(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A system that writes a few bytes at a time gives the same file."""
    header = small_header()
    streams = random_streams(header, [520])
    expected = write_streams(path, header, streams).read_bytes()
    monkeypatch.setattr(os, "writev", lambda file, parts: os.write(file, parts[0][:1000]))
    write_streams(path, header, streams)
    assert path.read_bytes() == expected


def test_optional_kinds_may_be_in_some_layers(path: Path) -> None:
    """lse, out and tokens are complete or absent, layer by layer."""
    header = small_header()
    streams = random_streams(header, [20], kinds=ALL)
    del streams["lse", 0, 2], streams["out", 0, 0]
    write_streams(path, header, streams)
    with Trace.open(path) as trace:
        assert [trace.has(kind, 2) for kind in ("q", "lse", "out")] == [True, False, True]
        assert equal_bits(trace.read("tokens", None), streams["tokens", 0, None])
        with pytest.raises(TraceError, match="lse of layer 2, sequence 0 is not recorded"):
            trace.read("lse", 2)
