"""Recovering traces: every complete chunk of what a crash or damage leaves."""

import os
import signal
import subprocess
import sys
import zlib
from pathlib import Path

import msgpack
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

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
from kvpolicy.trace.recover import repair, salvage
from oracles.trace_format import Frame, take_apart

HEADER = small_header(query_stride=2)
LENGTHS = (1300, 600)
MARKS = (("early", 3, 9), ("late", 500, 520))


@pytest.fixture(scope="module")
def streams() -> dict[Stream, Tensor]:
    """What the trace holds."""
    return random_streams(HEADER, LENGTHS)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory, streams: dict[Stream, Tensor]) -> Path:
    """A trace of two sequences that grew in turn."""
    target = tmp_path_factory.mktemp("traces") / "t.kvtrace"
    return write_streams(target, HEADER, streams, prompt_len=550, marks=MARKS)


def require_beginnings(
    found: Trace, streams: dict[Stream, Tensor], numbers: dict[int, int]
) -> None:
    """Everything of a repaired trace is the beginning of what was recorded."""
    old = {new: old for old, new in numbers.items()}
    for (kind, sequence, layer), rows in read_streams(found).items():
        whole = streams[kind, old[sequence], layer]
        axis = 0 if kind == "tokens" else 1
        count = found.header.num_rows(kind, found.sequences[sequence].tokens)
        assert equal_bits(rows, whole.narrow(axis, 0, count))


# --- truncation -------------------------------------------------------------------------------


@settings(max_examples=60)
@given(share=st.floats(0.0, 1.0))
def test_whatever_was_complete_is_recovered(
    tmp_path_factory: pytest.TempPathFactory,
    path: Path,
    streams: dict[Stream, Tensor],
    share: float,
) -> None:
    """Cut anywhere: each sequence has as many tokens as the complete chunks allow."""
    data = path.read_bytes()
    folder = tmp_path_factory.mktemp("cut")
    cut, target = folder / "t.kvtrace.part", folder / "t.kvtrace"
    cut.write_bytes(data[: int(len(data) * share)])
    expected = recoverable(data, cut.stat().st_size)
    if not any(expected):
        with pytest.raises(TraceError):
            repair(cut, target)
        assert not target.exists()
        return
    found = repair(cut, target)
    assert cut.stat().st_size == int(len(data) * share)
    assert [found.numbers.get(old) is not None for old in (0, 1)] == [n > 0 for n in expected]
    with Trace.open(target) as trace:
        assert trace.verify() == []
        assert [sequence.tokens for sequence in trace.sequences] == [n for n in expected if n]
        require_beginnings(trace, streams, found.numbers)


def recoverable(data: bytes, size: int) -> list[int]:
    """Tokens of each sequence below a size, counted from the index of the whole file."""
    _, *entries = take_apart(data).index
    rows: dict[tuple[str, int, int | None], int] = {}
    for kind, sequence, layer, _, count, offset, nbytes, _ in (x for x in entries if len(x) == 8):
        if offset + nbytes <= size:
            at = (kind, sequence, layer)
            rows[at] = rows.get(at, 0) + count
    found = []
    for sequence, length in enumerate(LENGTHS):
        covered = {
            (kind, layer): min(
                rows.get((kind, sequence, layer), 0) * (1 if kind in ("k", "v", "tokens") else 2),
                length,
            )
            for kind, layer in HEADER.streams()
        }
        tokens = min(n for (kind, _), n in covered.items() if kind in "qkv")
        optional = [n for (kind, _), n in covered.items() if kind not in "qkv"]
        found.append(min([tokens, *(n for n in optional if n and n >= tokens - 1024)]))
    return found


@pytest.mark.parametrize("share", [0.06, 0.14, 0.47, 0.51, 0.75, 0.95])
def test_every_complete_chunk_is_found(path: Path, tmp_path: Path, share: float) -> None:
    """The chunks found are exactly those whose last byte is there."""
    data = path.read_bytes()
    size = int(len(data) * share)
    part = tmp_path / "part"
    part.write_bytes(data[:size])
    ends = [x[5] + x[6] for x in take_apart(data).index if len(x) == 8]
    complete = sum(end <= size for end in ends)
    with pytest.raises(TraceError, match=f"; {complete} complete chunks can be"):
        Trace.open(part)


def test_a_killed_writer_leaves_a_trace_that_can_be_repaired(tmp_path: Path) -> None:
    """SIGKILL in the middle of writing loses what was not complete, and nothing else."""
    script = (
        "import sys, torch\n"
        "sys.path.insert(0, sys.argv[2])\n"
        "from fixtures.small_traces import small_header\n"
        "from kvpolicy.trace import TraceWriter\n"
        "writer = TraceWriter(sys.argv[1], small_header(layers=(0,)), queue_bytes=1)\n"
        "writer.begin(prompt_len=1)\n"
        "for start in range(0, 10**9, 100):\n"
        "    for kind, shape in (('q', (4, 100, 4)), ('k', (2, 100, 4)), ('v', (2, 100, 3))):\n"
        "        writer.append(0, 0, kind, start, torch.full(shape, float(start)))\n"
        "    if start == 3000:\n"
        "        print('go', flush=True)\n"
    )
    target = tmp_path / "t.kvtrace"
    command = [sys.executable, "-c", script, str(target), str(Path(__file__).parents[1])]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"go\n"
        os.kill(process.pid, signal.SIGKILL)
    assert not target.exists()
    found = repair(f"{target}.part", target)
    assert found.lost == []
    with Trace.open(target) as trace:
        tokens = trace.sequences[0].tokens
        assert tokens >= 2048
        assert tokens % 512 == 0
        expected = (torch.arange(tokens) // 100 * 100).float()
        assert torch.equal(trace.read("k", 0, head=1)[:, 2], expected)


def test_a_repair_may_write_the_name_of_the_unfinished_file(
    path: Path, tmp_path: Path, streams: dict[Stream, Tensor]
) -> None:
    """T.kvtrace.part is repaired to T.kvtrace, without destroying what it reads from."""
    part = tmp_path / "t.kvtrace.part"
    part.write_bytes(path.read_bytes()[:-16])
    before = part.read_bytes()
    found = repair(part, tmp_path / "t.kvtrace")
    assert part.read_bytes() == before
    with Trace.open(tmp_path / "t.kvtrace") as trace:
        assert same(read_streams(trace), streams)
        assert trace.sequences == found.trace.sequences
        assert trace.sequences[0].marks == MARKS
        assert trace.sequences[0].prompt_len == 550


# --- damage -----------------------------------------------------------------------------------


def place_of(path: Path, kind: str, sequence: int, layer: int | None, start: int) -> int:
    """Where a chunk's payload is."""
    for entry in take_apart(path.read_bytes()).index:
        if entry[:4] == [kind, sequence, layer, start]:
            return entry[5]
    raise AssertionError("there is no such chunk")


def broken(path: Path, target: Path, *places: int) -> Path:
    """A copy with a flipped bit at each place."""
    data = bytearray(path.read_bytes())
    for place in places:
        data[place] ^= 0x10
    target.write_bytes(data)
    return target


def test_a_damaged_chunk_ends_its_sequence(
    path: Path, tmp_path: Path, streams: dict[Stream, Tensor]
) -> None:
    """What lies before the damage is kept, other sequences entirely; the loss is listed."""
    file = broken(path, tmp_path / "b", place_of(path, "k", 0, 2, 512))
    found = repair(file, tmp_path / "r")
    with Trace.open(tmp_path / "r") as trace:
        assert [sequence.tokens for sequence in trace.sequences] == [512, 600]
        assert trace.sequences[0].prompt_len == 512
        assert trace.sequences[0].marks == (("early", 3, 9), ("late", 500, 512))
        require_beginnings(trace, streams, found.numbers)
    assert found.lost == [
        "k of layer 2, sequence 0, rows 512:1024: its checksum does not match",
        "k of layer 2, sequence 0, rows 1024:1300: rows before it are missing",
        "sequence 0: tokens 512:1300",
    ]
    assert found.num_chunks == found.num_intact + 1
    assert found.num_used == (5 * 2 + 1) + (7 * 2 + 2)


def test_what_is_optional_may_lag_or_be_left_out(tmp_path: Path) -> None:
    """Unfinished, up to a chunk behind costs tokens, more does not; damaged, it never does."""
    header = small_header(layers=(0,))
    path = write_streams(tmp_path / "t", header, random_streams(header, [1300]))
    for start, is_finished, tokens, has_ids in (
        (512, False, 1300, False),
        (1024, False, 1024, True),
        (512, True, 1300, False),
        (1024, True, 1300, False),
    ):
        file = broken(path, tmp_path / "b", place_of(path, "tokens", 0, None, start))
        if not is_finished:
            os.truncate(file, file.stat().st_size - 16)
        repair(file, tmp_path / "r")
        with Trace.open(tmp_path / "r") as trace:
            assert trace.sequences[0].tokens == tokens
            assert trace.has("tokens", None) == has_ids
            assert trace.has("lse", 0)


def test_damage_to_what_is_optional_costs_no_tokens(path: Path, tmp_path: Path) -> None:
    """Where lse, out or ids are damaged early, they are left out instead of cutting the rest."""
    places = [place_of(path, "tokens", 0, None, 0), place_of(path, "lse", 0, 0, 0)]
    found = repair(broken(path, tmp_path / "b", *places), tmp_path / "r")
    with Trace.open(tmp_path / "r") as trace:
        assert [sequence.tokens for sequence in trace.sequences] == [1300, 600]
        assert not trace.has("tokens", None, 0)
        assert trace.has("tokens", None, 1)
        assert [trace.has("lse", layer) for layer in (0, 2)] == [False, True]
    assert [line.split(":")[0] for line in found.lost] == [
        "lse of layer 0, sequence 0, rows 0",
        "tokens of sequence 0, rows 0",
        "lse of layer 0, sequence 0, rows 512",
        "tokens of sequence 0, rows 512",
        "tokens of sequence 0, rows 1024",
    ]


def test_a_damaged_frame_does_not_matter_with_an_index(
    path: Path, tmp_path: Path, streams: dict[Stream, Tensor]
) -> None:
    """The index knows where payloads are."""
    file = broken(path, tmp_path / "b", place_of(path, "k", 0, 2, 512) - PAGE)
    found = repair(file, tmp_path / "r")
    assert found.lost == []
    with Trace.open(tmp_path / "r") as trace:
        assert same(read_streams(trace), streams)


def test_a_scan_goes_on_behind_a_damaged_frame(
    path: Path, tmp_path: Path, streams: dict[Stream, Tensor]
) -> None:
    """Without an index, a damaged frame costs its chunk, not all that follow."""
    file = broken(path, tmp_path / "b", place_of(path, "q", 1, 2, 0) - PAGE)
    os.truncate(file, file.stat().st_size - 16)
    found = repair(file, tmp_path / "r")
    assert found.numbers == {0: 0}
    assert "sequence 1: no chunk of q, k and v in every layer" in found.lost
    with Trace.open(tmp_path / "r") as trace:
        assert same(read_streams(trace), {at: x for at, x in streams.items() if at[1] == 0})


def test_sequences_are_numbered_anew(
    path: Path, tmp_path: Path, streams: dict[Stream, Tensor]
) -> None:
    """Where the first sequence is lost, the second becomes the first, and the report says so."""
    file = broken(path, tmp_path / "b", place_of(path, "q", 0, 2, 0))
    found = repair(file, tmp_path / "r")
    assert found.numbers == {1: 0}
    with Trace.open(tmp_path / "r") as trace:
        assert [(s.index, s.tokens, s.source) for s in trace.sequences] == [(0, 600, "source 1")]
        require_beginnings(trace, streams, found.numbers)


def test_a_lost_announcement_costs_only_what_it_says(path: Path, tmp_path: Path) -> None:
    """Without its SEQN frame a sequence is kept, all of it taken for the prompt."""
    draft = take_apart(path.read_bytes())
    del draft.frames[0]
    (tmp_path / "b").write_bytes(draft.build()[:-16])
    found = repair(tmp_path / "b", tmp_path / "r")
    assert found.lost == ["sequence 0: its prompt's length, source and marks"]
    assert [(s.tokens, s.prompt_len, s.source) for s in found.trace.sequences] == [
        (1300, 1300, ""),
        (600, 550, "source 1"),
    ]


def test_an_index_that_contradicts_the_data_is_not_believed(
    path: Path, tmp_path: Path, streams: dict[Stream, Tensor]
) -> None:
    """A forged index is refused by readers; a repair scans instead."""
    draft = take_apart(path.read_bytes())
    draft.index[3][1] = 7
    (tmp_path / "b").write_bytes(draft.build())
    with pytest.raises(TraceError, match="there is no such sequence"):
        Trace.open(tmp_path / "b")
    repair(tmp_path / "b", tmp_path / "r")
    with Trace.open(tmp_path / "r") as trace:
        assert same(read_streams(trace), streams)


def test_a_repeated_chunk_counts_once(
    path: Path, tmp_path: Path, streams: dict[Stream, Tensor]
) -> None:
    """Of two chunks with the same rows the first intact one is taken."""
    draft = take_apart(path.read_bytes())
    frame = draft.frames[2]
    assert frame.payload is not None
    entry = msgpack.unpackb(frame.meta)
    other = bytes(len(frame.payload))
    draft.frames.append(Frame(b"CHNK", msgpack.packb([*entry[:6], zlib.crc32(other)]), other))
    (tmp_path / "b").write_bytes(draft.build()[:-16])
    found = salvage(tmp_path / "b")
    assert found.num_chunks == found.num_used + 1
    assert same(read_streams(found.trace), streams)


def test_nothing_follows_a_short_chunk(path: Path, tmp_path: Path) -> None:
    """A chunk with fewer than 512 rows ends its stream, whatever claims to come next."""
    draft = take_apart(path.read_bytes())
    frame = next(x for x in draft.frames if x.payload and msgpack.unpackb(x.meta)[0] == "k")
    assert frame.payload is not None
    payload = frame.payload[: 500 * 2 * 4 * 4]
    entry = [*msgpack.unpackb(frame.meta)[:4], 500, len(payload), zlib.crc32(payload)]
    frame.meta, frame.payload = msgpack.packb(entry), payload
    (tmp_path / "b").write_bytes(draft.build()[:-16])
    found = salvage(tmp_path / "b")
    assert [sequence.tokens for sequence in found.trace.sequences] == [500, 600]
    assert found.trace.read("k", 0).shape == (2, 500, 4)


def test_an_intact_trace_is_repaired_to_itself(
    path: Path, tmp_path: Path, streams: dict[Stream, Tensor]
) -> None:
    """Nothing is lost where nothing is wrong; progress counts reading and writing."""
    done: list[int] = []
    found = repair(path, tmp_path / "r", done.append)
    assert found.lost == []
    assert sum(done) == 2 * sum(x.nbytes for x in streams.values())
    with Trace.open(tmp_path / "r") as trace:
        assert same(read_streams(trace), streams)


# --- refusals ---------------------------------------------------------------------------------


def test_a_repair_never_writes_what_it_reads(path: Path, tmp_path: Path) -> None:
    """The target must be another file, also under another name."""
    before = path.read_bytes()
    with pytest.raises(TraceError, match="is the damaged trace itself"):
        repair(path, path)
    (tmp_path / "link").symlink_to(path)
    with pytest.raises(TraceError, match="is the damaged trace itself"):
        repair(path, tmp_path / "link")
    assert path.read_bytes() == before


def test_a_damaged_header_is_the_end(path: Path, tmp_path: Path) -> None:
    """Without a header no number has a meaning, and the error says which part is damaged."""
    with pytest.raises(TraceError, match="the header is damaged"):
        repair(broken(path, tmp_path / "b", 20), tmp_path / "r")


def test_another_version_is_not_repaired(path: Path, tmp_path: Path) -> None:
    """A repair does not guess what a later version means."""
    draft = take_apart(path.read_bytes())
    draft.header = msgpack.packb({**msgpack.unpackb(draft.header), "version": 2})
    (tmp_path / "b").write_bytes(draft.build()[:-16])
    with pytest.raises(TraceError, match="format version 2"):
        repair(tmp_path / "b", tmp_path / "r")
