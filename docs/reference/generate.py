"""Writes what in docs/reference follows from the code.

.venv/bin/python docs/reference/generate.py
"""

from pathlib import Path

import api_pages
import options_tables
import support_page

ROOT = Path(__file__).parents[2]


def pages() -> dict[Path, str]:
    """Every file that is generated, wholly or in parts, and its text."""
    return {**support_page.pages(), **api_pages.pages(), **options_tables.pages()}


if __name__ == "__main__":
    for path, text in pages().items():
        if not path.exists() or path.read_text("utf-8") != text:
            path.write_text(text, encoding="utf-8")
            print(path.relative_to(ROOT).as_posix())
