"""``kvpolicy check``: whether a policy keeps what hosts and users rely on."""

import argparse
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from kvpolicy.cli import FAILED
from kvpolicy.cli.arguments import command_parser, positive
from kvpolicy.cli.check_report import (
    outcome_as_dict,
    show_contract,
    show_hosts,
    show_speed,
    show_sum,
    speed_as_dict,
)
from kvpolicy.cli.output import Output, Steps
from kvpolicy.errors import PolicyError
from kvpolicy.extras import require
from kvpolicy.ledger import SEMANTICS
from kvpolicy.parameter import Parameter
from kvpolicy.policy import CachePolicy, EvictionPolicy, parameters
from kvpolicy.registry import find, parse
from kvpolicy.spec import split_spec

if TYPE_CHECKING:
    from kvpolicy.cli.check_hosts import Verdict
    from kvpolicy.speed import Speed
    from kvpolicy.testing import Outcome

EXAMPLES = """
  kvpolicy check my_policies:Mine
  kvpolicy check my_policies:Mine:power=2.0,recent=4 --hosts simulator transformers
  kvpolicy check my_policies:Mine --no-hosts --examples 200
  kvpolicy check h2o --json -
"""

HOSTS = ("simulator", "transformers", "vllm")

BUDGETS = (48, 96, 160)
"""Unless the policy says so, the first that it takes; hosts are given texts longer than these."""

SPEED_BUDGET = 1024

BESIDE = ("window", "h2o", "tova", "keydiff")
"""Built-in policies beside which speed is shown: positions, sums, the newest row, keys."""


def run(arguments: Sequence[str]) -> int:
    """Check a policy; 1 if it breaks a promise or hosts disagree about it."""
    options = _parser().parse_args(arguments)
    output = Output(options.json)
    policy = read_policy(options.policy)
    require("hypothesis")
    import torch

    began = time.perf_counter()
    torch.set_num_threads(1)  # what is compared is small, and rounds alike on one thread
    with output.progress() as steps, _notes_elsewhere():
        outcomes = _check_contract(policy, options.examples, steps)
        verdicts: list[Verdict] = []
        speeds: list[Speed] = []
        is_sound = all(outcome.failure is None for outcome in outcomes)
        if is_sound:  # otherwise neither would say anything
            verdicts = _compare_hosts(policy, options.hosts, steps)
            speeds = _measure(policy, steps, verdicts)
            is_sound = all(verdict.is_sound for verdict in verdicts)
    seconds = time.perf_counter() - began
    output.print(f"[bold]{policy}[/bold]\n")
    show_contract(output, outcomes)
    show_hosts(output, verdicts)
    show_speed(output, speeds)
    show_sum(output, outcomes, verdicts, seconds)
    output.json(
        {
            "schema": 1,
            "semantics": SEMANTICS,
            "policy": str(policy),
            "passed": is_sound,
            "contract": [outcome_as_dict(outcome) for outcome in outcomes],
            "hosts": [vars(verdict) for verdict in verdicts],
            "speed": [speed_as_dict(speed) for speed in speeds],
            "seconds": seconds,
        }
    )
    return 0 if is_sound else FAILED


def read_policy(text: str) -> CachePolicy:
    """Read ``MODULE:CLASS``, a name or a spec, each with or without parameters.

    A budget that is required and not given is the first of `BUDGETS` that the class takes.

    Raises:
        PolicyError: It names no policy, or its parameters are wrong.
    """
    name, _, rest = text.partition(":")
    attribute, _, given = rest.partition(":")
    if attribute.isidentifier():
        name = f"{name}.{attribute}"
    else:
        given = rest
    cls = find(name)
    policy = _parsed(name, given, parameters(cls))
    if not isinstance(policy, EvictionPolicy) and cls.__module__.partition(".")[0] != "kvpolicy":
        raise PolicyError(
            f"{name} derives from {cls.__mro__[1].__name__}, which never evicts; derive it from "
            "kvpolicy.ScorePolicy and write score(view)"
        )
    return policy


def _parsed(name: str, given: str, table: Mapping[str, Parameter]) -> CachePolicy:
    """The policy of a spec that may lack its budget."""
    lacks_budget = "budget" in table and table["budget"].is_required
    if not lacks_budget or "budget" in (split_spec(f"{name}:{given}").parameters if given else {}):
        return parse(f"{name}:{given}" if given else name)
    rest = f",{given}" if given else ""
    for budget in BUDGETS[:-1]:
        try:
            return parse(f"{name}:budget={budget}{rest}")
        except PolicyError:
            continue  # it may protect more; other faults are told with the last one
    return parse(f"{name}:budget={BUDGETS[-1]}{rest}")


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(
        "check",
        "Check that a policy keeps the contract that hosts and users rely on: budgets, "
        "protection, determinism, batches, chunks, edges. Compare what it keeps in the simulator, "
        "transformers and vLLM, as far as they are installed, and measure its speed beside "
        "built-in policies. A broken promise comes with the smallest case in which it breaks; "
        "hosts and speed come once there is none. Modules are also looked for in the working "
        "directory.",
        EXAMPLES,
    )
    parser.add_argument(
        "policy", metavar="MODULE:CLASS", help="a policy class; or a policy's name or spec"
    )
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument(
        "--hosts",
        nargs="+",
        choices=HOSTS,
        default=HOSTS,
        metavar="HOST",
        help=f"hosts to compare, out of {', '.join(HOSTS)} (default: all that are installed)",
    )
    chosen.add_argument(
        "--no-hosts", dest="hosts", action="store_const", const=(), help="compare no hosts"
    )
    parser.add_argument(
        "--examples",
        type=positive(),
        default=20,
        metavar="N",
        help="cases per promise; half as many for each changed setting (default: 20)",
    )
    return parser


@contextmanager
def _notes_elsewhere() -> Iterator[None]:
    """Keep hypothesis' notes out of the working directory."""
    from hypothesis.configuration import set_hypothesis_home_dir

    with TemporaryDirectory(prefix="kvpolicy-") as folder:
        set_hypothesis_home_dir(folder)
        try:
            yield
        finally:
            set_hypothesis_home_dir(None)


def _check_contract(policy: CachePolicy, examples: int, steps: Steps) -> "list[Outcome]":
    """Run every check on the policy's variants, until one breaks it; none if it does not run."""
    from kvpolicy.promises import runs_on_what_it_declares
    from kvpolicy.testing import CONTRACT, run_check, variants

    tried = variants(policy)
    advance = steps.begin("contract", len(CONTRACT) * len(tried), "checks")
    found: list[Outcome] = []
    for check in CONTRACT:
        if any(x.failure and x.check == runs_on_what_it_declares.__name__ for x in found):
            break  # all others would fail alike
        outcomes: list[Outcome] = []
        for index, variant in enumerate(tried):
            cases = examples if index == 0 else -(-examples // 2)
            outcomes.append(run_check(variant, check, examples=cases))
            advance(1)
            if outcomes[-1].failure is not None:
                advance(len(tried) - index - 1)
                break
        found.append(
            replace(
                outcomes[-1],
                cases=sum(outcome.cases for outcome in outcomes),
                near_ties=sum(outcome.near_ties for outcome in outcomes),
            )
        )
    return found


def _compare_hosts(policy: CachePolicy, hosts: Sequence[str], steps: Steps) -> "list[Verdict]":
    if not hosts:
        return []
    from kvpolicy.cli.check_hosts import compare_hosts

    return list(compare_hosts(_small(policy), hosts, steps.begin("hosts", len(hosts))))


def _small(policy: CachePolicy) -> CachePolicy:
    """The policy with no more budget than short texts exceed."""
    if not isinstance(policy, EvictionPolicy) or "budget" not in parameters(type(policy)):
        return policy
    for budget in BUDGETS:
        if policy.budget <= budget:
            break
        try:
            return replace(policy, budget=budget, interval=None)
        except PolicyError:
            continue  # it protects more
    return policy


def _measure(policy: CachePolicy, steps: Steps, verdicts: "list[Verdict]") -> "list[Speed]":
    """The policy's speed and that of built-in ones, all with as many slots.

    Should it fail with so many, that is one more verdict.
    """
    from kvpolicy.cli.check_hosts import failed
    from kvpolicy.speed import measure

    policy = _large(policy)
    if not isinstance(policy, EvictionPolicy) or policy.needs_prompt:
        return []
    slots = policy.occupancy.capacity
    if slots is None:
        return []
    law = policy.occupancy
    budget = max(slots - law.interval, 1)  # a policy of segments may keep none of them
    beside = (parse(f"{name}:budget={budget},interval={law.interval}") for name in BESIDE)
    rivals = [policy, *(rival for rival in beside if type(rival) is not type(policy))]
    rounds = 3
    advance = steps.begin("speed", rounds * len(rivals))
    try:
        return measure(rivals, rounds=rounds, advance=advance)
    except Exception as error:
        verdicts.append(failed(f"{slots:,} slots", error))
        return []


def _large(policy: CachePolicy) -> CachePolicy:
    """The policy with the budget of a real request."""
    if not isinstance(policy, EvictionPolicy) or "budget" not in parameters(type(policy)):
        return policy
    try:
        return replace(policy, budget=max(policy.budget, SPEED_BUDGET), interval=None)
    except PolicyError:
        return policy  # its other parameters say how many slots it has
