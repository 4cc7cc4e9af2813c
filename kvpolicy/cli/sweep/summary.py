"""What a sweep found, drawn together from its results: for tables, JSON and pictures alike."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvpolicy.cli.sweep.results import Results
from kvpolicy.cli.sweep.sources import EvalSource, ReplaySource
from kvpolicy.cli.sweep.units import Unit
from kvpolicy.evaluation.cells import read_measured
from kvpolicy.evaluation.result import Evaluation, question_of
from kvpolicy.evaluation.run import Run
from kvpolicy.ledger import SEMANTICS
from kvpolicy.policy import CachePolicy

SCHEMA = 1


@dataclass(frozen=True)
class ReplayFound:
    """Replays of one trace.

    Attributes:
        source: The trace.
        trace: What a replay's JSON says of it.
        results: Entries of a replay's JSON, one per policy.
    """

    source: ReplaySource
    trace: Mapping[str, Any]
    results: Sequence[dict[str, Any]]

    def as_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "source": self.source.label,
            "path": str(self.source.entry.trace),
            "trace": self.trace,
            "results": self.results,
        }


@dataclass(frozen=True)
class EvalFound:
    """One task for one model at one length.

    Attributes:
        source: What was asked.
        evaluation: The figures, each beside the full cache's.
        taken: Bytes of a request under each policy.
    """

    source: EvalSource
    evaluation: Evaluation
    taken: Mapping[CachePolicy, int]

    def as_dict(self) -> dict[str, Any]:
        """As JSON."""
        entry = self.source.entry
        question = getattr(entry.task, "question", None)
        return {
            "source": self.source.label,
            "model": entry.model_name,
            "task": entry.task.name,
            "context": entry.context,
            "samples": len(self.source.samples),
            "seed": entry.seed,
            "results": [
                {
                    **self.evaluation.as_dict(run),
                    "bytes_per_request": self.taken[run.policy],
                    "question": question and question_of(run.policy, question),
                }
                for run in self.evaluation.runs
            ],
        }


@dataclass(frozen=True)
class Failure:
    """A unit without a result."""

    source: str
    policy: str
    error: str


@dataclass(frozen=True)
class Summary:
    """What a sweep found.

    Attributes:
        total: Units of the grid.
        replays: Traces, in the grid's order.
        evaluations: Likewise; those whose full cache failed are left out.
        failures: Units that failed.
    """

    total: int
    replays: Sequence[ReplayFound]
    evaluations: Sequence[EvalFound]
    failures: Sequence[Failure]

    def as_dict(self) -> dict[str, Any]:
        """As JSON: results as `kvpolicy replay` and `kvpolicy eval` give them, by source."""
        return {
            "schema": SCHEMA,
            "semantics": SEMANTICS,
            "units": {"total": self.total, "failed": len(self.failures)},
            "replays": [found.as_dict() for found in self.replays],
            "evaluations": [found.as_dict() for found in self.evaluations],
            "failures": [vars(failure) for failure in self.failures],
        }


def summarise(units: Sequence[Unit], results: Results) -> Summary:
    """Draw the results of units together, source by source.

    Raises:
        PolicyError: A result cannot be right.
    """
    done: dict[int, dict[CachePolicy, dict[str, Any]]] = {}
    failures: list[Failure] = []
    for unit in units:
        found = done.setdefault(id(unit.source), {})
        record = results.find(unit)
        if record is not None and record.result is not None:
            found[unit.policy] = record.result
        elif record is not None:
            failures.append(Failure(unit.source.label, str(unit.policy), record.error or ""))
    replays: list[ReplayFound] = []
    evaluations: list[EvalFound] = []
    for source in {id(unit.source): unit.source for unit in units}.values():
        found = done[id(source)]
        if isinstance(source, ReplaySource) and found:
            trace = next(iter(found.values()))["trace"]
            replays.append(ReplayFound(source, trace, [x["results"][0] for x in found.values()]))
        elif isinstance(source, EvalSource) and source.policies[0] in found:
            evaluations.append(_evaluation(source, found))
    return Summary(len({unit.id for unit in units}), replays, evaluations, failures)


def _evaluation(source: EvalSource, found: Mapping[CachePolicy, Mapping[str, Any]]) -> EvalFound:
    runs = [
        Run(policy, read_measured(result["measured"]) or [], result["seconds"])
        for policy, result in found.items()
    ]
    samples = {source.entry.context: source.samples}
    taken = {policy: result["bytes_per_request"] for policy, result in found.items()}
    return EvalFound(source, Evaluation(source.entry.task, samples, runs), taken)
