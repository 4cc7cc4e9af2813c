"""Perplexity of a long text, teacher-forced."""

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

from kvpolicy.evaluation.sample import Sample, Target
from kvpolicy.evaluation.source import Source
from kvpolicy.evaluation.task import Measure, Task

BINS = 8
"""Points of the curve over positions."""


@dataclass(frozen=True, kw_only=True)
class Perplexity(Task):
    """Consecutive windows of the text, each behind the model's first token.

    Attributes:
        prompt_tokens: First tokens of each window that are its prompt and are not predicted.
    """

    name: ClassVar[str] = "ppl"
    summary: ClassVar[str] = "perplexity of consecutive windows of the text"
    title: ClassVar[str] = "perplexity"
    measure: ClassVar[Measure] = "perplexity"
    grouped_by: ClassVar[str] = "position"

    prompt_tokens: int = 0

    def samples(self, source: Source, context: int, count: int, seed: int) -> list[Sample]:
        """Cut the text; a remainder shorter than a window is left out."""
        if self.prompt_tokens >= context:
            raise ValueError(
                f"a prompt of {self.prompt_tokens} tokens leaves nothing to predict in windows of "
                f"{context}; give a shorter prompt"
            )
        body = context - len(source.start)
        whole = len(source.tokens) // body
        if whole == 0:
            raise ValueError(
                f"the text has {len(source.tokens)} tokens, too few for a window of {context}; "
                "give a longer text or a smaller context"
            )
        return [
            Sample(
                tokens=source.start + source.tokens[i * body : (i + 1) * body],
                prompt_tokens=self.prompt_tokens,
                targets=parts_of(max(1, self.prompt_tokens), context),
            )
            for i in range(min(count, whole))
        ]


def parts_of(first: int, context: int) -> list[Target]:
    """Everything from `first` on, in parts between eighths of the context."""
    edges = sorted({first, *(context * i // BINS for i in range(BINS + 1))})
    edges = [edge for edge in edges if edge >= first]
    return [Target(first=low, last=high, group=(low, high)) for low, high in pairwise(edges)]
