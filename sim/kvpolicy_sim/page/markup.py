"""HTML as strings: elements whose text is escaped, and numbers as a page shows them."""

import math
from collections.abc import Iterable
from html import escape
from typing import TypeGuard

NOTHING = "\N{EN DASH}"
"""Shown where there is no number."""

_VOID = ("img", "meta", "wbr")


class Markup(str):
    """Text that is HTML already; every other text is escaped when it becomes part of one."""

    __slots__ = ()


def join(children: Iterable[str]) -> Markup:
    """Children one after the other."""
    return Markup("".join(x if isinstance(x, Markup) else escape(x) for x in children))


def element(name: str, *children: str, **attributes: object) -> Markup:
    """An element.

    Args:
        name: Its tag.
        children: Text and elements.
        attributes: None leaves one out; `class_` and `stroke_dasharray` are written `class` and
            `stroke-dasharray`.
    """
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    if name in _VOID:
        return Markup(f"<{name}{written}>")
    return Markup(f"<{name}{written}>{join(children)}</{name}>")


def breakable(spec: str) -> Markup:
    """A policy spec, or another long name, that may break where its grammar separates."""
    pieces: list[str] = []
    for character in spec:
        pieces.append(character)
        if character in ":,/":
            pieces.append(element("wbr"))
    return join(pieces)


def is_number(value: float | None) -> TypeGuard[float]:
    """Whether there is something to show."""
    return value is not None and math.isfinite(value)


def figure(value: float | None, digits: int = 0) -> str:
    """A number with a fixed number of decimals."""
    return f"{value:,.{digits}f}" if is_number(value) else NOTHING


def interval(low: float, high: float, digits: int) -> str:
    """Two numbers as a range."""
    return f"{figure(low, digits)}\N{EN DASH}{figure(high, digits)}"


def size(num_bytes: float | None) -> str:
    """Bytes in a readable unit."""
    if not is_number(num_bytes):
        return NOTHING
    unit = min(int(math.log2(max(num_bytes, 1)) // 10), 4)
    digits = 1 if unit else 0
    return f"{num_bytes / 1024**unit:,.{digits}f} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[unit]}"
