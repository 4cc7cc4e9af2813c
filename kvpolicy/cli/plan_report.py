"""What `kvpolicy plan` found out, row by row, and how it is printed."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from rich.markup import escape

from kvpolicy.cli.output import Output, size, table
from kvpolicy.footprint import Footprint, Pool, Reach, floats_beside, position_limit
from kvpolicy.ledger import SEMANTICS
from kvpolicy.model_facts import ModelFacts
from kvpolicy.occupancy import Occupancy
from kvpolicy.policy import CachePolicy

FULL = Occupancy(retained=None)


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


def make_row(setting: Setting, policy: CachePolicy) -> Row:
    """Compute everything about one policy."""
    law, pool = policy.occupancy, setting.pool
    law = FULL if law.prompts == "bulk" else law  # a request may be all prompt
    limit = position_limit(policy, setting.facts.positions)
    group = setting.facts.num_query_heads // setting.facts.num_kv_heads
    floats = floats_beside(policy, pool.layout.head_dim, group)
    reached = [pool.footprint(law, n, floats) for n in setting.contexts]
    peak = law.token_capacity
    if peak is not None and pool.layout.num_sliding:
        peak = max(peak, pool.layout.window + pool.block_size)
    peak = peak if limit is None or peak is None else min(peak, limit)
    return Row(
        policy=policy,
        peak=None if peak is None else pool.footprint(law, peak, floats),
        reach=pool.reach(law, limit, floats),
        contexts=tuple(x if limit is None or x.tokens <= limit else None for x in reached),
        against_full=tuple(
            Fraction(pool.footprint(FULL, x.tokens).blocks, x.blocks) for x in reached
        ),
    )


def show(output: Output, setting: Setting, rows: Sequence[Row]) -> None:
    """Print the model, both tables and how to read them."""
    pool, facts = setting.pool, setting.facts
    share = f", {pool.layout.num_kv_heads} on each of {setting.ranks} ranks"
    name = "the bundled model" if setting.model == "bundled" else setting.model
    positions = "" if facts.positions is None else f", {facts.positions:,} positions"
    sliding = f", {facts.num_sliding} with a window of {facts.window:,}"
    output.print(
        f"[bold]{escape(name)}[/bold]: {facts.model_type}, {facts.num_layers} layers"
        f"{sliding if facts.num_sliding else ''}, "
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
                f"{layout.num_tables} per {pool.block_size}",
                f"{size(layout.num_tables * pool.block_bytes / pool.block_size)}/token",
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


def as_json(setting: Setting, rows: Sequence[Row]) -> dict[str, Any]:
    """The plan as JSON."""
    facts, pool, stock = setting.facts, setting.pool, setting.stock
    return {
        "schema": 1,
        "semantics": SEMANTICS,
        "model": setting.model,
        "geometry": {
            "model_type": facts.model_type,
            "layers": facts.num_layers,
            "sliding_layers": facts.num_sliding,
            "sliding_window": facts.window if facts.num_sliding else None,
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
