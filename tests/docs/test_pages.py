"""The documentation as a whole: every page can be found, and every link leads somewhere."""

import ast
import importlib
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from urllib.parse import unquote

import pytest
import yaml
from markdown_it import MarkdownIt
from markdown_it.token import Token

import kvpolicy
from fixtures.documents import ROOT, blocks_of, pages

DOCS = ROOT / "docs"
TOC = DOCS / "toc.yml"
API = DOCS / "reference" / "api"

UNORDERED = {"docs/decisions/0000-template.md"}
"""Pages that are no part of the site's order: a form to fill in."""


def named(page: Path) -> str:
    """A page's path from the root."""
    return page.relative_to(ROOT).as_posix()


@cache
def tokens_of(page: Path) -> list[Token]:
    """A page's Markdown, with links and pictures on the same level as all else."""
    blocks = MarkdownIt("commonmark").enable("table").parse(page.read_text("utf-8"))
    return [token for block in blocks for token in (block, *(block.children or ()))]


def targets_of(page: Path) -> Iterator[str]:
    """Where links and pictures of a page lead."""
    for token in tokens_of(page):
        for name in ("href", "src"):
            if target := token.attrGet(name):
                yield unquote(str(target))


@cache
def anchors_of(page: Path) -> set[str]:
    """Anchors that GitHub and MyST give a page's headings."""
    tokens = tokens_of(page)
    titles = [
        "".join(child.content for child in tokens[i + 1].children or ())
        for i, token in enumerate(tokens)
        if token.type == "heading_open"
    ]
    slugs = [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]
    seen: dict[str, int] = {}
    for slug in slugs:
        seen[slug] = seen.get(slug, -1) + 1
    repeated = {f"{slug}-{i}" for slug, last in seen.items() for i in range(1, last + 1)}
    return {*slugs} | repeated


def ordered() -> set[str]:
    """Pages of the site's order."""
    found: set[str] = set()

    def walk(node: object) -> None:
        if isinstance(node, dict):
            if "file" in node or "root" in node:
                found.add(f"{node.get('file', node.get('root'))}.md")
            if "glob" in node:
                found.update(named(path) for path in ROOT.glob(f"{node['glob']}.md"))
            node = list(node.values())
        for item in node if isinstance(node, list) else ():
            walk(item)

    walk(yaml.safe_load(TOC.read_text("utf-8")))
    return found


def test_every_page_has_a_place_in_the_order() -> None:
    """The site's contents list every page once it exists, and nothing that does not."""
    assert ordered() == {named(page) for page in pages()} - UNORDERED


@pytest.mark.parametrize("page", pages(), ids=named)
def test_every_link_leads_somewhere(page: Path) -> None:
    """Relative links name files that exist and headings that are there; pictures say what they are.

    Addresses of other sites are not visited.
    """
    lost = []
    for target in targets_of(page):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if (
            not file.is_relative_to(ROOT)
            or not file.exists()
            or (anchor and anchor not in anchors_of(file))
        ):
            lost.append(target)
    assert lost == []
    pictures = [token for token in tokens_of(page) if token.type == "image"]
    assert all(picture.content.strip() for picture in pictures)


def test_a_link_to_nowhere_is_seen(tmp_path: Path) -> None:
    """The check above is not blind: it tells a heading that exists from one that does not."""
    page = tmp_path / "page.md"
    page.write_text("# One `two`, *three*\n\n## Same\n\n## Same\n\n[a](b.md#c) ![d](e.png)\n")
    assert anchors_of(page) == {"one-two-three", "same", "same-1"}
    assert [*targets_of(page)] == ["b.md#c", "e.png"]


def test_generated_pages_are_current(monkeypatch: pytest.MonkeyPatch) -> None:
    """What stands in docs/reference by the code's own account is what the code says now."""
    monkeypatch.syspath_prepend(DOCS / "reference")
    stale = [named(path) for path, text in generated().items() if path.read_text("utf-8") != text]
    assert stale == [], "run docs/reference/generate.py"


def generated() -> dict[Path, str]:
    """Pages as the script would write them."""
    before = {*sys.modules}
    try:
        return importlib.import_module("generate").pages()
    finally:  # the scripts, and what stands in for xformers
        for name in {*sys.modules} - before:
            file = getattr(sys.modules[name], "__file__", None)
            if "xformers" in name or (file and Path(file).is_relative_to(DOCS)):
                del sys.modules[name]


def documented() -> set[str]:
    """Full names that the reference of Python shows."""
    shown = r"^(?:\.\. (?:auto\w+|py:data):: |``)([\w.]+)"
    texts = [page.read_text("utf-8") for page in API.glob("*.md")]
    return {name for text in texts for name in re.findall(shown, text, re.MULTILINE)}


def test_every_public_name_is_in_the_reference() -> None:
    """All of the public door is shown."""
    assert {f"kvpolicy.{name}" for name in kvpolicy.__all__} <= documented()


def imports_of(page: Path) -> Iterator[str]:
    """Full names that a page's Python imports from us."""
    for block in blocks_of(page):
        if block.language != "python":
            continue
        for node in ast.walk(ast.parse(block.text)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("kvpolicy"):
                yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_what_pages_import_is_in_the_reference() -> None:
    """A reader who copies an import can look the name up."""
    modules = {f"kvpolicy.{path.stem}" for path in (ROOT / "kvpolicy").iterdir()}
    asked = {name for page in pages() for name in imports_of(page)}
    assert len(asked) > 20
    assert asked - documented() - modules == set()
