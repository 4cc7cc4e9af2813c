"""The results of a replay, policy by policy, as data and as a page."""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from kvpolicy import SEMANTICS, CachePolicy, PolicyError, parse
from kvpolicy.passage import Passage
from kvpolicy.trace import Header
from kvpolicy.trace import Sequence as TracedSequence
from kvpolicy_sim.result import LayerResult, PolicyResult
from kvpolicy_sim.statistics import retained_at

SCHEMA = 1


@dataclass
class Report:
    """The results of one replay.

    Attributes:
        header: The trace's header.
        level: What the policies observed.
        layers: Layers replayed.
        results: One per policy, in the order asked for.
    """

    header: Header = field(repr=False)
    level: str
    layers: tuple[int, ...]
    sequences: dict[int, TracedSequence] = field(repr=False)
    results: dict[CachePolicy, PolicyResult] = field(repr=False)
    _data: dict[str, Any] | None = field(default=None, init=False, repr=False)

    def __repr__(self) -> str:
        """Name the trace, the level and the policies."""
        policies = ", ".join(map(str, self.results))
        return f"Report({self.header.model!r}, {self.level}, layers {self.layers}: {policies})"

    @classmethod
    def blank(
        cls,
        header: Header,
        level: str,
        layers: Sequence[int],
        sequences: Sequence[TracedSequence],
        policies: Sequence[CachePolicy],
    ) -> "Report":
        """Before the first layer."""
        by_index = {sequence.index: sequence for sequence in sequences}
        results = {policy: PolicyResult(policy, header, by_index) for policy in policies}
        return cls(header, level, tuple(layers), by_index, results)

    def add(self, found: LayerResult) -> None:
        """Add a layer of a sequence."""
        place, self._data = (found.sequence, found.layer), None
        for policy, result in self.results.items():
            result.outcomes[place] = found.outcomes[policy]
            if policy in found.details:
                result.details[place] = found.details[policy]
            if policy in found.optima:
                result.regrets[place] = found.optima[policy]

    def result(self, spec: str | CachePolicy) -> PolicyResult:
        """One policy's result.

        Raises:
            PolicyError: The policy was not replayed.
        """
        policy = parse(spec)
        if policy not in self.results:
            known = ", ".join(map(str, self.results))
            raise PolicyError(f"{policy} was not replayed; this report has {known}")
        return self.results[policy]

    def retained_positions(
        self,
        spec: str | CachePolicy,
        layer: int,
        sequence: int | None = None,
        tokens: int | None = None,
    ) -> np.ndarray:
        """Positions that a layer held after some tokens, [H_kv, kept] int64, ascending.

        Args:
            spec: A policy of the report.
            layer: Index of the layer in the model.
            sequence: Sequence of the trace; default the first one replayed.
            tokens: Tokens seen; default all.

        Raises:
            PolicyError: The policy, layer or sequence was not replayed.
        """
        sequence = next(iter(self.sequences)) if sequence is None else sequence
        outcome = self.result(spec).outcomes.get((sequence, layer))
        if outcome is None:
            raise PolicyError(
                f"layer {layer} of sequence {sequence} was not replayed; this report has layers "
                f"{list(self.layers)} of sequences {list(self.sequences)}"
            )
        return retained_at(outcome.evicted_at, tokens)

    def as_dict(self) -> dict[str, Any]:
        """Give the report as JSON-ready data with the contract's keys."""
        if self._data is None:
            self._data = self._figures()
        return deepcopy(self._data)

    def _figures(self) -> dict[str, Any]:
        sequences = self.sequences.values()
        return {
            "schema": SCHEMA,
            "semantics": SEMANTICS,
            "trace": {
                "tokens": sum(sequence.tokens for sequence in sequences),
                "sequences": len(self.sequences),
                "layers": len(self.layers),
                "kv_heads": len(self.header.kv_heads),
                "q_heads": len(self.header.kv_heads) * self.header.group,
                "head_dim": self.header.head_dim,
                "model": self.header.model,
            },
            "results": [result.as_dict(self.level) for result in self.results.values()],
        }

    def to_html(self, path: str | Path, passage: Passage | None = None) -> None:
        """Write the report as one self-contained page with pictures.

        Args:
            path: The page.
            passage: The text of the first sequence replayed, to be shown as policies hold it.

        Raises:
            OSError: The file cannot be written.
            UnsupportedError: There is nothing to draw with.
        """
        from kvpolicy_sim.page.html import document

        document(self, passage).write_html(Path(path))

    def to_png(self, folder: str | Path) -> list[Path]:
        """Write the pictures of the page as PNG files into a folder; gives their paths.

        Raises:
            OSError: The folder or a file cannot be written.
            UnsupportedError: There is nothing to draw with.
        """
        from kvpolicy_sim.page.html import document

        return document(self).write_pictures(Path(folder))
