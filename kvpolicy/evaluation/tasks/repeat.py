"""Perplexity of a passage that returns again and again."""

from dataclasses import dataclass
from typing import ClassVar

from kvpolicy.evaluation.sample import Sample, Target
from kvpolicy.evaluation.source import Source
from kvpolicy.evaluation.task import Measure, Task

READINGS = 4
"""How often a sample has its passage."""


@dataclass(frozen=True, kw_only=True)
class Repeat(Task):
    """A passage, as much fresh text, the passage again, and so on; repetitions are predicted.

    A reader who remembers the passage finds its repetitions easy. The first token of a repetition
    is not predicted: nothing announces it. Fresh text is the one after the passage, in the order
    of the text. The first reading is the prompt.
    """

    name: ClassVar[str] = "repeat"
    summary: ClassVar[str] = "perplexity of passages that return"
    title: ClassVar[str] = "perplexity of repetitions"
    measure: ClassVar[Measure] = "perplexity"
    grouped_by: ClassVar[str] = "reading"

    def samples(self, source: Source, context: int, count: int, seed: int) -> list[Sample]:
        """Take passages from evenly spread places, the first of which is drawn."""
        size = (context - len(source.start)) // (2 * READINGS - 1)
        if size < 2:
            raise ValueError(
                f"context must hold a passage {READINGS} times and text between: got {context} "
                f"tokens, at least {2 * (2 * READINGS - 1) + len(source.start)} are needed"
            )
        made: list[Sample] = []
        offset = self.random(context, 0, seed).randrange(len(source.sentences))
        for index in range(count):
            at = offset + index * len(source.sentences) // count
            text = [token for s in source.passage_from(at, context) for token in s]
            passage, fresh = text[:size], text[size:]
            tokens, targets = source.start + passage, list[Target]()
            for reading in range(2, READINGS + 1):
                tokens += fresh[:size]
                fresh = fresh[size:]
                first, last = len(tokens) + 1, len(tokens) + size
                targets.append(Target(first=first, last=last, group=(reading, reading + 1)))
                tokens += passage
            tokens = (tokens + fresh)[:context]
            prompt = len(source.start) + size
            made.append(Sample(tokens=tokens, prompt_tokens=prompt, targets=targets))
        return made
