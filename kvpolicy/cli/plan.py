"""``kvpolicy plan``: what policies cost on a model, and how many requests fit, before a run."""

import argparse
import re
from collections.abc import Sequence
from fractions import Fraction

from kvpolicy.bundled import bundled_model
from kvpolicy.cli.arguments import add_policies, command_parser, positive, with_baselines
from kvpolicy.cli.output import Output
from kvpolicy.cli.plan_report import Setting, as_json, make_row, show
from kvpolicy.errors import PolicyError, UnsupportedError
from kvpolicy.footprint import Layout, Pool, position_limit
from kvpolicy.memory.policy import MemoryPolicy
from kvpolicy.model_facts import ELEMENT_BYTES, ModelFacts, read_model_facts
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

UNITS = {"B": 1} | {
    f"{letter}{suffix}": base**power
    for power, letter in enumerate("KMGT", 1)
    for suffix, base in (("iB", 1024), ("B", 1000))
}


def run(arguments: Sequence[str]) -> int:
    """Plan for the policies asked for."""
    options = _parser().parse_args(arguments)
    policies = with_baselines(options.policy)
    for policy in policies:
        _require_pages(policy)
    setting = _setting(options, policies)
    output = Output(options.json)
    rows = [make_row(setting, policy) for policy in policies]
    show(output, setting, rows)
    output.json(as_json(setting, rows))
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


def _require_pages(policy: CachePolicy) -> None:
    """Refuse policies whose requests vLLM's pages cannot hold, or hold without a bound."""
    if isinstance(policy, MemoryPolicy) and policy.has_memory and policy.needs_decoder:
        raise UnsupportedError(
            f"{policy}: its memory needs the layers' weights, which vLLM does not give; it runs in "
            "transformers and in the simulator"
        )
    if policy.occupancy.prompts == "keep":
        raise UnsupportedError(
            f"{policy}: every prompt stays beside the budget, so that no number of requests can be "
            "promised; drop protect=prompt to plan for what is generated, and plan `full` for "
            "the prompts"
        )


def _setting(options: argparse.Namespace, policies: Sequence[CachePolicy]) -> Setting:
    facts = read_model_facts(options.model or bundled_model())
    dtype, notes = _dtype(options.dtype, facts)
    if options.tensor_parallel > 1:
        notes.append("under tensor parallelism, figures are of one rank")
    if options.tensor_parallel > facts.num_kv_heads:
        notes.append("kvpolicy refuses more tensor-parallel ranks in vLLM than there are KV heads")
    if any(policy.occupancy.prompts == "bulk" for policy in policies):
        notes.append(
            "prefill=bulk holds a whole prompt up to its end: figures are of requests that are all "
            "prompt; behind it budget + interval slots stay"
        )
    if options.block_size > MAX_BLOCK_SIZE:
        raise PolicyError(
            f"--block-size must be at most {MAX_BLOCK_SIZE:,}; vLLM's are far smaller"
        )
    layout = Layout(
        num_layers=facts.num_layers - facts.num_sliding,
        num_kv_heads=facts.kv_heads_per_rank(options.tensor_parallel),
        head_dim=facts.head_dim,
        element_bytes=ELEMENT_BYTES[dtype],
        num_sliding=facts.num_sliding,
        window=facts.window,
    )
    if layout.num_tables > 1:
        notes.append(
            "kvpolicy refuses this model in vLLM, which would give its layers of full attention "
            f"{layout.num_tables} block tables, because fewer layers attend to a sliding window"
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
