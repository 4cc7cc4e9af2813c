"""Slices and exports: the same numbers, fewer of them."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import kvpolicy.trace.export
from fixtures.small_traces import (
    Stream,
    equal_bits,
    random_streams,
    read_streams,
    same,
    small_header,
    write_streams,
)
from kvpolicy import TraceError, UnsupportedError
from kvpolicy.trace import Trace
from kvpolicy.trace.export import export_safetensors, free_memory
from kvpolicy.trace.slice import Selection, Sliced, write_slice

HEADER = small_header(
    num_layers=5, layers=(0, 2, 3), num_kv_heads=3, num_query_heads=6, kv_heads=(0, 1, 2)
)
LENGTHS = (1100, 30, 600)
MARKS = (("early", 3, 9), ("late", 20, 520))


@pytest.fixture(scope="module")
def streams() -> dict[Stream, Tensor]:
    """What the trace holds."""
    return random_streams(HEADER, LENGTHS)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory, streams: dict[Stream, Tensor]) -> Path:
    """A trace of three sequences, three layers and three KV heads."""
    target = tmp_path_factory.mktemp("traces") / "t.kvtrace"
    return write_streams(target, HEADER, streams, prompt_len=25, marks=MARKS)


def sliced(path: Path, target: Path, text: str) -> Sliced:
    """Write a slice of a trace."""
    with Trace.open(path) as trace:
        part = Sliced(trace, Selection.parse(text))
        write_slice(part, target)
    return part


# --- text -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("layers=3", Selection(layers=(range(3, 4),))),
        ("layers=0:2,5", Selection(layers=(range(2), range(5, 6)))),
        (
            " layers = 0:2 , tokens=0:512,sequence=0,kv_heads=1",
            Selection(
                layers=(range(2),),
                tokens=range(512),
                sequences=(range(1),),
                kv_heads=(range(1, 2),),
            ),
        ),
        ("sequences=1,3", Selection(sequences=(range(1, 2), range(3, 4)))),
        ("tokens=:512", Selection(tokens=range(512))),
        ("tokens=7:", Selection(tokens=range(7, 1 << 48))),
    ],
)
def test_a_slice_is_read(text: str, expected: Selection) -> None:
    """Half-open ranges and indices, joined by commas."""
    assert Selection.parse(text) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "a slice is KEY=FIRST:LAST"),
        ("0:2", "a slice is KEY=FIRST:LAST"),
        ("heads=1", "a slice has no 'heads'; choose from layers, kv_heads, sequence, tokens"),
        ("layers=", "layers must be FIRST:LAST or an index, got ''"),
        ("layers=a", "got 'a'"),
        ("layers=-1", "got '-1'"),
        ("layers=2:2", "got '2:2'"),
        ("layers=3:1", "got '3:1'"),
        ("layers=1:2:3", "got '1:2:3'"),
        ("layers=1,", "got ''"),
        ("layers=1,layers=2", "layers is given twice"),
        ("sequence=1,sequences=2", "sequence is given twice"),
        ("tokens=0:5,7:9", "tokens takes one range"),
        (f"layers={'9' * 5000}", "layers must be"),
    ],
)
def test_a_wrong_slice_says_what_is_wrong(text: str, message: str) -> None:
    """Keys and ranges that make no sense are named."""
    with pytest.raises(TraceError, match=message):
        Selection.parse(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("layers=1", r"layers=1 is not all in the trace, which has \[0, 2, 3\]"),
        ("layers=0:4", r"layers=0:4 is not all in the trace"),
        ("kv_heads=2:4", r"kv_heads=2:4 is not all in the trace"),
        ("sequence=3", r"sequence=3 is not all in the trace, which has \[0, 1, 2\]"),
        ("tokens=30:40", r"tokens=30:... begins behind sequence 1, which has 30 tokens"),
    ],
)
def test_what_the_trace_does_not_have_is_named(path: Path, text: str, message: str) -> None:
    """A slice must exist in the trace."""
    with Trace.open(path) as trace, pytest.raises(TraceError, match=message):
        Sliced(trace, Selection.parse(text))


# --- slices -----------------------------------------------------------------------------------


@settings(max_examples=40)
@given(
    layers=st.none() | st.sets(st.sampled_from(HEADER.layers), min_size=1),
    kv_heads=st.none() | st.sets(st.integers(0, 2), min_size=1),
    sequences=st.none() | st.sets(st.sampled_from([0, 2]), min_size=1),
    tokens=st.none() | st.tuples(st.integers(0, 29), st.integers(1, 1200)),
)
def test_a_slice_has_exactly_what_was_chosen(
    tmp_path_factory: pytest.TempPathFactory,
    path: Path,
    streams: dict[Stream, Tensor],
    layers: set[int] | None,
    kv_heads: set[int] | None,
    sequences: set[int] | None,
    tokens: tuple[int, int] | None,
) -> None:
    """Layers, heads, sequences and tokens in any combination; lse and out only from token 0."""
    first, size = tokens or (0, 10_000)
    chosen = {
        "layers": layers,
        "kv_heads": kv_heads,
        "sequence": sequences,
    }
    items = [f"{key}={','.join(map(str, sorted(x)))}" for key, x in chosen.items() if x]
    if tokens:
        items.append(f"tokens={first}:{first + size}")
    target = tmp_path_factory.mktemp("slices") / "s.kvtrace"
    part = sliced(path, target, ",".join(items) or "tokens=0:")
    heads = sorted(kv_heads) if kv_heads else [0, 1, 2]
    query_heads = [2 * head + i for head in heads for i in range(2)]
    expected: dict[Stream, Tensor] = {}
    for new, old in enumerate(sorted(sequences) if sequences else [0, 1, 2]):
        for (kind, sequence, layer), rows in streams.items():
            is_chosen = sequence == old and (layers is None or layer is None or layer in layers)
            if not is_chosen or (first and kind in ("lse", "out")):
                continue
            if kind == "tokens":
                expected[kind, new, None] = rows[first : first + size]
            else:
                own = heads if kind in ("k", "v") else query_heads
                expected[kind, new, layer] = rows[own][:, first : first + size]
    with Trace.open(target) as trace:
        assert trace.verify() == []
        assert same(read_streams(trace), expected)
        assert trace.header == part.header
        assert trace.header.kv_heads == tuple(heads)
        assert trace.header.group == 2
        assert trace.sequences == part.sequences
        assert bool(part.notes) == bool(first)


def test_marks_and_prompt_move_with_the_tokens(path: Path, tmp_path: Path) -> None:
    """Positions count from the slice's first token."""
    sliced(path, tmp_path / "s", "tokens=5:100,sequence=2")
    with Trace.open(tmp_path / "s") as trace:
        assert trace.sequences[0].prompt_len == 20
        assert trace.sequences[0].marks == (("early", 0, 4), ("late", 15, 95))
        assert trace.sequences[0].source == "source 2"


def test_a_slice_begins_at_a_recorded_query(tmp_path: Path) -> None:
    """With every third query, tokens 3, 6, ... can be first; others are refused."""
    header = small_header(query_stride=3)
    streams = random_streams(header, [1600])
    path = write_streams(tmp_path / "t", header, streams)
    sliced(path, tmp_path / "s", "tokens=1539:1600")
    with Trace.open(tmp_path / "s") as trace:
        assert equal_bits(trace.read("q", 0), streams["q", 0, 0][:, 513:])
        assert equal_bits(trace.read("k", 0), streams["k", 0, 0][:, 1539:])
    with pytest.raises(TraceError, match="must begin at a multiple of 3"):
        sliced(path, tmp_path / "s", "tokens=4:")


def test_a_slice_does_not_read_what_it_leaves_out(path: Path, tmp_path: Path) -> None:
    """Damage elsewhere does not matter; damage inside leaves no file behind."""
    data = bytearray(path.read_bytes())
    with Trace.open(path) as trace:
        data[trace._contents.streams["k", 0, 2][1].offset] ^= 1
    (tmp_path / "b").write_bytes(data)
    sliced(tmp_path / "b", tmp_path / "s", "tokens=0:512")
    sliced(tmp_path / "b", tmp_path / "s", "layers=0,3")
    (tmp_path / "s").unlink()
    with pytest.raises(TraceError, match="k of layer 2, sequence 0, rows 512:1024"):
        sliced(tmp_path / "b", tmp_path / "s", "tokens=0:513,layers=2")
    assert not (tmp_path / "s").exists()


def test_a_slice_may_replace_its_trace(
    path: Path, tmp_path: Path, streams: dict[Stream, Tensor]
) -> None:
    """The old file is read to the end before it is replaced."""
    copy = tmp_path / "t"
    copy.write_bytes(path.read_bytes())
    sliced(copy, copy, "tokens=0:600")
    with Trace.open(copy) as trace:
        assert equal_bits(trace.read("q", 3), streams["q", 0, 3][:, :600])
    assert [file.name for file in tmp_path.iterdir()] == ["t"]


# --- exports ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_an_export_holds_every_tensor(tmp_path: Path, dtype: str) -> None:
    """Safetensors gives the same bits under s0.l3.q and so on, and the header as metadata."""
    from safetensors import safe_open

    header = small_header(dtype=dtype)
    streams = random_streams(header, [600, 2])
    path = write_streams(tmp_path / "t", header, streams, marks=[("a", 0, 1)])
    target = tmp_path / "t.safetensors"
    done: list[int] = []
    with Trace.open(path) as trace:
        export_safetensors(Sliced(trace), target, done.append)
        expected = [(s.index, s.tokens, s.marks) for s in trace.sequences]
    assert sum(done) == sum(x.nbytes for x in streams.values())
    with safe_open(target, "pt") as file:
        names = {
            f"s{sequence}.{kind}" if layer is None else f"s{sequence}.l{layer}.{kind}": rows
            for (kind, sequence, layer), rows in streams.items()
        }
        assert set(file.keys()) == set(names)
        assert all(equal_bits(file.get_tensor(name), rows) for name, rows in names.items())
        about = json.loads(file.metadata()["kvtrace"])
    assert about["header"] == json.loads(json.dumps(header.as_dict()))
    assert [
        (s["index"], s["tokens"], tuple(map(tuple, s["marks"]))) for s in about["sequences"]
    ] == expected


def test_a_slice_can_be_exported(path: Path, tmp_path: Path, streams: dict[Stream, Tensor]) -> None:
    """Names are those of the slice's sequences and of the model's layers."""
    from safetensors.torch import load_file

    with Trace.open(path) as trace:
        selection = Selection.parse("sequence=2,layers=3,kv_heads=1,tokens=500:520")
        export_safetensors(Sliced(trace, selection), tmp_path / "t")
    found = load_file(tmp_path / "t")
    assert set(found) == {"s0.l3.q", "s0.l3.k", "s0.l3.v", "s0.tokens"}
    assert equal_bits(found["s0.l3.q"], streams["q", 2, 3][2:4, 500:520])


def test_an_export_that_does_not_fit_is_refused(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The estimate and what is free are named, before anything is read."""
    monkeypatch.setattr(kvpolicy.trace.export, "free_memory", lambda: 1000)
    with (
        Trace.open(path) as trace,
        pytest.raises(TraceError, match=r"all tensors in memory, .* GiB, and .* GiB are free"),
    ):
        export_safetensors(Sliced(trace), tmp_path / "t")
    assert list(tmp_path.iterdir()) == []


def test_free_memory_is_known_here() -> None:
    """The figure is plausible, or not known."""
    free = free_memory()
    assert free is None or free > 1 << 20


def test_an_export_without_safetensors_says_so(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The core does not need safetensors; the export does, and names it."""

    def find_spec(name: str) -> Any:
        return None if name == "safetensors" else sys.modules[name].__spec__

    monkeypatch.setattr("kvpolicy.extras.find_spec", find_spec)
    with (
        Trace.open(path) as trace,
        pytest.raises(UnsupportedError, match="needs safetensors, which is not installed"),
    ):
        export_safetensors(Sliced(trace), tmp_path / "t")


def test_a_failed_export_leaves_nothing(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An existing file stays until the new one is complete."""
    import safetensors.torch

    (tmp_path / "t").write_text("old")

    def fail(tensors: Any, target: Path, metadata: Any) -> None:
        target.write_text("half")
        raise OSError("disk full")

    monkeypatch.setattr(safetensors.torch, "save_file", fail)
    with Trace.open(path) as trace, pytest.raises(OSError, match="disk full"):
        export_safetensors(Sliced(trace), tmp_path / "t")
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("t", "old")]


def test_slices_keep_numbers_that_are_no_numbers(tmp_path: Path) -> None:
    """NaN payloads and signed zeros pass through bit by bit."""
    header = small_header(layers=(0,))
    streams = random_streams(header, [10], kinds=("q", "k", "v"))
    streams["k", 0, 0].view(torch.int32)[:] = 0x7FC12345
    streams["v", 0, 0][:] = -0.0
    path = write_streams(tmp_path / "t", header, streams)
    sliced(path, tmp_path / "s", "tokens=0:10")
    with Trace.open(tmp_path / "s") as trace:
        assert same(read_streams(trace), streams)
