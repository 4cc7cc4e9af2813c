"""Units of work: one policy on one source, known by what their results depend on."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from inspect import getsourcefile
from pathlib import Path
from typing import Any, ClassVar, Protocol

from kvpolicy.ledger import SEMANTICS
from kvpolicy.memory.policy import MemoryPolicy
from kvpolicy.policy import CachePolicy

FORMAT = 1
"""Raised when results of the same inputs change; finished units are then computed again."""

WEIGHT_FILES = (".safetensors", ".bin")
"""Ends of names of the files in a model's folder that hold weights."""

_MODEL_FILES = (*WEIGHT_FILES, ".json", ".model", ".txt", ".jinja")
"""Ends of names of the files in a model's folder that results may depend on."""


@dataclass(frozen=True)
class Cost:
    """What a unit takes.

    Attributes:
        bytes: Most memory that a worker holds meanwhile.
        seconds: Time on one processor, without an oracle's.
    """

    bytes: int
    seconds: float


class Source(Protocol):
    """What policies are run on: a trace, or a task for a model.

    Attributes:
        kind: ``replay`` or ``eval``.
    """

    kind: ClassVar[str]

    @property
    def label(self) -> str:
        """What to call it."""
        ...

    @property
    def policies(self) -> Sequence[CachePolicy]:
        """The full cache first."""
        ...

    @property
    def job(self) -> Mapping[str, Any]:
        """What a worker has to know about it."""
        ...

    def inputs(self, policy: CachePolicy) -> dict[str, Any]:
        """All that a policy's result depends on, beside the policy: contents, not paths."""
        ...

    def cost(self, policy: CachePolicy) -> Cost:
        """Estimate a policy's unit."""
        ...

    def is_result(self, policy: CachePolicy, result: object) -> bool:
        """Whether a value that was read can be a policy's result."""
        ...


class Unit:
    """One policy on one source.

    Attributes:
        inputs: All that the result depends on, as JSON has it.
        id: The unit's name: a hash of its inputs.

    Raises:
        PolicyError: A file of the policy's parameters cannot be read.
    """

    def __init__(self, source: Source, policy: CachePolicy) -> None:
        self.source, self.policy = source, policy
        inputs = {
            "format": FORMAT,
            "semantics": SEMANTICS,
            "kind": source.kind,
            **source.inputs(policy),
            "policy": str(policy),
            **_beside_spec(policy),
        }
        self.inputs: dict[str, Any] = json.loads(json.dumps(inputs))
        self.id = identity(self.inputs)

    @property
    def job(self) -> dict[str, Any]:
        """What a worker is told."""
        return {"kind": self.source.kind, **self.source.job, "policy": str(self.policy)}


def identity(inputs: Mapping[str, Any]) -> str:
    """SHA-256 of inputs, whatever the order of their keys."""
    written = json.dumps(inputs, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(written.encode()).hexdigest()


def file_digest(path: str | Path) -> str:
    """SHA-256 of a file's contents."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def model_files(folder: Path) -> list[Path]:
    """Files of a model's folder that results may depend on, by name."""
    return sorted(x for x in folder.iterdir() if x.suffix in _MODEL_FILES and x.is_file())


def folder_digest(folder: Path, advance: Callable[[int], object] = lambda _: None) -> str:
    """SHA-256 of a model's folder.

    Args:
        folder: The folder.
        advance: Told the bytes done.
    """
    digest = hashlib.sha256()
    for path in model_files(folder):
        digest.update(f"{path.name} {file_digest(path)}\n".encode())
        advance(path.stat().st_size)
    return digest.hexdigest()


def _beside_spec(policy: CachePolicy) -> dict[str, Any]:
    """What a policy is beside its spec: the file of its parameters, and the code of a stranger's.

    Our own code is what `FORMAT` and the semantics stand for. Of a stranger's, the module of the
    class is all that is looked at.
    """
    found: dict[str, Any] = {}
    if isinstance(policy, MemoryPolicy) and policy.parameter_file is not None:
        from kvpolicy.memory.parameters import load_parameters

        load_parameters(policy.parameter_file)  # what cannot be read is said now
        found["parameters"] = file_digest(policy.parameter_file)
    if type(policy).__module__.partition(".")[0] != "kvpolicy":
        source = getsourcefile(type(policy))
        found["code"] = None if source is None else file_digest(source)
    return found
