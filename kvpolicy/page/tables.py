"""Tables of a page: captioned, with headings that say what they are of, and scrolled alone."""

from collections.abc import Iterable, Sequence

import numpy as np

from kvpolicy.page.keys import Key
from kvpolicy.page.markup import Markup, element


def plain_table(caption: str, titles: Sequence[str], rows: Iterable[Sequence[str]]) -> Markup:
    """A table with one line of headings.

    Args:
        caption: What it has.
        titles: Of the columns.
        rows: Cells; the first one heads its row.
    """
    head = element("tr", *(element("th", title, scope="col") for title in titles))
    body = (
        element(
            "tr",
            element("th", row[0], scope="row"),
            *(element("td", cell) for cell in row[1:]),
        )
        for row in rows
    )
    return framed(caption, element("thead", head), element("tbody", *body))


def grouped_table(
    caption: str, first: str, columns: Iterable[tuple[str, str]], body: Iterable[Markup]
) -> Markup:
    """A table with two lines of headings: groups, and what they consist of.

    Args:
        caption: What it has.
        first: Title of the first column.
        columns: Group and title of the others; neighbours of one group share its heading.
        body: Rows.
    """
    groups: dict[str, list[str]] = {}
    for group, title in columns:
        groups.setdefault(group, []).append(title)
    upper = (element("th", g, scope="colgroup", colspan=len(t)) for g, t in groups.items())
    lower = (element("th", title, scope="col") for titles in groups.values() for title in titles)
    head = element(
        "thead",
        element("tr", element("th", first, scope="col", rowspan=2), *upper),
        element("tr", *lower),
    )
    spans = (element("colgroup", span=len(titles)) for titles in groups.values())
    return framed(caption, element("colgroup"), *spans, head, element("tbody", *body))


def matrix_table(caption: str, keys: Sequence[Key], values: np.ndarray, digits: int) -> Markup:
    """A triangle of figures from 0 to 1, one for each pair of policies.

    Args:
        caption: What it has.
        keys: P policies.
        values: [P, P].
        digits: Decimals.
    """
    rows = [
        element(
            "tr",
            element("th", key.name(), scope="row"),
            *(
                element("td", f"{value:.{digits}f}", style=f"--q:{value:.2f}")
                for value in values[index, :index].tolist()
            ),
        )
        for index, key in enumerate(keys)
    ]
    numbers = (
        element("th", element("b", str(key.number)), scope="col", title=key.spec)
        for key in keys[:-1]
    )
    head = element("thead", element("tr", element("td"), *numbers))
    return framed(caption, head, element("tbody", *rows), class_="matrix")


def framed(caption: str, *parts: Markup, class_: str | None = None) -> Markup:
    """A table that scrolls in its own frame, by keyboard too."""
    made = element("table", element("caption", caption), *parts, class_=class_)
    return element("div", made, class_="wide", role="group", tabindex="0", aria_label=caption)
