"""`--html` and `--png`: what commands write, and what they refuse before they begin."""

import json
import re
from base64 import b64decode
from pathlib import Path

import pytest

from fixtures.pages import Node, parse_page
from fixtures.traces import Shape, header_of, random_layers, write_trace
from kvpolicy import Ledger, bundled_model
from kvpolicy.bundled import heldout_text
from kvpolicy.cli import demo_page, main
from kvpolicy.cli.specimen import Outcome, Specimen
from kvpolicy.page.markup import NOTHING, figure, size
from kvpolicy.passage import Passage

PNG = b"\x89PNG\r\n\x1a\n"


def headings(root: Node) -> list[str]:
    """What the sections of a page are called, up to a colon."""
    return [x.first("h2").text.partition(":")[0] for x in root.all("section")]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short text."""
    path = tmp_path_factory.mktemp("text") / "short.txt"
    path.write_text(heldout_text()[:2500], encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory, text: Path) -> str:
    """A trace of the bundled model."""
    path = str(tmp_path_factory.mktemp("traces") / "t.kvtrace")
    assert main(["capture", "--text", str(text), "--tokens", "96", "--out", path]) == 0
    return path


def test_replay_writes_its_page_with_the_text(trace: str, text: Path, tmp_path: Path) -> None:
    """Of the bundled model's own trace, the page shows the text without being told how."""
    target = tmp_path / "r.html"
    arguments = ["replay", trace, "--policy", "h2o", "--budgets", "16,32", "--html", str(target)]
    assert main(arguments) == 0
    root = parse_page(target.read_text("utf-8"))
    assert "What is left of the text" in headings(root)
    shown = root.first("p", "passage").text
    assert len(shown) > 200
    assert text.read_text("utf-8").startswith(shown)
    specs = [
        x.first("span", "spec").text for x in root.section("Policies").first("tbody").all("tr")
    ]
    assert specs == [
        "full",
        "sinks:budget=16",
        "sinks:budget=32",
        "h2o:budget=16",
        "h2o:budget=32",
    ]


def test_replay_writes_its_pictures(trace: str, tmp_path: Path) -> None:
    """--png fills a folder, beside the page or without it."""
    folder = tmp_path / "pictures"
    assert main(["replay", trace, "--policy", "h2o:budget=32", "--png", str(folder)]) == 0
    found = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert {*found} == {
        "retained-mass-by-budget.png",
        "retained-mass-over-the-sequence.png",
        "lost-attention-by-age.png",
        "loss-by-layer-and-head.png",
        "what-was-held.png",
    }
    assert all(data.startswith(PNG) for data in found.values())


def test_tokenizer_is_named_for_other_models(
    trace: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """--tokenizer takes a folder or a file; it is refused if not the trace's, or without a page."""
    target = tmp_path / "r.html"
    base = ["replay", trace, "--policy", "h2o:budget=32", "--html", str(target), "--tokenizer"]
    assert main([*base, bundled_model()]) == 0
    assert "What is left of the text" in headings(parse_page(target.read_text("utf-8")))
    target.unlink()
    other = tmp_path / "tokenizer.json"
    other.write_text("{}", encoding="utf-8")
    assert main([*base, str(other)]) == 2
    assert "another tokenizer" in capsys.readouterr().err
    assert not target.exists()
    assert main(["replay", trace, "--policy", "h2o:budget=32", "--tokenizer", str(other)]) == 2
    assert "add --html" in capsys.readouterr().err


def test_text_that_cannot_be_read_is_said_to_be_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A trace without token ids has a page without a text, and the command says so."""
    shape, path = Shape(tokens=100), tmp_path / "t.kvtrace"
    write_trace(path, random_layers(shape), header=header_of(shape))
    target = tmp_path / "r.html"
    assert main(["replay", str(path), "--policy", "full", "--html", str(target)]) == 0
    assert "shows no text" in capsys.readouterr().out
    assert "What is left of the text" not in headings(parse_page(target.read_text("utf-8")))


@pytest.mark.parametrize("command", ["replay", "eval", "demo"])
@pytest.mark.parametrize(
    ("option", "target"),
    [("--html", "missing/x.html"), ("--html", "."), ("--png", "missing/x"), ("--png", "FILE")],
)
def test_what_cannot_be_written_is_refused_first(
    command: str,
    option: str,
    target: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A page has a folder to lie in, pictures fill no file: said before any work."""
    file = tmp_path / "file"
    file.write_text("x", encoding="utf-8")
    asked = {"replay": ["replay", str(file)], "eval": ["eval"], "demo": ["demo"]}[command]
    policies = [] if command == "demo" else ["--policy", "h2o:budget=32"]
    chosen = str(file) if target == "FILE" else target
    assert main([*asked, *policies, option, chosen]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert f"{chosen!r}" in captured.err
    assert file.read_text("utf-8") == "x"


@pytest.mark.parametrize("options", [["--html", "x.html"], ["--png", "x"]])
def test_missing_matplotlib_is_said_first(
    options: list[str],
    trace: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Without matplotlib there is one line on what to install, and no work in vain."""
    monkeypatch.setattr("kvpolicy.extras.find_spec", lambda _: None)
    assert main(["replay", trace, "--policy", "h2o:budget=32", *options]) == 2
    captured = capsys.readouterr()
    assert "extra report" in captured.err
    assert captured.out == ""


@pytest.fixture(scope="module")
def evaluated(text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Node, dict, Path]:
    """The page of an evaluation, its JSON, and its pictures."""
    folder = tmp_path_factory.mktemp("eval")
    page, result, pictures = folder / "e.html", folder / "e.json", folder / "pictures"
    arguments = ["eval", "--policy", "h2o", "tova", "--budgets", "16,32", "--text", str(text)]
    targets = ["--html", str(page), "--json", str(result), "--png", str(pictures)]
    assert main([*arguments, "--context", "128", *targets]) == 0
    return parse_page(page.read_text("utf-8")), json.loads(result.read_text("utf-8")), pictures


def test_page_of_an_evaluation_has_every_part(evaluated: tuple[Node, dict, Path]) -> None:
    """Figures, curves, and one sample in detail: its text, its ledger, its replay."""
    root, _, pictures = evaluated
    assert headings(root) == [
        "Policies",
        "Perplexity by budget",
        "Perplexity by position, 128 tokens",
        "What is left of the text",
        "Ledger",
        "The first sample, replayed",
        "Retained mass by budget",
        "Retained mass over the sequence",
        "Lost attention by age",
        "Loss by layer and head",
        "What was held",
        "How to read this",
    ]
    ids = [x.attributes["id"] for x in root.elements if "id" in x.attributes]
    assert len(ids) == len(set(ids))
    assert len([*pictures.iterdir()]) == len(root.all("figure")) == 7


def test_figures_of_an_evaluation_are_its_json_s(evaluated: tuple[Node, dict, Path]) -> None:
    """Every policy's row, every budget's column and every position's cell."""
    root, result, _ = evaluated
    entries = result["results"]
    for row, entry in zip(root.section("Policies").cells(), entries, strict=True):
        cells = [cell.text for cell in row]
        assert cells[0] == figure(entry["ppl"], 2)
        assert cells[4] == figure(entry["logit_kl"], 4)
        assert cells[5] == f"{100 * entry['top1_agreement']:.1f} %"
        assert cells[7] == size(entry["bytes_per_request"])
    by_policy = {entry["policy"]: entry for entry in entries}
    rows = root.section("Perplexity by budget").numbers()
    assert rows[0] == ["slots", "16", "32"]
    for name, *cells in rows[1:-1]:
        expected = [by_policy[f"{name}:budget={budget}"]["ppl"] for budget in (16, 32)]
        assert cells == [figure(x, 2) for x in expected]
    for row, entry in zip(
        root.section("Perplexity by position").numbers()[1:], entries, strict=True
    ):
        assert row[1:] == [figure(point["ppl"], 2) for point in entry["curve"]]


def test_sample_of_an_evaluation_is_shown_under_every_policy(
    evaluated: tuple[Node, dict, Path], text: Path
) -> None:
    """The window of text once for each policy, and beside it a ledger of what was evicted."""
    root, result, _ = evaluated
    shown = root.section("What is left of the text").all("details", "text")
    specs = [entry["policy"] for entry in result["results"]]
    assert [x.first("span", "spec").text for x in shown] == specs
    for each in shown:
        assert text.read_text("utf-8").startswith(each.first("p", "passage").text)
        assert each.first("p", "written").text.startswith("The model writes: ")
    for row, spec in zip(root.section("Ledger").cells(), specs, strict=True):
        tokens, retained, evicted = (float(cell.text) for cell in row[:3])
        assert retained + evicted == tokens == 128 + 23
        assert (evicted == 0) == (spec == "full")


def test_answers_are_shown_beside_their_prompt(tmp_path: Path) -> None:
    """Of a task with a question, the page shows the prompt, and what the model answers."""
    page = tmp_path / "p.html"
    arguments = ["eval", "--task", "passkey", "--policy", "snapkv:budget=64,window=16"]
    assert main([*arguments, "--context", "192", "--samples", "5", "--html", str(page)]) == 0
    root = parse_page(page.read_text("utf-8"))
    full = root.section("What is left of the text").first("details", "text")
    answer = full.first("p", "written").text.removeprefix("The model writes: ")
    assert re.fullmatch(r"\d{5}", answer)
    assert answer in full.first("p", "passage").text
    assert "Pass keys found by depth, 192 tokens" in headings(root)


RESULT = {
    "model": "a <model>",
    "kv_memory_bytes": 256 << 20,
    "prompt_tokens": [6, 3],
    "new_tokens": 2,
    "seconds": 61.2,
    "stock": {"max_concurrency": 2.0, "tokens_per_second": 915.0},
    "results": [
        {
            "policy": policy,
            "parity": not differences,
            "differences": differences,
            "blocks_per_request": blocks,
            "bytes_per_request": 1024 * blocks,
            "max_concurrency": 1.97 * blocks,
            "tokens_per_second": 700.0 + blocks,
            "ratio_to_stock": 0.8,
            "ppl": ppl,
        }
        for policy, blocks, ppl, differences in (
            ("full", 27, 28.55, []),
            ("window:budget=4", 4, None, ["request 0: tokens differ from new token 1 on"]),
        )
    ],
    "passkey": [
        {"policy": "stock", "keys": ["12345", "67890"], "answers": ["12345", "6"], "found": 1}
    ],
}


def demo_root() -> Node:
    """The page of a demo made up by hand."""
    passage = Passage("one é", [0, 5, 6, 7], [(0, 0), (0, 3), (3, 5), (4, 5)])
    outcomes = {
        spec: Outcome([[[2, 3]]], Ledger(spec, 6, 2, 4, 2, 1, 64, 8, 2, 0.0).as_dict(), "<b>")
        for spec in ("full", "window:budget=4")
    }
    document = demo_page.document(RESULT, Specimen(passage, outcomes, None), "blocks: so\nppl: so")
    return parse_page(document.html())


def test_page_of_a_demo_has_its_figures() -> None:
    """Every figure of the JSON, stock vLLM first, with a dash for what was not measured."""
    root = demo_root()
    stock, *rows = root.section("Policies").cells()
    assert [cell.text for cell in stock] == [NOTHING] * 3 + ["2.00x", "915", "1.00", NOTHING]
    for row, entry in zip(rows, RESULT["results"], strict=True):
        assert [cell.text for cell in row] == [
            "yes" if entry["parity"] else "NO",
            str(entry["blocks_per_request"]),
            size(entry["bytes_per_request"]),
            f"{entry['max_concurrency']:.2f}x",
            figure(entry["tokens_per_second"]),
            "0.80",
            figure(entry["ppl"], 2),
        ]
    assert "ppl: so" in root.section("Policies").text


def test_page_of_a_demo_says_what_broke_parity() -> None:
    """A difference stands in a part of its own, with the policy."""
    section = demo_root().section("Differences")
    assert section.first("li").text == (
        "window:budget=4: request 0: tokens differ from new token 1 on"
    )


def test_page_of_a_demo_tells_right_answers_from_wrong_ones() -> None:
    """A key that was found is set in bold; what is not the key is not."""
    section = demo_root().section("Pass keys")
    ((first, second, found),) = section.cells()
    assert first.first("b").text == "12345"
    assert not second.all("b")
    assert found.text == "1 of 2"


def test_page_of_a_demo_shows_the_prompt_and_its_ledger() -> None:
    """What vLLM held and wrote, as text; a model's markup stays text."""
    root = demo_root()
    shown = root.section("What is left of the text").all("details", "text")[1]
    assert [x.text for x in shown.first("p", "passage").all("mark", "most")] == [" é"]
    assert shown.first("p", "written").text == "The model writes: <b>"
    assert root.first("h1").text == "a <model>"
    assert [cell.text for cell in root.section("Ledger").cells()[1][:3]] == ["6", "2", "4"]


def test_pictures_of_a_page_are_light_and_dark(evaluated: tuple[Node, dict, Path]) -> None:
    """Each picture comes in two, of one size, and the reader's preference decides."""
    root, _, _ = evaluated
    for picture in root.all("picture"):
        dark, light = picture.first("source"), picture.first("img")
        assert dark.attributes["media"] == "(prefers-color-scheme: dark)"
        drawn = [
            b64decode(x.partition(",")[2]).decode()
            for x in (light.attributes["src"], dark.attributes["srcset"])
        ]
        assert "#ffffff" in drawn[0]
        assert "#17181a" in drawn[1]
        sizes = [(x.attributes["width"], x.attributes["height"]) for x in (light, dark)]
        assert sizes[0] == sizes[1]
