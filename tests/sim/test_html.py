"""The page: its figures are the report's, its text is harmless, and it needs nothing but itself."""

import re
from base64 import b64decode
from itertools import pairwise
from xml.etree import ElementTree

import numpy as np
import pytest

from fixtures.pages import parse_page
from fixtures.reports import Annotated, Dimensions, random_report
from kvpolicy.page.markup import NOTHING, figure, interval, size
from kvpolicy.page.themes import DARK, LIGHT
from kvpolicy.passage import Passage
from kvpolicy_sim.page.html import document
from kvpolicy_sim.page.series import mass_over_time, similarity
from kvpolicy_sim.report import Report

SPECS = (
    "full",
    "window:budget=40",
    "h2o:budget=40",
    "h2o:budget=40,score=mean",
    "sinks:budget=64",
    "tova:budget=64",
)

HOSTILE = "</title></style><script>alert(1)</script>\"'><img src=x onerror=alert(2)>&amp;$title"


@pytest.fixture(scope="module")
def report():
    """A report with every figure there is."""
    return random_report(SPECS)


@pytest.fixture(scope="module")
def root(report):
    """Its page, with a text."""
    return parse_page(page(report, passage(200)))


def page(report, passage=None):
    """The HTML of a report."""
    return document(report, passage).html()


def passage(tokens, text="word"):
    """A text of one word per token."""
    spans = [(i * (len(text) + 1), (i + 1) * (len(text) + 1)) for i in range(tokens)]
    return Passage(f"{text} " * tokens, [1] * tokens, spans)


def drawn(report, name):
    """A picture of a report's page, as matplotlib has it."""
    (found,) = (each for each in document(report).pictures if each.name == name)
    return found.draw(LIGHT)


def lines(drawing):
    """The lines of a chart, by the policies they stand for."""
    return {line.get_label(): line for line in drawing.axes[0].lines if line.get_label()[0] != "_"}


def number(cell):
    """What a cell shows, without its star and small print."""
    small = "".join(x.text for x in cell.all("small"))
    return cell.text.replace("★", "").removesuffix(small)


def shown(root):
    """Everything a reader may see or hear: text, and attributes but for pictures."""
    attributes = (
        value
        for x in root.elements
        for name, value in x.attributes.items()
        if name not in ("src", "srcset")
    )
    return "\n".join([root.first("body").text, *attributes])


def test_page_has_every_section(root):
    """All parts are there, in order, under one title."""
    assert [x.text for x in root.all("h1")] == ["a model"]
    assert [x.first("h2").text.partition(":")[0] for x in root.all("section")] == [
        "Policies",
        "Retained mass by budget",
        "Retained mass over the sequence",
        "Lost attention by age",
        "Loss by layer and head",
        "What was held",
        "What is left of the text",
        "Ledger",
        "Similarity of what is held at the end",
        "Marked spans",
        "How to read this",
    ]


@pytest.mark.parametrize("level", ["layer-local", "open-loop"])
def test_title_says_what_the_level_means(level):
    """Model, tokens, layers and heads stand at the top, and what a replay leaves out."""
    top = parse_page(page(random_report(SPECS, level=level))).first("header")
    facts = {x.first("dt").text: x.first("dd").text for x in top.first("dl").all("div")}
    assert facts == {
        "tokens": "200",
        "sequences": "1",
        "layers": "3 of 3",
        "KV heads": "2 of 2",
        "query heads per KV head": "2",
        "budget": "40, 64",
    }
    assert top.text.count(level) == 1
    assert ("renormalised" in top.text) == (level == "layer-local")
    assert ("weights that full attention gives" in top.text) == (level == "open-loop")
    assert "says nothing about how errors compound" in top.text


def test_every_policy_is_named_with_its_whole_spec(root):
    """The table has one row per policy, in the report's order."""
    rows = root.section("Policies").first("tbody").all("tr")
    assert [row.first("span", "spec").text for row in rows] == list(SPECS)


def test_figures_are_those_of_the_report(report, root):
    """Every cell is the report's figure, rounded."""
    expected = [
        [
            figure(100 * entry["retention_ratio"], 1),
            *(figure(entry["retained_mass"][key], 4) for key in ("mean", "p5", "min")),
            *(figure(entry["output_error"][key], 4) for key in ("mean", "p95")),
            *(figure(entry["recall"][key], 3) for key in ("16", "64")),
            figure(100 * entry["regret"]["upper"], 2) if entry["regret"] else NOTHING,
            size(entry["bytes_kept"]),
            figure(entry["seconds"], 2),
        ]
        for entry in report.as_dict()["results"]
    ]
    cells = root.section("Policies").cells()
    assert [[number(cell) for cell in row] for row in cells] == expected


def test_best_is_marked_among_policies_of_one_budget(report, root):
    """A star, not a colour alone, stands at the largest mass of either budget, and not at ties."""
    entries = report.as_dict()["results"]
    cells = root.section("Policies").cells()
    best = {
        max(policies, key=lambda i: entries[i]["retained_mass"]["mean"])
        for policies in ([1, 2, 3], [4, 5])
    }
    assert {i for i, row in enumerate(cells) if "★" in row[1].text} == best
    assert not any("★" in row[0].text for row in cells), "all keep the same share"


def test_intervals_stand_below_means_of_several_sequences():
    """With several sequences, each mean has its bootstrap interval; with one, none."""
    report = random_report(SPECS, Dimensions(tokens=(200, 150, 90)))
    low, high = report.as_dict()["results"][1]["retained_mass"]["interval"]
    section = parse_page(page(report)).section("Policies")
    assert section.cells()[1][1].first("small").text == f"{low:.4f}\N{EN DASH}{high:.4f}"


def test_regret_is_shown_between_its_bounds(report, root):
    """A cell has the upper bound, the small print below it the lower one."""
    for row, entry in zip(
        root.section("Policies").cells(), report.as_dict()["results"], strict=True
    ):
        regret = entry["regret"]
        below = [f"at least {100 * regret['lower']:.2f}"] if regret else []
        assert [x.text for x in row[8].all("small")] == below


def test_budget_curves_are_the_means_of_the_report(report, root):
    """A line per kind of policy, a point per budget, in the picture and in its table."""
    entries = {entry["policy"]: entry for entry in report.as_dict()["results"]}
    expected = {
        "window": [("window:budget=40", 40)],
        "h2o": [("h2o:budget=40", 40)],
        "h2o:score=mean": [("h2o:budget=40,score=mean", 40)],
        "sinks": [("sinks:budget=64", 64)],
        "tova": [("tova:budget=64", 64)],
    }
    found = lines(drawn(report, "retained-mass-by-budget"))
    head, *rows = root.section("Retained mass by budget").numbers()
    assert head == ["slots", "40", "64"]
    assert [*found] == [*expected] == [row[0] for row in rows[:-1]]
    for (series, points), row in zip(expected.items(), rows[:-1], strict=True):
        masses = [entries[policy]["retained_mass"]["mean"] for policy, _ in points]
        assert found[series].get_xdata().tolist() == [budget for _, budget in points]
        assert found[series].get_ydata().tolist() == masses
        assert [x for x in row[1:] if x != NOTHING] == [figure(mass, 4) for mass in masses]


def test_points_of_one_kind_of_policy_are_joined():
    """Budgets of one policy make one line, ascending, whatever the order they were asked in."""
    specs = ["full", "h2o:budget=64", "h2o:budget=32", "tova:budget=48"]
    report = random_report(specs)
    means = [entry["retained_mass"]["mean"] for entry in report.as_dict()["results"]]
    found = lines(drawn(report, "retained-mass-by-budget"))
    assert found["h2o"].get_xdata().tolist() == [32, 64]
    assert found["h2o"].get_ydata().tolist() == [means[2], means[1]]


def test_oracle_band_is_the_optimum_of_the_report(report, root):
    """Between the oracle's bounds, of policies with sets per head; without an oracle, no band."""
    by_budget = {}
    for entry in report.as_dict()["results"][1:]:
        if not entry["policy"].startswith("tova"):  # one set per layer
            bounds = (entry["regret"]["optimum_lower"], entry["regret"]["optimum_upper"])
            by_budget.setdefault(entry["budget"], []).append(bounds)
    ends = {
        budget: (min(low for low, _ in found), max(high for _, high in found))
        for budget, found in by_budget.items()
    }
    section = root.section("Retained mass by budget")
    bounds = [interval(*ends[budget], 4) for budget in (40, 64)]
    assert section.numbers()[-1] == ["the optimum, between bounds", *bounds]
    (band,) = drawn(report, "retained-mass-by-budget").axes[0].collections
    corners = {tuple(map(float, corner)) for corner in band.get_paths()[0].vertices}
    assert {(budget, end) for budget, both in ends.items() for end in both} <= corners
    plain = random_report(SPECS, extras=False)
    assert "optimum" not in parse_page(page(plain)).section("Retained mass by budget").text


def test_mass_over_the_sequence_is_drawn_to_scale(report, root):
    """Each policy's line is its binned mass, all of it inside the axes and in the table."""
    expected = mass_over_time(report, [*report.results.values()])
    drawing = drawn(report, "retained-mass-over-the-sequence")
    found = lines(drawing)
    assert [*found] == list(SPECS)
    low, high = drawing.axes[0].get_ylim()
    for line, mass in zip(found.values(), expected.mass, strict=True):
        np.testing.assert_array_equal(line.get_xdata(), expected.tokens)
        np.testing.assert_array_equal(line.get_ydata(), mass)
        assert low <= mass.min() <= mass.max() <= high
    rows = root.section("Retained mass over the sequence").numbers()[1:]
    assert [row[1:] for row in rows] == [
        [figure(x, 4) for x in masses] for masses in expected.mass.T
    ]


def test_lost_attention_is_that_of_the_report(report, root):
    """Each policy's line and column are its lost mass by age."""
    found = lines(drawn(report, "lost-attention-by-age"))
    rows = root.section("Lost attention by age").numbers()[1:]
    assert [row[0] for row in rows[:4]] == ["1", "2\N{EN DASH}3", "4\N{EN DASH}7", "8\N{EN DASH}15"]
    for column, entry in enumerate(report.as_dict()["results"], 1):
        lost = entry["lost_mass_by_age"][: len(rows)]
        assert found[entry["policy"]].get_ydata().tolist() == lost
        assert [row[column] for row in rows] == [figure(x, 5) for x in lost]


def test_similarity_has_every_pair_once(report, root):
    """Row i, column j of the triangle is what the arrays say."""
    expected = similarity([*report.results.values()])
    assert [[cell.text for cell in row] for row in root.section("Similarity").cells()] == [
        [f"{expected[i, j]:.2f}" for j in range(i)] for i in range(len(SPECS))
    ]


def test_heat_maps_are_what_every_head_lost(report, root):
    """Each policy that evicts has a cell per layer and KV head, in picture and table."""
    evicting = report.as_dict()["results"][1:]
    axes = drawn(report, "loss-by-layer-and-head").axes
    rows = iter(root.section("Loss by layer and head").numbers()[1:])
    assert len(axes) == len(evicting) + 1, "and the colour bar"
    for entry, each in zip(evicting, axes, strict=False):
        loss = 1 - np.array(entry["head_mass"]).T
        np.testing.assert_allclose(each.images[0].get_array(), loss, atol=1e-12)
        for head in range(2):
            assert next(rows)[1:] == [figure(x, 4) for x in loss[head]]
    assert next(rows, None) is None


def test_retained_sets_are_those_of_the_report(report, root):
    """The table names every position that the shown head holds at the end."""
    section = root.section("What was held")
    layer, head = map(int, re.findall(r"\d+", section.first("h2").text))
    rows = section.numbers()[1:]
    for row, policy in zip(rows, SPECS[1:], strict=True):
        held = report.retained_positions(policy, layer)[head].tolist()
        runs = [[int(x) for x in run.split("\N{EN DASH}")] for run in row[2].split(", ")]
        assert [p for run in runs for p in range(run[0], run[-1] + 1)] == held
        assert int(row[1]) == len(held)
    assert len(drawn(report, "what-was-held").axes) == len(SPECS) - 1


def test_text_is_marked_as_policies_hold_it(report, root):
    """Each word is marked by the share of all layers and heads that hold its token."""
    texts = root.section("What is left of the text").all("details", "text")
    assert [x.first("span", "spec").text for x in texts] == list(SPECS[1:])
    for shown_text, policy in zip(texts, SPECS[1:], strict=True):
        marked = shown_text.first("p", "passage")
        assert marked.text == "word " * 200
        held = np.stack([report.retained_positions(policy, layer) for layer in range(3)])
        shares = [np.mean([p in row for row in held.reshape(6, -1)]) for p in range(200)]
        expected = ["most" if x >= 0.5 else "some" if x else "none" for x in shares]
        found = [x.attributes["class"] for x in marked.elements for _ in range(x.text.count(" "))]
        assert found == expected
        assert all((x.name == "mark") == (x.attributes["class"] != "none") for x in marked.elements)


def test_long_text_is_shown_from_both_ends():
    """Of more than 4,096 tokens, the first and the last are shown, and the page says so."""
    report = random_report(["full", "window:budget=40"], Dimensions(layers=1, tokens=(5000,)))
    section = parse_page(page(report, passage(5000))).section("What is left of the text")
    assert "5,000" in section.first("p", "introduction").text
    pieces = section.all("p", "passage")
    assert [piece.text for piece in pieces] == ["word " * 2048] * 2
    held = {*report.retained_positions("window:budget=40", 0).ravel().tolist()}
    for piece, first in zip(pieces, (0, 5000 - 2048), strict=True):
        marked = [x.name == "mark" for x in piece.elements for _ in range(x.text.count("word"))]
        assert marked == [position in held for position in range(first, first + 2048)]


def test_ledger_is_that_of_the_report(report, root):
    """The table has each policy's ledger, key by key."""
    rows = root.section("Ledger").cells()
    for row, entry in zip(rows, report.as_dict()["results"], strict=True):
        (ledger,) = entry["ledgers"]
        counts = ("logical_tokens", "retained", "evicted", "merged", "slots_held")
        assert [cell.text for cell in row[:5]] == [figure(ledger[key]) for key in counts]
        assert row[6].text == size(ledger["bytes_held"])
        assert row[7].text.replace("\N{MINUS SIGN}", "") == size(abs(ledger["bytes_saved"]))
        assert row[8].text == figure(ledger["evictions"])


def test_pictures_of_many_policies_show_those_of_one_budget():
    """Of a sweep, single policies are drawn at the middle budget, and the page says so."""
    specs = [
        f"{name}:budget={b}" for b in (20, 40, 80) for name in ("h2o", "tova", "sinks", "window")
    ]
    report = random_report(["full", *specs])
    shown = lines(drawn(report, "retained-mass-over-the-sequence"))
    assert [*shown] == ["full", *(spec for spec in specs if spec.endswith("=40"))]
    root = parse_page(page(report))
    assert "budget of 40" in root.section("Retained mass over the sequence").text
    assert len(root.section("Policies").cells()) == 13


def test_marked_spans_are_listed(report, root):
    """The table of marks has the report's shares."""
    section = root.section("Marked spans")
    assert "needle" in section.first("thead").text
    assert [[cell.text for cell in row] for row in section.cells()] == [
        [figure(mark["retained_mass"], 3), figure(mark["kept"], 3)]
        for entry in report.as_dict()["results"]
        for mark in entry["marks"]
    ]


def test_hostile_text_stays_text():
    """Names of models, marks and policies cannot add an element or an attribute."""
    specs = ["full", Annotated(budget=20, note=HOSTILE), "window:budget=20"]
    hostile = random_report(specs, model=HOSTILE, mark=HOSTILE)
    root = parse_page(page(hostile, passage(200, HOSTILE)))
    plain = random_report(["full", Annotated(budget=20), specs[2]])
    harmless = parse_page(page(plain, passage(200)))
    assert {x.name for x in root.elements} == {x.name for x in harmless.elements}
    assert not any(name.startswith("on") for x in root.elements for name in x.attributes)
    assert root.first("h1").text == HOSTILE
    assert root.first("title").text.startswith(HOSTILE)
    assert HOSTILE in root.section("Marked spans").first("thead").text
    assert root.section("Policies").all("span", "spec")[1].text.endswith(f"note={HOSTILE}")
    assert root.first("p", "passage").text == f"{HOSTILE} " * 200


def test_characters_that_rule_others_are_made_visible():
    """Controls and marks of direction cannot hide or turn about what stands around them."""
    root = parse_page(page(random_report(["full"], model="a\x00b\u202ec\x1b[31m\u2066d")))
    assert root.first("h1").text == "a\u2400b\ufffdc\u241b[31m\ufffdd"


def test_mathematics_in_names_is_text():
    """A dollar sign in a policy's name does not make matplotlib read a formula."""
    noted = Annotated(budget=20, note="$\\frac{$ \u6f22")
    report = random_report(["full", noted, "window:budget=20"])
    title = drawn(report, "loss-by-layer-and-head").axes[0].get_title(loc="left")
    assert "$\\frac{$ ?" in title


def test_page_needs_nothing_but_itself(report, root):
    """No script and no address outside: pictures are inside, and nothing may be fetched."""
    names = {x.name for x in root.elements}
    assert not names & {"base", "embed", "form", "iframe", "link", "object", "script"}
    references = ("action", "background", "data", "href", "poster", "src", "srcset", "xlink:href")
    sources = [
        v for x in root.elements for n, v in x.attributes.items() if n in references and v[0] != "#"
    ]
    assert len(sources) == 2 * 5
    assert all(source.startswith("data:image/svg+xml;base64,") for source in sources)
    text = re.sub(r"base64,[\w+/=]+", "", page(report))
    assert not re.search(r"//|url\(|@import", text)
    assert "default-src 'none'" in text
    for source in sources:
        svg = ElementTree.fromstring(b64decode(source.partition(",")[2]))
        tags = {x.tag.rpartition("}")[2] for x in svg.iter()}
        assert tags <= {*"svg g path defs style clipPath rect use image metadata".split()}
        links = [v for x in svg.iter() for n, v in x.attrib.items() if n.endswith("href")]
        assert all(link[0] == "#" or link.startswith("data:image/png;") for link in links)


def test_page_can_be_walked_without_seeing_it(root):
    """Landmarks, one title, headings in order, and a list of contents that leads to each part."""
    body = root.first("body")
    tags = [x.name for x in body.children if not isinstance(x, str)]
    assert tags == ["a", "header", "nav", "main", "footer"]
    assert body.first("a").attributes["href"] == f"#{root.first('main').attributes['id']}"
    assert root.first("html").attributes["lang"] == "en"
    links = {x.attributes["href"].lstrip("#"): x.text for x in root.first("nav").all("a")}
    sections = root.all("section")
    assert [*links] == [x.attributes["id"] for x in sections]
    for section in sections:
        heading = section.first("h2")
        assert section.attributes["aria-labelledby"] == heading.attributes["id"]
    ids = [x.attributes["id"] for x in root.elements if "id" in x.attributes]
    assert len(ids) == len(set(ids))


def test_pictures_and_tables_say_what_they_show(root):
    """Each picture has words and numbers; each table a caption, headings, and a frame to scroll."""
    figures = root.all("figure")
    assert len(figures) == len(root.all("img")) == 5
    for each in figures:
        assert len(each.first("img").attributes["alt"]) > 60
        assert each.first("details").all("table")
        assert each.first("summary").text
    for frame in root.all("div", "wide"):
        caption = frame.first("table").first("caption").text
        assert frame.attributes["role"] == "group"
        assert frame.attributes["aria-label"] == caption != ""
        assert frame.attributes["tabindex"] == "0"
        assert all("scope" in x.attributes for x in frame.all("th"))
    assert len(root.all("table")) == len(root.all("div", "wide"))
    hidden = [x for x in root.all("svg") if x.attributes.get("aria-hidden") != "true"]
    assert not hidden, "swatches say nothing that text does not"


def test_pictures_are_written_as_png(report, tmp_path):
    """One file per picture, its name that of its part, into a folder that need not exist."""
    written = report.to_png(tmp_path / "pictures")
    assert [path.name for path in written] == [f"{x.name}.png" for x in document(report).pictures]
    assert sorted(tmp_path.glob("pictures/*")) == sorted(written)
    for path in written:
        data = path.read_bytes()
        assert data.startswith(b"\x89PNG\r\n\x1a\n")
        assert int.from_bytes(data[16:20]) == 1536, "9.6 inches of 160 pixels"


@pytest.mark.parametrize("specs", [["full"], ["window:budget=40"], ["window:budget=500"], SPECS])
@pytest.mark.parametrize("tokens", [(1,), (70,), (70, 200)])
def test_what_was_not_measured_is_not_shown(specs, tokens):
    """Without outputs, details and optimum there is a page, and no NaN or None on it."""
    report = random_report(specs, Dimensions(layers=1, tokens=tokens), extras=False)
    root = parse_page(page(report))
    assert not re.search(r"\b(nan|inf|None)\b", shown(root))
    assert "output error" not in root.first("thead").text
    assert len(root.section("Policies").cells()) == len(specs)


def test_figures_that_no_policy_has_have_no_column():
    """A sequence of 60 tokens has no 64 most attended ones."""
    report = random_report(SPECS, Dimensions(tokens=(60,)))
    head = parse_page(page(report)).section("Policies").first("thead").text
    assert "@16" in head
    assert "@64" not in head


def test_sampled_queries_have_a_page():
    """A trace with every third query alone can be drawn."""
    report = random_report(SPECS, Dimensions(stride=3), extras=False)
    assert len(parse_page(page(report)).all("section")) == 8


def test_page_of_many_heads_and_policies_is_small():
    """32 layers of 8 heads under 10 policies stay far below a megabyte."""
    specs = ["full", *(f"h2o:budget={budget}" for budget in range(64, 100, 4))]
    dimensions = Dimensions(layers=32, kv_heads=8, group=1, tokens=(300,))
    assert len(page(random_report(specs, dimensions))) < 1_500_000


def test_page_is_written_completely_or_not_at_all(report, tmp_path, monkeypatch):
    """A failure leaves the old page, and no other file."""
    path = tmp_path / "r.html"
    report.to_html(path)
    before = path.read_text(encoding="utf-8")
    assert before == page(report)
    monkeypatch.setattr(Report, "as_dict", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        report.to_html(path)
    assert [x.name for x in tmp_path.iterdir()] == ["r.html"]
    assert path.read_text(encoding="utf-8") == before


def test_page_that_cannot_take_its_name_leaves_nothing_behind(report, tmp_path):
    """Where a folder has the name, there is an error and no other file."""
    path = tmp_path / "r.html"
    path.mkdir()
    with pytest.raises(OSError, match=re.escape("r.html")):
        report.to_html(path)
    assert [x.name for x in tmp_path.iterdir()] == ["r.html"]


def test_text_that_is_not_unicode_is_written(tmp_path):
    """Half a surrogate pair, which UTF-8 cannot hold, does not stop a page."""
    report = random_report(["full", Annotated(budget=20, note="\ud800")])
    report.to_html(tmp_path / "r.html")
    assert "note=?" in (tmp_path / "r.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=["light", "dark"])
def test_lines_and_words_stand_out_from_the_paper(theme):
    """Lines have a contrast of 3 to 1; text one of 4.5 to 1, on its marks too."""
    for name in ("plain", *(f"c{n}" for n in range(len(theme.colours)))):
        assert contrast(theme.colour(name), theme.paper) >= 3, name
    for colour in (theme.ink, theme.soft):
        assert contrast(colour, theme.paper) >= 4.5
    for behind in (theme.most, theme.some, theme.likeness):
        assert contrast(theme.ink, behind) >= 4.5


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=["light", "dark"])
def test_ramps_run_one_way_from_the_paper(theme):
    """The more was lost, the farther from the paper; what is held differs from what is gone."""
    shades = [contrast(shade, theme.paper) for shade in theme.ramp]
    assert all(a < b for a, b in pairwise(shades))
    assert contrast(theme.held[1], theme.gone) > contrast(theme.held[0], theme.gone) > 1.5


def contrast(first, second):
    """Of two colours, as WCAG defines it."""
    low, high = sorted((luminance(first), luminance(second)))
    return (high + 0.05) / (low + 0.05)


def luminance(colour):
    """Relative luminance of a hash sign and six hexadecimal digits, as WCAG defines it."""
    parts = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
    return float(linear @ (0.2126, 0.7152, 0.0722))
