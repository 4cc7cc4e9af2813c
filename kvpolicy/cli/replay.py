"""``kvpolicy replay``: what policies would have kept of a trace."""

import argparse
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from rich.table import Table

from kvpolicy.bundled import bundled_model
from kvpolicy.cli.arguments import (
    add_budgets,
    add_policies,
    command_parser,
    indices,
    positive,
    with_baselines,
    with_budgets,
)
from kvpolicy.cli.output import Output, figure, size, table
from kvpolicy.cli.pages import add_pages, page_output, write_pages
from kvpolicy.extras import is_installed, require
from kvpolicy.passage import Passage
from kvpolicy.trace import Trace

# The simulator's types: this package may import it only inside functions.
Report: TypeAlias = Any

EXAMPLES = """
  kvpolicy replay t.kvtrace --policy window:budget=256 h2o:budget=256 --html report.html
  kvpolicy replay t.kvtrace --policy h2o tova --budgets 64,128,256 --oracle --html r.html --png r
  kvpolicy replay t.kvtrace --policy h2o:budget=128 --layers 0,4:8 --oracle
  kvpolicy replay t.kvtrace --policy fam:block=64,segments=2,level=model --weights path/to/model
  kvpolicy replay t.kvtrace --policy mymodule.Mine:budget=64 --level open-loop --json -
"""

WIDE = 112
"""Columns that the whole table takes; narrower ones leave out what matters least."""

LEVELS = ("layer-local", "open-loop")

CAVEAT = (
    "{level}: queries, keys and values are the traced run's in every layer, so this isolates "
    "which tokens are kept and ignores how errors compound; `kvpolicy eval` measures those"
)


def run(arguments: Sequence[str]) -> int:
    """Replay a trace."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.tokenizer is not None and not options.html:
        parser.error("--tokenizer is for the text on a page; add --html, or drop it")
    policies = with_baselines(with_budgets(options.policy, options.budgets or ()))
    output = page_output(options, inputs=[options.trace])
    with Trace.open(options.trace) as trace:
        passage = _passage(options, trace) if options.html else None
        report = _replay(options, trace, policies, output)
    if report is None:
        return 0
    output.print(results_table(report.as_dict()["results"], is_narrow=output.width < WIDE))
    output.print("\n" + CAVEAT.format(level=options.level))
    output.json(report.as_dict())
    if options.html or options.png:
        from kvpolicy_sim.page.html import document

        write_pages(options, document(report, passage), output)
        if options.html and passage is None:
            output.print(
                "the page shows no text: the trace has no token ids, or was made with a tokenizer "
                "that --tokenizer did not name"
            )
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(
        "replay",
        "Replay a trace under policies: retained attention mass, output error, recall. The full "
        "cache and, at each budget, sinks are replayed beside the policies asked for.",
        EXAMPLES,
    )
    parser.add_argument("trace", metavar="T.kvtrace", help="a trace, from `kvpolicy capture`")
    add_policies(parser)
    add_budgets(parser)
    parser.add_argument(
        "--level",
        choices=LEVELS,
        default=LEVELS[0],
        help="what policies observe: attention renormalised over what they retained, as in a "
        f"host, or full attention (default: {LEVELS[0]})",
    )
    parser.add_argument("--layers", type=indices, metavar="L", help="such as 0,4:8 (default: all)")
    parser.add_argument("--sequences", type=indices, metavar="S", help="such as 0:4 (default: all)")
    parser.add_argument(
        "--oracle", action="store_true", help="bound each policy's regret against the optimum"
    )
    parser.add_argument(
        "--weights",
        metavar="DIR",
        help="folder of the traced model, for policies that need its layers (fam:level=model)",
    )
    add_pages(parser)
    parser.add_argument(
        "--tokenizer",
        metavar="FILE",
        help="tokenizer.json of the traced model, or its folder, to show the text on the page "
        "(default: the bundled model's, of its own traces)",
    )
    parser.add_argument(
        "--no-outputs", action="store_true", help="do not compare attention outputs: half the work"
    )
    parser.add_argument(
        "--no-details", action="store_true", help="do not measure recall and lost mass"
    )
    parser.add_argument("--threads", type=positive(), metavar="N", help="default: one per CPU")
    parser.add_argument(
        "--dry-run", action="store_true", help="print the estimate of memory and time, and stop"
    )
    return parser


def _passage(options: argparse.Namespace, trace: Trace) -> Passage | None:
    """The text of the first sequence, if the trace has it and its tokenizer is known."""
    from kvpolicy_sim.support import choose_sequences
    from kvpolicy_sim.text import read_passage, tokenizer_hash

    named = Path(options.tokenizer or bundled_model())
    file = named / "tokenizer.json" if named.is_dir() else named
    if options.tokenizer is not None:
        require("tokenizers")
    elif tokenizer_hash(file) != trace.header.tokenizer or not is_installed("tokenizers"):
        return None
    return read_passage(trace, choose_sequences(trace, options.sequences)[0].index, file)


def _replay(
    options: argparse.Namespace, trace: Trace, policies: Sequence[Any], output: Output
) -> Report | None:
    """Say what it will take, and do it unless told not to."""
    from kvpolicy_sim.estimate import estimate
    from kvpolicy_sim.replay import replay
    from kvpolicy_sim.support import (
        choose_layers,
        choose_sequences,
        needs_weights,
        require_oracle,
        require_supported,
    )
    from kvpolicy_sim.weights import load_weights

    has_weights = options.weights is not None
    require_supported(trace.header, policies, options.level, has_weights=has_weights)
    if options.oracle:
        require_oracle(trace.header)  # before anything is promised
    model = None
    if has_weights and any(map(needs_weights, policies)):
        model = load_weights(options.weights, trace.header)
    layers = choose_layers(trace.header, options.layers)
    sequences = choose_sequences(trace, options.sequences)
    threads = options.threads or os.cpu_count() or 1
    expected = estimate(
        trace.header,
        sequences,
        len(layers),
        policies,
        threads,
        outputs=not options.no_outputs,
        details=not options.no_details,
        oracle=options.oracle,
    )
    output.print(
        f"estimate: at most {size(expected.bytes)} of memory, about "
        f"{max(1.0, expected.seconds):,.0f} s" + (" and the oracle's" if options.oracle else "")
    )
    if options.dry_run:
        output.json(
            {"schema": 1, "estimate": {"bytes": expected.bytes, "seconds": expected.seconds}}
        )
        return None
    tokens = sum(sequence.tokens for sequence in sequences)
    work = tokens * len(layers) * len(trace.header.kv_heads) * len(policies)
    with output.progress() as steps:
        return replay(
            trace,
            policies,
            level=options.level,
            layers=layers,
            sequences=[sequence.index for sequence in sequences],
            outputs=not options.no_outputs,
            details=not options.no_details,
            oracle=options.oracle,
            model=model,
            threads=threads,
            advance=steps.begin("replay", work, "head steps"),
        )


def results_table(results: Sequence[dict[str, Any]], *, is_narrow: bool) -> Table:
    """One line per policy.

    Args:
        results: Entries of a replay's JSON.
        is_narrow: Whether to leave out what matters least.
    """
    columns = result_columns(results, is_narrow=is_narrow)
    rows = table("policy", *columns)
    for result in results:
        rows.add_row(result["policy"], *(show(result) for show in columns.values()))
    return rows


def result_columns(
    results: Sequence[dict[str, Any]], *, is_narrow: bool
) -> dict[str, Callable[[dict[str, Any]], str]]:
    """Titles of columns, and what they show of an entry.

    Args:
        results: Entries of a replay's JSON.
        is_narrow: Whether to leave out what matters least.
    """
    has_memory = any(result["memory_share"] is not None for result in results)
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "kept": lambda r: figure(100 * r["retention_ratio"], 1) + " %",
        "retained mass": lambda r: _mass(r["retained_mass"], is_narrow or has_memory),
        "p5": lambda r: figure(r["retained_mass"]["p5"], 4),
        "output error": lambda r: figure(r["output_error"]["mean"], 4),
        "memory share": lambda r: figure(r["memory_share"], 4),
        "merged": lambda r: figure(r["merged"], 0),
        "recall@16": lambda r: figure((r["recall"] or {}).get("16"), 3),
        "regret": lambda r: regret_interval(r["regret"]),
        "bytes kept": lambda r: size(r["bytes_kept"]),
        "at peak": lambda r: size(r["bytes_at_peak"]),
        "steps/s": lambda r: figure(r["steps_per_second"], 0),
    }
    hidden = _hidden(results, is_narrow=is_narrow, has_memory=has_memory)
    return {name: show for name, show in columns.items() if name not in hidden}


def _hidden(results: Sequence[dict[str, Any]], *, is_narrow: bool, has_memory: bool) -> set[str]:
    """Columns that have nothing to say, or for which there is no room."""
    hidden = {"p5", "merged", "recall@16", "at peak", "steps/s"} if is_narrow else set[str]()
    if has_memory:
        hidden |= {"p5", "bytes kept", "steps/s"}
    else:
        hidden |= {"memory share", "merged", "at peak"}
    if all(result["regret"] is None for result in results):
        hidden.add("regret")
    return hidden


def _mass(mass: dict[str, Any], is_narrow: bool) -> str:
    """The mean, with its interval where there is one and room for it."""
    interval = mass["interval"]
    if interval is None or is_narrow:
        return figure(mass["mean"], 4)
    return f"{mass['mean']:.4f} ({interval[0]:.4f} .. {interval[1]:.4f})"


def regret_interval(regret: dict[str, float] | None) -> str:
    """A regret interval in per cent of the optimum."""
    if regret is None:
        return "-"
    low, high = (f"{100 * regret[bound]:.2f}" for bound in ("lower", "upper"))
    return f"{low} %" if low == high else f"{low} .. {high} %"
