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
from kvpolicy.trace.header import REQUIRED, Header, Sequence, name_stream
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
    gets as many tokens as all its layers have of q, k and v. Where lse or out of a layer lags
    behind by more than a chunk, it is left out of that layer; otherwise tokens are cut to it.
    Sequences of which nothing is left are dropped and the others numbered anew.

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
    """

    header: Header
    packed_header: bytes
    sequences: dict[int, Sequence]
    chunks: list[Chunk]


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
        return _Found(scanned.header, scanned.packed_header, announced, scanned.chunks)
    chunks = [chunk for stream in contents.streams.values() for chunk in stream]
    known = {sequence.index: sequence for sequence in contents.sequences}
    return _Found(contents.header, contents.packed_header, known, chunks)


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

    def covered(kind: str, layer: int | None) -> int:
        return header.num_tokens(kind, num_rows(runs.get((kind, index, layer), ())))

    tokens = min(covered(kind, layer) for kind, layer in header.streams() if kind in REQUIRED)
    tokens = min(tokens, known.tokens) if known and known.tokens else tokens
    least = tokens - CHUNK_ROWS * header.query_stride
    optional = [(kind, layer) for kind, layer in header.streams() if kind not in REQUIRED]
    present = {at: covered(*at) for at in optional if covered(*at)}
    kept = [tokens, *(count for count in present.values() if count >= least)]
    dropped = [at for at, count in present.items() if count < least]
    lost += [f"{name_stream(kind, index, layer)}: there is too little" for kind, layer in dropped]
    if not tokens:
        lost.append(f"sequence {index}: no chunk of q, k and v in every layer")
        return 0
    tokens = min(kept)
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
