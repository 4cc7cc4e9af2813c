"""What a worker does: compute one unit, from JSON to JSON."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeAlias

from kvpolicy.bundled import heldout_text
from kvpolicy.errors import PolicyError
from kvpolicy.evaluation.sample import Sample, digest_of
from kvpolicy.evaluation.source import Source
from kvpolicy.evaluation.task import Task
from kvpolicy.evaluation.tasks import TASKS
from kvpolicy.policy import CachePolicy
from kvpolicy.registry import parse
from kvpolicy.trace import Trace

# Types of hosts: this package may import them only inside functions.
ClosedLoop: TypeAlias = Any
Vocabulary: TypeAlias = Any
Tensor: TypeAlias = Any

MOST_REMEMBERED = 256 << 20
"""Bytes of the full cache's predictions that a worker keeps for the policies to come."""


def compute(job: dict[str, Any]) -> dict[str, Any]:
    """Compute the unit of a job: the JSON of a replay, or how each sample of an evaluation went.

    Raises:
        KVPolicyError: It cannot be computed, or what it is computed from is no longer what it was
            when the sweep began.
    """
    import torch

    torch.set_num_threads(1)
    return _KINDS[job["kind"]](job)


def make_samples(
    vocabulary: Vocabulary, text: Path | None, task: Task, context: int, count: int, seed: int
) -> list[Sample]:
    """Make the samples of an evaluation.

    Args:
        vocabulary: The model's.
        text: File of the text; None for the bundled one.
        task: The task.
        context: Tokens of a sample.
        count: Samples, at most.
        seed: Of what is drawn.

    Raises:
        ValueError: The text or the context is too small, or the text is not UTF-8.
        OSError: The text cannot be read.
    """
    written = heldout_text() if text is None else text.read_text("utf-8")
    source = Source(written, vocabulary.encode, vocabulary.start)
    return task.samples(source, context, count, seed)


def _replay(job: dict[str, Any]) -> dict[str, Any]:
    from kvpolicy_sim.replay import replay

    with Trace.open(job["trace"]) as trace:
        _require_same(job["trace"], trace.identity, job["identity"])
        names = ("level", "layers", "sequences", "outputs", "details", "oracle")
        report = replay(
            trace,
            job["policy"],
            **{name: job[name] for name in names},
            model=job["weights"],
            threads=1,
        )
    return report.as_dict()


def _evaluate(job: dict[str, Any]) -> dict[str, Any]:
    from kvpolicy.evaluation.run import evaluate

    settings = tuple(sorted(job["settings"].items()))
    numbers = (job["context"], job["count"], job["seed"])
    prepared = _prepare(job["model"], job["text"], job["task"], settings, *numbers)
    samples = {job["context"]: prepared.samples}
    _require_same(job["text"] or job["model"], digest_of(samples), job["samples"])
    policy, full = parse(job["policy"]), parse("full")
    # The full cache is timed as it is; to the others it is a reference, best remembered.
    is_full = policy == full
    host = prepared.host if is_full else prepared.remembering
    run = evaluate(host, samples, [full] if is_full else [full, policy])[-1]
    prompt = max(sample.prompt_tokens for sample in prepared.samples)
    return {
        "measured": [asdict(entry) for entry in run.measured],
        "seconds": run.seconds,
        "bytes_per_request": prepared.host.bytes_per_request(policy, job["context"], prompt),
    }


_KINDS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "replay": _replay,
    "eval": _evaluate,
}


def _require_same(what: str, found: str, expected: str) -> None:
    if found != expected:
        raise PolicyError(
            f"{what} is not what it was when the sweep began; begin the sweep again, or give every "
            "node the same files"
        )


@dataclass
class Remembering:
    """A host that computes the full cache's predictions of a batch once, if they are small.

    Attributes:
        host: What runs the model.
        room: Bytes that may still be kept.
    """

    host: ClosedLoop
    room: int = MOST_REMEMBERED
    _found: dict[tuple[tuple[int, ...], ...], list[Tensor]] = field(default_factory=dict)

    def batch_size(self, samples: Sequence[Sample]) -> int:
        """As the host says."""
        return self.host.batch_size(samples)

    def predict(self, batch: Sequence[Sample], policy: CachePolicy) -> list[Tensor]:
        """Predict, or look up; as the host."""
        if policy != parse("full"):
            return self.host.predict(batch, policy)
        key = tuple(tuple(sample.tokens) for sample in batch)
        found = self._found.get(key)
        if found is None:
            found = self.host.predict(batch, policy)
            size = sum(part.numel() * part.element_size() for part in found)
            if size <= self.room:
                self._found[key] = found
                self.room -= size
        return found


@dataclass(frozen=True)
class _Prepared:
    """A model and what it is asked, as the units of one source share them."""

    host: ClosedLoop
    remembering: Remembering
    samples: list[Sample]


@lru_cache(maxsize=1)
def _prepare(
    model: str,
    text: str | None,
    task: str,
    settings: tuple[tuple[str, Any], ...],
    context: int,
    count: int,
    seed: int,
) -> _Prepared:
    from kvpolicy_hf.closed_loop import ClosedLoop as Transformers

    checkpoint = _load(model)
    path = None if text is None else Path(text)
    made = make_samples(checkpoint, path, TASKS[task](**dict(settings)), context, count, seed)
    host = Transformers(checkpoint.model)
    return _Prepared(host, Remembering(host), made)


@lru_cache(maxsize=1)
def _load(model: str) -> Any:
    from kvpolicy_hf.checkpoint import load_checkpoint

    return load_checkpoint(model)
