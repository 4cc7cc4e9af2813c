"""The page: its figures are the report's, its text is harmless, and it needs nothing but itself."""

import re
from importlib.resources import files

import numpy as np
import pytest

from fixtures.pages import parse_page
from fixtures.reports import Annotated, Dimensions, random_report
from kvpolicy_sim.page.html import page
from kvpolicy_sim.page.markup import NOTHING, figure, size
from kvpolicy_sim.page.series import similarity
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
    """Its page."""
    return parse_page(page(report))


def number(cell):
    """What a cell shows, without its star and small print."""
    small = "".join(x.text for x in cell.all("small"))
    return cell.text.replace("★", "").removesuffix(small)


def shown(root):
    """Everything a reader may see or hear: text, and attributes but for pictures."""
    attributes = (
        value for x in root.elements for name, value in x.attributes.items() if name != "src"
    )
    return "\n".join([root.first("body").text, *attributes])


def test_page_has_every_section(root):
    """All parts are there, in order, under one title."""
    assert [x.text for x in root.all("h1")] == ["a model"]
    assert [x.first("h2").text.partition(":")[0] for x in root.all("section")] == [
        "Policies",
        "Retained mass over the sequence",
        "Lost attention by age",
        "Loss by layer and head",
        "What was held",
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


def test_curves_are_drawn_to_scale(root):
    """The full cache's curve is the upper edge; no curve leaves the plot."""
    lines = root.section("Retained mass").all("svg", "line")
    assert len(lines) == len(SPECS)
    points = [
        [
            tuple(map(int, point.split()))
            for point in line.first("path").attributes["d"][1:].split("L")
        ]
        for line in lines
    ]
    assert {y for _, y in points[0]} == {0}
    for line in points:
        assert 0 <= min(min(point) for point in line) <= max(max(point) for point in line) <= 1000
        assert line[-1][0] == 1000
    first = [line[0][1] for line in points[1:]]
    assert min(first) > 0, "curves of less mass lie lower"


def test_similarity_has_every_pair_once(report, root):
    """Row i, column j of the triangle is what the arrays say."""
    expected = similarity([*report.results.values()])
    assert [[cell.text for cell in row] for row in root.section("Similarity").cells()] == [
        [f"{expected[i, j]:.2f}" for j in range(i)] for i in range(len(SPECS))
    ]


def test_heat_maps_say_what_every_head_lost(report, root):
    """Each policy that evicts has a cell per layer and KV head, with its number."""
    heats = root.all("div", "heat")
    evicting = report.as_dict()["results"][1:]
    for heat, entry in zip(heats, evicting, strict=True):
        assert [cell.attributes["title"] for cell in heat.all("i")] == [
            f"layer {layer}, head {head}: {figure(1 - entry['head_mass'][layer][head], 4)}"
            for head in range(2)
            for layer in range(3)
        ]


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
    root = parse_page(page(random_report(specs, model=HOSTILE, mark=HOSTILE)))
    harmless = parse_page(page(random_report(["full", Annotated(budget=20), specs[2]])))
    assert {x.name for x in root.elements} == {x.name for x in harmless.elements}
    assert not any(name.startswith("on") for x in root.elements for name in x.attributes)
    assert root.first("h1").text == HOSTILE
    assert root.first("title").text.startswith(HOSTILE)
    assert HOSTILE in root.section("Marked spans").first("thead").text
    assert root.section("Policies").all("span", "spec")[1].text.endswith(f"note={HOSTILE}")


def test_page_needs_nothing_but_itself(report, root):
    """No script, no link, no address: pictures are inside, and nothing may be fetched."""
    names = {x.name for x in root.elements}
    assert not names & {"a", "base", "embed", "form", "iframe", "link", "object", "script"}
    references = ("action", "background", "data", "href", "poster", "src", "srcset", "xlink:href")
    sources = [v for x in root.elements for n, v in x.attributes.items() if n in references]
    assert len(sources) == len(SPECS) - 1
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    text = re.sub(r"base64,[\w+/=]+", "", page(report))
    assert not re.search(r"//|url\(|@import", text)
    assert "default-src 'none'" in text


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
    assert len(parse_page(page(report)).all("section")) == 6


def test_page_of_many_heads_and_policies_is_small():
    """32 layers of 8 heads under 10 policies stay far below a megabyte."""
    specs = ["full", *(f"h2o:budget={budget}" for budget in range(64, 100, 4))]
    dimensions = Dimensions(layers=32, kv_heads=8, group=1, tokens=(300,))
    assert len(page(random_report(specs, dimensions))) < 600_000


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


def test_lines_stand_out_from_the_paper():
    """In light and in dark, lines have a contrast of 3 to 1 and text one of 4.5 to 1."""
    style = files("kvpolicy_sim.page").joinpath("page.css").read_text(encoding="utf-8")
    blocks = re.findall(r":root \{(.*?)\n *\}", style, re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        colours = {name: luminance(c) for name, c in re.findall(r"--([\w-]+): #(\w{6})", block)}
        for name in ("ink", "soft", "plain", *(f"c{n}" for n in range(7))):
            low, high = sorted((colours[name], colours["paper"]))
            assert (high + 0.05) / (low + 0.05) >= (4.5 if name in ("ink", "soft") else 3), name


def luminance(colour):
    """Relative luminance of six hexadecimal digits, as WCAG defines it."""
    parts = np.array([int(colour[i : i + 2], 16) for i in (0, 2, 4)]) / 255
    linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
    return float(linear @ (0.2126, 0.7152, 0.0722))
