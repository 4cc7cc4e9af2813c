"""The wheel's annotations, as pyright sees them in a stranger's project."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from fixtures.installations import install_linked
from fixtures.venvs import Venv

FOLDER = Path(__file__).parent / "typing"


@pytest.fixture(scope="module")
def found(built: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, set[int]]:
    """Lines, from 0, of each file that pyright objects to, in strict mode, away from the tree."""
    folder = tmp_path_factory.mktemp("consumer")
    environment = Venv.bare(folder / "venv")
    install_linked(environment, next(built.glob("*.whl")), ("hf", "sim", "testing"))
    for file in FOLDER.glob("*.py"):
        (folder / file.name).write_bytes(file.read_bytes())
    settings = {
        "include": ["*.py"],
        "typeCheckingMode": "strict",
    }
    (folder / "pyrightconfig.json").write_text(json.dumps(settings))
    python = str(environment.bin / "python")
    command = [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", python]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    report = json.loads(done.stdout)
    assert report["summary"]["filesAnalyzed"] == len([*FOLDER.glob("*.py")]), done.stderr
    lines: dict[str, set[int]] = {file.name: set() for file in FOLDER.glob("*.py")}
    for message in report["generalDiagnostics"]:
        print(message["file"], message["range"]["start"]["line"] + 1, message["message"])
        lines[Path(message["file"]).name].add(message["range"]["start"]["line"])
    return lines


def test_right_use_passes_strict(found: dict[str, set[int]]) -> None:
    """A policy of one's own and calls of every door are fully typed: nothing is unknown."""
    assert found["consumer.py"] == set()


def test_every_misuse_is_found(found: dict[str, set[int]]) -> None:
    """Wrong arguments, names, signatures and assignments are reported, on their lines alone."""
    lines = (FOLDER / "misuse.py").read_text("utf-8").splitlines()
    assert found["misuse.py"] == {i for i, line in enumerate(lines) if line.endswith("# wrong")}
