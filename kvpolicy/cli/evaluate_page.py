"""What ``kvpolicy eval`` found, as a page with pictures."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeAlias

import numpy as np

from kvpolicy.cli.evaluate_report import (
    beside_sinks,
    legend,
    lines,
    quality,
    shown_interval,
    shown_range,
    shown_value,
    speed,
)
from kvpolicy.cli.output import Steps
from kvpolicy.cli.specimen import Outcome, Specimen, replay_text
from kvpolicy.evaluation.plot import DODGE, plan, upright
from kvpolicy.evaluation.result import Evaluation, Place
from kvpolicy.evaluation.run import Run
from kvpolicy.page.charts import Curve, Scale, line_chart
from kvpolicy.page.document import Document, Picture, Section
from kvpolicy.page.keys import Key, keys_of
from kvpolicy.page.markup import NOTHING, Markup, element, figure, interval, join, size
from kvpolicy.page.tables import plain_table
from kvpolicy.policy import CachePolicy
from kvpolicy.series import budget_of, drawn

# The host's type: this package may import hosts only inside functions.
Checkpoint: TypeAlias = Any

_MOST_NAMES = 9
"""Groups that a scale names."""

NEW_TOKENS = 24
"""What the model writes after a text that no answer follows."""


def document(
    evaluation: Evaluation,
    taken: Mapping[CachePolicy, int],
    model: str,
    specimen: Specimen,
) -> Document:
    """The page of an evaluation.

    Args:
        evaluation: What was found.
        taken: Bytes of a request under each policy.
        model: What the model is called.
        specimen: A sample of it in detail.
    """
    keys = {key.spec: key for key in keys_of([run.policy for run in evaluation.runs])}
    facts = {
        "task": evaluation.task.name,
        "samples": ", ".join(f"{len(x):,}" for x in evaluation.samples.values()),
        "tokens of a sample": ", ".join(f"{n:,}" for n in evaluation.samples),
        "tokens predicted": figure(evaluation.num_predicted),
    }
    caveat = join(
        [
            element("b", "closed loop"),
            ": the model runs under each policy, and every prediction sees what that policy had "
            "retained; ",
            legend(evaluation, is_sweep=False),
            ".",
        ]
    )
    sections = [
        _policies(evaluation, keys, taken),
        *_by_budget(evaluation),
        *(_by_place(evaluation, keys, context) for context in _divided(evaluation)),
        *specimen.sections(keys, "The first sample"),
    ]
    return Document("eval", model, facts, caveat, sections)


def examine(checkpoint: Checkpoint, evaluation: Evaluation, steps: Steps) -> Specimen:
    """Let the model write what follows one sample, the first of the longest, under every policy.

    Args:
        checkpoint: The model.
        evaluation: Whose sample and policies to run.
        steps: Shows progress.
    """
    from kvpolicy_hf.greedy import generate_greedy

    sample = evaluation.samples[max(evaluation.samples)][0]
    policies = [run.policy for run in evaluation.runs]
    is_text = evaluation.task.measure == "perplexity"
    read = sample.tokens if is_text else sample.tokens[: sample.targets[0].first]
    new_tokens = NEW_TOKENS if is_text else sample.targets[0].size
    advance = steps.begin("the sample shown", len(policies))
    outcomes: dict[str, Outcome] = {}
    for policy in policies:
        run = generate_greedy(
            checkpoint.model, read, policy, new_tokens, sample.prompt_tokens or None
        )
        written = checkpoint.decode(run.tokens).strip()
        outcomes[str(policy)] = Outcome(run.retained, run.ledger.as_dict(), written)
        advance(1)
    report = replay_text(
        checkpoint.model,
        sample.tokens,
        sample.prompt_tokens or None,
        policies,
        steps,
        oracle=False,
    )
    return Specimen(checkpoint.passage(read), outcomes, report)


def _policies(
    evaluation: Evaluation, keys: Mapping[str, Key], taken: Mapping[CachePolicy, int]
) -> Section:
    return Section(
        "Policies",
        "What each policy cost in quality, the full cache first. The pictures call policies by "
        "their number and by what sets them apart.",
        [figures_table(evaluation, keys, taken)],
    )


def figures_table(
    evaluation: Evaluation, keys: Mapping[str, Key], taken: Mapping[CachePolicy, int]
) -> Markup:
    """The table of all figures.

    Args:
        evaluation: What was found.
        keys: What the policies go by.
        taken: Bytes of a request under each policy.
    """
    full = evaluation.runs[0]
    titles = (
        "policy",
        evaluation.task.title,
        "95 % interval",
        "against full",
        "against sinks",
        "KL from full, nats",
        "top-1 as full",
        "first difference",
        "bytes of a request",
        "tokens/s",
    )

    def row(run: Run) -> list[str]:
        against = shown_interval(evaluation, evaluation.compare(run, full))
        return [
            keys[str(run.policy)].full_name(),
            shown_value(evaluation, run),
            _own_interval(evaluation, run),
            NOTHING if run is full else against,
            beside_sinks(evaluation, run),
            figure(evaluation.kl(run), 4),
            f"{100 * evaluation.agreement(run):.1f} %",
            figure(evaluation.first_divergence(run)),
            size(taken[run.policy]),
            figure(speed(evaluation, run)),
        ]

    return plain_table("Figures of every policy", titles, map(row, evaluation.runs))


def _by_budget(evaluation: Evaluation) -> list[Section]:
    """Quality against budget; nothing if no policy has one."""
    picture = quality_picture(evaluation)
    if picture is None:
        return []
    return [
        Section(
            f"{evaluation.task.title.capitalize()} by budget",
            "Lines join policies that differ in their budgets alone. Vertical strokes: 95 % "
            "intervals beside the full cache, which is the dashed line.",
            [picture],
            short="Quality",
        )
    ]


def quality_picture(evaluation: Evaluation) -> Picture | None:
    """Quality against budget; None if no policy has one."""
    by_series = lines(evaluation)
    if not by_series:
        return None
    axes, series, reference = quality(evaluation)
    budgets = sorted({budget for runs in by_series.values() for budget in runs})
    rows = [
        [name, *(shown_value(evaluation, runs[b]) if b in runs else figure(None) for b in budgets)]
        for name, runs in by_series.items()
    ]
    full = evaluation.runs[0]
    rows.append(["full", *[shown_value(evaluation, full)] * len(budgets)])
    alt = (
        f"{evaluation.task.title.capitalize()} of {len(by_series)} kinds of policy at budgets "
        f"from {budgets[0]:,} to {budgets[-1]:,} slots, beside {shown_value(evaluation, full)} "
        "with the full cache."
    )
    numbers = plain_table(
        f"{evaluation.task.title.capitalize()} by budget", ["slots", *map(figure, budgets)], rows
    )
    return Picture(
        "quality-by-budget", alt, plan(replace(axes, title=""), series, reference), numbers
    )


def _divided(evaluation: Evaluation) -> list[int]:
    """Context lengths whose targets fall into several groups."""
    return [
        context
        for context in evaluation.samples
        if sum(place[0] == context for place in evaluation.places) > 1
    ]


def _by_place(evaluation: Evaluation, keys: Mapping[str, Key], context: int) -> Section:
    """The task's figure by what its targets are grouped by."""
    places = [place for place in evaluation.places if place[0] == context]
    runs, remark = drawn(evaluation.runs, lambda run: budget_of(run.policy))
    task, names = evaluation.task, [shown_range(*group) for _, group in places]
    curves = [_curve(evaluation, keys[str(run.policy)], run, places) for run in runs]
    ends = [
        y
        for curve in curves
        for each in (curve.y, curve.low, curve.high)
        if each is not None
        for y in each[np.isfinite(each)].tolist()
    ]
    every = -(-len(names) // _MOST_NAMES)
    title = task.title.capitalize()
    picture = Picture(
        f"by-{task.grouped_by}-{context}",
        f"{title} of {len(curves)} policies by {task.grouped_by}, from {names[0]} to {names[-1]}, "
        f"of samples of {context:,} tokens.",
        partial(
            line_chart,
            x=Scale(task.grouped_by, 0, len(names) - 1, [*enumerate(names)][::every]),
            y=upright(task.title, ends, percent=_is_share(evaluation)),
            curves=curves,
            dots=True,
            dodge=DODGE,
        ),
        plain_table(
            f"{title} by {task.grouped_by}",
            ["policy", *names],
            (
                [
                    keys[str(run.policy)].short,
                    *(shown_value(evaluation, run, place) for place in places),
                ]
                for run in runs
            ),
        ),
    )
    return Section(
        f"{title} by {task.grouped_by}, {context:,} tokens",
        f"The same figure, of the targets of each {task.grouped_by} alone. Vertical strokes: its "
        f"own 95 % intervals.{remark}",
        [picture],
        short=f"By {task.grouped_by}, {context:,}",
    )


def _curve(evaluation: Evaluation, key: Key, run: Run, places: Sequence[Place]) -> Curve:
    values = np.array([evaluation.value(run, place) for place in places])
    ends = [evaluation.interval(run, place) or (np.nan, np.nan) for place in places]
    low, high = np.array(ends).T
    return Curve(key, np.arange(len(places)), values, low, high)


def _own_interval(evaluation: Evaluation, run: Run) -> str:
    """Of a policy's figure by itself; a dash of a single sample."""
    ends = evaluation.interval(run)
    if ends is None:
        return NOTHING
    if _is_share(evaluation):
        return interval(100 * ends[0], 100 * ends[1], 0)
    return interval(*ends, 2)


def _is_share(evaluation: Evaluation) -> bool:
    return evaluation.task.measure != "perplexity"
