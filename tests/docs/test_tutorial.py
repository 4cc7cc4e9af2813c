"""docs/tutorial: every file and command of its page, followed to the letter."""

from pathlib import Path

import pytest

from fixtures.documents import ROOT, Reader, blocks_of
from fixtures.venvs import Venv

PAGE = ROOT / "docs" / "tutorial" / "your-first-policy.md"


def policy_of_the_page() -> str:
    """The file with the reader's own policy."""
    found = (block.text for block in blocks_of(PAGE) if "# src/keen/policy.py" in block.text)
    return next(found)


def test_the_page_has_the_whole_path() -> None:
    """From a new package to a check, a trace of one's own, a report, and all three hosts."""
    text = "".join(block.text for block in blocks_of(PAGE))
    for step in ("new keen", "check keen", "capture", "replay", "--html", "PolicyCache", "LLM("):
        assert step in text


def test_the_policy_has_at_most_thirty_lines() -> None:
    """A policy of one's own is short: documentation, imports and blank lines included."""
    assert len(policy_of_the_page().splitlines()) <= 30


@pytest.mark.vllm
@pytest.mark.slow
def test_the_page_can_be_followed_to_the_letter(tmp_path: Path) -> None:
    """A reader who copies files and commands gets through, and sees what is shown."""
    (tmp_path / "kvpolicy").symlink_to(ROOT)
    reader = Reader(Venv.make(tmp_path / ".venv"), tmp_path)
    for block in blocks_of(PAGE):
        reader.follow(block, PAGE.name)
    assert (tmp_path / "keen" / "report.html").stat().st_size > 10_000
