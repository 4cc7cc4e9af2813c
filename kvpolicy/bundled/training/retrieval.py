"""Sequences that ask for what they stated, with the place of every answer and of its statement.

Answers are part of the sequence: all tokens of one are the likeliest ones exactly when greedy
decoding writes it.
"""

from dataclasses import dataclass
from random import Random

import numpy as np
from tokenizers import Tokenizer

from kvpolicy.bundled.passkey import REPEATED_FILLER, make_passkey
from kvpolicy.bundled.training.corpus import Corpus
from kvpolicy.bundled.training.tasks import Tasks, join
from kvpolicy.bundled.training.tokenizer import BOS_ID, encode

FILLER_TOKENS = 60_000


@dataclass(frozen=True, kw_only=True)
class Answer:
    """The half-open range [start, start + size) of a sequence, and where the same tokens stood."""

    start: int
    size: int
    stated: tuple[int, ...]


@dataclass(frozen=True)
class Retrieval:
    """Token ids [T], BOS first, and the answers in them."""

    tokens: np.ndarray
    answers: tuple[Answer, ...]


def passkey(
    corpus: Corpus, tokenizer: Tokenizer, context: int, sample: int, *, seed: int = 1
) -> Retrieval:
    """Hide a pass key in a book, or in repeated sentences in every fourth sample."""
    rng = Random(seed * 1_000_003 + sample)
    book = corpus.book(sample % corpus.num_books)
    start = rng.randrange(max(1, len(book) - FILLER_TOKENS))
    text = tokenizer.decode(book[start : start + FILLER_TOKENS].tolist())
    filler = REPEATED_FILLER * 8 if sample % 4 == 3 else text
    asked = make_passkey(rng, filler, lambda text: encode(tokenizer, text), context)
    prompt = [BOS_ID, *encode(tokenizer, asked.prompt)]
    answer = encode(tokenizer, asked.answer)
    answers = Answer(start=len(prompt), size=len(answer), stated=_occurrences(prompt, answer))
    return Retrieval(np.array([*prompt, *answer], dtype=np.int64), (answers,))


def recall(tasks: Tasks, context: int, sample: int, *, num_pairs: int, seed: int = 2) -> Retrieval:
    """List pairs, go on with a book, and ask for each pair once, in random order, at the end.

    Raises:
        ValueError: The context cannot hold the pairs and the questions.
    """
    rng = tasks.rng = np.random.default_rng([seed, sample])
    pairs = tasks.pairs(num_pairs)
    stated = np.cumsum([1, *(len(pair.statement.tokens) for pair in pairs)])
    room = context - 2 * int(stated[-1]) + 1
    if room < 0:
        raise ValueError(
            f"context must hold {num_pairs} pairs and their questions: got {context}, "
            f"at least {context - room} tokens are needed"
        )
    asked = rng.permutation(num_pairs)
    pieces = [*(pair.statement for pair in pairs), tasks.book(room)]
    answers, at = [], int(stated[-1]) + room
    for pair in asked:
        question = pairs[pair].question
        size = int((question.weights == question.weights.max()).sum())
        at += len(question.tokens)
        answers.append(Answer(start=at - size, size=size, stated=(int(stated[pair + 1]) - size,)))
        pieces.append(question)
    tokens = np.concatenate([np.array([BOS_ID]), join(pieces).tokens])
    return Retrieval(tokens, tuple(answers))


def _occurrences(tokens: list[int], wanted: list[int]) -> tuple[int, ...]:
    size = len(wanted)
    return tuple(
        start for start in range(len(tokens) - size + 1) if tokens[start : start + size] == wanted
    )
