"""What `kvpolicy check` prints and writes."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.padding import Padding
from rich.text import Text

from kvpolicy.cli.output import Output, count, figure, table

if TYPE_CHECKING:
    from kvpolicy.cli.check_hosts import Verdict
    from kvpolicy.speed import Speed
    from kvpolicy.testing import Outcome


def show_contract(output: Output, outcomes: "Sequence[Outcome]") -> None:
    """Print each promise with its result, then what breaks some of them."""
    rows = table("promise", "cases", "", left=1)
    for outcome in outcomes:
        told = "[green]kept[/]" if outcome.failure is None else "[bold red]BROKEN[/]"
        rows.add_row(outcome.promise, str(outcome.cases), told)
    output.print(rows)
    for outcome in outcomes:
        if outcome.failure is None:
            continue
        output.print(f"\n[bold red]{outcome.check}[/]")
        output.print(Padding(Text(outcome.failure.problem), (0, 2)))
        if outcome.example is not None:
            output.print(Padding(Text("the smallest case found:", "dim"), (1, 2, 0, 2)))
            output.print(Text(_script(outcome)))  # at the margin, so that it can be pasted


def _script(outcome: "Outcome") -> str:
    """Python that breaks the promise."""
    return (
        "import kvpolicy\n"
        f"from kvpolicy.promises import {outcome.check}\n"
        "from kvpolicy.rehearsal import Case\n"
        f"{outcome.example}"
    )


_COLOURS = {"agrees": "green", "differs": "bold red", "undecided": "bold red"}


def show_hosts(output: Output, verdicts: "Sequence[Verdict]") -> None:
    """Print what came out of comparing hosts."""
    if not verdicts:
        return
    output.print()
    rows = table("host", "", "compared", left=3)
    for verdict in verdicts:
        colour = _COLOURS.get(verdict.outcome, "yellow")
        rows.add_row(verdict.host, f"[{colour}]{verdict.outcome}[/]", Text(verdict.detail))
    output.print(rows)


def show_speed(output: Output, speeds: "Sequence[Speed]") -> None:
    """Print speeds, the policy's first."""
    if not speeds:
        return
    output.print()
    rows = table("speed", "policy, µs per token", "whole step, µs", "of its step")
    for speed in speeds:
        share = 100 * speed.policy_seconds / speed.step_seconds
        rows.add_row(
            str(speed.policy),
            figure(1e6 * speed.policy_seconds, 0),
            figure(1e6 * speed.step_seconds, 0),
            figure(share, 0) + " %",
        )
    output.print(rows)
    output.print(
        "one layer of 8 KV heads of 4 query heads and 128 dimensions, one request, one thread; "
        "medians"
    )


def show_sum(
    output: Output,
    outcomes: "Sequence[Outcome]",
    verdicts: "Sequence[Verdict]",
    seconds: float,
) -> None:
    """Print the result in a line."""
    from kvpolicy.testing import CONTRACT

    broken = sum(outcome.failure is not None for outcome in outcomes)
    apart = [verdict.host for verdict in verdicts if not verdict.is_sound]
    agreeing = [verdict.host for verdict in verdicts if verdict.outcome == "agrees"]
    parts = [f"{count(len(outcomes), 'promise')} checked, {broken or 'none'} broken"]
    if agreeing:
        parts.append(f"agrees: {', '.join(agreeing)}")
    if apart:
        parts.append(f"does not agree: {', '.join(apart)}")
    output.print(f"\n{'; '.join(parts)}; {seconds:.0f} s")
    if broken > 1:
        output.print("Mend the first one first: others may follow from it.")
    if broken:
        rest = "" if len(outcomes) == len(CONTRACT) else "the other promises, "
        output.print(f"{rest}hosts and speed are looked at once these are kept".capitalize() + ".")


def outcome_as_dict(outcome: "Outcome") -> dict[str, Any]:
    """A check's outcome as JSON."""
    failure = outcome.failure
    return {
        "check": outcome.check,
        "promise": outcome.promise,
        "passed": failure is None,
        "cases": outcome.cases,
        "near_ties": outcome.near_ties,
        "problem": None if failure is None else failure.problem,
        "example": None if outcome.example is None else _script(outcome),
    }


def speed_as_dict(speed: "Speed") -> dict[str, Any]:
    """A measured speed as JSON."""
    return {
        "policy": str(speed.policy),
        "policy_seconds_per_token": speed.policy_seconds,
        "step_seconds_per_token": speed.step_seconds,
    }
