"""What the commands' argument parsers have in common."""

import argparse
from collections.abc import Callable, Mapping, Sequence
from typing import NoReturn

from kvpolicy.errors import PolicyError, UnsupportedError
from kvpolicy.policy import CachePolicy, EvictionPolicy
from kvpolicy.registry import parse
from kvpolicy.spec import split_spec

_MAX_INDICES = 100_000

PLUGIN = "kvpolicy"
"""Our name among vLLM's plugins."""


class CommandParser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong and exit with 2."""
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def command_parser(name: str, description: str, examples: str) -> argparse.ArgumentParser:
    """A command's parser, with examples below its options and the ``--json`` option."""
    parser = CommandParser(
        prog=f"kvpolicy {name}",
        description=description,
        epilog=f"examples:\n{examples.strip(chr(10))}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--json", metavar="FILE", help="write the result as JSON; - writes it alone to stdout"
    )
    return parser


def add_policies(parser: argparse.ArgumentParser, *, default: Sequence[str] | None = None) -> None:
    """Declare ``--policy SPEC...``, which may be repeated."""
    parser.add_argument(
        "--policy",
        nargs="+",
        action="extend",
        metavar="SPEC",
        required=default is None,
        help="policies, such as h2o:budget=256; may be repeated"
        + (f" (default: {' '.join(default)})" if default else ""),
    )


def add_budgets(parser: argparse.ArgumentParser) -> None:
    """Declare ``--budgets N,N``, for `with_budgets`."""
    parser.add_argument(
        "--budgets",
        type=sizes(),
        metavar="N,N",
        help="complete policies that lack a budget with each of these",
    )


def positive(least: int = 1) -> Callable[[str], int]:
    """A converter to integers of at least `least`."""

    def convert(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, got {value}")
        return value

    convert.__name__ = "int"
    return convert


def indices(text: str) -> list[int]:
    """Read indices and half-open ranges: ``0,4:8`` is 0, 4, 5, 6, 7."""
    found: list[int] = []
    for part in text.split(","):
        first, colon, last = part.partition(":")
        try:
            numbers = range(int(first), int(last) if colon else int(first) + 1)
        except ValueError:
            numbers = range(0)
        if not 0 < len(numbers) <= _MAX_INDICES or numbers[0] < 0:
            raise argparse.ArgumentTypeError(f"{part!r} is no index or range such as 4:8")
        found.extend(numbers)
    return found


def sizes(least: int = 1) -> Callable[[str], list[int]]:
    """A converter to different integers of at least `least`, ascending, as in ``32,64``."""

    def convert(text: str) -> list[int]:
        return sorted({positive(least)(part) for part in text.split(",")})

    convert.__name__ = "integers"
    return convert


def with_budgets(specs: Sequence[str], budgets: Sequence[int]) -> list[str]:
    """Complete the specs that lack a budget with each budget in turn.

    Raises:
        PolicyError: None lacks one, or a spec is malformed.
    """
    if not budgets:
        return list(specs)
    completed = [
        [spec] if _is_complete(spec) else [_with_budget(spec, budget) for budget in budgets]
        for spec in specs
    ]
    if completed == [[spec] for spec in specs]:
        raise PolicyError(
            "budgets complete policies that lack one, and none does: leave the budget out of a "
            "spec, or drop the budgets"
        )
    return [spec for each in completed for spec in each]


def _is_complete(spec: str) -> bool:
    """Whether a budget would not help: the spec has one, or needs none."""
    if "budget" in split_spec(spec).parameters:
        return True
    try:
        parse(spec)
    except PolicyError:
        return False
    return True


def _with_budget(spec: str, budget: int) -> str:
    return f"{spec}{',' if ':' in spec else ':'}budget={budget}"


def with_baselines(specs: Sequence[str]) -> list[CachePolicy]:
    """Parse specs and put the full cache, and sinks at each budget, before them.

    Sinks treat prompts as the policy of that budget does, so that both are compared on the same
    steps.

    Raises:
        PolicyError: A spec is wrong.
    """
    asked = [parse(spec) for spec in specs]
    sinks = [
        parse(f"sinks:budget={budget}{_PROMPTS[policy.prompts]}")
        for policy in asked
        if (budget := _budget_of(policy)) > 4
    ]
    return list(dict.fromkeys([parse("full"), *sinks, *asked]))


def _budget_of(policy: CachePolicy) -> int:
    """The policy's budget, or the largest of its parts; 0 if it has none."""
    own = getattr(policy, "budget", None)
    budgets = (each.budget for each in policy.members if isinstance(each, EvictionPolicy))
    return max(budgets, default=0) if own is None else own


_PROMPTS = {"stream": "", "bulk": ",prefill=bulk", "keep": ",protect=prompt"}
"""How a spec says what a law makes of prompts."""


def require_plugin(environment: Mapping[str, str]) -> None:
    """Raise UnsupportedError if VLLM_PLUGINS keeps our plugin out."""
    listed = environment.get("VLLM_PLUGINS")
    if listed is not None and PLUGIN not in listed.split(","):
        raise UnsupportedError(
            f"VLLM_PLUGINS={listed} keeps the plugin {PLUGIN!r} out, so no policy would run; "
            f"add {PLUGIN} to it or unset it"
        )
