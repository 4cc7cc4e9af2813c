"""HTML as strings: elements whose text is escaped, and numbers as a page shows them."""

import math
from collections.abc import Iterable
from html import escape
from typing import TypeGuard

NOTHING = "\N{EN DASH}"
"""Shown where there is no number."""

_VOID = ("img", "meta", "source", "wbr")

_VISIBLE = {
    code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\t\n"
} | dict.fromkeys(
    [0x7F, *range(0x80, 0xA0), 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A)],
    "\N{REPLACEMENT CHARACTER}",
)
"""What stands for characters that HTML forbids, or that turn the text around them about."""


class Markup(str):
    """Text that is HTML already; every other text is escaped when it becomes part of one."""

    __slots__ = ()


def join(children: Iterable[str]) -> Markup:
    """Children one after the other."""
    return Markup("".join(x if isinstance(x, Markup) else _escaped(x) for x in children))


def _escaped(text: str) -> str:
    return escape(text.translate(_VISIBLE))


def element(name: str, *children: str, **attributes: object) -> Markup:
    """An element.

    Args:
        name: Its tag.
        children: Text and elements.
        attributes: None leaves one out; `class_` and `aria_label` are written `class` and
            `aria-label`.
    """
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{_escaped(str(value))}"'
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


def amount(value: float, digits: int = 1) -> str:
    """A number of things; with decimals where it is the mean of different numbers."""
    return figure(value, 0 if float(value).is_integer() else digits)


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
