"""What a sweep prints and draws of its summary."""

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.markup import escape

from kvpolicy.cli.evaluate_report import WIDE, legend, plot, tables
from kvpolicy.cli.output import Output, by_budget, count, figure, table
from kvpolicy.cli.replay import CAVEAT, regret_interval, results_table
from kvpolicy.cli.sweep.summary import EvalFound, ReplayFound, Summary
from kvpolicy.evaluation.plot import Axes, Point, Series, draw
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


def draw_all(summary: Summary, folder: Path) -> list[str]:
    """Draw quality against budget of every source that has budgets; names of the files."""
    drawn: dict[str, str] = {}
    for found in [*summary.replays, *summary.evaluations]:
        picture = _draw_replay(found) if isinstance(found, ReplayFound) else _draw_eval(found)
        if picture is not None:
            drawn[_name(f"{found.source.kind}-{found.source.label}", drawn)] = picture
    for name, picture in drawn.items():
        Output.write(str(folder / name), picture)
    return list(drawn)


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
    lines = _lines(evicting)
    for title, content in contents.items():
        if any(content(result) != "-" for result in evicting):
            yield title
            yield by_budget(lines, content)
            yield ""


def _lines(results: Sequence[Result]) -> dict[str, dict[int, Result]]:
    """Results of policies with a budget, by what they have in common, then by budget."""
    lines: dict[str, dict[int, Result]] = {}
    for result in results:
        policy = parse(result["policy"])
        budget = budget_of(policy)
        if budget:
            lines.setdefault(series_of(policy), {})[budget] = result
    return lines


def _draw_replay(found: ReplayFound) -> str | None:
    """Retained mass against budget; None if no policy has one."""
    series = [
        Series(
            label,
            [
                Point(budget, each["mean"], _interval(each["interval"]))
                for budget in sorted(results)
                for each in [results[budget]["retained_mass"]]
            ],
        )
        for label, results in _lines(found.results).items()
    ]
    axes = Axes(
        title=f"Retained attention mass, {found.source.label}",
        x="slots per KV head",
        y="%",
        percent=True,
    )
    return draw(axes, series, ("full", 1.0)) if series else None


def _interval(ends: Sequence[float] | None) -> tuple[float, float] | None:
    return None if ends is None else (ends[0], ends[1])


def _draw_eval(found: EvalFound) -> str | None:
    """As `kvpolicy eval --plot` draws it; None if no policy has a budget."""
    has_budget = any(budget_of(run.policy) for run in found.evaluation.runs)
    return plot(found.evaluation) if has_budget else None


def _name(label: str, taken: dict[str, str]) -> str:
    """A file's name for a source; numbered where two are called alike."""
    stem = re.sub(r"[^a-z0-9]+", "-", label.lower().replace(",", "")).strip("-")[:80]
    names = (f"{stem}.svg", *(f"{stem}-{number}.svg" for number in range(2, len(taken) + 2)))
    return next(name for name in names if name not in taken)
