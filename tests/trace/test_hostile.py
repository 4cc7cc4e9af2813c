"""Hostile files: whatever is in them, a trace reads as itself or raises TraceError.

Nothing else may be raised, no memory reserved on a file's word, and no time lost.
"""

import os
import resource
import time
import tracemalloc
import zlib
from collections import Counter
from contextlib import suppress
from pathlib import Path
from random import Random

import msgpack
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import kvpolicy.trace.frames
from fixtures.mutations import ACCIDENTS, FORGERIES, RAW, Mutation
from fixtures.small_traces import (
    Stream,
    bits,
    random_streams,
    read_streams,
    same,
    small_header,
    write_streams,
)
from kvpolicy import TraceError
from kvpolicy.trace import Header, Sequence, Trace
from kvpolicy.trace.recover import salvage
from oracles.trace_format import PAGE, Draft, Frame, take_apart

HEADER = small_header(dtype="bfloat16", query_stride=2, layers=(1,), head_dim=4)
LENGTHS = (515, 3)
KINDS = ("q", "k", "v", "lse", "tokens")
MARKS = (("a", 0, 2),)

Everything = tuple[Header, tuple[Sequence, ...], dict[Stream, Tensor]]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, Everything]:
    """A small trace, as bytes and as what it says."""
    path = tmp_path_factory.mktemp("original") / "t.kvtrace"
    write_streams(path, HEADER, random_streams(HEADER, LENGTHS, KINDS), marks=MARKS)
    return path.read_bytes(), everything(path)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where broken traces go."""
    return tmp_path_factory.mktemp("broken") / "t.kvtrace"


def everything(path: Path) -> Everything:
    """Open, verify and read all of a trace.

    Raises:
        TraceError: It is refused.
    """
    with Trace.open(path) as trace:
        trace.verify()
        return trace.header, trace.sequences, read_streams(trace)


def attempt(path: Path, broken: bytes) -> tuple[Everything | None, Everything | None]:
    """What a broken trace says, or else what a repair of it would; None for what is refused."""
    # A new file: some systems flush one that is overwritten.
    path.unlink(missing_ok=True)
    path.write_bytes(broken)
    try:
        return everything(path), None
    except TraceError:
        pass
    try:
        saved = salvage(path).trace
        return None, (saved.header, saved.sequences, read_streams(saved))
    except TraceError:
        return None, None


def check_accident(broken: bytes, path: Path, original: tuple[bytes, Everything]) -> str:
    """After an accident a trace reads as it was, or not at all; so does what is saved of it."""
    _, (header, sequences, streams) = original
    read, saved = attempt(path, broken)
    assert read is None or (read[:2] == (header, sequences) and same(read[2], streams))
    if saved is not None:
        assert saved[0] == header
        for (kind, _, layer), rows in saved[2].items():
            assert any(is_beginning(rows, streams[kind, at, layer]) for at in range(len(LENGTHS)))
    return outcome(read, saved)


def check_forgery(broken: bytes, path: Path) -> str:
    """A forgery is refused, or is a trace that agrees with itself."""
    read, saved = attempt(path, broken)
    for found in (read, saved):
        if found is None:
            continue
        header, sequences, streams = found
        for (kind, sequence, layer), rows in streams.items():
            count = header.num_rows(kind, sequences[sequence].tokens)
            assert tuple(rows.shape) == header.shape(kind, count)
            assert rows.dtype == getattr(torch, header.element(kind))
            assert layer is None or layer in header.layers
    return outcome(read, saved)


def outcome(read: Everything | None, saved: Everything | None) -> str:
    """Words for the statistics."""
    if read is not None:
        return "read"
    return "refused" if saved is None else "refused, parts saved"


def is_beginning(rows: Tensor, whole: Tensor) -> bool:
    """Whether rows are the first ones of a tensor, bit by bit."""
    axis = 0 if rows.dim() == 1 else 1
    if rows.dtype != whole.dtype or rows.shape[axis] > whole.shape[axis]:
        return False
    part = whole.narrow(axis, 0, rows.shape[axis])
    return rows.shape == part.shape and torch.equal(bits(rows), bits(part))


def check(
    mutation: Mutation, random: Random, path: Path, original: tuple[bytes, Everything]
) -> str:
    """Break a trace and check what comes of it."""
    broken = mutation(random, original[0])
    if mutation in ACCIDENTS:
        return check_accident(broken, path, original)
    return check_forgery(broken, path)


@pytest.mark.parametrize("mutation", ACCIDENTS + FORGERIES, ids=lambda mutation: mutation.__name__)
def test_a_broken_trace_is_itself_or_refused(
    mutation: Mutation, path: Path, original: tuple[bytes, Everything]
) -> None:
    """Hundreds of accidents and forgeries: no other exception, no wrong number."""

    @settings(max_examples=60)
    @given(random=st.randoms(use_true_random=False))
    def run(random: Random) -> None:
        check(mutation, random, path, original)

    run()


@pytest.mark.slow
def test_a_hundred_thousand_broken_traces(
    path: Path, original: tuple[bytes, Everything], capsys: pytest.CaptureFixture[str]
) -> None:
    """The same at length, with what came of it; memory stays where it was."""
    random, counts, began = Random(0), Counter[str](), time.process_time()
    mutations = ACCIDENTS + FORGERIES
    for number in range(100_000):
        mutation = mutations[number % len(mutations)]
        counts[f"{mutation.__name__}: {check(mutation, random, path, original)}"] += 1
        if number == 5000:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    with capsys.disabled():
        print(
            f"\n{counts.total()} broken traces in {time.process_time() - began:.0f} s of CPU time"
        )
        for what, count in sorted(counts.items()):
            print(f"  {count:6}  {what}")
        print(f"  peak memory grew by {grown / 1024:.1f} MiB after the first 5000")
    assert grown < 8 * 1024


def test_mutations_reach_every_outcome(path: Path, original: tuple[bytes, Everything]) -> None:
    """The fuzz is not blind: some mutants are read, some refused, some partly saved."""
    random, counts = Random(1), Counter[str]()
    for mutation in ACCIDENTS + FORGERIES:
        for _ in range(30):
            counts[check(mutation, random, path, original)] += 1
    assert set(counts) == {"read", "refused", "refused, parts saved"}
    assert min(counts.values()) >= 15


# --- memory and time --------------------------------------------------------------------------


def bombs(data: bytes) -> dict[str, bytes]:
    """Files that ask for a lot on their own word."""
    found: dict[str, bytes] = {}
    for number, raw in enumerate(RAW):
        for where in ("header", "index", "frame"):
            draft = take_apart(data)
            if where == "header":
                draft.header = raw
            elif where == "index":
                draft.index = [[1, 1], raw]
            else:
                draft.frames[1].meta = raw
            built = draft.build()
            found[f"{where} {number}"] = built[:-16] if where == "frame" else built
    draft = take_apart(data)
    draft.index = [[1, 1], b"\x90" * 1_000_000]
    found["an index of a million empty lists"] = draft.build()
    draft.index = [[1, 1], b"\xdd\x00\x0f\x42\x40" + b"\x90" * 1_000_000]
    found["one entry of a million empty lists"] = draft.build()
    draft.index = [[1 << 40, 1 << 40]]
    found["counts without entries"] = draft.build()
    for key, value in (("head_dim", 1 << 16), ("num_query_heads", 1 << 16)):
        draft = take_apart(data)
        draft.header = msgpack.packb({**msgpack.unpackb(draft.header), key: value})
        found[f"{key} {value}"] = draft.build()
    draft = take_apart(data)
    sequence = next(entry for entry in draft.index if len(entry) == 5)
    sequence[1] = 1 << 40
    found["a sequence of 2^40 tokens"] = draft.build()
    return found


def test_no_memory_is_reserved_on_a_files_word(
    path: Path, original: tuple[bytes, Everything]
) -> None:
    """Forged lengths, counts and nestings cost no more than the file is large."""
    for name, broken in bombs(original[0]).items():
        path.write_bytes(broken)
        tracemalloc.start()
        began = time.monotonic()
        with pytest.raises(TraceError):
            everything(path)
        with suppress(TraceError):  # a repair may find the frames, which are right
            salvage(path)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 4 * len(broken) + (1 << 20), name
        assert time.monotonic() - began < 5, name


def test_damage_does_not_make_a_scan_quadratic(
    path: Path, original: tuple[bytes, Everything], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pages that all begin like long frames are passed over in linear time."""
    draft = take_apart(original[0])
    head = draft.build()[:PAGE]
    page = (b"SEQN" + (65_536).to_bytes(4, "little") + b"crc!").ljust(PAGE, b"\0")
    index = (b"INDX" + (1 << 23).to_bytes(4, "little") + b"crc!").ljust(PAGE, b"\0")
    path.write_bytes(head + page * 2000 + index * 4000)
    crc32, checked = zlib.crc32, 0

    def count(data: bytes, crc: int = 0) -> int:
        nonlocal checked
        checked += len(data)
        return crc32(data[:PAGE], crc)

    monkeypatch.setattr(kvpolicy.trace.frames.zlib, "crc32", count)
    with pytest.raises(TraceError, match="; 0 complete chunks"):
        Trace.open(path)
    with pytest.raises(TraceError, match="of 0 complete chunks"):
        salvage(path)
    assert checked < 20 * path.stat().st_size


def test_opening_does_not_search_a_hole(path: Path, original: tuple[bytes, Everything]) -> None:
    """A file that claims 64 GiB and has one page is refused at once."""
    path.write_bytes(original[0][:PAGE])
    os.truncate(path, 1 << 36)
    began = time.monotonic()
    with pytest.raises(TraceError, match="; 0 complete chunks"):
        Trace.open(path)
    assert time.monotonic() - began < 5
    path.unlink()


def test_empty_sequences_cost_no_time(path: Path) -> None:
    """Thousands of announcements under a header of thousands of layers are passed over."""
    header = small_header(num_layers=4096, layers=tuple(range(4096)))
    draft = Draft(msgpack.packb(header.as_dict()), [])
    draft.frames = [Frame(b"SEQN", msgpack.packb([n, 1, "", []])) for n in range(3000)]
    path.write_bytes(draft.build()[:-16])
    began = time.monotonic()
    with pytest.raises(TraceError, match="of 0 complete chunks"):
        salvage(path)
    assert time.monotonic() - began < 5


def test_a_trace_inside_a_payload_is_not_found(
    path: Path, original: tuple[bytes, Everything]
) -> None:
    """A scan does not take frames out of a chunk that holds another trace's bytes."""
    draft = take_apart(original[0])
    other = take_apart(original[0])
    other.header = msgpack.packb({**msgpack.unpackb(other.header), "model": "other"})
    foreign = other.build()
    draft.frames = [*draft.frames[:1], Frame(b"JUNK", b"", foreign)]
    path.write_bytes(draft.build()[:-16])
    with pytest.raises(TraceError, match="of 0 complete chunks"):
        salvage(path)
