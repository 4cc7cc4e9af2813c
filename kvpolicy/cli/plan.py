"""``kvpolicy plan``: what policies cost on a model, and how many requests fit, before a run."""

import argparse
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from rich.markup import escape

from kvpolicy.bundled import bundled_model
from kvpolicy.cli.arguments import add_policies, command_parser, positive, with_baselines
from kvpolicy.cli.output import Output, size, table
from kvpolicy.errors import PolicyError, UnsupportedError
from kvpolicy.footprint import Footprint, Layout, Pool, Reach, position_limit
from kvpolicy.ledger import SEMANTICS
from kvpolicy.model_facts import ELEMENT_BYTES, ModelFacts, read_model_facts
from kvpolicy.occupancy import Occupancy
from kvpolicy.policy import CachePolicy
from kvpolicy.spec import shown

EXAMPLES = """
  kvpolicy plan --policy h2o:budget=1024
  kvpolicy plan --model DIR --policy window:budget=512 tova:budget=512 --memory 24GiB
  kvpolicy plan --model DIR --policy h2o:budget=2048 --context 8192,65536 --block-size 16
  kvpolicy plan --policy full --json - | jq '.results[0].contexts'
"""

BLOCK_SIZE = 128
"""Slots of a block on vLLM's CPU platform unless its user says otherwise; 16 on CUDA."""

MAX_BLOCK_SIZE = 1 << 20

CONTEXTS = (4096, 32768, 131072)

FULL = Occupancy(retained=None)

UNITS = {"B": 1} | {
    f"{letter}{suffix}": base**power
    for power, letter in enumerate("KMGT", 1)
    for suffix, base in (("iB", 1024), ("B", 1000))
}


@dataclass(frozen=True)
class Setting:
    """What is planned for.

    Attributes:
        model: Where the facts are from.
        facts: The model's sizes.
        dtype: Of the KV cache.
        pool: KV memory of one rank.
        ranks: Tensor-parallel ranks.
        contexts: Lengths of requests, prompt and output together.
        notes: What the reader must know, one line each.
    """

    model: str
    facts: ModelFacts
    dtype: str
    pool: Pool
    ranks: int
    contexts: tuple[int, ...]
    notes: tuple[str, ...]

    @property
    def stock_contexts(self) -> tuple[Footprint | None, ...]:
        """What stock vLLM pays by context; None where the model's positions end."""
        limit, stock = self.facts.positions, self.stock
        return tuple(
            stock.footprint(FULL, n) if limit is None or n <= limit else None for n in self.contexts
        )

    @property
    def stock(self) -> Pool:
        """The same memory in stock vLLM, whose pages carry no policy state."""
        pool = self.pool
        return Pool(
            layout=pool.layout, block_size=pool.block_size, memory=pool.memory, has_state=False
        )


@dataclass(frozen=True)
class Row:
    """What one policy costs.

    Attributes:
        policy: The policy.
        peak: The fullest moment of any request; None if requests grow for ever.
        reach: The longest request.
        contexts: By context, those of `Setting.contexts`; None where the model's positions end.
        against_full: By context, how many requests take as much memory as one under `full`.
    """

    policy: CachePolicy
    peak: Footprint | None
    reach: Reach
    contexts: tuple[Footprint | None, ...]
    against_full: tuple[Fraction, ...]


def run(arguments: Sequence[str]) -> int:
    """Plan for the policies asked for."""
    options = _parser().parse_args(arguments)
    policies = with_baselines(options.policy)
    for policy in policies:
        _require_stream(policy)
    setting = _setting(options, policies)
    output = Output(options.json)
    rows = [make_row(setting, policy) for policy in policies]
    _show(output, setting, rows)
    output.json(_result(setting, rows))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(
        "plan",
        "Compute what policies cost on a model: slots, blocks and bytes of a request, how many "
        "fit into a KV pool, and how long one may become. Reads the model's config.json only. "
        "The full cache and, at each budget, sinks are shown beside the policies asked for.",
        EXAMPLES,
    )
    add_policies(parser)
    parser.add_argument(
        "--model", metavar="DIR", help="folder with a config.json (default: the bundled model)"
    )
    parser.add_argument(
        "--memory",
        type=memory_size,
        default=1 << 30,
        metavar="SIZE",
        help="KV pool of one rank, such as 24GiB or 512MiB (default: 1GiB)",
    )
    parser.add_argument(
        "--context",
        type=context_lengths,
        metavar="N[,N...]",
        help="lengths of requests, prompt and output together (default: those of "
        f"{','.join(map(str, CONTEXTS))} that the model was trained for, or all it was)",
    )
    parser.add_argument(
        "--dtype",
        choices=("auto", *ELEMENT_BYTES),
        default="auto",
        help="of the KV cache; auto is the config's, bfloat16 if that is float32, as in vLLM",
    )
    parser.add_argument(
        "--block-size",
        type=positive(),
        default=BLOCK_SIZE,
        metavar="N",
        help=f"slots of a block in vLLM (default: {BLOCK_SIZE}, that of vLLM on a CPU; on CUDA "
        "it is 16)",
    )
    parser.add_argument(
        "--tensor-parallel",
        type=positive(),
        default=1,
        metavar="N",
        help="split the KV heads over N ranks and plan for one of them (default: 1)",
    )
    return parser


def memory_size(text: str) -> int:
    """Read a size such as ``24GiB``; exact, rounded down to whole bytes."""
    found = re.fullmatch(r"(\d{1,15}(?:\.\d{1,9})?) ?([A-Za-z]*)", text.strip())
    unit = UNITS.get(found[2] or "B") if found else None
    if found is None or unit is None:
        raise argparse.ArgumentTypeError(
            f"expected a size such as 24GiB (units {', '.join(UNITS)}), got {text!r}"
        )
    num_bytes = int(Fraction(found[1]) * unit)
    if num_bytes < 1:
        raise argparse.ArgumentTypeError(f"must be at least one byte, got {text!r}")
    return num_bytes


def context_lengths(text: str) -> tuple[int, ...]:
    """Read lengths separated by commas; ascending, each once."""
    try:
        lengths = sorted({int(part) for part in text.split(",")})
    except ValueError:
        lengths = []
    if not lengths or not 0 < lengths[0] <= lengths[-1] < 1 << 62:
        raise argparse.ArgumentTypeError(
            f"expected positive lengths such as 4096,32768, got {text!r}"
        )
    return tuple(lengths)


def _require_stream(policy: CachePolicy) -> None:
    if getattr(policy, "prefill", "stream") != "stream":
        raise UnsupportedError(
            f"{policy}: with prefill=bulk a request's peak is its prompt, and no host runs it yet; "
            "drop prefill=bulk"
        )


def _setting(options: argparse.Namespace, policies: Sequence[CachePolicy]) -> Setting:
    facts = read_model_facts(options.model or bundled_model())
    dtype, notes = _dtype(options.dtype, facts)
    if options.tensor_parallel > 1:
        notes.append("kvpolicy refuses tensor parallelism in vLLM so far; figures are of one rank")
    if options.block_size > MAX_BLOCK_SIZE:
        raise PolicyError(
            f"--block-size must be at most {MAX_BLOCK_SIZE:,}; vLLM's are far smaller"
        )
    layout = Layout(
        num_layers=facts.num_layers,
        num_kv_heads=facts.kv_heads_per_rank(options.tensor_parallel),
        head_dim=facts.head_dim,
        element_bytes=ELEMENT_BYTES[dtype],
    )
    return Setting(
        model=options.model or "bundled",
        facts=facts,
        dtype=dtype,
        pool=Pool(layout=layout, block_size=options.block_size, memory=options.memory),
        ranks=options.tensor_parallel,
        contexts=_contexts(options.context, facts.positions, policies),
        notes=(*facts.notes, *notes),
    )


def _dtype(asked: str, facts: ModelFacts) -> tuple[str, list[str]]:
    """The KV cache's dtype, and what to say about it."""
    if asked != "auto":
        return asked, []
    if facts.dtype == "float32":
        return "bfloat16", [
            "the config says float32, which vLLM's --dtype auto runs in bfloat16; "
            "--dtype float32 plans for float32"
        ]
    if facts.dtype in ELEMENT_BYTES:
        return facts.dtype, []
    raise PolicyError(
        f"config.json says dtype={shown(facts.dtype)}; give --dtype, one of "
        f"{', '.join(ELEMENT_BYTES)}"
    )


def _contexts(
    asked: tuple[int, ...] | None, positions: int | None, policies: Sequence[CachePolicy]
) -> tuple[int, ...]:
    """The contexts asked for, or the usual ones that a policy can reach."""
    limits = [position_limit(policy, positions) for policy in policies]
    longest = None if None in limits else positions
    if asked is None:
        return tuple(sorted({n if longest is None else min(n, longest) for n in CONTEXTS}))
    if longest is not None and asked[-1] > longest:
        raise PolicyError(
            f"--context {asked[-1]} exceeds the model's {longest} positions; lower it, or write a "
            "policy with rope_beyond=allow"
        )
    return asked


def make_row(setting: Setting, policy: CachePolicy) -> Row:
    """Compute everything about one policy."""
    law, pool = policy.occupancy, setting.pool
    limit = position_limit(policy, setting.facts.positions)
    reached = [pool.footprint(law, n) for n in setting.contexts]
    peak = law.capacity if limit is None or law.capacity is None else min(law.capacity, limit)
    return Row(
        policy=policy,
        peak=None if peak is None else pool.footprint(law, peak),
        reach=pool.reach(law, limit),
        contexts=tuple(x if limit is None or x.tokens <= limit else None for x in reached),
        against_full=tuple(
            Fraction(FULL.num_blocks(x.tokens, pool.block_size), x.blocks) for x in reached
        ),
    )


def _show(output: Output, setting: Setting, rows: Sequence[Row]) -> None:
    """Print the model, both tables and how to read them."""
    pool, facts = setting.pool, setting.facts
    share = f", {pool.layout.num_kv_heads} on each of {setting.ranks} ranks"
    name = "the bundled model" if setting.model == "bundled" else setting.model
    positions = "" if facts.positions is None else f", {facts.positions:,} positions"
    output.print(
        f"[bold]{escape(name)}[/bold]: {facts.model_type}, {facts.num_layers} layers, "
        f"{facts.num_kv_heads} KV heads{share if setting.ranks > 1 else ''}, head_dim "
        f"{facts.head_dim}{positions}; {size(pool.layout.token_bytes)} per token in {setting.dtype}"
    )
    output.print(
        f"[bold]pool[/bold]: {size(pool.memory)}, {pool.num_blocks:,} blocks of {pool.block_size} "
        f"slots, {size(pool.block_bytes)} each with their policy state\n"
    )
    _show_requests(output, setting, rows)
    output.print()
    _show_pool(output, setting, rows)
    output.print(_legend(setting))
    for note in setting.notes:
        output.print(f"[yellow]note[/]: {escape(note)}")


def _show_requests(output: Output, setting: Setting, rows: Sequence[Row]) -> None:
    """Print what one request costs at its peak."""
    pool, layout = setting.pool, setting.pool.layout
    shown = table(
        "policy", "slots", "blocks", "vLLM", "transformers", title="One request at its peak"
    )
    for row in rows:
        peak = row.peak
        if peak is None:
            cells = (
                "1 per token",
                f"1 per {pool.block_size}",
                f"{size(pool.block_bytes / pool.block_size)}/token",
                f"{size(layout.dense_bytes(1))}/token",
            )
        else:
            cells = (
                f"{peak.slots:,}",
                f"{peak.blocks:,}",
                size(peak.bytes),
                size(peak.dense_bytes),
            )
        shown.add_row(escape(str(row.policy)), *cells)
    output.print(shown)


def _show_pool(output: Output, setting: Setting, rows: Sequence[Row]) -> None:
    """Print how many requests fit together, by context, and how long one may become."""
    lengths = [f"{n:,}" for n in setting.contexts]
    title = "Requests in the pool, by their length"
    shown = table("policy", *lengths, "longest request", title=title)
    for row in rows:
        cells = [
            "-" if at is None else f"{at.requests:,} {f'x{float(ratio):,.1f}':>8}"
            for _, at, ratio in _by_context(setting, row)
        ]
        shown.add_row(escape(str(row.policy)), *cells, _reach(row.reach))
    output.print(shown)


def _by_context(setting: Setting, row: Row) -> Iterator[tuple[int, Footprint | None, Fraction]]:
    return zip(setting.contexts, row.contexts, row.against_full, strict=True)


def _reach(reach: Reach) -> str:
    return "any length" if reach.tokens is None else f"{reach.tokens:,} ({reach.limit})"


def _legend(setting: Setting) -> str:
    """How to read the tables."""
    fitting = ", ".join("-" if x is None else f"{x.requests:,}" for x in setting.stock_contexts)
    return (
        "\nA request under a budget stops growing at budget + interval slots, and its prompt never "
        "takes more either, because prefill=stream evicts while it is read; under `full` it grows "
        "with every token.\n\n"
        "slots: of each KV head and layer; vLLM: whole blocks; transformers: exactly these slots; "
        "policy state is included in both\n"
        "requests: of that length, prompt and output, as vLLM's maximum concurrency counts them "
        "(it runs at most --max-num-seqs); x: how many times as many as under `full`; in stock "
        f"vLLM, whose pages carry no state: {fitting}\n"
        "longest request: if it is alone; what ends it is the pool, or the model's positions, "
        "which rope_beyond=allow exceeds"
    )


def _result(setting: Setting, rows: Sequence[Row]) -> dict[str, Any]:
    """The plan as JSON."""
    facts, pool, stock = setting.facts, setting.pool, setting.stock
    return {
        "schema": 1,
        "semantics": SEMANTICS,
        "model": setting.model,
        "geometry": {
            "model_type": facts.model_type,
            "layers": facts.num_layers,
            "q_heads": facts.num_query_heads,
            "kv_heads": facts.num_kv_heads,
            "head_dim": facts.head_dim,
            "positions": facts.positions,
        },
        "dtype": setting.dtype,
        "tensor_parallel": setting.ranks,
        "kv_heads_per_rank": pool.layout.num_kv_heads,
        "bytes_per_token": pool.layout.token_bytes,
        "block_size": pool.block_size,
        "bytes_per_block": pool.block_bytes,
        "memory_bytes": pool.memory,
        "pool_blocks": pool.num_blocks,
        "contexts": list(setting.contexts),
        "notes": list(setting.notes),
        "stock": {
            "bytes_per_block": stock.block_bytes,
            "pool_blocks": stock.num_blocks,
            "contexts": [
                _at_stock(n, x)
                for n, x in zip(setting.contexts, setting.stock_contexts, strict=True)
            ],
        },
        "results": [_entry(setting, row) for row in rows],
    }


def _at_stock(tokens: int, at: Footprint | None) -> dict[str, Any]:
    """Stock vLLM at one context."""
    return {
        "context": tokens,
        "blocks": at and at.blocks,
        "bytes": at and at.bytes,
        "requests": at and at.requests,
    }


def _entry(setting: Setting, row: Row) -> dict[str, Any]:
    """One policy of the JSON; null where a request grows for ever, or may not become so long."""
    peak = row.peak
    return {
        "policy": str(row.policy),
        "budget": getattr(row.policy, "budget", None),
        "slots_per_request": peak and peak.slots,
        "blocks_per_request": peak and peak.blocks,
        "bytes_per_request": peak and peak.bytes,
        "dense_bytes_per_request": peak and peak.dense_bytes,
        "longest_context": row.reach.tokens,
        "longest_context_limit": row.reach.limit,
        "contexts": [
            _at_context(tokens, at, ratio) for tokens, at, ratio in _by_context(setting, row)
        ],
    }


def _at_context(tokens: int, at: Footprint | None, ratio: Fraction) -> dict[str, Any]:
    """One policy at one context."""
    return {
        "context": tokens,
        "slots": at and at.slots,
        "blocks": at and at.blocks,
        "bytes": at and at.bytes,
        "dense_bytes": at and at.dense_bytes,
        "requests": at and at.requests,
        "ratio_to_full": at and float(ratio),
    }
