"""``kvpolicy fit``: parameters of memories that suit a trace."""

import argparse
from collections.abc import Sequence

from kvpolicy.cli.arguments import command_parser, indices, positive
from kvpolicy.cli.output import Output, count, figure, table
from kvpolicy.trace import Trace

EXAMPLES = """
  kvpolicy fit t.kvtrace --policy compressive:budget=256,fn=conv --out kernels.safetensors
  kvpolicy fit t.kvtrace --policy infini:segment=512 --out gates.safetensors --json -
  kvpolicy replay t.kvtrace --policy infini:segment=512,gate=gates.safetensors
"""


def run(arguments: Sequence[str]) -> int:
    """Fit and write."""
    options = _parser().parse_args(arguments)
    output = Output(options.json, inputs=[options.trace], others=[options.out])
    from kvpolicy_sim.fit import fit
    from kvpolicy_sim.support import choose_layers

    with Trace.open(options.trace) as trace, output.progress() as steps:
        total = len(choose_layers(trace.header, options.layers))
        fitted = fit(
            trace,
            options.policy,
            options.out,
            layers=options.layers,
            sequences=options.sequences,
            steps=options.steps,
            threads=options.threads,
            advance=steps.begin("fit", total, "layers"),
        )
    rows = table("layer", "before", "after", "held out: before", "held out: after")
    for made in fitted.layers:
        losses = (made.fitted.before, made.fitted.after, made.held_out.before, made.held_out.after)
        rows.add_row(str(made.layer), *(figure(loss, 4) for loss in losses))
    output.print(rows)
    better = sum(made.held_out.after < made.held_out.before for made in fitted.layers)
    output.print(
        "\nsquared error of attention outputs, relative to their square, without the fit and with "
        f"it; on tokens that were held out it is lower in {better} of "
        f"{count(len(fitted.layers), 'layer')}"
    )
    output.print(f"wrote {options.out}; use it as {fitted.policy}")
    output.json(fitted.as_dict())
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(
        "fit",
        "Fit what a policy's memory reads from a file to a trace, layer by layer: kernels of "
        "compressive:...,fn=conv by the attention-reconstruction loss, gates of infini by least "
        "squares. The last tokens of each sequence are held out to judge the fit.",
        EXAMPLES,
    )
    parser.add_argument("trace", metavar="T.kvtrace", help="a trace, from `kvpolicy capture`")
    parser.add_argument(
        "--policy",
        required=True,
        metavar="SPEC",
        help="the policy, such as compressive:budget=256,fn=conv",
    )
    parser.add_argument("--out", required=True, metavar="FILE", help="the safetensors file")
    parser.add_argument("--layers", type=indices, metavar="L", help="such as 0,4:8 (default: all)")
    parser.add_argument("--sequences", type=indices, metavar="S", help="such as 0:4 (default: all)")
    parser.add_argument(
        "--steps", type=positive(), default=200, metavar="N", help="of kernels (default: 200)"
    )
    parser.add_argument("--threads", type=positive(), metavar="N", help="default: one per CPU")
    return parser
