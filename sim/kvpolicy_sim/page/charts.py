"""Charts that keep their text size at any width: SVG for lines, positioned HTML for words.

An SVG is stretched over the plot, its strokes are not; labels stand at percentages of it. What
follows the mouse is done in the style sheet.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kvpolicy.axes import round_ticks, spread
from kvpolicy_sim.page.keys import Key
from kvpolicy_sim.page.markup import Markup, element, figure

UNITS = 1000
"""Width and height of a plot in SVG units."""

HEIGHT = 320
"""Of a plot, in pixels, unless its labels need more."""

LABEL = 22
"""Height of a line's label, in pixels."""


@dataclass(frozen=True)
class Axis:
    """A linear scale with labels.

    Attributes:
        title: What it measures.
        low: Where it begins.
        high: Where it ends.
        ticks: Values and their labels.
    """

    title: str
    low: float
    high: float
    ticks: Sequence[tuple[float, str]]

    def share(self, values: np.ndarray | float) -> np.ndarray:
        """Where values lie, from 0 to 1."""
        return (np.asarray(values, float) - self.low) / (self.high - self.low)


@dataclass(frozen=True)
class Curve:
    """One policy's line.

    Attributes:
        key: The policy.
        x: [n].
        y: [n].
    """

    key: Key
    x: np.ndarray
    y: np.ndarray


def labelled(ticks: Sequence[float]) -> list[tuple[float, str]]:
    """Ticks with as many decimals as tell them apart."""
    step = ticks[1] - ticks[0]
    digits = next((d for d in range(9) if math.isclose(round(step, d), step)), 9)
    return [(tick, figure(tick, digits)) for tick in ticks]


def line_chart(
    x: Axis, y: Axis, curves: Sequence[Curve], *, rules: Sequence[float] = (), dots: bool = False
) -> Markup:
    """Lines with their labels at the right or, on a narrow page, below.

    Args:
        x: Horizontal axis.
        y: Vertical axis.
        curves: What is drawn.
        rules: Places on the horizontal axis to be marked.
        dots: Whether to show the points.
    """
    height = max(HEIGHT, LABEL * len(curves))
    ends = [float(1 - y.share(curve.y[-1])) for curve in curves]
    places = spread(ends, LABEL / height)
    return element(
        "div",
        _grid(x, y, rules),
        *(
            _series(curve, _points(x, y, curve), end, place, dots=dots)
            for curve, end, place in zip(curves, ends, places, strict=True)
        ),
        class_="chart",
        style=f"--height:{height}px",
    )


def colour_bar(high: float) -> Markup:
    """The scale of `heat_map`, with numbers."""
    labels: list[Markup] = []
    last = -1.0
    for tick, label in labelled(round_ticks(0, high, 4)):
        place = (tick / high) ** 0.5
        if place <= 1 and place - last > 0.12:
            labels.append(element("span", label, style=f"left:{100 * place:.1f}%"))
            last = place
    return element("div", element("i"), element("div", *labels, class_="ticks"), class_="bar")


def heat_map(losses: np.ndarray, high: float, names: Sequence[Sequence[str]]) -> Markup:
    """Cells as dark as the square root of a loss.

    Args:
        losses: [rows, columns].
        high: Loss of the darkest cell.
        names: What to say of each cell, before its number.
    """
    shades = np.sqrt(np.clip(losses / high, 0, 1))
    cells = [
        element("i", style=f"--q:{shade:.2f}", title=f"{name}: {figure(loss, 4)}")
        for row in zip(losses.tolist(), shades.tolist(), names, strict=True)
        for loss, shade, name in zip(*row, strict=True)
    ]
    rows, columns = losses.shape
    return element("div", *cells, class_="heat", style=f"--rows:{rows};--columns:{columns}")


def _points(x: Axis, y: Axis, curve: Curve) -> list[tuple[int, int]]:
    """A curve in SVG units, without what is not a number."""
    across = np.round(UNITS * x.share(curve.x))
    down = np.round(UNITS * (1 - y.share(curve.y)))
    known = np.isfinite(across + down)
    return [*zip(across[known].astype(int), down[known].astype(int), strict=True)]


def _series(
    curve: Curve, points: Sequence[tuple[int, int]], end: float, place: float, *, dots: bool
) -> Markup:
    """A line, its dots, its label, and what leads from one to the other."""
    key = curve.key
    line = "M" + "L".join(f"{a} {b}" for a, b in points)
    paths = [element("path", d=line, stroke_dasharray=key.dash)]
    if dots:
        paths.append(element("path", d="".join(f"M{a} {b}h0" for a, b in points), class_="dots"))
    leader = element("path", d=f"M0 {UNITS * end:.0f}L{UNITS} {UNITS * place:.0f}")
    return element(
        "div",
        _stretched(*paths, class_=f"line {key.colour}"),
        _stretched(leader, class_=f"leader {key.colour}"),
        element("div", key.name(), class_="label", style=f"--at:{place:.4f}"),
        class_="series",
    )


def _grid(x: Axis, y: Axis, rules: Sequence[float]) -> Markup:
    """Lines across at the vertical axis's ticks, both axes' labels, and marked places."""
    heights = [float(1 - y.share(tick)) for tick, _ in y.ticks]
    across = "".join(f"M0 {UNITS * height:.0f}H{UNITS}" for height in heights)
    marked = "".join(f"M{UNITS * float(x.share(rule)):.0f} 0V{UNITS}" for rule in rules)
    up = (
        element("span", label, style=f"top:{100 * height:.1f}%")
        for height, (_, label) in zip(heights, y.ticks, strict=True)
    )
    along = (
        element("span", label, style=f"left:{100 * float(x.share(tick)):.1f}%")
        for tick, label in x.ticks
    )
    return element(
        "div",
        _stretched(
            element("path", d=across), element("path", d=marked, class_="rule"), class_="grid"
        ),
        element("div", *up, class_="up"),
        element("div", *along, class_="along"),
        element("div", y.title, class_="y-title"),
        element("div", x.title, class_="x-title"),
        class_="axes",
    )


def _stretched(*paths: Markup, class_: str) -> Markup:
    """An SVG that fills its place whatever its shape."""
    return element(
        "svg",
        *paths,
        class_=class_,
        viewBox=f"0 0 {UNITS} {UNITS}",
        preserveAspectRatio="none",
        aria_hidden="true",
    )
