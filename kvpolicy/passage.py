"""A text whose tokens are known, and which of them are held."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Kept = Literal["most", "some", "none"]
"""By how many (layer, KV head) pairs hold a token: at least half, fewer, none."""


@dataclass(frozen=True)
class Passage:
    """A text whose tokens know their place in it.

    Attributes:
        text: The text.
        tokens: Token ids, the model's first token included.
        spans: For each token, the characters it stands for; empty for one that has no text.
    """

    text: str
    tokens: list[int]
    spans: list[tuple[int, int]]


def spell(tokens: list[int], tokenizer: "Tokenizer") -> Passage:
    """Token ids as text; special tokens, and ids that the tokenizer lacks, have none.

    Args:
        tokens: Token ids.
        tokenizer: What made them.
    """
    from tokenizers.decoders import DecodeStream

    stream, at = DecodeStream(skip_special_tokens=True), 0
    pieces: list[str] = []
    spans: list[tuple[int, int]] = []
    for token in tokens:
        # A character that several tokens make up comes with the last of them.
        piece = stream.step(tokenizer, token) or ""
        spans.append((at, at + len(piece)))
        pieces.append(piece)
        at += len(piece)
    return Passage("".join(pieces), tokens, spans)


def kept_shares(retained: Sequence[Sequence[Sequence[int]]], num_tokens: int) -> list[float]:
    """Share of all (layer, KV head) pairs that hold each of the first `num_tokens` positions."""
    heads = [set(positions) for layer in retained for positions in layer]
    return [sum(p in head for head in heads) / len(heads) for p in range(num_tokens)]


def kept_runs(passage: Passage, shares: Sequence[float]) -> Iterator[tuple[Kept, str]]:
    """The passage, cut where what holds its tokens changes.

    Args:
        passage: The text.
        shares: For each token, the share of (layer, KV head) pairs that hold it.
    """
    at = 0
    labelled: list[tuple[Kept, int]] = [
        (_kept(share), end) for share, (_, end) in zip(shares, passage.spans, strict=True)
    ]
    for kept, run in groupby(labelled, key=_first):
        # A character may take several tokens, which then all span it: give it once.
        end = max([at, *(end for _, end in run)])
        yield kept, passage.text[at:end]
        at = end


def _kept(share: float) -> Kept:
    if share >= 0.5:
        return "most"
    return "some" if share > 0 else "none"


def _first(item: tuple[Kept, int]) -> Kept:
    return item[0]
