"""Every block of Python and every command that the pages show, run."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from fixtures.documents import ROOT, Block, blocks_of, commands_of, indented, pages
from fixtures.following import SHELLS, SLOW, Follower, follower, is_run, needs_vllm
from kvpolicy.cli import main
from kvpolicy.testing import check_policy

FOLLOWED_ELSEWHERE = {"docs/tutorial/your-first-policy.md": "tests/docs/test_tutorial.py"}
"""Pages with a test of their own, which does more."""

LANGUAGES = {"python", "sh", "console", "text", "json", "toml", "promql", "{eval-rst}"}


def named(page: Path) -> str:
    """A page's path from the root."""
    return page.relative_to(ROOT).as_posix()


def is_slow(block: Block) -> bool:
    """Whether a block starts processes."""
    if block.note.startswith("slow, "):
        return True
    if not is_run(block) or block.language not in ("python", *SHELLS):
        return False
    if block.language == "python":
        return needs_vllm(block)
    programs = (command.split()[:2] for command, _ in commands_of(block))
    return any(program == ["kvpolicy", name] for program in programs for name in SLOW)


FOLLOWED = [
    page for page in pages() if [*blocks_of(page)] and named(page) not in FOLLOWED_ELSEWHERE
]
SLOWLY = [page for page in FOLLOWED if any(map(is_slow, blocks_of(page)))]


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What pages call ``t.kvtrace``."""
    path = tmp_path_factory.mktemp("trace") / "t.kvtrace"
    assert main(["capture", "--tokens", "256", "--sequences", "2", "--out", str(path)]) == 0
    return path


@pytest.fixture
def reader(tmp_path: Path, trace: Path) -> Iterator[Follower]:
    """Somebody in a hurry."""
    with follower(tmp_path, trace) as found:
        yield found


@pytest.mark.parametrize("page", FOLLOWED, ids=named)
def test_blocks_of_a_page_run(page: Path, reader: Follower) -> None:
    """Python runs, commands exit with 0, and what prints the same everywhere prints what is shown.

    All but what starts an engine or processes.
    """
    reader.follow([*blocks_of(page)])


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.parametrize("page", SLOWLY, ids=named)
def test_slow_blocks_of_a_page_run(page: Path, tmp_path: Path, trace: Path) -> None:
    """So does the rest."""
    with follower(tmp_path, trace, slow=True) as patient:
        patient.follow([*blocks_of(page)])


@pytest.mark.parametrize("page", pages(), ids=named)
def test_blocks_say_what_they_are(page: Path) -> None:
    """No block escapes: it has a language, and if it is not run, a note says why."""
    for block in blocks_of(page):
        assert block.language in LANGUAGES, block
        assert block.language != "text" or "$ kvpolicy" not in block.text, block
        word, _, reason = block.note.partition(", ")
        assert not block.note or word.split()[0] in ("none", "slow", "exit", "file"), block
        assert word not in ("none", "slow") or len(reason) > 10, block
    assert not [text for text in indented(page) if re.match(r"kvpolicy |import |from ", text)]


def test_policies_that_pages_show_keep_the_contract(reader: Follower) -> None:
    """What authors are told to write passes the checks; the page's bad example fails elsewhere."""
    reader.follow([*blocks_of(ROOT / "docs" / "how-to" / "write-a-policy.md")])
    shown = reader.namespace
    for policy in (shown["RowTimesKeyNorm"](budget=8), shown["policy"], shown["Digest"](budget=12)):
        check_policy(policy, examples=1)


def test_pages_that_are_followed_elsewhere_are() -> None:
    """The other test reads the page."""
    for page, test in FOLLOWED_ELSEWHERE.items():
        assert Path(page).name in (ROOT / test).read_text("utf-8")


@pytest.mark.parametrize(
    "block",
    [
        Block("python", "import kvpolicy\nkvpolicy.parse('h3o:budget=1')", 1),
        Block("sh", "kvpolicy plan --policies h2o:budget=64", 1),
        Block("sh", "kvpolicy serve MODEL --kv-policy h3o:budget=64", 1),
        Block("sh", "kvpolcy policies", 1),
        Block("console", "$ kvpolicy policies h2o\nno such thing", 1),
        Block("console", "$ kvpolicy policies h2o\n", 1, "exit 1"),
    ],
)
def test_a_block_that_fails_is_noticed(block: Block, reader: Follower) -> None:
    """The test is not blind: mistakes in names, options, programs, outputs and codes fail it."""
    with pytest.raises((AssertionError, ValueError)):
        reader.follow([block])
