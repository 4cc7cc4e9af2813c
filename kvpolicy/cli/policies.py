"""``kvpolicy policies``: what there is to choose from."""

import inspect
from collections.abc import Sequence
from dataclasses import MISSING
from typing import Any

from rich.text import Text

from kvpolicy.capabilities import HOSTS, capability, settings
from kvpolicy.cli.arguments import command_parser
from kvpolicy.cli.output import Output, table
from kvpolicy.features import ENGINES, FEATURES, Feature, Refused
from kvpolicy.policy import CachePolicy, EvictionPolicy, parameters
from kvpolicy.registry import available, find

EXAMPLES = """
  kvpolicy policies
  kvpolicy policies h2o
  kvpolicy policies my_package.policies.Mine
  kvpolicy policies --features
  kvpolicy policies --json - | jq '.policies[].name'
"""


def run(arguments: Sequence[str]) -> int:
    """List the policies, or explain one."""
    parser = command_parser("policies", "List the policies, or explain one.", EXAMPLES)
    parser.add_argument("name", nargs="?", help="a policy's name or import path")
    parser.add_argument(
        "--features",
        action="store_true",
        help="what engines offer, and what it does under a policy",
    )
    options = parser.parse_args(arguments)
    output = Output(options.json)
    chosen = available() if options.name is None else {options.name: find(options.name)}
    if options.features:
        _print_features(output)
    elif options.name is None:
        _print_all(output, chosen)
    else:
        _print_one(output, options.name, chosen[options.name])
    described = [describe(name, cls) for name, cls in chosen.items()]
    features = [describe_feature(row) for row in FEATURES]
    output.json({"schema": 1, "policies": described, "features": features})
    return 0


def describe(name: str, cls: type[CachePolicy]) -> dict[str, Any]:
    """A policy class as JSON."""
    return {
        "name": name,
        "keeps": summary(cls),
        "paper": cls.paper,
        "needs": list(cls.needs),
        "hosts": {host: capability(cls, host) for host in HOSTS},
        "settings": settings(cls),
        "parameters": [
            {
                "key": key,
                "values": parameter.describe(),
                "required": parameter.is_required,
                "default": None if parameter.default is MISSING else _plain(parameter.default),
            }
            for key, parameter in parameters(cls).items()
        ],
    }


def describe_feature(row: Feature) -> dict[str, Any]:
    """A feature as JSON, with the tests that show each engine's answer."""
    proofs = {engine: answer.proof for engine, answer in row.answers.items()}
    engines = {engine: str(row.answers.get(engine, "-")) for engine in ENGINES}
    return {"name": row.name, "engines": engines, "tests": proofs}


def summary(cls: type[CachePolicy]) -> str:
    """The first line of a policy's docstring."""
    text = inspect.cleandoc(cls.__doc__ or "")
    first = text.partition("\n")[0]
    # A dataclass without a docstring carries its signature instead.
    return "" if first.startswith(f"{cls.__name__}(") else first


def _print_all(output: Output, policies: dict[str, type[CachePolicy]]) -> None:
    """Print the table of policies."""
    rows = table("policy", "keeps", "needs", "paper", "hosts", left=5)
    for name, cls in policies.items():
        hosts = [host for host in HOSTS if capability(cls, host).startswith("yes")]
        rows.add_row(
            f"[bold]{name}[/bold]",
            summary(cls),
            ", ".join(cls.needs) or "-",
            cls.paper or "-",
            ", ".join(hosts) or "-",
        )
    output.print(rows)
    output.print("\nA spec is name:key=value,key=value, for instance h2o:budget=1024,recent=0.5.")
    output.print("`kvpolicy policies NAME` explains one policy and its keys.")
    output.print("`kvpolicy policies --features` says what engines offer under a policy.")


def _print_features(output: Output) -> None:
    """Print the table of features, then why some are refused."""
    rows = table("feature", *ENGINES, left=1 + len(ENGINES))
    reasons = table("refused", "in", "why, and what to do", left=3)
    for row in FEATURES:
        given = row.answers
        rows.add_row(row.name, *(str(given.get(e, "-")).partition(":")[0] for e in ENGINES))
        for engine, answer in given.items():
            if isinstance(answer, Refused):
                reasons.add_row(row.name, engine, f"{answer.reason}; {answer.remedy}")
    output.print(rows)
    output.print()
    output.print(reasons)


def _print_one(output: Output, name: str, cls: type[CachePolicy]) -> None:
    """Print a policy's docstring, keys and hosts."""
    output.print(f"[bold]{name}[/bold]  {cls.paper}\n")
    output.print(Text(inspect.cleandoc(cls.__doc__ or "")))
    rows = table("key", "values", "default", "meaning", left=4)
    meanings = _meanings(cls)
    for key, parameter in parameters(cls).items():
        default = "required" if parameter.is_required else _shown_default(cls, key, parameter)
        rows.add_row(f"[bold]{key}[/bold]", parameter.describe(), default, meanings.get(key, ""))
    output.print()
    output.print(rows)
    output.print()
    for host in HOSTS:
        output.print(f"{host}: {capability(cls, host)}")


def _shown_default(cls: type[CachePolicy], key: str, parameter: Any) -> str:
    """A parameter's default as a spec would write it."""
    if key == "interval" and issubclass(cls, EvictionPolicy):
        is_common = cls.default_interval is EvictionPolicy.default_interval
        return "max(1, budget // 16)" if is_common else "by other keys"
    return str(_plain(parameter.default))


def _plain(value: Any) -> Any:
    """A default value for JSON and tables."""
    return "none" if value == () else value


def _meanings(cls: type[CachePolicy]) -> dict[str, str]:
    """What the docstrings' Attributes sections along the inheritance say of each key."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        lines = inspect.cleandoc(base.__doc__ or "").split("\n")
        if "Attributes:" not in lines:
            continue
        for line in lines[lines.index("Attributes:") + 1 :]:
            key, colon, text = line.strip().partition(": ")
            if line.startswith("    ") and not line.startswith("     ") and colon:
                found[key] = text
            elif line.startswith("     ") and found:
                found[next(reversed(found))] += f" {line.strip()}"
    return found
