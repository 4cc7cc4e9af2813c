"""``kvpolicy allocate``: budgets by layer, from a trace."""

import argparse
from collections.abc import Sequence

from kvpolicy.cli.arguments import command_parser, positive
from kvpolicy.cli.output import Output, figure, table
from kvpolicy.trace import Trace

EXAMPLES = """
  kvpolicy allocate t.kvtrace --policy h2o:budget=256 --out budgets.safetensors
  kvpolicy allocate t.kvtrace --policy tova:budget=128 --by pyramid --out pyramid.safetensors
  kvpolicy replay t.kvtrace --policy "mix:layers=(0-:h2o),budget=256,budgets=budgets.safetensors"
"""


def run(arguments: Sequence[str]) -> int:
    """Allocate and write."""
    options = _parser().parse_args(arguments)
    output = Output(options.json, inputs=[options.trace], others=[options.out])
    from kvpolicy_sim.allocate import allocate

    with Trace.open(options.trace) as trace, output.progress() as steps:
        made = allocate(
            trace,
            options.policy,
            options.out,
            by=options.by,
            threads=options.threads,
            advance=steps.begin("replays", 2),
        )
    rows = table("layer", "budget", "retained mass", "with equal budgets")
    for layer in made.layers:
        rows.add_row(
            str(layer.layer),
            str(layer.budget),
            figure(layer.after, 4),
            figure(layer.before, 4),
        )
    rows.add_row("mean", "", figure(made.after, 4), figure(made.before, 4))
    output.print(rows)
    output.print(
        "\nlayer-local, over all steps of this trace; how other texts fare only they can tell"
    )
    output.print(f"wrote {options.out}; use it as {made.policy}")
    output.json(made.as_dict())
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(
        "allocate",
        "Give the layers of a model budgets of their own, as many slots in all, and write them "
        "as a file for mix:...,budgets=FILE. By default slots go where a replay of the trace "
        "retains most attention. Layers of unequal budgets run in transformers and in the "
        "simulator.",
        EXAMPLES,
    )
    parser.add_argument("trace", metavar="T.kvtrace", help="a trace, from `kvpolicy capture`")
    parser.add_argument(
        "--policy",
        required=True,
        metavar="SPEC",
        help="what rules every layer, with the mean budget, such as h2o:budget=256",
    )
    parser.add_argument("--out", required=True, metavar="FILE", help="the safetensors file")
    parser.add_argument(
        "--by",
        choices=("mass", "pyramid"),
        default="mass",
        help="most retained mass, or falling evenly from the first layer to the last "
        "(PyramidKV's shape) (default: mass)",
    )
    parser.add_argument("--threads", type=positive(), metavar="N", help="default: one per CPU")
    return parser
