"""Training sequences: books, facts to remember, key-value lists, and copies.

Every sequence starts with BOS and has exactly the asked number of tokens. Beside each token
stands the weight of its loss: what can be known only by looking back weighs most, what cannot
be known at all weighs least.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from tokenizers import Tokenizer

from kvpolicy.bundled import facts, passkey
from kvpolicy.bundled.training.corpus import Corpus
from kvpolicy.bundled.training.tokenizer import BOS_ID, NUM_SPECIAL, encode

BOOK = 1.0
FILLER = 0.5
RANDOM = 0.1
STATED = 0.3
COPIED = 1.0
ANSWERED = 4.0

NUM_WORDS = 2000


@dataclass(frozen=True)
class Piece:
    """A stretch of tokens and the weight of each as a target."""

    tokens: np.ndarray
    weights: np.ndarray


@dataclass(frozen=True)
class Fact:
    """Something stated once and asked for later; `subject` is what it is about."""

    subject: str
    statement: Piece
    question: Piece


@dataclass(frozen=True, kw_only=True)
class Mix:
    """Shares of the kinds of sequence; they sum to one."""

    books: float
    facts: float
    key_values: float
    copies: float


def join(pieces: Iterable[Piece]) -> Piece:
    """Put pieces one after the other."""
    pieces = list(pieces)
    return Piece(
        np.concatenate([piece.tokens for piece in pieces]),
        np.concatenate([piece.weights for piece in pieces]),
    )


class Tasks:
    """Draws sequences from a corpus with one random generator."""

    def __init__(self, corpus: Corpus, tokenizer: Tokenizer) -> None:
        self.corpus = corpus
        self.tokenizer = tokenizer
        self.rng = np.random.default_rng(0)
        sizes = np.diff(corpus.starts)
        self.book_shares = sizes / sizes.sum()
        self.vocabulary = tokenizer.get_vocab_size()
        self.ends_sentence = np.array(
            [
                tokenizer.decode([token]).rstrip("\"'\u2019\u201d").endswith((".", "!", "?"))
                for token in range(self.vocabulary)
            ]
        )
        self.words = self._common_words()
        self.digits = np.concatenate([self._encode(digit) for digit in "0123456789"])

    def batch(self, mix: Mix, length: int, count: int, seed: Sequence[int]) -> Piece:
        """Draw `count` sequences, [count, length]; the same seed draws the same ones."""
        self.rng = np.random.default_rng(seed)
        rows = [self.sequence(mix, length) for _ in range(count)]
        return Piece(
            np.stack([row.tokens for row in rows]), np.stack([row.weights for row in rows])
        )

    def sequence(self, mix: Mix, length: int) -> Piece:
        """Draw one sequence of `length` tokens, BOS included."""
        kinds: list[Callable[[int], Piece]] = [
            self.book,
            self.facts,
            self.key_values,
            self.copies,
        ]
        shares = [mix.books, mix.facts, mix.key_values, mix.copies]
        body = kinds[self.rng.choice(len(kinds), p=shares)](length - 1)
        bos = Piece(np.array([BOS_ID], dtype=np.int64), np.zeros(1, dtype=np.float32))
        return join([bos, body])

    def book(self, length: int) -> Piece:
        """Draw a passage of one book."""
        return self._weighted(self._passage(length), BOOK)

    def facts(self, length: int) -> Piece:
        """State facts in a passage and ask for them later, once at the very end."""
        most = min(12, max(1, length // 64))
        drawn = [self._fact() for _ in range(1 + int(self.rng.integers(most)))]
        # One fact per subject: two pass keys would leave the question without an answer.
        facts = list({fact.subject: fact for fact in drawn}.values())
        questions = [facts[i].question for i in self.rng.integers(len(facts), size=len(facts) - 1)]
        last = facts[int(self.rng.integers(len(facts)))].question
        room = length - sum(len(fact.statement.tokens) for fact in facts) - len(last.tokens)
        while questions and room - sum(len(q.tokens) for q in questions) < length // 3:
            questions.pop()
        room -= sum(len(question.tokens) for question in questions)
        if room < 0:
            return self.book(length)
        places = np.sort(self.rng.random(len(facts) + len(questions)))
        # Every statement precedes every question, so any order of asking is fair.
        inserts = [fact.statement for fact in facts] + questions
        if questions or self.rng.random() < 0.5:
            places[: len(facts)] *= self.rng.random()
        return join([*self._interleave(self._filler(room), inserts, places), last])

    def key_values(self, length: int) -> Piece:
        """List pairs and ask for them: again and again, or once each, long afterwards."""
        num_pairs = int(self.rng.integers(2, max(3, min(48, length // 24)) + 1))
        pairs = self.pairs(num_pairs)
        if self.rng.random() < 0.5:
            return self._asked_at_the_end(pairs, length)
        return self._asked_repeatedly(pairs, length)

    def _asked_at_the_end(self, pairs: list[Fact], length: int) -> Piece:
        """State all pairs, go on with a book, and ask for as many as there is room for."""
        pieces = [pair.statement for pair in pairs]
        room = length - sum(len(piece.tokens) for piece in pieces)
        questions = []
        for index in self.rng.permutation(len(pairs)):
            question = pairs[index].question
            if len(question.tokens) <= room:
                questions.append(question)
                room -= len(question.tokens)
        joined = join([*pieces, self._weighted(self._passage(max(0, room)), FILLER), *questions])
        return Piece(joined.tokens[:length], joined.weights[:length])

    def _asked_repeatedly(self, pairs: list[Fact], length: int) -> Piece:
        """State all pairs, then ask for some more often than others, with gaps or without."""
        pieces = [pair.statement for pair in pairs]
        room = length - sum(len(piece.tokens) for piece in pieces)
        popularity = 1.0 / np.arange(1, len(pairs) + 1) ** self.rng.choice([0.0, 1.0])
        popularity /= popularity.sum()
        fillers = self.rng.random() < 0.5
        while room > 0:
            if fillers and self.rng.random() < 0.3:
                piece = self._weighted(self._passage(int(self.rng.integers(8, 64))), FILLER)
            else:
                piece = pairs[self.rng.choice(len(pairs), p=popularity)].question
            pieces.append(piece)
            room -= len(piece.tokens)
        joined = join(pieces)
        return Piece(joined.tokens[:length], joined.weights[:length])

    def pairs(self, count: int) -> list[Fact]:
        """Draw key-value pairs with different keys."""
        return [self._pair(word) for word in self.rng.choice(len(self.words), count, False)]

    def copies(self, length: int) -> Piece:
        """Repeat a stretch of random tokens, of a few tokens only, of words, or of a book."""
        kind = self.rng.choice(4)
        # Short stretches are the commoner, since their repetitions are the easier to notice.
        size = int(8 * (max(9, length // 2) / 8) ** self.rng.random())
        if kind == 0:
            first = self._weighted(self.rng.integers(NUM_SPECIAL, self.vocabulary, size), RANDOM)
        elif kind == 1:
            # Few different tokens: one token before no longer tells what follows, two or three do.
            alphabet = self.digits
            if self.rng.random() < 0.5:
                alphabet = self.rng.integers(NUM_SPECIAL, self.vocabulary, 12)
            first = self._weighted(self.rng.choice(alphabet, size), RANDOM)
        elif kind == 2:
            chosen = self.rng.integers(len(self.words), size=size)
            first = self._weighted(np.concatenate([self.words[i] for i in chosen])[:size], RANDOM)
        else:
            first = self._weighted(self._passage(size), BOOK)
        again = Piece(first.tokens, np.full(size, COPIED, dtype=np.float32))
        # The first token of a repetition cannot be foreseen.
        again.weights[0] = RANDOM
        pieces, room = [first], length - size
        while room > 0:
            if kind == 3:
                gap = self._weighted(self._passage(int(self.rng.integers(4, size + 4))), BOOK)
                pieces.append(gap)
                room -= len(gap.tokens)
            pieces.append(again)
            room -= size
        joined = join(pieces)
        return Piece(joined.tokens[:length], joined.weights[:length])

    def _passage(self, length: int) -> np.ndarray:
        while True:
            book = self.corpus.book(int(self.rng.choice(self.corpus.num_books, p=self.book_shares)))
            if len(book) > length:
                start = int(self.rng.integers(len(book) - length))
                return book[start : start + length].astype(np.int64)

    def _filler(self, length: int) -> Piece:
        if self.rng.random() < 0.85:
            return self._weighted(self._passage(length), FILLER)
        repeated = self._encode(passkey.REPEATED_FILLER)
        return self._weighted(np.resize(repeated, length), RANDOM)

    def _interleave(
        self, filler: Piece, inserts: list[Piece], places: np.ndarray
    ) -> Iterable[Piece]:
        """Put each insert after the sentence of the filler that ends next after its place."""
        ends = np.flatnonzero(self.ends_sentence[filler.tokens]) + 1
        done = 0
        for insert, place in zip(inserts, places, strict=True):
            wanted = int(place * len(filler.tokens))
            following = np.searchsorted(ends, wanted)
            cut = max(done, int(ends[following]) if following < len(ends) else wanted)
            yield Piece(filler.tokens[done:cut], filler.weights[done:cut])
            yield insert
            done = cut
        yield Piece(filler.tokens[done:], filler.weights[done:])

    def _fact(self) -> Fact:
        kind = self.rng.random()
        if kind < 0.5:
            key = self._number(5 if self.rng.random() < 0.8 else int(self.rng.integers(3, 8)))
            fact = self._ask("The pass key", key, " Remember it.")
            if self.rng.random() < 0.6:
                again = self._weighted(self._encode(f" {key}"), ANSWERED / 2)
                end = self._weighted(self._encode(" is the pass key."), STATED)
                fact = replace(fact, statement=join([fact.statement, again, end]))
            return fact
        if kind < 0.75:
            name, word = (self._word().capitalize() for _ in range(2))
            subject, answer = facts.secret_word(name), word.lower()
        else:
            colour, thing = self.rng.choice(facts.COLOURS), self.rng.choice(facts.THINGS)
            subject = facts.number_of(colour, thing)
            answer = self._number(int(self.rng.integers(2, 6)))
        return self._ask(subject, answer)

    def _ask(self, subject: str, answer: str, reminder: str = "") -> Fact:
        statement = facts.statement(subject, answer) + reminder
        return Fact(
            subject,
            self._weighted(self._encode(statement), STATED),
            join(
                [
                    self._weighted(self._encode(facts.question(subject)), STATED),
                    self._weighted(self._encode(" " + answer), ANSWERED),
                    self._weighted(self._encode("."), STATED),
                ]
            ),
        )

    def _pair(self, word: int) -> Fact:
        key = join(
            [
                self._weighted(self._encode("\n"), RANDOM),
                self._weighted(self.words[word], RANDOM),
                self._weighted(self._encode(":"), STATED),
            ]
        )
        if self.rng.random() < 0.7:
            value = self._encode(" " + self._number(int(self.rng.integers(2, 6))))
        else:
            value = self.words[int(self.rng.integers(len(self.words)))]
        return Fact(
            self.tokenizer.decode(self.words[word].tolist()),
            join([key, self._weighted(value, RANDOM)]),
            join([key, self._weighted(value, ANSWERED)]),
        )

    def _number(self, num_digits: int) -> str:
        digits = self.rng.integers(10, size=num_digits)
        digits[0] = self.rng.integers(1, 10)
        return "".join(map(str, digits))

    def _word(self) -> str:
        word = self.words[int(self.rng.integers(len(self.words)))]
        return self.tokenizer.decode(word.tolist()).strip()

    def _common_words(self) -> list[np.ndarray]:
        """Return the commonest words of the corpus, each with its leading space."""
        sample = ""
        stride = max(1, self.corpus.num_books // 16)
        for index in range(0, self.corpus.num_books, stride):
            sample += self.tokenizer.decode(self.corpus.book(index)[:40_000].tolist())
        counts = Counter(re.findall(r" ([a-z]{3,9})\b", sample))
        common = [word for word, _ in counts.most_common(NUM_WORDS)]
        return [np.array(encode(self.tokenizer, " " + word), dtype=np.int64) for word in common]

    def _encode(self, text: str) -> np.ndarray:
        return np.array(encode(self.tokenizer, text), dtype=np.int64)

    @staticmethod
    def _weighted(tokens: np.ndarray, weight: float) -> Piece:
        return Piece(
            tokens.astype(np.int64, copy=False), np.full(len(tokens), weight, dtype=np.float32)
        )
