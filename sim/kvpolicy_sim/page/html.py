"""A report as one page that needs nothing but itself: no script, no font, no network."""

import os
from importlib.resources import files
from pathlib import Path
from string import Template

from kvpolicy import SEMANTICS, __version__
from kvpolicy_sim.page import sections
from kvpolicy_sim.page.keys import keys_of
from kvpolicy_sim.page.markup import join
from kvpolicy_sim.page.tables import Row
from kvpolicy_sim.report import Report


def write_html(report: Report, path: Path) -> None:
    """Write a report as a page, completely or not at all.

    Raises:
        OSError: The file cannot be written.
    """
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        # A model's name may hold half a surrogate pair, which UTF-8 cannot.
        part.write_text(page(report), encoding="utf-8", errors="replace")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def page(report: Report) -> str:
    """The HTML of a report."""
    folder = files("kvpolicy_sim.page")
    keys, entries = keys_of([*report.results]), report.as_dict()["results"]
    rows = [*map(Row, keys, report.results.values(), entries)]
    content = (
        sections.title(report),
        sections.policies(report, rows),
        sections.over_the_sequence(report, rows),
        sections.by_age(rows),
        sections.by_head(report, rows),
        sections.retention(report, rows),
        sections.similarity(rows),
        sections.marks(rows),
    )
    return Template(folder.joinpath("page.html").read_text(encoding="utf-8")).substitute(
        style=folder.joinpath("page.css").read_text(encoding="utf-8"),
        title=join([sections.model_name(report)]),
        content=join(content),
        version=f"kvpolicy {__version__}, semantics {SEMANTICS}",
    )
