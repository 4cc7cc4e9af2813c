"""What the repository itself promises: no trace of a machine, the agreed folders, safe tests."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
FOLDERS = {"kvpolicy", "integrations", "sim", "tests", "docs"}
MAX_BYTES = 9_000_000

# Written with character classes so that this file does not match itself.
MACHINE_TRACES = {
    "a path of somebody's machine": r"(?<![\w.~])/(?:[w]ork|[r]oot|[h]ome|[U]sers)/[\w.-]+",
    "a temporary path": r"(?<![\w.])/[t]mp/[\w.-]+",
    "a local package folder": r"/[o]pt/(?:wheels|pypi)",
    "a package registry": r"(?:[p]ypi\.org|[p]ythonhosted|[d]ownload\.pytorch\.org|[s]imple/pip)",
    "a configured package index": r"(?:[i]ndex-url|[f]ind-links)\s*=",
    "a private address": r"\b(?:10\.\d+|192\.168|172\.(?:1[6-9]|2\d|3[01]))\.\d+\.\d+\b",
    "a credential": r"\b(?:[g]hp_|[h]f_|[s]k-|[A]KIA)[A-Za-z0-9]{16,}",
}


def tracked_files() -> list[Path]:
    """Return the files that git tracks or would track."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [path for name in listed.split("\0") if name and (path := ROOT / name).is_file()]


def is_text(data: bytes) -> bool:
    """Tell text from binary data as git does."""
    return b"\0" not in data[:8000]


@pytest.mark.parametrize("what", MACHINE_TRACES)
def test_no_text_file_names_a_machine(what: str) -> None:
    """A clone works anywhere: no tracked text contains what belongs to one machine."""
    pattern = re.compile(MACHINE_TRACES[what])
    found = [
        f"{path.relative_to(ROOT)}:{number}: {match.group()}"
        for path in tracked_files()
        if is_text(data := path.read_bytes())
        for number, line in enumerate(data.decode("utf-8", "replace").splitlines(), 1)
        if (match := pattern.search(line))
    ]
    assert not found, f"{what}:\n" + "\n".join(found)


@pytest.mark.parametrize(
    ("what", "parts"),
    [
        ("a path of somebody's machine", ("see /wo", "rk/main/x")),
        ("a temporary path", ("open('/tm", "p/x')")),
        ("a local package folder", ("/op", "t/wheels")),
        ("a package registry", ("files.pytho", "nhosted.org")),
        ("a configured package index", ("extra-index-", "url = file:")),
        ("a private address", ("http://192.", "168.0.1")),
        ("a credential", ("hf", "_" + "a" * 20)),
    ],
)
def test_trace_of_a_machine_is_recognised(what: str, parts: tuple[str, str]) -> None:
    """The patterns above are not blind: each finds an example, put together here."""
    assert re.search(MACHINE_TRACES[what], "".join(parts))


def test_root_holds_only_the_agreed_folders() -> None:
    """Five folders stand at the root, beside dot-folders; a newcomer sees the parts at once."""
    folders = {p.relative_to(ROOT).parts[0] for p in tracked_files() if p.parent != ROOT}
    assert {name for name in folders if not name.startswith(".")} <= FOLDERS


def test_no_file_is_large() -> None:
    """The bundled model stays small and nothing big slips in by accident."""
    large = [p.relative_to(ROOT) for p in tracked_files() if p.stat().st_size > MAX_BYTES]
    assert large == []


def make_targets() -> set[str]:
    """Targets that `make help` lists."""
    return set(
        re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
    )


def test_help_lists_every_target() -> None:
    """Whatever a person may call make for says what it does."""
    [phony] = re.findall(
        r"^\.PHONY: ((?:.*\\\n)*.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE
    )
    assert {*phony.replace("\\", "").split()} == make_targets()


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "README.md", "docs/how-to/install.md"])
def test_targets_that_a_page_names_exist(page: str) -> None:
    """Nobody is told to call make for what it does not know."""
    named = re.findall(r"\bmake ([a-z]+(?:-[a-z]+)*)", (ROOT / page).read_text("utf-8"))
    commands = {name for name in named if f"`make {name}" in (ROOT / page).read_text("utf-8")}
    assert commands
    assert commands <= make_targets()


def test_contributors_are_told_every_target() -> None:
    """CONTRIBUTING.md says what each target is for."""
    text = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    assert {name for name in make_targets() if f"make {name}" not in text} == set()


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "SECURITY.md"])
def test_paths_that_a_page_names_exist(page: str) -> None:
    """Files and folders in code type are where they are said to be."""
    words = re.findall(r"`([\w./-]+)`", (ROOT / page).read_text("utf-8"))
    paths = [word for word in words if "/" in word and not word.startswith(".venv")]
    assert paths or page == "SECURITY.md"
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_fresh_memory_reads_as_nan() -> None:
    """Tests run with poisoned memory: reading an unwritten slot fails loudly."""
    assert torch.empty(1000).isnan().all()


def test_torch_uses_one_thread() -> None:
    """Tests run on one torch thread, so that sums have one order."""
    assert torch.get_num_threads() == 1
