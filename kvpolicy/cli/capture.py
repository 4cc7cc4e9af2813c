"""``kvpolicy capture``: record what a model's attention receives and returns."""

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, TypeAlias

from kvpolicy.bundled import bundled_model
from kvpolicy.bundled.passkey import FACT, make_passkey
from kvpolicy.cli.arguments import command_parser, indices, positive
from kvpolicy.cli.output import Output, size
from kvpolicy.cli.source import add_source, load_model, read_text
from kvpolicy.cli.trace import require_room, show
from kvpolicy.extras import require
from kvpolicy.trace import Mark

# The host's type: this package may import hosts only inside functions.
Checkpoint: TypeAlias = Any

EXAMPLES = """
  kvpolicy capture --text book.txt --tokens 2048 --out t.kvtrace
  kvpolicy capture --tokens 1024 --sequences 8 --layers 0,2:4 --out t.kvtrace
  kvpolicy capture --model DIR --dtype bfloat16 --tokens 8192 --kv-heads 0:2 --out t.kvtrace
  kvpolicy capture --tokens 1024 --passkey 4 --out needle.kvtrace
"""


@dataclass(frozen=True)
class Text:
    """One sequence to record.

    Attributes:
        tokens: Token ids.
        prompt_len: How many of them are the prompt.
        source: Where it comes from.
        marks: Named spans.
    """

    tokens: list[int]
    prompt_len: int
    source: str
    marks: tuple[Mark, ...] = ()


def run(arguments: Sequence[str]) -> int:
    """Record a trace."""
    parser = _parser()
    options = parser.parse_args(arguments)
    require("transformers")
    output = Output(options.json, inputs=[options.text], others=[options.out])
    text = read_text(options)
    checkpoint = load_model(options, options.dtype)
    try:
        texts = (_passkeys if options.passkey else _windows)(options, checkpoint, text)
    except ValueError as error:
        parser.error(str(error))
    try:
        _capture(options, checkpoint, texts, output)
    except KeyboardInterrupt:
        part = Path(f"{options.out}.part")
        if part.exists():
            print(
                f"kvpolicy capture: interrupted; what was complete can be recovered with: "
                f"kvpolicy inspect {part} --repair OUT",
                file=sys.stderr,
            )
        raise
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(
        "capture",
        "Run a model over consecutive windows of a text, each behind the model's first token, and "
        "record the queries, keys and values of its attention. They tell much about the text, also "
        "without the token ids.",
        EXAMPLES,
    )
    parser.add_argument("--out", metavar="T.kvtrace", required=True, help="the trace to write")
    parser.add_argument(
        "--tokens",
        type=positive(2),
        default=1024,
        metavar="N",
        help="tokens of a sequence, the first one included (default: 1024)",
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--sequences", type=positive(), default=1, metavar="N", help="windows (default: 1)"
    )
    what.add_argument(
        "--passkey",
        type=positive(),
        metavar="N",
        help="instead of plain windows, N texts with a number hidden at depths spread evenly and "
        "asked for at the end; the mark `needle` names where it is",
    )
    add_source(parser)
    parser.add_argument("--layers", type=indices, metavar="L", help="such as 0,2:4 (default: all)")
    parser.add_argument(
        "--kv-heads", type=indices, metavar="H", help="with their query heads (default: all)"
    )
    parser.add_argument(
        "--query-stride",
        type=positive(),
        default=1,
        metavar="N",
        help="record the queries of every Nth token; policies that look at attention cannot be "
        "replayed then (default: 1)",
    )
    parser.add_argument(
        "--prompt-len", type=positive(), metavar="N", help="tokens of the prompt (default: all)"
    )
    parser.add_argument(
        "--new-tokens",
        type=positive(0),
        default=0,
        metavar="N",
        help="let the model continue each sequence (default: 0)",
    )
    parser.add_argument("--no-tokens", action="store_true", help="leave the token ids out")
    parser.add_argument("--no-outputs", action="store_true", help="leave attention's outputs out")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="to run the model in (default: float32)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of pass keys (default: 0)"
    )
    return parser


def _windows(options: argparse.Namespace, checkpoint: Checkpoint, text: str) -> list[Text]:
    """Consecutive windows of the text.

    Raises:
        ValueError: The text is too short.
    """
    start, tokens = checkpoint.start, checkpoint.encode(text)
    body = options.tokens - len(start)
    if len(tokens) < options.sequences * body:
        raise ValueError(
            f"the text has {len(tokens):,} tokens, too few for {options.sequences} times "
            f"{options.tokens:,}; give a longer text, or lower --tokens or --sequences"
        )
    name, prompt_len = _source(options), options.prompt_len or options.tokens
    return [
        Text(start + tokens[i * body : (i + 1) * body], prompt_len, f"{name}, window {i}")
        for i in range(options.sequences)
    ]


def _passkeys(options: argparse.Namespace, checkpoint: Checkpoint, text: str) -> list[Text]:
    """Texts that hide a pass key and end with its answer, which the prompt does not include.

    Raises:
        ValueError: The text has no sentence, or there are too few tokens.
    """
    found: list[Text] = []
    for index in range(options.passkey):
        depth = (index + 0.5) / options.passkey
        rng = Random(options.seed * 1_000_003 + index)
        drawn = make_passkey(rng, text, checkpoint.encode, options.tokens, depth)
        fact = FACT.format(key=drawn.answer.strip())
        fact = fact if fact in drawn.prompt else fact.lstrip()
        before = drawn.prompt.index(fact)
        first, last = (
            len(checkpoint.start) + len(checkpoint.encode(drawn.prompt[:end]))
            for end in (before, before + len(fact))
        )
        prompt = checkpoint.start + checkpoint.encode(drawn.prompt)
        found.append(
            Text(
                prompt + checkpoint.encode(drawn.answer),
                options.prompt_len or len(prompt),
                f"{_source(options)}, pass key at depth {depth:.2f}",
                (("needle", first, last),),
            )
        )
    return found


def _source(options: argparse.Namespace) -> str:
    """The name of the text, without its folder."""
    return "bundled held-out prose" if options.text is None else Path(options.text).name


def _capture(
    options: argparse.Namespace, checkpoint: Checkpoint, texts: Sequence[Text], output: Output
) -> None:
    """Say how large the trace will be, and record it."""
    import torch

    from kvpolicy_sim.capture import bytes_per_token, capture, plan
    from kvpolicy_sim.text import tokenizer_hash

    chosen: dict[str, Any] = {
        "layers": options.layers,
        "kv_heads": options.kv_heads,
        "query_stride": options.query_stride,
        "tokenizer": tokenizer_hash(Path(options.model or bundled_model()) / "tokenizer.json"),
    }
    kinds: dict[str, Any] = {"outputs": not options.no_outputs, "tokens": not options.no_tokens}
    tokens = sum(len(text.tokens) + options.new_tokens for text in texts)
    header = plan(checkpoint.model, **chosen)
    expected = tokens * bytes_per_token(header, **kinds)
    output.print(f"estimate: {tokens:,} tokens, {size(expected)}")
    require_room(Path(options.out), expected)
    began = time.perf_counter()
    with output.progress() as steps:
        trace = capture(
            checkpoint.model,
            [torch.tensor(text.tokens) for text in texts],
            options.out,
            **chosen,
            prompt_len=[text.prompt_len for text in texts],
            new_tokens=options.new_tokens,
            **kinds,
            sources=[text.source for text in texts],
            marks=[text.marks for text in texts],
            advance=steps.begin("capture", tokens, "tokens"),
        )
    with trace:
        show(output, trace, tokens, time.perf_counter() - began)
