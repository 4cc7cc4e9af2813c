"""``kvpolicy recommend``: the smallest budget that keeps enough of the attention mass."""

import argparse
from collections.abc import Sequence

from kvpolicy.cli.arguments import command_parser, indices, positive
from kvpolicy.cli.output import Output, figure, size, table
from kvpolicy.ledger import SEMANTICS
from kvpolicy.trace import Trace

EXAMPLES = """
  kvpolicy recommend t.kvtrace --target 0.95
  kvpolicy recommend t.kvtrace --target 0.9 --policy sinks h2o:recent=0.25 --layers 0:8
"""


def run(arguments: Sequence[str]) -> int:
    """Search budgets."""
    from kvpolicy_sim.recommend import CANDIDATES, recommend

    options = _parser(CANDIDATES).parse_args(arguments)
    output = Output(options.json, inputs=[options.trace])
    with Trace.open(options.trace) as trace, output.progress() as steps:
        advance = steps.begin("rounds")
        found = recommend(
            trace,
            options.target,
            options.policy,
            layers=options.layers,
            threads=options.threads,
            advance=lambda _: advance(1),
        )
    rows = table("policy", "retained mass", "budget", "of the tokens", "bytes kept", "of full")
    for made in sorted(found, key=lambda made: made.budget):
        rows.add_row(
            str(made.policy),
            figure(made.retained_mass, 4),
            figure(made.budget, 0),
            figure(100 * made.budget / made.tokens, 1) + " %",
            size(made.bytes_kept),
            figure(100 * made.bytes_kept / made.bytes_full, 1) + " %",
        )
    output.print(rows)
    output.print(
        f"\nsmallest budgets whose mean retained mass is at least {options.target}, layer-local, "
        "over the steps beyond the budget; tasks differ in how much lost mass they forgive: "
        "check with `kvpolicy eval`"
    )
    output.json(
        {
            "schema": 1,
            "semantics": SEMANTICS,
            "target": options.target,
            "results": [
                {
                    "policy": str(made.policy),
                    "budget": made.budget,
                    "retained_mass": made.retained_mass,
                    "retention_ratio": made.retention_ratio,
                    "bytes_kept": made.bytes_kept,
                    "bytes_full": made.bytes_full,
                }
                for made in found
            ],
        }
    )
    return 0


def _parser(candidates: Sequence[str]) -> argparse.ArgumentParser:
    parser = command_parser(
        "recommend",
        "Find each policy's smallest budget that keeps a share of the attention mass of a trace.",
        EXAMPLES,
    )
    parser.add_argument("trace", metavar="T.kvtrace", help="a trace, from `kvpolicy capture`")
    parser.add_argument("--target", type=float, default=0.95, metavar="MASS", help="default: 0.95")
    parser.add_argument(
        "--policy",
        nargs="+",
        action="extend",
        metavar="SPEC",
        help=f"specs without a budget (default: {' '.join(candidates)})",
    )
    parser.add_argument("--layers", type=indices, metavar="L", help="such as 0,4:8 (default: all)")
    parser.add_argument("--threads", type=positive(), metavar="N", help="default: one per CPU")
    return parser
