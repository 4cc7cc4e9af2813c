"""Takes the pictures of docs/how-to/read-a-report.md: a replay's page, on light and dark paper.

    make test-browser   # fills .venv-browser
    PYTHONPATH=.venv-browser .venv/bin/python docs/figures/photograph.py

Needs a Chromium: `chromium` on PATH, or what CHROMIUM names.
"""

import io
import os
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

from PIL import Image
from playwright.sync_api import Page, sync_playwright

from kvpolicy.cli import main

WIDTH, HEIGHT = 1120, 900
"""Of the window, in pixels."""

COLOURS = 256
"""Of a picture."""


def photograph() -> None:
    """Make the page and take both pictures."""
    folder = Path(__file__).parent
    with TemporaryDirectory() as scratch:
        trace, page = f"{scratch}/t.kvtrace", Path(scratch) / "report.html"
        main(["capture", "--tokens", "512", "--out", trace])
        sweep = ["--policy", "h2o", "tova", "--budgets", "32,64,128"]
        main(["replay", trace, *sweep, "--oracle", "--html", str(page)])
        with sync_playwright() as playwright:
            program = os.environ.get("CHROMIUM") or shutil.which("chromium")
            browser = playwright.chromium.launch(executable_path=program)
            for scheme, section in (("light", "budgets"), ("dark", "text")):
                opened = browser.new_page(
                    color_scheme=scheme, viewport={"width": WIDTH, "height": HEIGHT}
                )
                opened.goto(page.as_uri())
                (folder / f"report-{scheme}.png").write_bytes(_taken(opened, section))
            browser.close()


def _taken(page: Page, section: str) -> bytes:
    """What the window shows of a section, in few colours."""
    page.locator(f"#{section}").evaluate("x => scrollTo(0, x.offsetTop - 40)")
    image = Image.open(io.BytesIO(page.screenshot())).convert("RGB").quantize(COLOURS)
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return file.getvalue()


if __name__ == "__main__":
    photograph()
