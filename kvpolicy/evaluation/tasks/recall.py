"""One of many key-value pairs, asked for after a long text."""

from dataclasses import dataclass
from random import Random
from typing import ClassVar

from kvpolicy.bundled import facts
from kvpolicy.evaluation.sample import Sample
from kvpolicy.evaluation.source import Source
from kvpolicy.evaluation.task import Measure, Question, Task, room_for_text
from kvpolicy.evaluation.tasks.passkey import asked

MOST_PAIRS = 500


@dataclass(frozen=True)
class Pair:
    """A line of a list: its key, and its value, which is a blank and four digits."""

    key: list[int]
    value: list[int]


@dataclass(frozen=True, kw_only=True)
class Recall(Task):
    """A list of pairs, prose that does not repeat itself, and the key of one pair.

    Attributes:
        question: Whether the question belongs to the prompt.
        pairs: Pairs in the list.
    """

    name: ClassVar[str] = "recall"
    summary: ClassVar[str] = "one of many key-value pairs, after a long text"
    title: ClassVar[str] = "pairs recalled"
    measure: ClassVar[Measure] = "exact"
    grouped_by: ClassVar[str] = "place"

    question: Question = "seen"
    pairs: int = 16

    def samples(self, source: Source, context: int, count: int, seed: int) -> list[Sample]:
        """Ask for a pair, each in its turn."""
        made: list[Sample] = []
        for index in range(count):
            rng = self.random(context, index, seed)
            listed = draw_pairs(source, rng, self.pairs)
            place = index % self.pairs
            pair = listed[place]
            stated = [token for each in listed for token in each.key + each.value]
            room = room_for_text(source, context, stated, pair.key, pair.value)
            prose = [token for sentence in source.passage(rng, room) for token in sentence]
            group = (place, place + 1)
            made.append(asked(source, stated + prose, pair.key, pair.value, self.question, group))
        return made


def draw_pairs(source: Source, rng: Random, count: int) -> list[Pair]:
    """Draw pairs whose keys and values all differ.

    Raises:
        ValueError: There are too many.
    """
    if count > MOST_PAIRS:
        raise ValueError(f"at most {MOST_PAIRS} pairs can be told apart: got {count}")
    words = source.draw_words(rng, count)
    numbers = rng.sample(range(1000, 10_000), count)
    return [
        Pair(source.encode(facts.pair_key(word)), source.encode(f" {number}"))
        for word, number in zip(words, numbers, strict=True)
    ]
