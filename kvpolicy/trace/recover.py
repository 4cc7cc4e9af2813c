"""What can be saved of a trace that is damaged or was not completed."""

import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from kvpolicy.errors import TraceError
from kvpolicy.trace.contents import Contents, num_rows, read_contents
from kvpolicy.trace.frames import CHUNK_ROWS, Buffer, Chunk, Stream
from kvpolicy.trace.header import MAX_NUMBER, REQUIRED, Header, Sequence, name_stream
from kvpolicy.trace.mapping import Mapping
from kvpolicy.trace.reader import Trace
from kvpolicy.trace.scan import scan
from kvpolicy.trace.slice import Sliced, write_slice

Advance = Callable[[int], object]


@dataclass(frozen=True)
class Salvage:
    """What was saved.

    Attributes:
        trace: It, readable as a trace; it shares the damaged file.
        num_chunks: Complete chunks found.
        num_intact: Those whose checksums match.
        num_used: Those of which the trace consists.
        numbers: Index of each sequence saved, by its index in the damaged file.
        lost: What is lost, one line each.
    """

    trace: Trace
    num_chunks: int
    num_intact: int
    num_used: int
    numbers: dict[int, int]
    lost: list[str]


def repair(path: str | Path, target: str | Path, advance: Advance = lambda _: None) -> Salvage:
    """Write a new trace of everything that is intact in a damaged one.

    Of each stream (kind, sequence, layer) the intact chunks from the beginning count; a sequence
    gets as many tokens as all its layers have of q, k and v. Where a trace has no index and lse,
    out or ids lag behind by no more than a chunk, tokens are cut to them, too; otherwise what is
    not complete of these is left out. Sequences of which nothing is left are dropped and the
    others numbered anew.

    Args:
        path: The damaged trace; it is not changed.
        target: The new trace; a file there is replaced once the new one is complete.
        advance: Told the bytes done, out of about twice the file's.

    Raises:
        OSError: A file cannot be opened.
        TraceError: Nothing can be recovered, `target` is `path`, or cannot be written.
    """
    path, target = Path(path), Path(target)
    if target.exists() and path.exists() and target.samefile(path):
        raise TraceError(f"{target} is the damaged trace itself; a repair writes another file")
    found = salvage(path, advance)
    write_slice(Sliced(found.trace), target, advance)
    return found


def salvage(path: str | Path, advance: Advance = lambda _: None) -> Salvage:
    """Find what is intact in a trace, by its index if that is right, otherwise by a scan.

    Args:
        path: The trace.
        advance: Told the bytes done.

    Raises:
        OSError: The file cannot be opened.
        TraceError: Nothing can be recovered.
    """
    path = Path(path)
    mapping = Mapping(path)
    try:
        found = _find(mapping.data)
    except TraceError as error:
        raise TraceError(f"{path}: {error}") from error
    intact, lost = _intact(mapping.data, found.chunks, advance)
    runs = _runs(intact, lost)
    streams: dict[Stream, list[Chunk]] = {}
    sequences: list[Sequence] = []
    numbers: dict[int, int] = {}
    for index in sorted({index for _, index, _ in runs} | set(found.sequences)):
        tokens = _saved_tokens(found, runs, index, lost)
        if not tokens:
            continue
        numbers[index] = new = len(sequences)
        sequences.append(_saved_sequence(found, index, tokens, lost).cut(0, tokens, new))
        for kind, layer in found.header.streams():
            rows = found.header.num_rows(kind, tokens)
            run = runs.get((kind, index, layer), [])
            if num_rows(run) >= rows:
                streams[kind, new, layer] = run[: -(-rows // CHUNK_ROWS)]
    if not sequences:
        raise TraceError(
            f"{path}: nothing can be recovered: of {len(found.chunks)} complete chunks "
            f"{len(intact)} are intact, and no sequence has q, k and v in every layer"
        )
    contents = Contents(found.header, found.packed_header, tuple(sequences), streams)
    return Salvage(
        trace=Trace(path, mapping, contents),
        num_chunks=len(found.chunks),
        num_intact=len(intact),
        num_used=sum(map(len, streams.values())),
        numbers=numbers,
        lost=lost,
    )


class _Found(NamedTuple):
    """What there is before anything is compared.

    Attributes:
        header: The header.
        packed_header: The header as it is stored.
        sequences: By index; with tokens if the index is right, otherwise with 0.
        chunks: Complete chunks.
        is_indexed: Whether they are from the index.
    """

    header: Header
    packed_header: bytes
    sequences: dict[int, Sequence]
    chunks: list[Chunk]
    is_indexed: bool


def _find(data: Buffer) -> _Found:
    """Read the index if it is right, otherwise scan.

    Raises:
        TraceError: The header cannot be read.
    """
    try:
        contents = read_contents(data)
    except TraceError:
        scanned = scan(data)
        announced = {sequence.index: sequence for sequence in reversed(scanned.sequences)}
        return _Found(scanned.header, scanned.packed_header, announced, scanned.chunks, False)
    chunks = [chunk for stream in contents.streams.values() for chunk in stream]
    known = {sequence.index: sequence for sequence in contents.sequences}
    return _Found(contents.header, contents.packed_header, known, chunks, True)


def _intact(
    data: Buffer, chunks: Iterable[Chunk], advance: Advance
) -> tuple[list[Chunk], list[str]]:
    """Chunks whose checksums match, and a line on each of the others."""
    intact: list[Chunk] = []
    lost: list[str] = []
    for chunk in chunks:
        if zlib.crc32(data[chunk.offset : chunk.offset + chunk.nbytes]) == chunk.crc:
            intact.append(chunk)
        else:
            lost.append(f"{chunk}: its checksum does not match")
        advance(chunk.nbytes)
    return intact, lost


def _runs(chunks: Iterable[Chunk], lost: list[str]) -> dict[Stream, list[Chunk]]:
    """Chunks of each stream from its beginning up to the first gap."""
    streams: dict[Stream, dict[int, Chunk]] = defaultdict(dict)
    for chunk in chunks:
        streams[chunk.stream].setdefault(chunk.start, chunk)
    runs: dict[Stream, list[Chunk]] = {}
    for stream, by_start in streams.items():
        run: list[Chunk] = []
        while (chunk := by_start.pop(len(run) * CHUNK_ROWS, None)) is not None:
            run.append(chunk)
            if chunk.count < CHUNK_ROWS:
                break
        runs[stream] = run
        lost += [f"{chunk}: rows before it are missing" for _, chunk in sorted(by_start.items())]
    return runs


def _saved_tokens(
    found: _Found, runs: dict[Stream, list[Chunk]], index: int, lost: list[str]
) -> int:
    """Tokens of a sequence that every layer has completely."""
    header, known = found.header, found.sequences.get(index)
    tokens = MAX_NUMBER
    optional: dict[tuple[str, int | None], int] = {}
    for kind, layer in header.streams():
        covered = header.num_tokens(kind, num_rows(runs.get((kind, index, layer), ())))
        if kind not in REQUIRED:
            optional[kind, layer] = covered
            continue
        tokens = min(tokens, covered)
        if not tokens:
            lost.append(f"sequence {index}: no chunk of q, k and v in every layer")
            return 0
    # Without an index, what is optional may lag behind; with one, it is damaged.
    least = tokens - (0 if found.is_indexed else CHUNK_ROWS * header.query_stride)
    dropped = [at for at, covered in optional.items() if 0 < covered < least]
    lost += [f"{name_stream(kind, index, layer)}: the rest of it" for kind, layer in dropped]
    tokens = min([tokens, *(n for n in optional.values() if n and n >= least)])
    if known and known.tokens > tokens:
        lost.append(f"sequence {index}: tokens {tokens}:{known.tokens}")
    return tokens


def _saved_sequence(found: _Found, index: int, tokens: int, lost: list[str]) -> Sequence:
    """A sequence as it was announced, or what can be said without."""
    known = found.sequences.get(index)
    if known is not None:
        return known
    lost.append(f"sequence {index}: its prompt's length, source and marks")
    return Sequence(index, tokens, tokens)
