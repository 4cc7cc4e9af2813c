"""`kvpolicy new`: what it writes works as it is, installed, tested and checked."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from fixtures.venvs import Venv
from kvpolicy.cli import main
from kvpolicy.errors import PolicyError
from kvpolicy.scaffold import Names


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Venv, Path]:
    """An environment with a generated package, and its folder."""
    folder = tmp_path_factory.mktemp("authors")
    environment = Venv.make(folder / "venv")
    assert main(["new", "keen-eye", "--into", str(folder)]) == 0
    package = folder / "keen-eye"
    install = "pip install --quiet --no-deps --no-build-isolation --editable ."
    done = environment.run(install, package)
    assert done.returncode == 0, done.stdout
    return environment, package


def test_generated_tests_pass(installed: tuple[Venv, Path]) -> None:
    """The package's own tests pass: the contract, its name in specs, and its purpose."""
    environment, package = installed
    done = environment.run("python -m pytest -q -p no:cacheprovider", package)
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout


def test_generated_policy_passes_check_by_its_name(
    installed: tuple[Venv, Path], tmp_path: Path
) -> None:
    """`kvpolicy check NAME` finds it by its entry point, nothing wrong, and leaves nothing."""
    environment, _ = installed
    command = "kvpolicy check keen_eye --examples 1 --hosts simulator transformers --json -"
    done = environment.run(command, tmp_path)
    assert done.returncode == 0, done.stdout
    result = json.loads(done.stdout)
    assert result["policy"] == "keen_eye:budget=48"
    assert [host["outcome"] for host in result["hosts"]] == ["agrees", "agrees"]
    assert list(tmp_path.iterdir()) == []


def test_generated_policy_is_as_short_as_a_policy_can_be(installed: tuple[Venv, Path]) -> None:
    """The class takes at most 30 lines, documentation included."""
    lines = (installed[1] / "src" / "keen_eye" / "policy.py").read_text("utf-8").splitlines()
    assert len(lines) <= 30


def test_generated_code_is_clean(installed: tuple[Venv, Path]) -> None:
    """ruff, with its own defaults and sorted imports, has nothing to say or to format."""
    ruff = [sys.executable, "-m", "ruff"]
    for command in (["check", "--extend-select", "I,B,UP,RUF"], ["format", "--check"]):
        done = subprocess.run(
            [*ruff, *command, "--isolated", "--no-cache", "--line-length", "100", "."],
            cwd=installed[1],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout


def test_json_names_what_was_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--json - tells programs the class, the spec and every file, all of which exist."""
    assert main(["new", "keen", "--into", str(tmp_path), "--json", "-"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["class"], result["spec"]) == ("keen.policy:Keen", "keen:budget=256")
    assert len(result["files"]) == 6
    assert all(Path(file).is_file() for file in result["files"])


@pytest.mark.parametrize("name", ["", "Keen", "9lives", "a b", "../keen", "keen-", "class", "é"])
def test_impossible_names_are_refused(name: str, tmp_path: Path) -> None:
    """A name that Python or pip would not take is bad usage, and writes nothing."""
    assert main(["new", name, "--into", str(tmp_path)]) == 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "told"), [("h2o", "a policy called 'h2o'"), ("torch", "a module called 'torch'")]
)
def test_taken_names_are_refused(name: str, told: str) -> None:
    """A package must not hide a policy or a module, nor be hidden by one."""
    with pytest.raises(PolicyError, match=told):
        Names.of(name)


def test_what_is_there_stays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder of that name is not touched, and nothing is left beside it."""
    (tmp_path / "keen").mkdir()
    (tmp_path / "keen" / "mine.py").write_text("mine")
    assert main(["new", "keen", "--into", str(tmp_path)]) == 2
    assert "is there already" in capsys.readouterr().err
    assert [path.name for path in tmp_path.rglob("*")] == ["keen", "mine.py"]


def test_a_missing_folder_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--into something that is no folder is one line, exit 2."""
    assert main(["new", "keen", "--into", str(tmp_path / "no")]) == 2
    assert "is no folder" in capsys.readouterr().err
