"""Panels: small pictures of values in rows and columns, beside each other on one scale.

Axes: r rows and c columns of a panel.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, ListedColormap, PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FixedFormatter, FixedLocator

from kvpolicy.page.canvas import WIDTH, on_paper, plain
from kvpolicy.page.keys import Key
from kvpolicy.page.themes import Theme

_MOST_TICKS = 9
"""Layers or heads that a panel numbers."""

_SHADES = 64
"""Of a map of what was held."""


@dataclass(frozen=True)
class Panel:
    """A small picture among others.

    Attributes:
        key: The policy.
        values: [r, c].
    """

    key: Key
    values: np.ndarray


@dataclass(frozen=True)
class Grid:
    """What panels of one picture have in common.

    Attributes:
        x: What columns are.
        y: What rows are.
        x_names: Of the columns; None numbers them from `x_first` to `x_last`.
        y_names: Of the rows, likewise.
        extent: Values at the left, right, bottom and top edge, where there are no names.
        columns: Panels beside each other.
        height: Of a panel, in inches.
    """

    x: str
    y: str
    x_names: Sequence[int] | None = None
    y_names: Sequence[int] | None = None
    extent: tuple[float, float, float, float] | None = None
    columns: int = 3
    height: float = 1.7


def heat_maps(theme: Theme, panels: Sequence[Panel], grid: Grid, high: float) -> Figure:
    """Panels whose cells are the darker, or on dark paper the lighter, the more was lost.

    Args:
        theme: Colours.
        panels: Losses.
        grid: Their axes.
        high: Loss at the end of the ramp, which goes by the square root.
    """
    with on_paper(theme):
        figure, images = _panels(
            panels,
            grid,
            right=0.95,
            cmap=LinearSegmentedColormap.from_list("loss", list(theme.ramp)),
            norm=PowerNorm(0.5, 0, high),
        )
        height = figure.get_figheight()
        place = figure.add_axes(
            (1 - 0.7 / WIDTH, 0.5 / height, 0.13 / WIDTH, min(grid.height, 2.4) / height)
        )
        bar = figure.colorbar(images[-1], cax=place)
        bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]
        place.tick_params(labelsize=8, length=2)
    return figure


def held_maps(theme: Theme, panels: Sequence[Panel], grid: Grid) -> Figure:
    """Panels of shares held: NaN was not seen yet, 0 evicted; even a few are well visible.

    Args:
        theme: Colours.
        panels: Shares from 0 to 1.
        grid: Their axes.
    """
    few, every = theme.held
    held = LinearSegmentedColormap.from_list("held", [few, every])(np.linspace(0, 1, _SHADES - 1))
    shades = ListedColormap([theme.gone, *held]).with_extremes(bad=theme.paper)
    with on_paper(theme):
        figure, _ = _panels(panels, grid, right=0.15, cmap=shades, norm=PowerNorm(0.5, 0, 1))
    return figure


def _panels(
    panels: Sequence[Panel], grid: Grid, right: float, **colours: Any
) -> tuple[Figure, list[Any]]:
    """Lay panels out row by row; gives their images.

    Args:
        panels: What to draw.
        grid: Their axes.
        right: Room at the right, in inches.
        colours: What gives values their colours.
    """
    columns = grid.columns
    rows = -(-len(panels) // columns)
    left, top, bottom, across, down = 0.72, 0.3, 0.5, 0.42, 0.55  # in inches
    height = top + bottom + rows * grid.height + (rows - 1) * down
    width = (WIDTH - left - right - (columns - 1) * across) / columns
    figure = Figure((WIDTH, height))
    places = figure.add_gridspec(
        rows,
        columns,
        left=left / WIDTH,
        right=1 - right / WIDTH,
        bottom=bottom / height,
        top=1 - top / height,
        wspace=across / width,
        hspace=down / grid.height,
    )
    images: list[Any] = []
    for index, panel in enumerate(panels):
        axes = figure.add_subplot(places[index // columns, index % columns])
        images.append(_image(axes, panel, grid, colours))
        if index % columns == 0:
            axes.set_ylabel(grid.y, fontsize=8)
        if index + columns >= len(panels):
            axes.set_xlabel(grid.x, fontsize=8)
    return figure, images


def _image(axes: Axes, panel: Panel, grid: Grid, colours: dict[str, Any]) -> Any:
    """Draw a panel."""
    image = axes.imshow(
        panel.values, aspect="auto", interpolation="none", extent=grid.extent, **colours
    )
    for axis, names in ((axes.xaxis, grid.x_names), (axes.yaxis, grid.y_names)):
        if names is not None:
            ticks = range(0, len(names), -(-len(names) // _MOST_TICKS))
            axis.set_major_locator(FixedLocator(ticks))
            axis.set_major_formatter(FixedFormatter([str(names[tick]) for tick in ticks]))
    axes.set_title(plain(panel.key.short), loc="left", fontsize=8.5)
    axes.tick_params(labelsize=8, length=2)
    return image
