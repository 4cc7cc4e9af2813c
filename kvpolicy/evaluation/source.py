"""The text that tasks are made of, cut by a model's tokenizer."""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from random import Random

NUM_WORDS = 2000
"""Commonest words of a text that serve as names, keys and answers."""

_SENTENCE = re.compile(r"\s*\S.*?(?:[.!?][\"'\u2019\u201d)]*(?=\s)|\Z)", re.DOTALL)
_WORD = re.compile(r" ([a-z]{3,9})\b")


@dataclass(frozen=True)
class Source:
    """A text and a tokenizer.

    Attributes:
        text: Prose; the longer, the less of it is used twice.
        encode: Turns text into token ids, without special tokens.
        start: What begins every sequence; empty if the model has no such token.
    """

    text: str
    encode: Callable[[str], list[int]]
    start: list[int]

    @cached_property
    def tokens(self) -> list[int]:
        """The whole text."""
        return self.encode(self.text)

    @cached_property
    def sentences(self) -> list[list[int]]:
        """The text, sentence by sentence.

        Raises:
            ValueError: It has none.
        """
        found = [self.encode(match.group()) for match in _SENTENCE.finditer(self.text.rstrip())]
        if not any(found):
            raise ValueError("the text has no sentence; give another one")
        return found

    @cached_property
    def words(self) -> list[str]:
        """The text's commonest words, commonest first."""
        counts = Counter(_WORD.findall(self.text))
        return [word for word, _ in counts.most_common(NUM_WORDS)]

    def draw_words(self, rng: Random, count: int) -> list[str]:
        """Draw different words.

        Raises:
            ValueError: The text has too few.
        """
        if count > len(self.words):
            raise ValueError(
                f"{count} words are needed, and the text has {len(self.words)} of three to nine "
                "letters; give a longer one"
            )
        return rng.sample(self.words, count)

    def passage(self, rng: Random, length: int) -> list[list[int]]:
        """Consecutive sentences of exactly `length` tokens together, from anywhere."""
        return self.passage_from(rng.randrange(len(self.sentences)), length)

    def passage_from(self, at: int, length: int) -> list[list[int]]:
        """Consecutive sentences of exactly `length` tokens together, the last one cut.

        After the text's end they go on at its beginning.

        Args:
            at: Index of the first sentence, in a circle.
            length: Tokens.
        """
        taken, room = list[list[int]](), length
        while room > 0:
            taken.append(self.sentences[at % len(self.sentences)][:room])
            room -= len(taken[-1])
            at += 1
        return taken


def interleave(
    sentences: Sequence[list[int]], inserts: Sequence[list[int]], depths: Sequence[float]
) -> list[int]:
    """Put each insert between two sentences, behind a share of the tokens nearest to its depth.

    Args:
        sentences: Tokens of each sentence.
        inserts: Tokens to be put between them; in ascending order of depth.
        depths: For each insert, a number between 0 and 1.
    """
    ends = [0]
    for sentence in sentences:
        ends.append(ends[-1] + len(sentence))
    joined, done = list[int](), 0
    for insert, depth in zip(inserts, depths, strict=True):
        cut = min(range(done, len(ends)), key=lambda i: abs(ends[i] - depth * ends[-1]))
        joined += [token for sentence in sentences[done:cut] for token in sentence] + insert
        done = cut
    return joined + [token for sentence in sentences[done:] for token in sentence]
