"""``kvpolicy trace``: traces that no model made."""

import argparse
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvpolicy.cli.arguments import CommandParser, command_parser, positive
from kvpolicy.cli.output import Output, count, figure, ranges, size
from kvpolicy.trace import Trace
from kvpolicy.trace.header import ITEM_BYTES

EXAMPLES = """
  kvpolicy trace synth --pattern drift --tokens 2048 --out d.kvtrace
  kvpolicy trace synth --pattern needle --tokens 8192 --layers 2 --seed 1 --out n.kvtrace
  kvpolicy trace synth --help
"""

PATTERNS = {
    "sink": "about half of the weight on the first tokens, much of the rest on recent ones",
    "heavy": "a few tokens of lasting, Zipf-like weight",
    "drift": "topics that come, go and return; hard for policies that go by the past",
    "needle": "a span, marked `needle`, that only the last queries attend to",
}


def run(arguments: Sequence[str]) -> int:
    """Do what the first argument says."""
    parser = CommandParser(
        prog="kvpolicy trace",
        usage="kvpolicy trace synth [arguments]",
        description="Make synthetic traces, for tests and to see what a policy is bad at.",
        epilog=f"examples:{EXAMPLES.rstrip()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "action", choices=("synth",), metavar="ACTION", help="synth: write a trace of a pattern"
    )
    parser.parse_args(arguments[:1])
    return _synth(arguments[1:])


def require_room(path: Path, num_bytes: float) -> None:
    """Raise before work begins that the disk cannot hold.

    Raises:
        OSError: There is too little room, or no such folder.
    """
    free = shutil.disk_usage(path.parent).free
    if num_bytes > free:
        raise OSError(
            f"{path} needs {size(num_bytes)} and {path.parent} has {size(free)} free; record "
            "fewer tokens, layers or heads, or write to another disk"
        )


def show(output: Output, trace: Trace, tokens: int, seconds: float) -> None:
    """Print what was written, and say so in JSON."""
    header = trace.header
    output.print(
        f"{trace.path}: {size(trace.num_bytes)}, {count(len(trace.sequences), 'sequence')}, "
        f"{tokens:,} tokens, layers {ranges(header.layers)}, KV heads {ranges(header.kv_heads)}\n"
        f"{size(trace.num_bytes / tokens)} per token; {seconds:,.1f} s, "
        f"{figure(tokens / seconds, 0)} tokens/s"
    )
    output.json(
        {
            "schema": 1,
            "path": str(trace.path),
            "model": header.model,
            "sequences": [
                {
                    "tokens": sequence.tokens,
                    "prompt_len": sequence.prompt_len,
                    "source": sequence.source,
                    "marks": sequence.marks,
                }
                for sequence in trace.sequences
            ],
            "tokens": tokens,
            "layers": list(header.layers),
            "kv_heads": list(header.kv_heads),
            "query_stride": header.query_stride,
            "dtype": header.dtype,
            "bytes": trace.num_bytes,
            "bytes_per_token": trace.num_bytes / tokens,
            "seconds": seconds,
            "tokens_per_second": tokens / seconds,
        }
    )


def _synth(arguments: Sequence[str]) -> int:
    """Write a synthetic trace."""
    from kvpolicy_sim.capture import bytes_per_token
    from kvpolicy_sim.synth import synth, synth_header

    options = _synth_parser().parse_args(arguments)
    output = Output(options.json, others=[options.out])
    shape: dict[str, Any] = {
        "layers": options.layers,
        "kv_heads": options.kv_heads,
        "group": options.group,
        "head_dim": options.head_dim,
        "dtype": options.dtype,
    }
    kinds: dict[str, Any] = {"outputs": not options.no_outputs, "lse": not options.no_lse}
    header = synth_header(options.pattern, **shape)
    expected = options.tokens * bytes_per_token(header, **kinds, tokens=False)
    require_room(Path(options.out), expected)
    began = time.perf_counter()
    with output.progress() as steps:
        trace = synth(
            options.out,
            pattern=options.pattern,
            tokens=options.tokens,
            **shape,
            **kinds,
            seed=options.seed,
            prompt_len=options.prompt_len,
            advance=steps.begin("synth", options.tokens * options.layers, "tokens"),
        )
    with trace:
        show(output, trace, options.tokens, time.perf_counter() - began)
    return 0


def _synth_parser() -> argparse.ArgumentParser:
    parser = command_parser(
        "trace synth",
        "Write a trace whose full attention shows a pattern:\n"
        + "\n".join(f"  {name:7} {what}" for name, what in PATTERNS.items()),
        EXAMPLES,
    )
    parser.add_argument("--pattern", choices=PATTERNS, required=True, help="one of the above")
    parser.add_argument("--out", metavar="T.kvtrace", required=True, help="the trace to write")
    for name, default, what in (
        ("tokens", 2048, "length of its one sequence"),
        ("layers", 1, "layers, independent of each other"),
        ("kv-heads", 2, "KV heads of a layer"),
        ("group", 4, "query heads per KV head"),
        ("head-dim", 64, "size of keys and values, at least 32"),
    ):
        parser.add_argument(
            f"--{name}",
            type=positive(),
            default=default,
            metavar="N",
            help=f"{what} (default: {default})",
        )
    parser.add_argument(
        "--dtype", choices=ITEM_BYTES, default="float32", help="of its numbers (default: float32)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="default: 0")
    parser.add_argument(
        "--prompt-len", type=positive(), metavar="N", help="tokens of the prompt (default: all)"
    )
    parser.add_argument("--no-outputs", action="store_true", help="leave attention's outputs out")
    parser.add_argument(
        "--no-lse", action="store_true", help="leave the log-sum-exp out; with both out it is fast"
    )
    return parser
