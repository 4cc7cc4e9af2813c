"""The plot: everything named, points where their values are, a file that needs nothing else."""

from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib.text import Text

from kvpolicy.evaluation.plot import Axes, Point, Series, draw, plan
from kvpolicy.page.themes import LIGHT

AXES = Axes(title="Perplexity <of> & prose", x="slots", y="perplexity")


def axes_of(*arguments, **options):
    """What matplotlib draws."""
    return plan(*arguments, **options)(LIGHT).axes[0]


def lines(axes):
    """The lines of series, by name."""
    return {line.get_label(): line for line in axes.lines if not line.get_label().startswith("_")}


def words(axes):
    """Everything that is written."""
    labels = [*axes.get_xticklabels(), *axes.get_yticklabels()]
    return {x.get_text() for x in (*labels, *axes.figure.findobj(Text))}


def test_every_line_and_the_reference_are_named():
    """Series and reference have names, each its own line; budgets and titles are written."""
    series = [
        Series(f"policy{i}", [Point(32, 30 + i, (29 + i, 31 + i)), Point(64, 29 + i)])
        for i in range(12)
    ]
    axes = axes_of(AXES, series, ("full", 27.0))
    names = [f"policy{i}" for i in range(12)]
    assert [*lines(axes)] == [*names, "full"]
    assert {AXES.title, "slots", "perplexity", "32", "64", *names, "full"} <= words(axes)


def test_points_stand_where_their_values_are():
    """Values are drawn as they are, with their intervals, budgets at equal ratios."""
    points = [Point(32, 40.0, (38.0, 43.0)), Point(64, 35.0), Point(128, 30.0)]
    axes = axes_of(AXES, [Series("h2o", points)], None)
    line = lines(axes)["h2o"]
    assert line.get_xdata().tolist() == [32, 64, 128]
    assert line.get_ydata().tolist() == [40, 35, 30]
    assert axes.get_xscale() == "log"
    (strokes,) = axes.collections
    assert [s[:, 1].tolist() for s in strokes.get_segments() if len(s)][:1] == [[38.0, 43.0]]
    assert axes.get_xlim()[0] < 32
    assert axes.get_ylim()[0] < 30 < 43 < axes.get_ylim()[1]


def test_neighbours_at_one_budget_stand_apart():
    """Points are moved sideways, so that intervals do not cover each other."""
    series = [Series(name, [Point(32, 40.0), Point(64, 35.0)]) for name in ("h2o", "tova")]

    def distance(dodge):
        drawn = axes_of(AXES, series, None, dodge=dodge)
        places = [line.get_transform().transform((32, 40.0))[0] for line in lines(drawn).values()]
        return places[1] - places[0]

    assert distance(0) == pytest.approx(0)
    assert distance(7.2) == pytest.approx(10), "100 pixels per inch, 72 points"


def test_shares_run_from_nothing_to_all():
    """Per cent: the scale is whole, whatever the values."""
    axes = axes_of(
        Axes(title="Pass keys", x="slots", y="%", percent=True),
        [Series("h2o", [Point(64, 0.25)])],
        ("full", 1.0),
    )
    assert axes.get_ylim() == (0, 1)
    assert {"0 %", "100 %"} <= words(axes)


def test_values_far_apart_are_drawn_by_their_ratios():
    """From threefold on the scale is logarithmic: equal factors are equal distances."""
    points = [Point(32, 1000.0), Point(64, 100.0), Point(128, 10.0)]
    axes = axes_of(AXES, [Series("window", points)], ("full", 10.0))
    assert axes.get_yscale() == "log"
    assert {"10", "100", "1,000"} <= words(axes)
    near = axes_of(AXES, [Series("window", [Point(32, 29.0)])], ("full", 10.0))
    assert near.get_yscale() == "linear"


@pytest.mark.parametrize("points", [[Point(64, 5.0, (5.0, 5.0))], [Point(64, 5.0)]])
def test_equal_values_can_be_drawn(points):
    """One value everywhere, also that of the reference: a picture, not a division by zero."""
    axes = axes_of(AXES, [Series("h2o", points)], ("full", 5.0))
    assert np.isfinite([*axes.get_xlim(), *axes.get_ylim()]).all()
    assert axes.get_ylim()[0] < 5 < axes.get_ylim()[1]


def test_svg_needs_nothing_but_itself():
    """The file is well-formed, the same each time, and refers to nothing outside."""
    series = [Series("a <b> & $c$", [Point(32, 40.0), Point(64, 35.0)])]
    svg = draw(AXES, series, ("full", 27.0))
    root = ElementTree.fromstring(svg)
    links = [v for x in root.iter() for name, v in x.attrib.items() if name.endswith("href")]
    assert all(link.startswith("#") for link in links)
    assert svg == draw(AXES, series, ("full", 27.0))
