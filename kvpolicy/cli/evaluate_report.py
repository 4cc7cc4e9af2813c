"""What ``kvpolicy eval`` prints and draws."""

from collections.abc import Callable, Iterator, Mapping, Sequence

from rich.table import Table

from kvpolicy.cli.output import by_budget, figure, size, table
from kvpolicy.evaluation.plot import Axes, Point, Series, draw
from kvpolicy.evaluation.result import Comparison, Evaluation, Place
from kvpolicy.evaluation.run import Run
from kvpolicy.policy import CachePolicy
from kvpolicy.series import budget_of, series_of

WIDE = 112
"""Columns of text that whole tables take."""

MOST_COLUMNS, NARROW_COLUMNS = 8, 5
"""Groups that fit beside each other, in whole tables and in narrow ones."""


def tables(
    evaluation: Evaluation, taken: Mapping[CachePolicy, int], *, is_sweep: bool, is_narrow: bool
) -> Iterator[Table | str]:
    """The tables to be printed, some below their titles.

    Args:
        evaluation: What was found.
        taken: Bytes of a request under each policy.
        is_sweep: Whether budgets stand in columns.
        is_narrow: Whether to leave out what matters least.
    """
    if is_sweep:
        yield from _sweep(evaluation, is_narrow=is_narrow)
        return
    yield _policies(evaluation, taken, is_narrow=is_narrow)
    yield ""
    for context in evaluation.samples:
        places = [place for place in evaluation.places if place[0] == context]
        if 1 < len(places) <= (NARROW_COLUMNS if is_narrow else MOST_COLUMNS):
            by = evaluation.task.grouped_by
            yield f"{evaluation.task.title} by {by}, {context:,} tokens"
            yield _curve(evaluation, places)
            yield ""


def legend(evaluation: Evaluation, *, is_sweep: bool) -> str:
    """What was measured, and what the columns mean.

    Args:
        evaluation: What was found.
        is_sweep: Whether budgets stand in columns.
    """
    lengths = " and ".join(
        f"{len(group)} of {context:,} tokens" for context, group in evaluation.samples.items()
    )
    means = (
        "ratios of perplexities"
        if evaluation.task.measure == "perplexity"
        else "differences in percentage points"
    )
    columns = (
        "; KL, top-1: predictions beside the full cache's; differs: predictions before the first "
        "other choice, median"
    )
    return (
        f"samples: {lengths}; against: {means}, 95 % by paired bootstrap over samples; sinks: at "
        f"the same budget{'' if is_sweep else columns}{_asked(evaluation)}"
    )


def _asked(evaluation: Evaluation) -> str:
    """Who had read the question when it evicted."""
    question = getattr(evaluation.task, "question", None)
    if question is None:
        return ""
    if question == "unseen":
        return "; the question comes after the prompt, so no policy that evicts has seen it"
    if any(run.policy.prompts != "stream" for run in evaluation.runs):
        return "; the question ends the prompt: prefill=bulk has seen it, who streams has not"
    return "; the question comes last, and policies that stream have evicted by then"


def _policies(
    evaluation: Evaluation, taken: Mapping[CachePolicy, int], *, is_narrow: bool
) -> Table:
    """One line per policy."""
    full = evaluation.runs[0]
    columns: dict[str, Callable[[Run], str]] = {
        "bytes": lambda run: size(taken[run.policy]),
        evaluation.task.name: lambda run: shown_value(evaluation, run),
        "against full": lambda run: (
            "-" if run is full else shown_interval(evaluation, evaluation.compare(run, full))
        ),
        "sinks": lambda run: beside_sinks(evaluation, run),
        "KL": lambda run: figure(evaluation.kl(run), 4),
        "top-1": lambda run: figure(100 * evaluation.agreement(run), 1) + " %",
        "differs": lambda run: figure(evaluation.first_divergence(run), 0),
        "tokens/s": lambda run: figure(speed(evaluation, run), 0),
    }
    hidden = {"bytes", "differs", "tokens/s"} if is_narrow else set[str]()
    shown = {name: show for name, show in columns.items() if name not in hidden}
    rows = table("policy", *shown)
    for run in evaluation.runs:
        rows.add_row(str(run.policy), *(show(run) for show in shown.values()))
    return rows


def speed(evaluation: Evaluation, run: Run) -> float | None:
    """Tokens per second; None of a run whose time is not known."""
    return evaluation.num_processed / run.seconds if run.seconds else None


def _curve(evaluation: Evaluation, places: Sequence[Place]) -> Table:
    """The task's figure by group, one line per policy."""
    heads = [shown_range(*group) for _, group in places]
    rows = table("policy", *heads)
    for run in evaluation.runs:
        rows.add_row(str(run.policy), *(shown_value(evaluation, run, place) for place in places))
    return rows


def _sweep(evaluation: Evaluation, *, is_narrow: bool) -> Iterator[Table | str]:
    """Tables with a line per series of policies and a column per budget."""
    full, by_series = evaluation.runs[0], lines(evaluation)
    contents: dict[str, Callable[[Run], str]] = {
        evaluation.task.title: lambda run: shown_value(evaluation, run),
        "against full": lambda run: shown_interval(evaluation, evaluation.compare(run, full)),
        "against sinks": lambda run: beside_sinks(evaluation, run),
        "KL from the full cache, nats": lambda run: figure(evaluation.kl(run), 4),
    }
    for title, show in contents.items():
        if is_narrow and title.startswith("against"):
            continue
        yield title
        yield by_budget(by_series, show, show(full) if title == evaluation.task.title else None)
        yield ""


def quality(evaluation: Evaluation) -> tuple[Axes, list[Series], tuple[str, float]]:
    """Quality against budget, the full cache as reference; some policy has a budget."""
    task, full = evaluation.task, evaluation.runs[0]
    series = [
        Series(
            label,
            [
                Point(budget, evaluation.value(runs[budget]), evaluation.beside(runs[budget], full))
                for budget in sorted(runs)
            ],
        )
        for label, runs in lines(evaluation).items()
    ]
    is_share = task.measure != "perplexity"
    axes = Axes(
        title=f"{task.title.capitalize()}, {' and '.join(map(str, evaluation.samples))} "
        "tokens; 95 % intervals beside the full cache",
        x="slots per KV head",
        y="%" if is_share else "perplexity",
        percent=is_share,
    )
    return axes, series, ("full", evaluation.value(full))


def plot(evaluation: Evaluation) -> str:
    """Draw quality against budget, as SVG; some policy has a budget.

    Raises:
        UnsupportedError: There is nothing to draw with.
    """
    return draw(*quality(evaluation))


def lines(evaluation: Evaluation) -> dict[str, dict[int, Run]]:
    """Policies with a budget, by what they have in common, then by budget."""
    found: dict[str, dict[int, Run]] = {}
    for run in evaluation.runs:
        budget = budget_of(run.policy)
        if budget:
            found.setdefault(series_of(run.policy), {})[budget] = run
    return found


def shown_value(evaluation: Evaluation, run: Run, place: Place | None = None) -> str:
    """The task's figure, over all samples or in one place."""
    value = evaluation.value(run, place)
    if evaluation.task.measure == "perplexity":
        return figure(value)
    return figure(100 * value, 0) + " %"


def beside_sinks(evaluation: Evaluation, run: Run) -> str:
    """The interval of a run beside sinks at its budget; a dash without such."""
    sinks = evaluation.sinks_beside(run)
    return "-" if sinks is None else shown_interval(evaluation, evaluation.compare(run, sinks))


def shown_interval(evaluation: Evaluation, found: Comparison) -> str:
    """A comparison's interval; its value where there is a single sample."""
    is_ratio = evaluation.task.measure == "perplexity"
    ends = found.interval or (found.value,)
    if is_ratio:
        return " .. ".join(f"{end:.3f}" for end in ends)
    return " .. ".join(f"{100 * end:+.0f}" for end in ends)


def shown_range(low: float, high: float) -> str:
    """A group's name: its range, or its number if it holds one."""
    if high == low + 1:
        return f"{low:g}"
    return f"{low:g}..{high:g}"
