"""Charts: lines with their names beside them.

Axes: n points.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedFormatter, FixedLocator, NullLocator
from matplotlib.transforms import ScaledTranslation

from kvpolicy.axes import budget_marks, round_ticks, spread
from kvpolicy.page.canvas import WIDTH, on_paper, plain
from kvpolicy.page.keys import Key
from kvpolicy.page.markup import figure as number
from kvpolicy.page.themes import Theme

LABEL = 0.2
"""Height of a line's name, in inches."""

_AXES = 0.575
"""Share of a picture's width between the scales; names need the rest."""


@dataclass(frozen=True)
class Scale:
    """An axis with its labels.

    Attributes:
        title: What it measures.
        low: Where it begins.
        high: Where it ends.
        ticks: Values and their labels.
        is_log: Whether equal ratios are equal distances.
    """

    title: str
    low: float
    high: float
    ticks: Sequence[tuple[float, str]]
    is_log: bool = False


@dataclass(frozen=True)
class Curve:
    """One line.

    Attributes:
        key: What it goes by.
        x: [n].
        y: [n]; NaN where nothing is known.
        low: Lower ends of intervals, [n]; None without any.
        high: Upper ends.
    """

    key: Key
    x: np.ndarray
    y: np.ndarray
    low: np.ndarray | None = None
    high: np.ndarray | None = None


@dataclass(frozen=True)
class Band:
    """An area between two lines.

    Attributes:
        name: What lies in it.
        x: [n].
        low: [n].
        high: [n].
    """

    name: str
    x: np.ndarray
    low: np.ndarray
    high: np.ndarray


def line_chart(
    theme: Theme,
    x: Scale,
    y: Scale,
    curves: Sequence[Curve],
    *,
    rules: Sequence[float] = (),
    band: Band | None = None,
    dots: bool = False,
    dodge: float = 0.0,
    title: str = "",
) -> Figure:
    """Lines with their names at the right.

    Args:
        theme: Colours.
        x: Horizontal axis.
        y: Vertical axis.
        curves: What is drawn.
        rules: Places on the horizontal axis to be marked.
        band: What lies behind the lines.
        dots: Whether to show the points, but of plain lines.
        dodge: Points (of 1/72 inch) between neighbouring lines that are not plain, so that
            intervals show.
        title: Above all.
    """
    above = 0.8 if title else 0.4
    plot = max(2.7, LABEL * (len(curves) + (band is not None)))
    height = plot + 0.52 + above
    with on_paper(theme):
        figure = Figure((WIDTH, height))
        axes = figure.add_axes((0.075, 0.52 / height, _AXES, plot / height))
        figure.text(
            0.075, 1 - 0.2 / height, plain(title, 100), fontsize=11, weight="bold", va="top"
        )
        room = dodge * (len(curves) - 1) / 2 / 72  # inches that the outermost lines move
        _scale(axes, _widened(x, room / (_AXES * WIDTH - 2 * room)), y)
        for place in rules:
            axes.axvline(place, color=theme.soft, linewidth=1, linestyle=(0, (1, 3)))
        ends: list[tuple[float, str, dict[str, Any]]] = []
        if band is not None:
            # The edge keeps an optimum visible whose bounds meet.
            axes.fill_between(band.x, band.low, band.high, color=theme.soft, alpha=0.3, linewidth=3)
            middle = float(band.low[-1] + band.high[-1]) / 2
            style = {"color": theme.soft, "alpha": 0.3, "linewidth": 6, "solid_capstyle": "butt"}
            ends.append((middle, band.name, style))
        for index, curve in enumerate(curves):
            style = _style(theme, curve.key)
            shift = 0.0 if curve.key.colour == "plain" else dodge * index / 72 - room
            place = {
                "transform": axes.transData + ScaledTranslation(shift, 0, figure.dpi_scale_trans),
                "clip_on": False,
            }
            has_dots = dots and curve.key.colour != "plain"
            marker = {"marker": "o", "markersize": 4} if has_dots else {}
            axes.plot(curve.x, curve.y, label=curve.key.spec, **style, **marker, **place)
            if curve.low is not None and curve.high is not None:
                ends_of = {"color": style["color"], "linewidth": 1, **place}
                axes.vlines(curve.x, curve.low, curve.high, **ends_of)
            known = curve.y[np.isfinite(curve.y)]
            ends.append((float(known[-1]) if known.size else y.low, curve.key.short, style))
        _name(axes, ends, plot)
    return figure


def labelled(ticks: Sequence[float]) -> list[tuple[float, str]]:
    """Ticks with as many decimals as tell them apart."""
    step = ticks[1] - ticks[0]
    digits = next((d for d in range(9) if math.isclose(round(step, d), step)), 9)
    return [(tick, number(tick, digits)) for tick in ticks]


def budget_scale(title: str, budgets: Sequence[float]) -> Scale:
    """Equal ratios at equal distances; room on both sides of a single budget."""
    marks = [(mark, f"{mark:,.6g}") for mark in budget_marks(budgets)]
    first, last = min(budgets), max(budgets)
    before, after = (1.5, 1.5) if first == last else (1.05, 1.0)
    return Scale(title, first / before, last * after, marks, is_log=True)


def share_scale(title: str, values: Sequence[float], count: int = 6) -> Scale:
    """From a round number below all values to 1."""
    ticks = round_ticks(min(*values, 0.99), 1, count)
    return Scale(title, ticks[0], ticks[-1], labelled(ticks))


def _widened(scale: Scale, share: float) -> Scale:
    """A scale with a share of its length more at both ends."""
    if scale.is_log:
        more = (scale.high / scale.low) ** share
        return replace(scale, low=scale.low / more, high=scale.high * more)
    more = (scale.high - scale.low) * share
    return replace(scale, low=scale.low - more, high=scale.high + more)


def _scale(axes: Axes, x: Scale, y: Scale) -> None:
    """Put scales, ticks, a grid and titles on empty axes."""
    axes.set_xscale("log" if x.is_log else "linear")
    axes.set_yscale("log" if y.is_log else "linear")
    axes.set_xlim(x.low, x.high)
    axes.set_ylim(y.low, y.high)
    for axis, scale in ((axes.xaxis, x), (axes.yaxis, y)):
        axis.set_major_locator(FixedLocator([tick for tick, _ in scale.ticks]))
        axis.set_major_formatter(FixedFormatter([label for _, label in scale.ticks]))
        axis.set_minor_locator(NullLocator())
    axes.grid(axis="y", color=axes.spines["left"].get_edgecolor(), linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.set_xlabel(x.title, loc="right")
    axes.set_title(y.title, loc="left", fontsize=9, color=axes.xaxis.label.get_color())


def _style(theme: Theme, key: Key) -> dict[str, Any]:
    """Colour and dashes of a line."""
    dashes = tuple(float(x) / 1.6 for x in key.dash.split()) if key.dash else None
    return {
        "color": theme.colour(key.colour),
        "linestyle": (0, dashes) if dashes else "-",
        "linewidth": 1.4 if key.colour == "plain" else 1.8,
    }


def _name(axes: Axes, ends: Sequence[tuple[float, str, dict[str, Any]]], height: float) -> None:
    """Write names beside the ends of lines, moved apart, each with a piece of its line.

    Args:
        axes: Where the lines are.
        ends: Values at the lines' ends, names and styles.
        height: Of the axes, in inches.
    """
    to_axes = axes.transData + axes.transAxes.inverted()
    left = axes.get_xlim()[0]
    wanted = [float(to_axes.transform((left, value))[1]) for value, _, _ in ends]
    wanted = [min(max(place, 0.0), 1.0) for place in wanted]
    for (_, name, style), end, place in zip(
        ends, wanted, spread(wanted, LABEL / height), strict=True
    ):
        beside = {"transform": axes.transAxes, "clip_on": False}
        axes.plot([1.0, 1.03], [end, place], color=style["color"], linewidth=0.6, **beside)
        axes.plot([1.03, 1.085], [place, place], **style, **beside)
        axes.text(1.1, place, plain(name), va="center", fontsize=8.5, transform=axes.transAxes)
