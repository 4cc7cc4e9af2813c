"""Showing which tokens of a prompt a policy kept: colours on a terminal, brackets elsewhere."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from rich.text import Text

STYLES = {"most": "bold green", "some": "yellow", "none": "bright_black"}
"""By how many (layer, KV head) pairs hold a token: at least half, fewer, none."""


@dataclass(frozen=True)
class Passage:
    """A prompt whose tokens know their place in its text.

    Attributes:
        text: The text.
        tokens: Token ids, the model's first token included.
        spans: For each token, the characters it stands for; (0, 0) for the first token.
    """

    text: str
    tokens: list[int]
    spans: list[tuple[int, int]]


def kept_shares(retained: Sequence[Sequence[Sequence[int]]], num_tokens: int) -> list[float]:
    """Share of all (layer, KV head) pairs that hold each of the first `num_tokens` positions."""
    heads = [set(positions) for layer in retained for positions in layer]
    return [sum(p in head for head in heads) / len(heads) for p in range(num_tokens)]


def highlight(passage: Passage, shares: Sequence[float], *, is_terminal: bool) -> Text:
    """The passage with its kept tokens marked.

    Args:
        passage: The prompt.
        shares: For each token, the share of (layer, KV head) pairs that hold it.
        is_terminal: Colour the tokens; otherwise put those kept by at least half in brackets.
    """
    shown, at = Text(), 0
    labelled = [(_label(share), end) for share, (_, end) in zip(shares, passage.spans, strict=True)]
    for label, run in groupby(labelled, key=lambda item: item[0]):
        # A character may take several tokens, which then all span it: show it once.
        end = max([at, *(end for _, end in run)])
        text, at = passage.text[at:end], end
        if is_terminal:
            shown.append(text, STYLES[label])
        else:
            shown.append(f"[{text}]" if label == "most" and text else text)
    return shown


def _label(share: float) -> str:
    if share >= 0.5:
        return "most"
    return "some" if share > 0 else "none"
