"""One of several facts hidden in prose, asked for at its end."""

from dataclasses import dataclass
from random import Random
from typing import ClassVar

from kvpolicy.bundled import facts
from kvpolicy.evaluation.sample import Sample
from kvpolicy.evaluation.source import Source, interleave
from kvpolicy.evaluation.task import Measure, Question, Task, evenly, room_for_text
from kvpolicy.evaluation.tasks.passkey import BINS, asked


@dataclass(frozen=True, kw_only=True)
class Needle(Task):
    """A fact at depths spread evenly, and others of the same kind at random depths beside it.

    Even samples ask for somebody's secret word, odd ones for the number of a coloured thing.

    Attributes:
        question: Whether the question belongs to the prompt.
        distractors: Facts that are not asked for.
    """

    name: ClassVar[str] = "needle"
    summary: ClassVar[str] = "one of several facts hidden in the text"
    title: ClassVar[str] = "facts found"
    measure: ClassVar[Measure] = "exact"
    grouped_by: ClassVar[str] = "depth"

    question: Question = "seen"
    distractors: int = 3

    def samples(self, source: Source, context: int, count: int, seed: int) -> list[Sample]:
        """Hide a fact at each depth."""
        made: list[Sample] = []
        for index in range(count):
            rng = self.random(context, index, seed)
            depth, group = evenly(index, count, BINS)
            stated_facts = 1 + self.distractors
            drawn = (
                _numbers(rng, stated_facts)
                if index % 2
                else _secret_words(source, rng, stated_facts)
            )
            stated = [source.encode(facts.statement(*fact)) for fact in drawn]
            question = source.encode(facts.question(drawn[0][0]))
            answer = source.encode(f" {drawn[0][1]}")
            room = room_for_text(source, context, *stated, question, answer)
            depths = [depth, *(rng.random() for _ in range(self.distractors))]
            order = sorted(range(len(stated)), key=depths.__getitem__)
            text = interleave(
                source.passage(rng, room), [stated[i] for i in order], [depths[i] for i in order]
            )
            made.append(asked(source, text, question, answer, self.question, group))
        return made


def _secret_words(source: Source, rng: Random, count: int) -> list[tuple[str, str]]:
    """Subjects and answers about people, all different."""
    words = source.draw_words(rng, 2 * count)
    names = (facts.secret_word(word.capitalize()) for word in words[:count])
    return list(zip(names, words[count:], strict=True))


def _numbers(rng: Random, count: int) -> list[tuple[str, str]]:
    """Subjects and answers about things, all different."""
    things = [(colour, thing) for colour in facts.COLOURS for thing in facts.THINGS]
    subjects = (facts.number_of(*thing) for thing in rng.sample(things, count))
    return [
        (subject, str(number))
        for subject, number in zip(subjects, rng.sample(range(1000, 10_000), count), strict=True)
    ]
