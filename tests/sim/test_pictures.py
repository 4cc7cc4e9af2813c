"""The pieces of a page: binned arrays, pictures, scales, labels, numbers."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fixtures.reports import Dimensions, evictions, random_report
from kvpolicy import parse
from kvpolicy.axes import round_ticks, spread
from kvpolicy.page.canvas import plain
from kvpolicy.page.charts import labelled
from kvpolicy.page.keys import keys_of, series_keys
from kvpolicy.page.markup import NOTHING, element, figure, size
from kvpolicy.page.panels import Grid, Panel, held_maps
from kvpolicy.page.themes import LIGHT
from kvpolicy_sim.page.series import (
    mass_over_time,
    median_place,
    retention_map,
    similarity,
    spans,
)
from kvpolicy_sim.statistics import is_retained, jaccard

SPECS = ("full", "window:budget=40", "h2o:budget=40", "tova:budget=64")


def evicted_at(spec, tokens):
    """When random evictions that follow a spec's law took the tokens of one head; [T]."""
    return evictions(parse(spec), 1, tokens, np.random.default_rng(1))[0]


def test_retention_map_follows_the_definition():
    """A pixel is the share of its positions that are held once its row's tokens are seen."""
    times = evicted_at("h2o:budget=40", 200)
    shares = retention_map(times)
    edges = [i * 200 // 128 for i in range(129)]
    assert shares.shape == (128, 128)
    for y, n in enumerate(edges[1:]):
        for x, (first, last) in enumerate(pairwise(edges)):
            held = [times[s] == 0 or times[s] > n for s in range(first, last) if s < n]
            assert shares[y, x] == np.mean(held) if held else np.isnan(shares[y, x])


def test_short_sequences_are_drawn_token_by_token():
    """With no more tokens than pixels, the map is the retained set after every token."""
    times = evicted_at("tova:budget=20", 90)
    shares = retention_map(times)
    for n in range(1, 91):
        np.testing.assert_array_equal(shares[n - 1] > 0, is_retained(times[None], n)[0])
        assert np.isnan(shares[n - 1, n:]).all()


def test_mass_over_time_is_a_mean_of_steps():
    """Bins average steps over layers, heads, and the sequences that reach them."""
    report = random_report(SPECS, Dimensions(tokens=(240, 70)), extras=False)
    over_time = mass_over_time(report, [*report.results.values()])
    assert over_time.tokens[[0, -1]].tolist() == [1.5, 239.5]
    for row, result in zip(over_time.mass, report.results.values(), strict=True):
        long, short = (
            np.mean([result.outcomes[index, layer].retained_mass for layer in range(3)], (0, 1, 2))
            for index in (0, 1)
        )
        assert row[0] == pytest.approx(np.mean([long[:2], short[:2]]), rel=1e-6)
        assert row[-1] == pytest.approx(long[-2:].mean(), rel=1e-6)


def test_mass_over_time_of_sampled_queries_spans_all_tokens():
    """With every third query, the curve still ends at the last of them."""
    report = random_report(SPECS, Dimensions(stride=3), extras=False)
    assert mass_over_time(report, [*report.results.values()]).tokens[[0, 1, -1]].tolist() == [
        1,
        4,
        199,
    ]


def test_similarity_is_the_mean_jaccard():
    """The matrix equals the plain Jaccard similarity, layer by layer."""
    results = [*random_report(SPECS).results.values()]
    for ours, first in zip(similarity(results), results, strict=True):
        for value, second in zip(ours, results, strict=True):
            plain = [
                jaccard(*(is_retained(x.outcomes[place].evicted_at) for x in (first, second)))
                for place in first.outcomes
            ]
            assert value == pytest.approx(np.mean(plain))


def test_maps_tell_unseen_evicted_and_held_apart():
    """Paper is for tokens to come, one grey for evicted ones; one of 64 held is far from it."""
    shares = np.array([[np.nan, 0.0, 1 / 64, 0.5, 1.0]])
    drawing = held_maps(LIGHT, [Panel(series_keys(["h2o"])[0], shares)], Grid("x", "y"))
    image = drawing.axes[0].images[0]
    colours = image.cmap(image.norm(np.ma.masked_invalid(shares)))[0, :, :3]
    written = ["#" + "".join(f"{round(255 * x):02x}" for x in colour) for colour in colours]
    assert written[:2] == [LIGHT.paper, LIGHT.gone]
    assert written[4] == LIGHT.held[1]
    assert len({*written}) == 5


@given(st.sets(st.integers(0, 60)))
def test_spans_are_the_positions_in_runs(positions):
    """Runs give the positions back, and no two of them touch."""
    found = spans(np.array(sorted(positions), np.int64))
    assert [p for a, b in found for p in range(a, b + 1)] == sorted(positions)
    assert all(b + 1 < c for (_, b), (c, _) in pairwise(found))


def test_names_in_pictures_are_short_and_plain():
    """What the font may lack is replaced, and long names end in dots."""
    assert plain("h2o:note=\u6f22\n$x$") == "h2o:note=??$x$"
    assert len(plain("x" * 100)) == 34
    assert plain("x" * 100).endswith("x...")


def test_median_place_is_in_the_middle():
    """As many values are smaller as are larger; of two in the middle it is the smaller."""
    assert median_place(np.array([[5.0, 1.0, 4.0], [2.0, 3.0, 6.0]])) == (1, 1)
    assert median_place(np.array([[5.0]])) == (0, 0)


@given(st.lists(st.floats(0, 1), max_size=30), st.floats(0.01, 0.2))
def test_labels_keep_their_order_and_their_distance(places, gap):
    """Labels stay inside, in order, and apart as far as there is room."""
    room = min(gap, 1 / max(len(places), 1))
    found = spread(places, gap)
    moved = [found[i] for i in sorted(range(len(places)), key=lambda i: places[i])]
    assert all(room / 2 - 1e-9 <= place <= 1 - room / 2 + 1e-9 for place in moved)
    assert all(b - a >= room - 1e-9 for a, b in pairwise(moved))


def test_labels_that_have_room_stay_where_they_are():
    """Nothing moves that need not."""
    assert spread([0.5, 0.2, 0.8], 0.1) == [0.5, 0.2, 0.8]


@given(st.floats(0, 1e6), st.floats(1e-4, 1e6), st.integers(2, 8))
def test_ticks_cover_what_they_label(low, extent, count):
    """Ticks begin at or below, end at or above, are not many, and have labels of their own."""
    ticks = round_ticks(low, low + extent, count)
    slack = 1e-6 * extent + 1e-9 * (low + extent)
    assert ticks[0] <= low + slack
    assert ticks[-1] >= low + extent - slack
    assert 2 <= len(ticks) <= count + 3
    assert len({label for _, label in labelled(ticks)}) == len(ticks)


def test_policies_are_told_apart_without_colours():
    """Labels leave out what is common; no two lines share colour and dash."""
    keys = keys_of([parse("full"), *(parse(f"h2o:budget=64,sinks={n}") for n in range(1, 31))])
    assert [key.label for key in keys[:3]] == ["full", "h2o:sinks=1", "h2o:sinks=2"]
    assert len({(key.colour, key.dash) for key in keys}) == len(keys)
    assert len({key.dash for key in keys[1:7]}) == 6
    assert keys_of([parse("h2o:budget=64")])[0].label == "h2o:budget=64"


def test_lines_that_join_budgets_are_told_apart():
    """Up to twelve kinds of policy have lines of their own, without numbers."""
    keys = series_keys([f"h2o:sinks={n}" for n in range(12)])
    assert len({(key.colour, key.dash) for key in keys}) == 12
    assert keys[3].short == "h2o:sinks=3"


def test_budgets_of_one_policy_share_a_colour():
    """A sweep has a colour per kind of policy and a dash per budget."""
    keys = keys_of([parse(f"{n}:budget={b}") for b in (32, 64, 128) for n in ("h2o", "tova")])
    assert [key.colour for key in keys] == ["c0", "c1"] * 3
    assert len({(key.colour, key.dash) for key in keys}) == len(keys)


def test_custom_policies_go_by_their_class():
    """Of an import path, a label has the last part."""
    key = keys_of([parse("fixtures.policies.RowTimesKeyNorm:budget=24")])[0]
    assert key.label == "RowTimesKeyNorm:budget=24"


def test_numbers_are_written_alike():
    """Thousands are separated, decimals fixed; what is not a number is a dash."""
    assert [figure(x, 2) for x in (1234.5, 0.0, 0.004)] == ["1,234.50", "0.00", "0.00"]
    assert [figure(x) for x in (None, float("nan"), float("inf"))] == [NOTHING] * 3
    assert [size(n) for n in (0, 1023, 1024, 1536 * 1024, 3 << 50)] == [
        "0 B",
        "1,023 B",
        "1.0 KiB",
        "1.5 MiB",
        "3,072.0 TiB",
    ]
    assert size(None) == NOTHING


def test_elements_escape_what_is_not_markup():
    """Text is escaped once, in content and in attributes; elements are not."""
    inner = element("b", "<&>")
    assert element("p", inner, "'", class_='"x"', stroke_width=None) == (
        '<p class="&quot;x&quot;"><b>&lt;&amp;&gt;</b>&#x27;</p>'
    )
