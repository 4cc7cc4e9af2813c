"""A text as each policy holds it, on a page."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from kvpolicy.page.document import Section
from kvpolicy.page.keys import Key
from kvpolicy.page.markup import Markup, element, figure
from kvpolicy.page.tables import plain_table
from kvpolicy.passage import Passage, kept_runs

MOST_TOKENS = 4096
"""Tokens of a text that are shown; of a longer one, half from either end."""

_LEGEND = element(
    "p",
    element("mark", "held by at least half", class_="most"),
    " of all heads in all layers, ",
    element("mark", "held by fewer", class_="some"),
    ", ",
    element("span", "evicted everywhere", class_="none"),
    ".",
    class_="legend",
)


@dataclass(frozen=True)
class Held:
    """What one policy holds of a text at the end.

    Attributes:
        key: The policy.
        shares: For each token of the passage, the share of (layer, KV head) pairs that hold it.
        written: What a model wrote after the text; None if none did.
    """

    key: Key
    shares: Sequence[float]
    written: str | None = None


def text_section(passage: Passage, held: Sequence[Held], where: str) -> Section:
    """A passage, once for every policy, the tokens it holds marked.

    Args:
        passage: The text.
        held: What policies hold of it; the last one is shown open.
        where: Which text it is, and when it is looked at.
    """
    total = len(passage.tokens)
    cut = (
        ""
        if total <= MOST_TOKENS
        else f" Of its {total:,} tokens the first and the last {MOST_TOKENS // 2:,} are shown."
    )
    return Section(
        "What is left of the text",
        f"{where}{cut} Open a policy to read the text as it holds it.",
        (
            _LEGEND,
            *(_policy(passage, each, is_open=each is held[-1]) for each in held),
            _counts(held),
        ),
        short="Text",
    )


def _policy(passage: Passage, held: Held, *, is_open: bool) -> Markup:
    """The text under one policy, folded away or open."""
    parts = [_marked(piece, shares) for piece, shares in _pieces(passage, held.shares)]
    gap = element("p", "[...]", class_="gap")
    shown = [x for part in parts for x in (gap, part)][1:]
    if held.written is not None:
        answer = element("p", element("b", "The model writes: "), held.written, class_="written")
        shown.append(answer)
    summary = element("summary", held.key.full_name())
    return element("details", summary, *shown, class_="text", open="" if is_open else None)


def _marked(passage: Passage, shares: Sequence[float]) -> Markup:
    runs = (
        element("mark", text, class_=kept) if kept != "none" else element("span", text, class_=kept)
        for kept, text in kept_runs(passage, shares)
        if text
    )
    return element("p", *runs, class_="passage", dir="auto")


def _pieces(passage: Passage, shares: Sequence[float]) -> Iterable[tuple[Passage, Sequence[float]]]:
    """The passage, or its two ends if it is long."""
    total = len(passage.tokens)
    if total <= MOST_TOKENS:
        yield passage, shares
        return
    half = MOST_TOKENS // 2
    for first, last in ((0, half), (total - half, total)):
        begin = passage.spans[first - 1][1] if first else 0
        spans = [(a - begin, b - begin) for a, b in passage.spans[first:last]]
        text = passage.text[begin : begin + spans[-1][1]]
        yield Passage(text, passage.tokens[first:last], spans), shares[first:last]


def _counts(held: Sequence[Held]) -> Markup:
    """How many tokens are marked in which way."""
    return plain_table(
        "Tokens of the text by how many heads hold them",
        ("policy", "at least half", "fewer", "none"),
        (
            (
                each.key.full_name(),
                figure(sum(share >= 0.5 for share in each.shares)),
                figure(sum(0 < share < 0.5 for share in each.shares)),
                figure(sum(share == 0 for share in each.shares)),
            )
            for each in held
        ),
    )
