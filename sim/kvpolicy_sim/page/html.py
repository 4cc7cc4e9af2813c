"""A replay's report as a page."""

from collections.abc import Mapping
from dataclasses import replace

from kvpolicy.page.document import Document, Section
from kvpolicy.page.keys import Key, keys_of
from kvpolicy.passage import Passage
from kvpolicy_sim.page import pictures, sections
from kvpolicy_sim.page.tables import Row
from kvpolicy_sim.report import Report


def document(report: Report, passage: Passage | None = None) -> Document:
    """The page of a report.

    Args:
        report: What was found.
        passage: The text of the first sequence, if it is known.
    """
    rows = report_rows(report)
    return Document(
        "replay",
        report.header.model or "unnamed model",
        sections.facts(report),
        sections.caveat(report),
        [*report_sections(report, rows, passage), sections.HOW_TO_READ],
    )


def report_rows(report: Report, keys: Mapping[str, Key] | None = None) -> list[Row]:
    """The policies of a report as a page calls them.

    Args:
        report: What was found.
        keys: By spec, on a page that has more than the report; default those of the report.
    """
    known = keys or {key.spec: key for key in keys_of([*report.results])}
    entries = report.as_dict()["results"]
    return [
        Row(known[entry["policy"]], result, entry)
        for result, entry in zip(report.results.values(), entries, strict=True)
    ]


def report_sections(report: Report, rows: list[Row], passage: Passage | None) -> list[Section]:
    """Whatever there is to show of a report."""
    return [
        sections.policies(report, rows),
        *picture_sections(report, rows),
        *_present(sections.text(report, rows, passage)),
        sections.ledger(report, rows),
        *_present(sections.similarity(rows), sections.marks(rows)),
    ]


def picture_sections(report: Report, rows: list[Row]) -> list[Section]:
    """The pictures of a report."""
    return _present(
        pictures.by_budget(rows),
        pictures.over_the_sequence(report, rows),
        pictures.by_age(rows),
        pictures.by_head(report, rows),
        pictures.retention(report, rows),
    )


def embedded_sections(report: Report, keys: Mapping[str, Key], what: str) -> list[Section]:
    """A replay as a part of another command's page.

    Args:
        report: What was found.
        keys: The page's policies, by spec.
        what: What was replayed, such as ``The prompt``.
    """
    rows = report_rows(report, keys)
    table = replace(
        sections.policies(report, rows),
        heading=f"{what}, replayed",
        introduction="Its attention was recorded with the full cache and replayed under every "
        "policy. This isolates which tokens are kept, and says nothing about how errors compound. "
        "The pictures below are of the same replay.",
        short="Replay",
    )
    return [table, *picture_sections(report, rows), sections.HOW_TO_READ]


def _present(*found: Section | None) -> list[Section]:
    return [each for each in found if each is not None]
