"""A sweep's summary as a page: a section per source, with its table and its picture."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from kvpolicy.cli.evaluate_page import figures_table, quality_picture
from kvpolicy.cli.evaluate_report import legend
from kvpolicy.cli.replay import CAVEAT, result_columns
from kvpolicy.cli.sweep.report import lines_of
from kvpolicy.cli.sweep.summary import EvalFound, Failure, ReplayFound, Summary
from kvpolicy.evaluation.plot import Axes, Point, Series, plan
from kvpolicy.page.document import Document, Picture, Section, slug
from kvpolicy.page.keys import keys_of
from kvpolicy.page.markup import Markup, amount, figure, join
from kvpolicy.page.tables import plain_table
from kvpolicy.registry import parse

_LONGEST = 72
"""Characters of a short name, after which files of pictures are called."""


def document(summary: Summary, title: str) -> Document:
    """The page of a sweep.

    Args:
        summary: What was found.
        title: What the sweep is called.
    """
    facts = {
        "units": f"{summary.total:,}",
        "failed": f"{len(summary.failures):,}",
        "replayed traces": f"{len(summary.replays):,}",
        "evaluations": f"{len(summary.evaluations):,}",
    }
    caveat = (
        "A section per source, in the grid's order. In pictures, lines join policies that differ "
        "in their budgets alone."
    )
    sections = [
        _replay(found, name) if isinstance(found, ReplayFound) else _evaluation(found, name)
        for found, name in _named([*summary.replays, *summary.evaluations])
    ]
    if summary.failures:
        sections.append(_failures(summary.failures))
    return Document("sweep", title, facts, join([caveat]), sections)


def _named(
    found: Iterable[ReplayFound | EvalFound],
) -> Iterator[tuple[ReplayFound | EvalFound, str]]:
    """Sources with short names, numbered where two are called alike."""
    taken = {"", "failures"}
    for each in found:
        name, number = each.source.label[:_LONGEST], 1
        while slug(name) in taken:
            number += 1
            name = f"{each.source.label[:_LONGEST]} ({number})"
        taken.add(slug(name))
        yield each, name


def _replay(found: ReplayFound, name: str) -> Section:
    """A trace: the table of `kvpolicy replay`, and retained mass against budget."""
    keys = keys_of([parse(result["policy"]) for result in found.results])
    columns = result_columns(found.results, is_narrow=False)
    rows = (
        [key.full_name(), *(show(result) for show in columns.values())]
        for key, result in zip(keys, found.results, strict=True)
    )
    content: list[Markup | Picture] = [
        plain_table(f"Replays of {name}", ["policy", *columns], rows),
        *_mass(found, name),
    ]
    introduction = _sentence(CAVEAT.format(level=found.source.entry.level))
    return Section(found.source.label, introduction, content, short=name)


def _mass(found: ReplayFound, name: str) -> list[Picture]:
    """Retained mass against budget; nothing if no policy has one."""
    lines = lines_of(found.results)
    if not lines:
        return []
    budgets = sorted({budget for results in lines.values() for budget in results})
    masses = {
        label: {budget: result["retained_mass"] for budget, result in sorted(results.items())}
        for label, results in lines.items()
    }
    series = [
        Series(
            label,
            [
                Point(budget, mass["mean"], mass["interval"] and tuple(mass["interval"]))
                for budget, mass in by_budget.items()
            ],
        )
        for label, by_budget in masses.items()
    ]
    axes = Axes(title="", x="slots per KV head", y="retained mass, %", percent=True)
    rows = (
        [label, *(figure(by_budget.get(b, {}).get("mean"), 4) for b in budgets)]
        for label, by_budget in masses.items()
    )
    alt = (
        f"Retained attention mass of {len(series)} kinds of policy on {name}, at budgets from "
        f"{amount(budgets[0])} to {amount(budgets[-1])} slots."
    )
    numbers = plain_table("Mean retained mass", ["slots", *map(amount, budgets)], rows)
    return [Picture(f"replay-{slug(name)}", alt, plan(axes, series, ("full", 1.0)), numbers)]


def _evaluation(found: EvalFound, name: str) -> Section:
    """A task: the table of `kvpolicy eval`, and its figure against budget."""
    keys = {key.spec: key for key in keys_of([run.policy for run in found.evaluation.runs])}
    content: list[Markup | Picture] = [figures_table(found.evaluation, keys, found.taken)]
    picture = quality_picture(found.evaluation)
    if picture is not None:
        content.append(replace(picture, name=f"eval-{slug(name)}"))
    introduction = _sentence(legend(found.evaluation, is_sweep=False))
    return Section(found.source.label, introduction, content, short=name)


def _sentence(remark: str) -> str:
    """A remark of the terminal's as a page has it."""
    return f"{remark[0].upper()}{remark[1:]}.".replace("`", "")


def _failures(failures: Sequence[Failure]) -> Section:
    rows = ([each.source, each.policy, each.error] for each in failures)
    return Section(
        "Failures",
        "Units without a result; the same command tries them again.",
        [plain_table("Units that failed", ("source", "policy", "error"), rows)],
    )
