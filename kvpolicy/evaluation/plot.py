"""Quality against budget, as an SVG that needs nothing but itself."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from kvpolicy.axes import round_ticks, spread

WIDTH, HEIGHT = 820, 460
LEFT, RIGHT, TOP, BOTTOM = 66, 216, 44, 52
LABEL = 17
"""Height of a line's label."""

COLOURS = "#1257e0 #dd7a0d #1d5c2e #b8188f #4d0b45 #24a1c0 #87702b #c22f2f #6a7f10 #555555".split()
DASHES = ("", "7 4", "2 3")

DODGE = 2.5
"""Pixels between the points of neighbouring series at one budget, so that intervals show."""

MOST_MARKS = 8
"""Places on the horizontal scale that are all named."""

LOGARITHMIC_FROM = 3.0
"""Largest value in multiples of the smallest one from which on the scale is logarithmic."""


@dataclass(frozen=True)
class Point:
    """One policy at one budget, or at one place of a correlation.

    Attributes:
        x: Where it stands.
        y: Its value.
        interval: Of the value; None if it is not known.
    """

    x: float
    y: float
    interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class Series:
    """One line.

    Attributes:
        label: What it is called.
        points: In ascending order of x.
    """

    label: str
    points: Sequence[Point]


@dataclass(frozen=True, kw_only=True)
class Axes:
    """What the scales say.

    Attributes:
        title: Above the picture.
        x: Title of the horizontal scale.
        y: Title of the vertical one.
        percent: Whether values are shares, shown in per cent from 0 to 100.
    """

    title: str
    x: str
    y: str
    percent: bool = False


def draw(
    axes: Axes,
    series: Sequence[Series],
    reference: tuple[str, float] | None,
    *,
    dodge: float = DODGE,
) -> str:
    """Draw lines over a logarithmic horizontal scale, beside a reference.

    Args:
        axes: Titles.
        series: Lines; at least one point altogether.
        reference: Label and value of a horizontal line.
        dodge: Pixels between the points of neighbouring series that stand at one place.
    """
    points = [point for each in series for point in each.points]
    xs = _marks([point.x for point in points])
    across = _scale([math.log(x) for x in xs], LEFT + 14, WIDTH - RIGHT - 14)
    values = [y for point in points for y in (point.y, *(point.interval or ()))]
    up = _upright(values + ([reference[1]] if reference else []), percent=axes.percent)
    parts = [_frame(axes, xs, across, up)]
    ends = [(each.points[-1].y, each.label, *_style(i)) for i, each in enumerate(series)]
    if reference:
        y = up.place(reference[1])
        parts.append(_line([(LEFT, y), (WIDTH - RIGHT, y)], "#000", "5 4"))
        ends.append((reference[1], reference[0], "#000", "5 4"))
    for index, each in enumerate(series):
        shift = dodge * (index - (len(series) - 1) / 2)
        parts.append(_series(each, lambda x, s=shift: across(math.log(x)) + s, up, index))
    parts.append(_labels(ends, up))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" '
        f'viewBox="0 0 {WIDTH} {HEIGHT}" font-family="system-ui, sans-serif" font-size="13">\n'
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>\n' + "\n".join(parts) + "\n</svg>\n"
    )


@dataclass(frozen=True)
class _Upright:
    """The vertical scale."""

    place: Callable[[float], float]
    ticks: list[tuple[float, str]]


def _upright(values: Sequence[float], *, percent: bool) -> _Upright:
    """Linear, or logarithmic where values differ by much; shares always from 0 to 100 %."""
    if percent:
        ticks = [(share / 100, f"{share} %") for share in range(0, 101, 20)]
    elif min(values) > 0 and max(values) > LOGARITHMIC_FROM * min(values):
        return _logarithmic(min(values), max(values))
    else:
        low, high = min(values), max(values)
        margin = 0.04 * (high - low) or 1.0
        marks = round_ticks(low - margin, high + margin)
        ticks = [(mark, f"{mark:,.10g}") for mark in marks]
    place = _scale([tick for tick, _ in ticks], HEIGHT - BOTTOM, TOP)
    return _Upright(place, ticks)


def _marks(xs: Sequence[float]) -> list[float]:
    """What a horizontal scale is marked with: the places themselves, if they are few."""
    places = sorted(set(xs))
    return places if len(places) <= MOST_MARKS else _around(places[0], places[-1])


def _around(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten, the outer ones at or beyond the ends."""
    marks = [
        factor * 10.0**power
        for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        for factor in (1, 2, 5)
    ]
    first = max((mark for mark in marks if mark <= low * 1.001), default=marks[0])
    last = min((mark for mark in marks if mark >= high / 1.001), default=marks[-1])
    return [mark for mark in marks if first <= mark <= last]


def _logarithmic(low: float, high: float) -> _Upright:
    """A scale by ratios."""
    shown = _around(low, high)
    logarithms = _scale([math.log(mark) for mark in shown], HEIGHT - BOTTOM, TOP)
    return _Upright(lambda y: logarithms(math.log(y)), [(m, f"{m:,.10g}") for m in shown])


def _scale(values: Sequence[float], first: float, last: float) -> Callable[[float], float]:
    """A linear map from the range of some values to pixels; a single one to the middle."""
    low, high = min(values), max(values)
    if high == low:
        return lambda _: (first + last) / 2
    return lambda value: first + (value - low) / (high - low) * (last - first)


def _style(index: int) -> tuple[str, str]:
    """Colour and dashes of a line."""
    return COLOURS[index % len(COLOURS)], DASHES[index // len(COLOURS) % len(DASHES)]


def _frame(axes: Axes, xs: Sequence[float], across: Callable[[float], float], up: _Upright) -> str:
    """Titles, marks and grid."""
    parts = [_text(LEFT, 22, axes.title, 'font-size="15" font-weight="600"')]
    for value, label in up.ticks:
        y = up.place(value)
        parts.append(_line([(LEFT, y), (WIDTH - RIGHT, y)], "#e3e3e3", "", 1))
        parts.append(_text(LEFT - 8, y + 4, label, 'text-anchor="end" fill="#555"'))
    for x in xs:
        at = across(math.log(x))
        parts.append(_line([(at, HEIGHT - BOTTOM), (at, HEIGHT - BOTTOM + 5)], "#555", "", 1))
        middle = 'text-anchor="middle" fill="#555"'
        parts.append(_text(at, HEIGHT - BOTTOM + 20, f"{x:,.10g}", middle))
    centre = (LEFT + WIDTH - RIGHT) / 2
    parts.append(_text(centre, HEIGHT - 12, axes.x, 'text-anchor="middle" fill="#333"'))
    middle = (TOP + HEIGHT - BOTTOM) / 2
    turned = f'text-anchor="middle" fill="#333" transform="rotate(-90 16 {middle:.0f})"'
    parts.append(_text(16, middle, axes.y, turned))
    return "\n".join(parts)


def _series(each: Series, across: Callable[[float], float], up: _Upright, index: int) -> str:
    """A line, its points and their intervals."""
    colour, dash = _style(index)
    places = [(across(point.x), up.place(point.y)) for point in each.points]
    parts = [_line(places, colour, dash, 1.6)]
    for point, (x, y) in zip(each.points, places, strict=True):
        if point.interval is not None:
            low, high = (up.place(value) for value in point.interval)
            parts.append(_line([(x, low), (x, high)], colour, "", 1))
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.6" fill="{colour}"/>')
    return "\n".join(parts)


def _labels(ends: Sequence[tuple[float, str, str, str]], up: _Upright) -> str:
    """Names at the lines' ends, moved apart."""
    height = HEIGHT - TOP - BOTTOM
    wanted = [(up.place(value) - TOP) / height for value, *_ in ends]
    parts: list[str] = []
    for (value, label, colour, dash), share in zip(
        ends, spread(wanted, LABEL / height), strict=True
    ):
        x, y = WIDTH - RIGHT, TOP + share * height
        parts.append(_line([(x + 2, up.place(value)), (x + 16, y)], colour, "", 0.6))
        parts.append(_line([(x + 16, y), (x + 36, y)], colour, dash, 2))
        parts.append(_text(x + 41, y + 4, label, f'fill="{colour}"'))
    return "\n".join(parts)


def _line(places: Sequence[tuple[float, float]], colour: str, dash: str, width: float = 1.4) -> str:
    path = "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
    dashes = f' stroke-dasharray="{dash}"' if dash else ""
    return f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="{width}"{dashes}/>'


def _text(x: float, y: float, text: str, style: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" {style}>{escape(text)}</text>'
