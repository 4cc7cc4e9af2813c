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


def test_fresh_memory_reads_as_nan() -> None:
    """Tests run with poisoned memory: reading an unwritten slot fails loudly."""
    assert torch.empty(1000).isnan().all()


def test_torch_uses_one_thread() -> None:
    """Tests run on one torch thread, so that sums have one order."""
    assert torch.get_num_threads() == 1
