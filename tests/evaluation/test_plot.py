"""The plot: well-formed, everything named, points where their values are."""

from xml.etree import ElementTree

import pytest

from kvpolicy.evaluation.plot import HEIGHT, WIDTH, Axes, Point, Series, draw

AXES = Axes(title="Perplexity <of> & prose", x="slots", y="perplexity")
NAMESPACE = "{http://www.w3.org/2000/svg}"


def parts(svg, tag):
    """Elements of a picture."""
    return list(ElementTree.fromstring(svg).iter(NAMESPACE + tag))


def texts(svg):
    """All words of a picture."""
    return [part.text for part in parts(svg, "text")]


def test_every_line_and_the_reference_are_named():
    """Titles are escaped, series and reference have labels, budgets are marked."""
    series = [
        Series(f"policy{i}", [Point(32, 30 + i, (29 + i, 31 + i)), Point(64, 29 + i)])
        for i in range(12)
    ]
    svg = draw(AXES, series, ("full", 27.0))
    assert {"Perplexity <of> & prose", "slots", "perplexity", "full", "32", "64"} <= {*texts(svg)}
    assert {f"policy{i}" for i in range(12)} <= {*texts(svg)}
    assert len(parts(svg, "circle")) == 24


def test_points_stand_where_their_values_are():
    """Higher is above, budgets run from left to right at equal ratios, nothing leaves the page."""
    points = [Point(32, 40.0), Point(64, 35.0), Point(128, 30.0)]
    svg = draw(AXES, [Series("h2o", points)], None)
    places = [(float(c.get("cx")), float(c.get("cy"))) for c in parts(svg, "circle")]
    (x0, y0), (x1, y1), (x2, y2) = places
    assert y0 < y1 < y2
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2)
    assert y1 - y0 == pytest.approx(y2 - y1, abs=0.2)
    assert all(0 < x < WIDTH and 0 < y < HEIGHT for x, y in places)


def test_shares_run_from_nothing_to_all():
    """Per cent: the scale is whole, whatever the values."""
    axes = Axes(title="Pass keys", x="slots", y="%", percent=True)
    svg = draw(axes, [Series("h2o", [Point(64, 0.25)])], ("full", 1.0))
    assert {"0 %", "100 %"} <= {*texts(svg)}
    [circle] = parts(svg, "circle")
    assert 0 < float(circle.get("cx")) < WIDTH


def test_values_far_apart_are_drawn_by_their_ratios():
    """From threefold on the scale is logarithmic: equal factors are equal distances."""
    points = [Point(32, 1000.0), Point(64, 100.0), Point(128, 10.0)]
    svg = draw(AXES, [Series("window", points)], ("full", 10.0))
    heights = [float(c.get("cy")) for c in parts(svg, "circle")]
    assert heights[1] - heights[0] == pytest.approx(heights[2] - heights[1], abs=0.2)
    assert {"10", "100", "1,000"} <= {*texts(svg)}


def test_equal_values_can_be_drawn():
    """One value everywhere, also that of the reference: a picture, not a division by zero."""
    svg = draw(AXES, [Series("h2o", [Point(64, 5.0, (5.0, 5.0))])], ("full", 5.0))
    assert "nan" not in svg
    assert len(parts(svg, "circle")) == 1
