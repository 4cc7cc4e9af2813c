"""What an evaluation found, with intervals: as figures, as JSON, as CSV."""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np

from kvpolicy.evaluation.measured import Measured
from kvpolicy.evaluation.run import Run
from kvpolicy.evaluation.sample import Sample, Target
from kvpolicy.evaluation.statistics import Ratio
from kvpolicy.evaluation.task import Measure, Question, Task
from kvpolicy.evaluation.tasks import TASKS
from kvpolicy.policy import CachePolicy
from kvpolicy.series import budget_of, series_of

Interval = tuple[float, float]

Place = tuple[int, tuple[float, float]]
"""Context length and group of targets."""


@dataclass(frozen=True)
class Comparison:
    """A policy's figure beside another one's, on the same samples.

    Attributes:
        other: The other policy.
        value: Ratio of perplexities, or difference of shares.
        interval: Of the value, paired by sample; None of a single sample.
    """

    other: CachePolicy
    value: float
    interval: Interval | None


@dataclass(frozen=True)
class Evaluation:
    """Runs of several policies over the same samples.

    Attributes:
        task: What was asked.
        samples: By context length.
        runs: The full cache first.
    """

    task: Task
    samples: Mapping[int, Sequence[Sample]]
    runs: Sequence[Run]

    def value(self, run: Run, place: Place | None = None) -> float:
        """The task's figure, over all samples or in one place."""
        return self._shown(self._ratio(run, self.task.measure, place).value)

    def interval(self, run: Run, place: Place | None = None) -> Interval | None:
        """Of `value`."""
        interval = self._ratio(run, self.task.measure, place).interval
        return None if interval is None else (self._shown(interval[0]), self._shown(interval[1]))

    def kl(self, run: Run, place: Place | None = None) -> float:
        """Mean divergence of predictions from the full cache's, in nats."""
        return self._ratio(run, "kl", place).value

    def agreement(self, run: Run, place: Place | None = None) -> float:
        """Share of predictions whose likeliest token is the full cache's."""
        return self._ratio(run, "agreement", place).value

    def compare(self, run: Run, other: Run) -> Comparison:
        """Set a policy beside another one."""
        mine, theirs = (self._ratio(each, self.task.measure) for each in (run, other))
        value, interval = mine.value - theirs.value, mine.difference_interval(theirs)
        if self.task.measure == "perplexity":
            value = math.exp(value)
            interval = None if interval is None else (math.exp(interval[0]), math.exp(interval[1]))
        return Comparison(other.policy, value, interval)

    def beside(self, run: Run, other: Run) -> Interval | None:
        """Where a policy's figure lies if the other one's is taken as certain."""
        interval, fixed = self.compare(run, other).interval, self.value(other)
        if interval is None:
            return None
        if self.task.measure == "perplexity":
            return fixed * interval[0], fixed * interval[1]
        return fixed + interval[0], fixed + interval[1]

    def sinks_beside(self, run: Run) -> Run | None:
        """The run of sinks with this one's budget, which treats prompts alike."""
        return next(
            (
                each
                for each in self.runs
                if series_of(each.policy).partition(":")[0] == "sinks"
                and budget_of(each.policy) == budget_of(run.policy)
                and each.policy.prompts == run.policy.prompts
                and each is not run
            ),
            None,
        )

    def first_divergence(self, run: Run) -> int | None:
        """Median over samples of the predictions before the first that differs from full's.

        None if half of the samples or more never differ.
        """
        found = sorted(math.inf if m.diverged is None else m.diverged for m in run.measured)
        median = found[(len(found) - 1) // 2]
        return None if median == math.inf else int(median)

    @cached_property
    def places(self) -> list[Place]:
        """Contexts and groups that occur, in ascending order."""
        return sorted(
            {
                (context, target.group)
                for context, samples in self.samples.items()
                for sample in samples
                for target in sample.targets
            }
        )

    @cached_property
    def num_predicted(self) -> int:
        """Tokens that each policy predicted."""
        return sum(sample.num_predicted for _, sample in self._ordered)

    @cached_property
    def num_processed(self) -> int:
        """Tokens that went through the model under each policy."""
        return sum(len(sample.tokens) for _, sample in self._ordered)

    def as_dict(self, run: Run) -> dict[str, Any]:
        """One policy's figures as JSON; what other tasks measure is null."""
        tasks: dict[str, float | None] = dict.fromkeys(TASKS)
        tasks[self.task.name] = self.value(run)
        full, sinks = self.compare(run, self.runs[0]), self.sinks_beside(run)
        is_perplexity = self.task.measure == "perplexity"
        return {
            "policy": str(run.policy),
            "budget": budget_of(run.policy),
            **tasks,
            "interval": self.interval(run),
            **({"ppl_ratio": full.interval} if is_perplexity else {}),
            "against_full": self._written(full),
            "against_sinks": None if sinks is None else self._written(self.compare(run, sinks)),
            "logit_kl": self.kl(run),
            "top1_agreement": self.agreement(run),
            "first_divergence": self.first_divergence(run),
            "never_diverged": sum(m.diverged is None for m in run.measured) / len(run.measured),
            "curve": [
                {
                    "context": place[0],
                    self.task.grouped_by: list(place[1]),
                    self.task.name: self.value(run, place),
                    "interval": self.interval(run, place),
                    "logit_kl": self.kl(run, place),
                    "top1_agreement": self.agreement(run, place),
                    "tokens": int(self._ratio(run, "kl", place).counts.sum()),
                }
                for place in self.places
            ],
            "tokens": self.num_predicted,
            "processed": self.num_processed,
            "seconds": run.seconds,
        }

    def as_csv(self) -> str:
        """All figures as a table: a line per policy, then one per policy and place."""
        by = self.task.grouped_by
        names = ("task", "policy", "series", "budget", "context", f"{by}_from", f"{by}_to")
        figures = ("value", "low", "high", "logit_kl", "top1_agreement")
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow((*names, *figures))
        for place in (None, *self.places):
            for run in self.runs:
                where = ("", "", "") if place is None else (place[0], *place[1])
                interval = self.interval(run, place) or ("", "")
                policy = (str(run.policy), series_of(run.policy), budget_of(run.policy))
                writer.writerow(
                    (
                        self.task.name,
                        *policy,
                        *where,
                        self.value(run, place),
                        *interval,
                        self.kl(run, place),
                        self.agreement(run, place),
                    )
                )
        return text.getvalue()

    @cached_property
    def _ordered(self) -> list[tuple[int, Sample]]:
        """Samples with their contexts, in the order of the runs' entries."""
        return [(context, s) for context in sorted(self.samples) for s in self.samples[context]]

    def _ratio(self, run: Run, what: "What", place: Place | None = None) -> Ratio:
        """A figure, taken apart by sample; samples without targets in a place are left out."""
        rows: list[tuple[float, float]] = []
        for (context, sample), measured in zip(self._ordered, run.measured, strict=True):
            terms = [
                _term(what, target, measured, index)
                for index, target in enumerate(sample.targets)
                if place is None or place == (context, target.group)
            ]
            if terms:
                rows.append((sum(term[0] for term in terms), sum(term[1] for term in terms)))
        sums, counts = np.array(rows, dtype=np.float64).T
        return Ratio(sums, counts)

    def _shown(self, mean: float) -> float:
        return math.exp(mean) if self.task.measure == "perplexity" else mean

    def _written(self, found: Comparison) -> dict[str, Any]:
        what = "ratio" if self.task.measure == "perplexity" else "difference"
        return {"policy": str(found.other), what: found.value, "interval": found.interval}


What = Measure | Literal["kl", "agreement"]


def _term(what: What, target: Target, measured: Measured, index: int) -> tuple[float, float]:
    """One target's share of a figure: what is added up, and over how many."""
    match what:
        case "perplexity":
            return measured.nll[index], target.size
        case "exact":
            return measured.right[index] == target.size, 1
        case "tokens":
            return measured.right[index], target.size
        case "kl":
            return measured.kl[index], target.size
        case "agreement":
            return measured.agreed[index], target.size


def question_of(policy: CachePolicy, question: Question) -> Question:
    """Whether the policy has read the question when it evicts what the question is about.

    Only what evicts behind a prompt, or never evicts from it, can have: policies that stream
    evict the text as they read it.
    """
    is_dense = not policy.evicts or policy.prompts != "stream"
    return question if is_dense else "unseen"
