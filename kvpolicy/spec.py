"""The spec grammar: ``name`` or ``name:key=value,key=value``.

Values are int, float, bool or str; inside parentheses ``,`` and ``:`` are literal, so that
``window:budget=64,protect=(0:8,20:24)`` has two keys. A name that contains a dot is an
import path (``pkg.mod.Class``). This module only splits and prints; what a key means and
which values it takes is the policy class's business.
"""

from typing import NamedTuple

from kvpolicy.errors import PolicyError

Value = int | float | bool | str | tuple[tuple[int, int], ...]


_SHOWN = 80
"""Characters of a bad value that an error message repeats."""


class Spec(NamedTuple):
    """A spec string taken apart."""

    name: str
    parameters: dict[str, str]


def split_spec(text: str) -> Spec:
    """Split a spec into its name and the raw text of each value.

    Raises:
        PolicyError: The text does not follow the grammar.
    """
    name, colon, rest = text.strip().partition(":")
    if not name or (colon and not rest.strip()):
        raise PolicyError(
            f"malformed policy spec: got {shown(text)}, expected name or name:key=value,key=value"
        )
    parameters: dict[str, str] = {}
    for item in split_parts(rest, ",", text) if colon else []:
        key, equals, value = item.partition("=")
        key, value = key.strip(), value.strip()
        if not (equals and key and value):
            raise PolicyError(
                f"malformed policy spec {shown(text)}: got {shown(item)}, expected key=value"
            )
        if key in parameters:
            raise PolicyError(
                f"malformed policy spec {shown(text)}: {shown(key)} is given twice; keep one"
            )
        parameters[key] = value
    return Spec(name.strip(), parameters)


def split_parts(text: str, separator: str, whole: str) -> list[str]:
    """Split at the separators that stand outside parentheses.

    Args:
        text: What is split.
        separator: One character.
        whole: The spec that an error message shows.

    Raises:
        PolicyError: Parentheses do not match.
    """
    items: list[str] = []
    depth = start = 0
    for index, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth < 0:
            break
        if character == separator and depth == 0:
            items.append(text[start:index])
            start = index + 1
    if depth != 0:
        raise PolicyError(f"malformed policy spec {shown(whole)}: unbalanced parentheses")
    return [*items, text[start:]]


def parse_number(text: str) -> int | float | None:
    """Read an int, or failing that a finite float; None if the text is neither."""
    for kind in (int, float):
        try:
            value = kind(text)
        except ValueError:
            continue
        return value if value - value == 0 else None
    return None


def parse_spans(text: str) -> tuple[tuple[int, int], ...] | None:
    """Read half-open position spans ``(a:b,c:d)``; None if the text is not that."""
    if not (text.startswith("(") and text.endswith(")")):
        return None
    spans: list[tuple[int, int]] = []
    for item in text[1:-1].split(","):
        first, colon, last = item.partition(":")
        if not colon:
            return None
        start, end = parse_number(first), parse_number(last)
        if not (isinstance(start, int) and isinstance(end, int)):
            return None
        spans.append((start, end))
    return tuple(spans)


def shown(value: object) -> str:
    """Give the repr of a value for an error message, cut short if it is long."""
    if isinstance(value, int) and value.bit_length() > 3 * _SHOWN:
        return f"an integer of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 20]}...{text[-10:]}"


def format_value(value: Value) -> str:
    """Print a value so that parsing it gives the value back."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, tuple):
        return "(" + ",".join(f"{first}:{last}" for first, last in value) + ")"
    return str(value)
