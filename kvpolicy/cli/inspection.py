"""``kvpolicy inspect``: what a trace holds, whether it is intact, and parts of it."""

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.text import Text

from kvpolicy.cli import FAILED
from kvpolicy.cli.arguments import command_parser
from kvpolicy.cli.output import Advance, Output, count, ranges, size, table
from kvpolicy.errors import TraceError
from kvpolicy.extras import require

if TYPE_CHECKING:
    from kvpolicy.trace import Trace
    from kvpolicy.trace.slice import Selection, Sliced

EXAMPLES = """
  kvpolicy inspect t.kvtrace
  kvpolicy inspect t.kvtrace --verify
  kvpolicy inspect t.kvtrace.part --repair t.kvtrace
  kvpolicy inspect t.kvtrace --slice layers=0:2,tokens=0:512 --out small.kvtrace
  kvpolicy inspect t.kvtrace --slice sequence=0,kv_heads=0,3 --export head.safetensors
  kvpolicy inspect t.kvtrace --json - | jq .bytes_per_token
"""

_SHOWN = 20
"""Sequences, layers and faults that the text lists; JSON has all of them."""


def run(arguments: Sequence[str]) -> int:
    """Inspect a trace; 1 if it is damaged."""
    parser = _parser()
    options = parser.parse_args(arguments)
    selection = _selection(parser, options)
    if options.export is not None:
        require("safetensors", "the export")
    output = Output(
        options.json,
        inputs=[options.trace],
        others=[options.out, options.export, options.repair],
    )
    if options.repair is not None:
        return _repair(options, output)
    from kvpolicy.trace import Trace
    from kvpolicy.trace.slice import Sliced

    try:
        trace = Trace.open(options.trace)
    except TraceError as error:
        output.json({"schema": 1, "path": options.trace, "ok": False, "error": str(error)})
        raise
    with trace:
        with _usage(parser):
            sliced = Sliced(trace, selection)
        result = describe(trace)
        _print(trace, output)
        try:
            if options.verify:
                _verify(trace, output, result)
            if result["ok"]:
                _take(options, sliced, output, result)
        except TraceError as error:
            result.update(ok=False, error=str(error))
            raise
        finally:
            output.json(result)
    return 0 if result["ok"] else FAILED


def describe(trace: "Trace") -> dict[str, Any]:
    """A trace as JSON."""
    from kvpolicy.trace.header import TOKENS

    layers = [
        {"layer": layer, "bytes": _layer_bytes(trace, layer)} for layer in trace.header.layers
    ]
    tokens = sum(sequence.tokens for sequence in trace.sequences)
    id_bytes = _bytes(trace, TOKENS, None)
    num_bytes = id_bytes + sum(sum(found["bytes"].values()) for found in layers)
    return {
        "schema": 1,
        "path": str(trace.path),
        "ok": True,
        "error": None,
        "file_bytes": trace.num_bytes,
        "tokens": tokens,
        "bytes_per_token": num_bytes / tokens,
        "header": trace.header.as_dict(),
        "sequences": [asdict(sequence) for sequence in trace.sequences],
        "layers": layers,
        "token_id_bytes": id_bytes,
        "verified": False,
        "damage": [],
    }


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(
        "inspect",
        "Show what a trace holds; verify, repair, slice or export it.",
        EXAMPLES,
    )
    parser.add_argument("trace", metavar="T.kvtrace", help="a trace, from `kvpolicy capture`")
    parser.add_argument("--verify", action="store_true", help="compare every checksum")
    parser.add_argument(
        "--repair",
        metavar="OUT",
        help="write what is intact of a damaged or unfinished trace as a new one",
    )
    parser.add_argument(
        "--slice",
        metavar="S",
        help="a part: layers=, kv_heads=, sequence=, tokens=, each with FIRST:LAST (past the last) "
        "or indices, all joined by commas; needs --out or --export",
    )
    parser.add_argument("--out", metavar="FILE", help="write the slice as a new trace")
    parser.add_argument("--export", metavar="FILE", help="write tensors s0.l3.q ... as safetensors")
    return parser


def _selection(parser: argparse.ArgumentParser, options: argparse.Namespace) -> "Selection":
    """Check that the options fit together, and read the slice."""
    if options.slice is None:
        if options.out is not None:
            parser.error("--out writes a slice; add --slice")
    elif options.out is None and options.export is None:
        parser.error("--slice needs --out FILE or --export FILE")
    for name in ("verify", "slice", "export"):
        if options.repair is not None and getattr(options, name):
            parser.error(f"--repair writes a new trace; use --{name} on that one")
    from kvpolicy.trace.slice import Selection

    with _usage(parser):
        return Selection() if options.slice is None else Selection.parse(options.slice)


@contextmanager
def _usage(parser: argparse.ArgumentParser) -> Iterator[None]:
    """Take an impossible request for bad usage, which damage is not."""
    try:
        yield
    except TraceError as error:
        parser.error(str(error))


def _verify(trace: "Trace", output: Output, result: dict[str, Any]) -> None:
    """Compare checksums and print what is wrong."""
    with output.progress() as steps:
        damage = trace.verify(_mebibytes(steps.begin("verify", trace.num_bytes / 2**20, "MiB")))
    result.update(verified=True, ok=not damage, damage=damage)
    if not damage:
        output.print("\nEvery checksum matches.")
        return
    result["error"] = f"damaged in {count(len(damage), 'place')}"
    output.print(f"\nDamaged in {count(len(damage), 'place')}:")
    _print_lines(output, damage)
    output.print(
        Text(f"What is intact can be recovered: kvpolicy inspect {trace.path} --repair OUT")
    )


def _take(
    options: argparse.Namespace, sliced: "Sliced", output: Output, result: dict[str, Any]
) -> None:
    """Write the slice and the export that were asked for."""
    from kvpolicy.trace.export import export_safetensors
    from kvpolicy.trace.slice import write_slice

    for key, target, write in (
        ("slice", options.out, write_slice),
        ("export", options.export, export_safetensors),
    ):
        if target is None:
            continue
        with output.progress() as steps:
            write(sliced, target, _mebibytes(steps.begin(key, sliced.num_bytes / 2**20, "MiB")))
        result[key] = _written(sliced, target)
        output.print(Text(f"\nWrote {target}: {size(sliced.num_bytes)} of numbers"))
        _print_lines(output, sliced.notes)


def _repair(options: argparse.Namespace, output: Output) -> int:
    """Write what is intact."""
    from kvpolicy.trace.recover import repair

    total = 2 * Path(options.trace).stat().st_size / 2**20
    with output.progress() as steps:
        saved = repair(
            options.trace, options.repair, _mebibytes(steps.begin("repair", total, "MiB"))
        )
    tokens = sum(sequence.tokens for sequence in saved.trace.sequences)
    output.print(
        Text(
            f"Wrote {options.repair}: {count(len(saved.numbers), 'sequence')}, "
            f"{count(tokens, 'token')}.\n"
            f"Of {saved.num_chunks} complete chunks {saved.num_intact} are intact, "
            f"{saved.num_used} were used."
        )
    )
    if saved.lost:
        output.print("Lost:")
        _print_lines(output, saved.lost)
    if any(old != new for old, new in saved.numbers.items()):
        output.print(f"Sequences were numbered anew (old: new): {saved.numbers}")
    output.json(
        {
            "schema": 1,
            "path": options.trace,
            "repair": {
                "path": options.repair,
                "chunks": saved.num_chunks,
                "intact": saved.num_intact,
                "used": saved.num_used,
                "tokens": tokens,
                "sequences": [
                    {"index": new, "was": old, "tokens": saved.trace.sequences[new].tokens}
                    for old, new in saved.numbers.items()
                ],
                "lost": saved.lost,
            },
        }
    )
    return 0


def _written(sliced: "Sliced", target: str) -> dict[str, Any]:
    """A slice as JSON."""
    return {
        "path": target,
        "bytes": sliced.num_bytes,
        "header": sliced.header.as_dict(),
        "sequences": [asdict(sequence) for sequence in sliced.sequences],
        "notes": sliced.notes,
    }


def _print(trace: "Trace", output: Output) -> None:
    """Print header, sequences and sizes."""
    tokens = sum(sequence.tokens for sequence in trace.sequences)
    facts = table("", "", left=2)
    facts.show_header = False
    for name, value in _facts(trace).items():
        facts.add_row(name, Text(_printable(value)))
    output.print(
        Text(
            _printable(
                f"{trace.path}: {count(len(trace.sequences), 'sequence')}, "
                f"{count(tokens, 'token')}, "
            )
            + size(trace.num_bytes)
        )
    )
    output.print(facts)
    output.print()
    output.print(_sequence_table(trace))
    output.print()
    output.print(_size_table(trace))


def _facts(trace: "Trace") -> dict[str, str]:
    """The header in words."""
    header = trace.header
    rope = header.rope
    with_ids = sum(trace.has("tokens", None, sequence.index) for sequence in trace.sequences)
    some_ids = f"of {with_ids} of {len(trace.sequences)} sequences" if with_ids else "not recorded"
    return {
        "model": f"{header.model} {header.model_type}".strip(),
        "fingerprint": header.fingerprint or "-",
        "tokenizer": header.tokenizer or "-",
        "recorded by": header.producer or "-",
        "policy": header.policy,
        "layers": f"{len(header.layers)} of {header.num_layers}: {ranges(header.layers, _SHOWN)}",
        "KV heads": f"{len(header.kv_heads)} of {header.num_kv_heads}: "
        f"{ranges(header.kv_heads, _SHOWN)}, {header.group} query heads each",
        "numbers": f"{header.dtype}, keys of {header.head_dim}, values of {header.value_dim}, "
        f"scale {header.scale:.6g}",
        "queries": "all"
        if header.query_stride == 1
        else f"of the tokens 0, {header.query_stride}, {2 * header.query_stride}, ...",
        "token ids": "recorded" if with_ids == len(trace.sequences) else some_ids,
        "RoPE": "unknown"
        if rope is None
        else f"{rope.kind}, {len(rope.inverse_frequencies)} frequencies"
        + (", interleaved" if rope.interleaved else ""),
    }


def _sequence_table(trace: "Trace") -> Any:
    rows = table("sequence", "tokens", "prompt", "source", "marks")
    for column in rows.columns[3:]:
        column.justify, column.no_wrap = "left", False
    for sequence in trace.sequences[:_SHOWN]:
        marks = [f"{name} {first}:{last}" for name, first, last in sequence.marks[:_SHOWN]]
        more = len(sequence.marks) - _SHOWN
        rows.add_row(
            str(sequence.index),
            f"{sequence.tokens:,}",
            f"{sequence.prompt_len:,}",
            Text(_printable(sequence.source or "-")),
            Text(_printable(", ".join(marks) or "-") + (f" and {more} more" if more > 0 else "")),
        )
    if len(trace.sequences) > _SHOWN:
        rows.add_row(f"and {len(trace.sequences) - _SHOWN} more")
    return rows


def _size_table(trace: "Trace") -> Any:
    """Bytes by layer and kind."""
    layers = [(layer, _layer_bytes(trace, layer)) for layer in trace.header.layers]
    kinds = [kind for kind in layers[0][1] if any(found[kind] for _, found in layers)]
    tokens = sum(sequence.tokens for sequence in trace.sequences)
    rows = table("layer", *kinds, "together")
    shown = layers if len(layers) <= _SHOWN else layers[: _SHOWN - 2]
    for layer, found in shown:
        cells = [size(found[kind]) if found[kind] else "-" for kind in kinds]
        rows.add_row(str(layer), *cells, size(sum(found.values())))
    if len(shown) < len(layers):
        rows.add_row(f"and {len(layers) - len(shown)} more")
    totals = [sum(found[kind] for _, found in layers) for kind in kinds]
    rows.add_row("all", *map(size, totals), size(sum(totals)))
    rows.add_row("per token", *(size(n / tokens) for n in totals), size(sum(totals) / tokens))
    return rows


def _layer_bytes(trace: "Trace", layer: int) -> dict[str, int]:
    """Bytes of a layer by kind, over all sequences."""
    from kvpolicy.trace.header import KINDS

    return {kind: _bytes(trace, kind, layer) for kind in KINDS}


def _bytes(trace: "Trace", kind: str, layer: int | None) -> int:
    return sum(trace.payload_bytes(kind, layer, s.index) for s in trace.sequences)


def _print_lines(output: Output, lines: Sequence[str]) -> None:
    """Print some lines and say how many there are more."""
    for line in lines[:_SHOWN]:
        output.print(Text(f"  {_printable(line)}"))
    if len(lines) > _SHOWN:
        output.print(f"  and {len(lines) - _SHOWN} more")


def _printable(text: str) -> str:
    """Text of a file that nobody vouches for, without what steers a terminal."""
    return "".join(c if c.isprintable() else "\ufffd" for c in text)


def _mebibytes(advance: Advance) -> Callable[[int], None]:
    """Count bytes in MiB."""
    return lambda num_bytes: advance(num_bytes / 2**20)
