"""Passkey prompts: a number hidden in a long text, asked for at the end.

Needs only the standard library. The same seed, text and tokenizer give the same prompt.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

FACT = " The pass key is {key}. Remember it. {key} is the pass key."
QUESTION = "\nWhat is the pass key? The pass key is"
ANSWER = " {key}"
REPEATED_FILLER = (
    " The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
)
SLACK = 4

_SENTENCE = re.compile(r"\s*\S.*?[.!?][\"'\u2019\u201d)]*(?=\s)", re.DOTALL)

_WORD = re.compile(r"\s*\S+")


@dataclass(frozen=True, kw_only=True)
class Passkey:
    """One prompt and the text that must follow it.

    `depth` is the share of the filler that comes before the pass key, between 0 and 1.
    """

    prompt: str
    answer: str
    depth: float


def make_passkey(
    rng: Random,
    filler_text: str,
    tokenizer_encode: Callable[[str], Sequence[int]],
    context: int,
    depth: float | None = None,
) -> Passkey:
    """Hide a five-digit key in sentences of `filler_text`.

    Args:
        rng: Chooses the key, the place in the filler text and, unless given, the depth.
        filler_text: A text of sentences; it is read in a circle when it is short.
        tokenizer_encode: Turns text into token ids, without special tokens.
        context: Tokens that BOS, prompt and answer may fill together; they fall short of it by
            a word or so.
        depth: Share of the filler before the pass key; drawn evenly when None.

    Raises:
        ValueError: The depth is outside [0, 1], the text has no sentence, or nothing fits.
    """
    if depth is None:
        depth = rng.random()
    if not 0.0 <= depth <= 1.0:
        raise ValueError(f"depth must lie between 0 and 1: got {depth}")
    key = rng.randrange(10_000, 100_000)
    fact, answer = FACT.format(key=key), ANSWER.format(key=key)
    room = context - 1 - sum(len(tokenizer_encode(text)) for text in (fact, QUESTION, answer))
    if room < 0:
        raise ValueError(
            f"context must hold the key and the question: got context={context}, "
            f"at least {context - room} tokens are needed"
        )
    filler = _take_sentences(rng, filler_text, tokenizer_encode, room - SLACK)
    while True:
        before = round(depth * len(filler))
        prompt = "".join([*filler[:before], fact, *filler[before:], QUESTION]).lstrip()
        # Beyond the slack, sentences joined may take more tokens than sentences alone.
        if not filler or 1 + len(tokenizer_encode(prompt + answer)) <= context:
            return Passkey(prompt=prompt, answer=answer, depth=depth)
        filler.pop()


def _take_sentences(
    rng: Random, text: str, encode: Callable[[str], Sequence[int]], room: int
) -> list[str]:
    """Return consecutive sentences, the last one cut, of at most `room` tokens together."""
    # Twice around, so that the circle closes; the space lets the last sentence end.
    circle = text + " " + text + " "
    taken: list[str] = []
    start = _SENTENCE.search(circle, rng.randrange(len(text)) if text else 0)
    if start is None:
        raise ValueError("filler_text must hold at least one sentence: got none")
    at = start.end()
    while match := _SENTENCE.match(circle, at):
        sentence = match.group()
        size = len(encode(sentence))
        if size > room:
            taken.append(_first_words(sentence, encode, room))
            break
        room -= size
        taken.append(sentence)
        at = match.end() if match.end() < len(text) else match.end() - len(text)
    return taken


def _first_words(sentence: str, encode: Callable[[str], Sequence[int]], room: int) -> str:
    words: list[str] = _WORD.findall(sentence)
    while words and len(encode("".join(words))) > room:
        words.pop()
    return "".join(words)
