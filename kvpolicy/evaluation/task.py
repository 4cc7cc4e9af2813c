"""What tasks have in common: how they make samples and what of the answers counts."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from random import Random
from typing import ClassVar, Literal

from kvpolicy.evaluation.sample import Sample
from kvpolicy.evaluation.source import Source

Measure = Literal["perplexity", "exact", "tokens"]
"""Perplexity of the predicted tokens, share of targets all right, or share of tokens right."""

Question = Literal["seen", "unseen"]
"""Whether a question belongs to the prompt, or comes after it."""


@dataclass(frozen=True, kw_only=True)
class Task(ABC):
    """A way of asking.

    Attributes:
        name: What the task and its figure are called.
        summary: What is asked, in a few words.
        title: What the figure is called above a table.
        measure: What its figure is.
        grouped_by: What the groups of its targets are ranges of.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    title: ClassVar[str]
    measure: ClassVar[Measure]
    grouped_by: ClassVar[str]

    @abstractmethod
    def samples(self, source: Source, context: int, count: int, seed: int) -> list[Sample]:
        """Make samples of exactly `context` tokens; the same seed makes the same ones.

        Args:
            source: Text and tokenizer.
            context: Tokens of each sample.
            count: Samples; a text too short for so many different ones may give fewer.
            seed: Of what is drawn.

        Raises:
            ValueError: The text or the context is too small.
        """

    def random(self, context: int, index: int, seed: int) -> Random:
        """What one sample is drawn with, whatever the others are."""
        return Random(f"{self.name} {context} {index} {seed}")


def evenly(index: int, count: int, bins: int) -> tuple[float, tuple[float, float]]:
    """The depth of one of `count` evenly spread samples, and the bin of [0, 1) it lies in."""
    depth = (index + 0.5) / count
    bin_ = int(depth * bins)
    return depth, (bin_ / bins, (bin_ + 1) / bins)


def room_for_text(source: Source, context: int, *parts: list[int]) -> int:
    """Tokens of a sample that are left for plain text.

    Raises:
        ValueError: Nothing is.
    """
    needed = len(source.start) + sum(map(len, parts))
    if context <= needed:
        raise ValueError(
            f"context must hold all that is stated and asked: got {context} tokens, at least "
            f"{needed + 1} are needed"
        )
    return context - needed
