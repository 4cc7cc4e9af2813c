"""A pass key hidden in prose, asked for at its end."""

from dataclasses import dataclass
from typing import ClassVar

from kvpolicy.bundled.passkey import ANSWER, FACT, QUESTION
from kvpolicy.evaluation.sample import Sample, Target
from kvpolicy.evaluation.source import Source, interleave
from kvpolicy.evaluation.task import Measure, Question, Task, evenly, room_for_text

BINS = 5
"""Depths told apart."""


@dataclass(frozen=True, kw_only=True)
class Passkey(Task):
    """One five-digit key per sample, at depths spread evenly from the beginning to the end.

    Attributes:
        question: Whether the question belongs to the prompt.
    """

    name: ClassVar[str] = "passkey"
    summary: ClassVar[str] = "a number hidden in the text"
    title: ClassVar[str] = "pass keys found"
    measure: ClassVar[Measure] = "exact"
    grouped_by: ClassVar[str] = "depth"

    question: Question = "seen"

    def samples(self, source: Source, context: int, count: int, seed: int) -> list[Sample]:
        """Hide a key at each depth."""
        made: list[Sample] = []
        for index in range(count):
            rng = self.random(context, index, seed)
            depth, group = evenly(index, count, BINS)
            key = rng.randrange(10_000, 100_000)
            fact, question, answer = (
                source.encode(text.format(key=key)) for text in (FACT, QUESTION, ANSWER)
            )
            room = room_for_text(source, context, fact, question, answer)
            text = interleave(source.passage(rng, room), [fact], [depth])
            made.append(asked(source, text, question, answer, self.question, group))
        return made


def asked(
    source: Source,
    text: list[int],
    question: list[int],
    answer: list[int],
    when: Question,
    group: tuple[float, float],
) -> Sample:
    """A text, a question about it, and the answer, which is to be predicted."""
    told = source.start + text
    prompt = len(told) + (len(question) if when == "seen" else 0)
    tokens = told + question + answer
    target = Target(first=len(tokens) - len(answer), last=len(tokens), group=group)
    return Sample(tokens=tokens, prompt_tokens=prompt, targets=[target])
