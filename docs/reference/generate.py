"""Writes what in docs/reference follows from the code.

.venv/bin/python docs/reference/generate.py            writes
.venv/bin/python docs/reference/generate.py --check    exits with 1 if something is out of date
"""

import sys
from pathlib import Path

import api_pages
import support_page

ROOT = Path(__file__).parents[2]


def pages() -> dict[Path, str]:
    """Every file that is generated, wholly or in parts, and its text."""
    return {**support_page.pages(), **api_pages.pages()}


def main(arguments: list[str]) -> int:
    """Write the files, or compare them."""
    stale = [
        (path, text)
        for path, text in pages().items()
        if not path.exists() or path.read_text("utf-8") != text
    ]
    for path, text in stale:
        if arguments != ["--check"]:
            path.write_text(text, encoding="utf-8")
        print(path.relative_to(ROOT).as_posix())
    return 1 if stale and arguments == ["--check"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
