"""A real Chromium, and the pages of all commands that make one."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from fixtures.reports import Annotated, random_report
from kvpolicy.bundled import heldout_text
from kvpolicy.cli import main
from kvpolicy.passage import Passage

HOSTILE = "</p></main></style><script>document.title='owned'</script><img src=x onerror=alert(1)>"


GRID = """
budgets = [32, 64]
policies = ["h2o", "tova"]
[[replay]]
traces = ["t.kvtrace"]
[[eval]]
contexts = [256]
samples = 2
"""


@dataclass
class Visit:
    """An open page, and what it did that it should not.

    Attributes:
        page: Playwright's.
        said: Messages on the console, and errors.
        asked: Addresses that it asked for, beside its own and those that hold their data.
    """

    page: Any
    said: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)


class Visitor:
    """Opens files in a browser, as somebody with a screen and a taste would."""

    def __init__(self, browser: Any) -> None:
        self._browser = browser

    @contextmanager
    def visit(self, file: Path, scheme: str = "light", width: int = 1200) -> Iterator[Visit]:
        """Open a file; every page has a fresh profile and no network.

        Args:
            file: What to open.
            scheme: ``light`` or ``dark``.
            width: Of the window, in pixels.
        """
        context = self._browser.new_context(
            color_scheme=scheme, viewport={"width": width, "height": 900}, offline=True
        )
        try:
            found = Visit(context.new_page())
            found.page.on("console", lambda message: found.said.append(message.text))
            found.page.on("pageerror", lambda error: found.said.append(str(error)))
            found.page.on(
                "request",
                lambda request: (
                    found.asked.append(request.url)
                    if request.url != file.as_uri() and not request.url.startswith("data:")
                    else None
                ),
            )
            found.page.goto(file.as_uri())
            yield found
        finally:
            context.close()


@pytest.fixture(scope="session")
def visitor() -> Iterator[Visitor]:
    """A browser without a window."""
    from playwright.sync_api import sync_playwright

    program = os.environ.get("CHROMIUM") or shutil.which("chromium")
    if program is None:
        pytest.fail(
            "no chromium on PATH: install it (Debian: apt-get install chromium), or set CHROMIUM "
            "to the program of a Chromium or Chrome"
        )
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program)
        yield Visitor(browser)
        browser.close()


@pytest.fixture(scope="session")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One page of each command, and one of hostile text."""
    folder = tmp_path_factory.mktemp("pages")
    text, trace = folder / "text.txt", str(folder / "t.kvtrace")
    text.write_text(heldout_text()[:6000], encoding="utf-8")
    made = {name: folder / f"{name}.html" for name in ("replay", "eval", "demo", "hostile")}
    made["sweep"] = folder / "swept" / "summary.html"
    grid = folder / "grid.toml"
    grid.write_text(GRID, encoding="utf-8")
    sweep = ("--policy", "h2o", "tova", "--budgets", "32,64")
    source = ("--text", str(text))
    for command in (
        ("capture", *source, "--tokens", "256", "--out", trace),
        ("replay", trace, *sweep, "--oracle", "--html", str(made["replay"])),
        ("eval", *source, *sweep, "--context", "256", "--html", str(made["eval"])),
        ("sweep", str(grid), "--out", str(made["sweep"].parent)),
        ("demo", "--rounds", "1", "--windows", "1", "--html", str(made["demo"])),
    ):
        assert main([*command]) == 0
    words = f"{HOSTILE} " * 40
    spans = [(i * len(words) // 200, (i + 1) * len(words) // 200) for i in range(200)]
    report = random_report(["full", Annotated(budget=40, note=HOSTILE)], model=HOSTILE)
    report.to_html(made["hostile"], Passage(words, [0] * 200, spans))
    return made
