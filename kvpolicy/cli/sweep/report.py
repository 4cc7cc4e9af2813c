"""What a sweep prints of its summary."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rich.markup import escape

from kvpolicy.cli.evaluate_report import WIDE, legend, tables
from kvpolicy.cli.output import Output, by_budget, count, figure, table
from kvpolicy.cli.replay import CAVEAT, regret_interval, results_table
from kvpolicy.cli.sweep.summary import ReplayFound, Summary
from kvpolicy.registry import parse
from kvpolicy.series import budget_of, series_of

Result = dict[str, Any]


def show(output: Output, summary: Summary) -> None:
    """Print every source's tables, and what failed."""
    for found in summary.replays:
        output.print(f"\n{escape(found.source.label)}\n")
        for each in _replay_tables(found, is_narrow=output.width < WIDE):
            output.print(each)
        output.print(CAVEAT.format(level=found.source.entry.level))
    for found in summary.evaluations:
        policies = [run.policy for run in found.evaluation.runs[1:]]
        is_sweep, is_narrow = all(map(budget_of, policies)) and bool(policies), output.width < WIDE
        output.print(f"\n{escape(found.source.label)}\n")
        for each in tables(found.evaluation, found.taken, is_sweep=is_sweep, is_narrow=is_narrow):
            output.print(each)
        output.print(legend(found.evaluation, is_sweep=is_sweep))
    if summary.failures:
        output.print(f"\n{count(len(summary.failures), 'unit')} failed\n")
        rows = table("source", "policy", "error", left=3)
        for failure in summary.failures:
            rows.add_row(*map(escape, (failure.source, failure.policy, failure.error)))
        output.print(rows)


def _replay_tables(found: ReplayFound, *, is_narrow: bool) -> Iterator[Any]:
    """A table per figure where all policies have budgets, otherwise one line per policy."""
    evicting = [result for result in found.results if result["policy"] != "full"]
    if not evicting or not all(budget_of(parse(each["policy"])) for each in evicting):
        yield results_table(found.results, is_narrow=is_narrow)
        yield ""
        return
    contents: dict[str, Callable[[Result], str]] = {
        "retained mass": lambda r: figure(r["retained_mass"]["mean"], 4),
        "output error": lambda r: figure(r["output_error"]["mean"], 4),
        "regret": lambda r: regret_interval(r["regret"]),
    }
    lines = lines_of(evicting)
    for title, content in contents.items():
        if any(content(result) != "-" for result in evicting):
            yield title
            yield by_budget(lines, content)
            yield ""


def lines_of(results: Sequence[Result]) -> dict[str, dict[int, Result]]:
    """Results of policies with a budget, by what they have in common, then by budget."""
    lines: dict[str, dict[int, Result]] = {}
    for result in results:
        policy = parse(result["policy"])
        budget = budget_of(policy)
        if budget:
            lines.setdefault(series_of(policy), {})[budget] = result
    return lines
