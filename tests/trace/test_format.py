"""The format is what its documentation says, to the byte."""

import re
from pathlib import Path

import msgpack
import numpy as np
import pytest
import torch

from fixtures.small_traces import random_streams, read_streams, same, small_header, write_streams
from kvpolicy import TraceError
from kvpolicy.trace import Header, Trace, TraceWriter
from kvpolicy.trace.frames import END, MAGIC, MAX_HEADER, MAX_RECORD, MAX_SEQUENCE
from kvpolicy.trace.header import KINDS, MAX_ITEMS, MAX_SIZE, MAX_TEXT, TOKENS
from oracles import trace_format

DOCUMENT = Path(__file__).parents[2] / "docs" / "reference" / "trace-format.md"


@pytest.fixture
def example(tmp_path: Path) -> bytes:
    """The file that the document shows."""
    header = Header(
        model="tiny",
        num_layers=1,
        num_query_heads=1,
        num_kv_heads=1,
        layers=(0,),
        kv_heads=(0,),
        head_dim=2,
        value_dim=2,
        dtype="float32",
        scale=0.5,
    )
    with TraceWriter(tmp_path / "tiny.kvtrace", header) as writer:
        writer.begin(prompt_len=2, source="example", marks=[("needle", 0, 1)])
        for number, kind in enumerate("qkv"):
            writer.append(0, 0, kind, 0, torch.arange(6.0).view(1, 3, 2) + 8 * number)
    return (tmp_path / "tiny.kvtrace").read_bytes()


def test_the_document_shows_a_real_file(example: bytes) -> None:
    """The hex dump is that of the file which the text above it describes."""
    text = DOCUMENT.read_text("utf-8")
    (shown,) = re.findall(r"```text\n(0000.*?)\n```", text, flags=re.DOTALL)
    assert shown.splitlines() == list(trace_format.hexdump(example))
    assert f"{len(example):,} bytes" in text


def test_the_documents_explanation_of_the_file_is_true(example: bytes) -> None:
    """What the text says about the dump can be read from the file."""
    draft = trace_format.take_apart(example)
    assert len(draft.header) == 0xD6
    assert len(msgpack.unpackb(draft.header)) == 18
    announced, first, *_ = draft.frames
    assert len(announced.meta) == 22
    assert msgpack.unpackb(announced.meta) == [0, 2, "example", [["needle", 0, 1]]]
    assert len(first.meta) == 13
    assert msgpack.unpackb(first.meta) == ["q", 0, 0, 0, 3, 24, 0x91E79017]
    assert np.frombuffer(first.payload, "<f4").tolist() == [0, 1, 2, 3, 4, 5]
    assert draft.index[:3] == [
        [1, 3],
        [0, 3, 2, "example", [["needle", 0, 1]]],
        ["q", 0, 0, 0, 3, 0x3000, 24, 0x91E79017],
    ]


def test_the_document_names_every_key_kind_and_limit() -> None:
    """Nothing that the code knows is missing from the description."""
    text = DOCUMENT.read_text("utf-8")
    header = small_header().as_dict()
    for key in (*header, *header["rope"], *KINDS, TOKENS):
        assert f"`{key}`" in text, key
    for limit in (MAX_HEADER, MAX_SEQUENCE, *MAX_RECORD.values(), MAX_ITEMS, MAX_SIZE, MAX_TEXT):
        assert f"{limit:,}" in text, limit
    for magic in (MAGIC, END):
        assert magic.hex(" ") in text


def test_a_file_built_from_the_document_is_read(tmp_path: Path) -> None:
    """Pieces put together by other code are a trace, and the same one."""
    header = small_header(query_stride=3)
    streams = random_streams(header, [513, 7])
    original = write_streams(tmp_path / "a", header, streams).read_bytes()
    rebuilt = trace_format.take_apart(original).build()
    assert rebuilt == original
    (tmp_path / "b").write_bytes(rebuilt)
    with Trace.open(tmp_path / "b") as trace:
        assert same(read_streams(trace), streams)


def rewritten(data: bytes, **changes: object) -> bytes:
    """A trace with another header; a change to Ellipsis removes the key."""
    draft = trace_format.take_apart(data)
    header = {**msgpack.unpackb(draft.header), **changes}
    draft.header = msgpack.packb({k: v for k, v in header.items() if v is not ...})
    return draft.build()


def test_keys_may_be_added_to_the_header(example: bytes, tmp_path: Path) -> None:
    """Unknown keys are ignored, and those with defaults may be missing: version 1 can grow."""
    path = tmp_path / "t.kvtrace"
    path.write_bytes(rewritten(example, invented=[1, 2], producer=..., policy=..., rope=...))
    with Trace.open(path) as trace:
        assert trace.header.model == "tiny"
        assert (trace.header.producer, trace.header.policy, trace.header.rope) == ("", "full", None)


@pytest.mark.parametrize("version", [0, 2, 1 << 40, 1.0, "1", None, True])
def test_an_unknown_version_is_refused_first(
    example: bytes, tmp_path: Path, version: object
) -> None:
    """Another version is named and refused before anything else of the header is judged."""
    path = tmp_path / "t.kvtrace"
    path.write_bytes(rewritten(example, version=version, dtype="int4", layers=...))
    with pytest.raises(TraceError, match=r"format version .*, this kvpolicy reads version 1"):
        Trace.open(path)
