"""Options of the commands that show results as a page or as pictures."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kvpolicy.cli.output import Output, count
from kvpolicy.page import require_matplotlib

if TYPE_CHECKING:
    from kvpolicy.page.document import Document


def add_pages(parser: argparse.ArgumentParser) -> None:
    """Declare ``--html`` and ``--png``."""
    parser.add_argument(
        "--html", metavar="FILE", help="write one page with pictures that needs nothing but itself"
    )
    add_png(parser)


def add_png(parser: argparse.ArgumentParser) -> None:
    """Declare ``--png`` alone."""
    parser.add_argument(
        "--png", metavar="DIR", help="write the page's pictures into a folder, as PNG"
    )


def page_output(
    options: argparse.Namespace,
    *,
    inputs: Sequence[str | None] = (),
    others: Sequence[str | None] = (),
) -> Output:
    """Where a command's results go, its page and pictures included.

    Args:
        options: What the command was told.
        inputs: Files that it reads and must not overwrite.
        others: Files that it writes beside JSON and the page.

    Raises:
        PolicyError: A file or folder cannot be written.
        UnsupportedError: There is nothing to draw with.
    """
    if options.html or options.png:
        require_matplotlib()
    return Output(
        options.json, inputs=inputs, others=[*others, options.html], folders=[options.png]
    )


def write_pages(options: argparse.Namespace, document: "Document", output: Output) -> None:
    """Write the page and the pictures that were asked for."""
    written: list[str] = []
    with output.progress() as steps:
        advance = steps.begin("drawing", bool(options.html) + bool(options.png))
        if options.html:
            document.write_html(Path(options.html))
            written.append(f"wrote {options.html}")
            advance(1)
        if options.png:
            number = len(document.write_pictures(Path(options.png)))
            written.append(f"wrote {count(number, 'picture')} into {options.png}")
            advance(1)
    for line in written:
        output.print(line)
