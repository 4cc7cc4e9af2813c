"""What units run on, opened and checked before any of them runs."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from kvpolicy.cli.sweep.grid import Entry, EvalEntry, ReplayEntry, naming
from kvpolicy.cli.sweep.units import Cost, Unit, folder_digest, model_files
from kvpolicy.cli.sweep.work import make_samples
from kvpolicy.errors import UnsupportedError
from kvpolicy.evaluation.cells import fits, read_measured
from kvpolicy.evaluation.run import require_prompts
from kvpolicy.evaluation.sample import Sample, digest_of
from kvpolicy.footprint import position_limit
from kvpolicy.journal import is_count, is_figure
from kvpolicy.model_facts import ModelFacts, read_model_facts
from kvpolicy.policy import CachePolicy
from kvpolicy.trace import Header, Trace
from kvpolicy.trace import Sequence as TracedSequence


def open_units(
    entries: Iterable[Entry], advance: Callable[[int], object] = lambda _: None
) -> list[Unit]:
    """Open what entries name, and check that every policy can be run on it.

    Args:
        entries: Entries of a grid.
        advance: Told the bytes of models read.

    Raises:
        KVPolicyError: Something is missing, damaged or unsupported; the message names the entry.
    """
    units: list[Unit] = []
    digests: dict[str, str] = {}
    for entry in entries:
        with naming(entry.where):
            if isinstance(entry, ReplayEntry):
                source = open_replay(entry)
            else:
                model = str(entry.model)
                if model not in digests:
                    read_model_facts(model)  # before all its bytes are read
                    digests[model] = folder_digest(entry.model, advance)
                source = open_eval(entry, digests[model])
            units += [Unit(source, policy) for policy in entry.policies]
    return units


def model_bytes(entries: Iterable[Entry]) -> int:
    """Bytes of all models that `open_units` will read; what is missing is said there."""
    models = {entry.model for entry in entries if isinstance(entry, EvalEntry)}
    return sum(x.stat().st_size for m in models if m.is_dir() for x in model_files(m))


@dataclass(frozen=True)
class ReplaySource:
    """A trace, as an entry replays it.

    Attributes:
        entry: The entry.
        header: The trace's header.
        sequences: The sequences chosen.
        job: What a worker has to know.
        weights: Digest of the model's folder, for policies that need it; None if none does.
    """

    kind: ClassVar[str] = "replay"

    entry: ReplayEntry
    header: Header
    sequences: Sequence[TracedSequence]
    job: Mapping[str, Any]
    weights: str | None

    @property
    def label(self) -> str:
        """The trace's name, and what is out of the ordinary."""
        level = "" if self.entry.level == "layer-local" else f", {self.entry.level}"
        return f"{self.entry.trace.name}{level}"

    @property
    def policies(self) -> Sequence[CachePolicy]:
        """The full cache first."""
        return self.entry.policies

    def inputs(self, policy: CachePolicy) -> dict[str, Any]:
        """The trace's contents, and what of it is replayed how."""
        from kvpolicy_sim.support import needs_weights

        chosen = {name: x for name, x in self.job.items() if name not in ("trace", "weights")}
        return {**chosen, "weights": self.weights if needs_weights(policy) else None}

    def cost(self, policy: CachePolicy) -> Cost:
        """As a replay of this policy alone, on one thread."""
        from kvpolicy_sim.estimate import estimate

        expected = estimate(
            self.header,
            self.sequences,
            len(self.job["layers"]),
            [policy],
            threads=1,
            outputs=self.entry.outputs,
            details=self.entry.details,
            oracle=self.entry.oracle,
        )
        return Cost(expected.bytes, expected.seconds)

    def is_result(self, policy: CachePolicy, result: object) -> bool:
        """Whether it is the JSON of a replay of this policy alone."""
        if not isinstance(result, dict) or not isinstance(result.get("results"), list):
            return False
        (found, *others) = result["results"] or [None]
        return (
            not others
            and isinstance(found, dict)
            and found.get("policy") == str(policy)
            and all(_is_at(found, name, is_figure) for name in _FIGURES)
            and all(_is_at(found, name, _is_figure_or_none) for name in _PERHAPS)
            and _is_at(found, "retained_mass.interval", _is_interval_or_none)
            and isinstance(result.get("trace"), dict)
        )


_FIGURES = "retention_ratio retained_mass.mean retained_mass.p5 bytes_kept bytes_at_peak".split()
_PERHAPS = (
    "budget output_error.mean memory_share merged recall.16 regret.lower regret.upper "
    "steps_per_second"
).split()
"""Figures of a replay's JSON that tables and pictures show: always there, and perhaps null."""


def _is_at(found: Any, name: str, fits: Callable[[Any], bool]) -> bool:
    """Whether what stands at a dotted name fits; null on the way is null at the end."""
    for part in name.split("."):
        if found is None:
            break
        if not isinstance(found, dict) or part not in found:
            return False
        found = found[part]
    return fits(found)


def _is_figure_or_none(value: object) -> bool:
    return value is None or is_figure(value)


def _is_interval_or_none(value: object) -> bool:
    return value is None or (
        isinstance(value, list) and len(value) == 2 and all(map(is_figure, value))
    )


def open_replay(entry: ReplayEntry) -> ReplaySource:
    """Open a trace and check that every policy can be replayed from it.

    Raises:
        KVPolicyError: It is missing or damaged, or a policy is not supported.
        OSError: It cannot be read.
    """
    from kvpolicy_sim.support import (
        choose_layers,
        choose_sequences,
        needs_weights,
        require_oracle,
        require_prompts,
        require_supported,
    )
    from kvpolicy_sim.weights import load_weights

    weights = None
    with Trace.open(entry.trace) as trace:
        header = trace.header
        has_weights = entry.weights is not None
        require_supported(header, entry.policies, entry.level, has_weights=has_weights)
        if entry.oracle:
            require_oracle(header)
        layers = choose_layers(header, entry.layers)
        sequences = choose_sequences(trace, entry.sequences)
        require_prompts(trace, sequences, entry.policies)
        identity = trace.identity
    if entry.weights is not None and any(map(needs_weights, entry.policies)):
        load_weights(entry.weights, header)
        weights = folder_digest(entry.weights)
    job = {
        "trace": str(entry.trace),
        "identity": identity,
        "level": entry.level,
        "layers": list(layers),
        "sequences": [sequence.index for sequence in sequences],
        "outputs": entry.outputs,
        "details": entry.details,
        "oracle": entry.oracle,
        "weights": None if entry.weights is None else str(entry.weights),
    }
    return ReplaySource(entry, header, sequences, job, weights)


@dataclass(frozen=True)
class EvalSource:
    """A task for a model at one length.

    Attributes:
        entry: The entry.
        samples: What is asked.
        facts: The model's sizes.
        vocabulary_size: Tokens that the model knows.
        model: Digest of the model's folder.
        job: What a worker has to know.
    """

    kind: ClassVar[str] = "eval"

    entry: EvalEntry
    samples: Sequence[Sample]
    facts: ModelFacts
    vocabulary_size: int
    model: str
    job: Mapping[str, Any]

    @property
    def label(self) -> str:
        """Task, length and model."""
        return f"{self.entry.task.name}, {self.entry.context:,} tokens, {self.entry.model_name}"

    @property
    def policies(self) -> Sequence[CachePolicy]:
        """The full cache first."""
        return self.entry.policies

    def inputs(self, policy: CachePolicy) -> dict[str, Any]:
        """The model, and the samples, which text, tokenizer and seed are for."""
        names = ("task", "settings", "context", "samples")
        return {"model": self.model, **{name: self.job[name] for name in names}}

    def cost(self, policy: CachePolicy) -> Cost:
        """Weights, cache and predictions; time for the policy and for its reference."""
        from kvpolicy.cli.sweep.estimate import estimate_eval

        return estimate_eval(self, policy)

    def is_result(self, policy: CachePolicy, result: object) -> bool:
        """Whether it has figures for every target of every sample."""
        if not isinstance(result, dict):
            return False
        measured = read_measured(result.get("measured"))
        return (
            measured is not None
            and fits(measured, self.samples)
            and is_figure(result.get("seconds"))
            and is_count(result.get("bytes_per_request"))
        )


def open_eval(entry: EvalEntry, model: str) -> EvalSource:
    """Make an entry's samples and check that every policy can be run on its model.

    Args:
        entry: The entry.
        model: Digest of the model's folder.

    Raises:
        PolicyError: Samples cannot be made, or a policy cannot be run.
        OSError: The text cannot be read.
    """
    from kvpolicy_hf.checkpoint import load_config, load_vocabulary
    from kvpolicy_hf.support import require_config_supported

    facts = read_model_facts(str(entry.model))
    config = load_config(str(entry.model))
    for policy in entry.policies:
        require_config_supported(config, policy, entry.model_name)
        limit = position_limit(policy, facts.positions)
        if limit is not None and entry.context > limit:
            raise UnsupportedError(
                f"contexts has {entry.context}, and {policy} ends at the {limit} positions of "
                f"{entry.model_name}; choose shorter ones"
            )
    vocabulary = load_vocabulary(str(entry.model))
    samples = make_samples(
        vocabulary, entry.text, entry.task, entry.context, entry.samples, entry.seed
    )
    require_prompts({entry.context: samples}, entry.policies)
    job = {
        "model": str(entry.model),
        "text": None if entry.text is None else str(entry.text),
        "task": entry.task.name,
        "settings": asdict(entry.task),
        "context": entry.context,
        "count": entry.samples,
        "seed": entry.seed,
        "samples": digest_of({entry.context: samples}),
    }
    return EvalSource(entry, samples, facts, len(vocabulary.tokenizer), model, job)
