"""Quality against budget, as a picture."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from kvpolicy.axes import ratio_marks, round_ticks
from kvpolicy.page import require_matplotlib
from kvpolicy.page.keys import Key, series_keys
from kvpolicy.page.themes import LIGHT, Theme

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from kvpolicy.page.charts import Curve, Scale

DODGE = 2.5
"""Points between neighbouring series at one budget, so that intervals show."""

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
    """Draw lines over a logarithmic horizontal scale, beside a reference, as SVG.

    Args:
        axes: Titles.
        series: Lines; at least one point altogether.
        reference: Label and value of a horizontal line.
        dodge: Points between neighbouring series that stand at one place.

    Raises:
        UnsupportedError: There is nothing to draw with.
    """
    require_matplotlib()
    from kvpolicy.page.canvas import svg

    return svg(LIGHT, plan(axes, series, reference, dodge=dodge)(LIGHT)).decode()


def plan(
    axes: Axes,
    series: Sequence[Series],
    reference: tuple[str, float] | None,
    *,
    dodge: float = DODGE,
) -> Callable[[Theme], "Figure"]:
    """What `draw` draws, for any theme; same arguments."""
    from kvpolicy.page.charts import Curve, budget_scale, line_chart

    points = [point for each in series for point in each.points]
    x = budget_scale(axes.x, [point.x for point in points])
    values = [y for point in points for y in (point.y, *(point.interval or ()))]
    values += [reference[1]] if reference else []
    curves = [
        _curve(key, each.points)
        for key, each in zip(series_keys([s.label for s in series]), series, strict=True)
    ]
    if reference:
        key = Key(None, reference[0], reference[0], "plain", "5 4")
        curves.append(Curve(key, np.array([x.low, x.high]), np.array([reference[1]] * 2)))
    return partial(
        line_chart,
        x=x,
        y=upright(axes.y, values, percent=axes.percent),
        curves=curves,
        dots=True,
        dodge=dodge,
        title=axes.title,
    )


def _curve(key: Key, points: Sequence[Point]) -> "Curve":
    """A series as a line with intervals where they are known."""
    from kvpolicy.page.charts import Curve

    ends = np.array([point.interval or (np.nan, np.nan) for point in points])
    x, y = np.array([(point.x, point.y) for point in points]).T
    return Curve(key, x, y, *ends.T)


def upright(title: str, values: Sequence[float], *, percent: bool) -> "Scale":
    """Linear, or logarithmic where values differ by much; shares always from 0 to 100 %.

    Args:
        title: What the scale measures.
        values: What it must hold.
        percent: Whether they are shares.
    """
    from kvpolicy.page.charts import Scale

    low, high = min(values), max(values)
    if percent:
        return Scale(title, 0, 1, [(share / 100, f"{share} %") for share in range(0, 101, 20)])
    if is_log := low > 0 and high > LOGARITHMIC_FROM * low:
        marks = ratio_marks(low, high)
    else:
        margin = 0.04 * (high - low) or 1.0
        marks = round_ticks(low - margin, high + margin)
    return Scale(title, marks[0], marks[-1], [(m, f"{m:,.10g}") for m in marks], is_log)
