"""Facts in evaluations are worded as the bundled model's training words them."""

import numpy as np
import pytest

from kvpolicy.bundled import facts, passkey
from kvpolicy.bundled.training.tasks import Tasks

WORDS = ("house", "river", "evening", "letter")


class Letters:
    """A tokenizer whose tokens are characters."""

    @staticmethod
    def decode(tokens):
        """The text of tokens."""
        return "".join(map(chr, tokens))


class Told(Tasks):
    """Training's tasks without a corpus."""

    def __init__(self):
        self.rng = np.random.default_rng(0)
        self.tokenizer = Letters()
        self.words = [self._encode(f" {word}") for word in WORDS]

    def _encode(self, text):
        return np.array([ord(character) for character in text])


def text_of(piece):
    """What a piece of a training sequence says."""
    return Letters.decode(piece.tokens)


@pytest.fixture(scope="module")
def drawn():
    """Many facts, of all kinds."""
    told = Told()
    return [told._fact() for _ in range(200)]


def test_statements_and_questions_read_the_same(drawn):
    """Whatever training draws, the evaluation's templates give the same text."""
    for fact in drawn:
        asked = facts.question(fact.subject)
        question = text_of(fact.question)
        answer = question.removeprefix(asked).removesuffix(".").lstrip()
        assert question == f"{asked} {answer}."
        stated = facts.statement(fact.subject, answer)
        assert text_of(fact.statement).startswith(stated)


def test_pass_keys_read_the_same(drawn):
    """Pass keys are stated as the shared wording says, with or without its second half."""
    keys = [fact for fact in drawn if fact.subject == "The pass key"]
    assert len(keys) > 20
    for fact in keys:
        key = text_of(fact.question).split()[-1].removesuffix(".")
        assert passkey.FACT.format(key=key).startswith(text_of(fact.statement))
        assert text_of(fact.question).startswith(passkey.QUESTION)


def test_facts_are_about_the_same_things(drawn):
    """Subjects come from the same lists, in the same words."""
    known = {facts.number_of(colour, thing) for colour in facts.COLOURS for thing in facts.THINGS}
    known |= {facts.secret_word(word.capitalize()) for word in WORDS} | {"The pass key"}
    assert {fact.subject for fact in drawn} <= known


def test_pairs_read_the_same():
    """A line of a list of pairs has its key, a colon and its value, as in training."""
    told = Told()
    for index, word in enumerate(WORDS):
        pair = told._pair(index)
        assert text_of(pair.statement).startswith(f"{facts.pair_key(word)} ")
        assert text_of(pair.question) == text_of(pair.statement)
