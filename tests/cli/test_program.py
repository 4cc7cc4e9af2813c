"""The program as a whole: help, exit codes, one-line errors, and what a command imports."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from kvpolicy.cli import COMMANDS, main
from kvpolicy.errors import LedgerError


def loaded_by(*arguments: str) -> set[str]:
    """Run the program in a fresh interpreter and return the top-level packages it imported."""
    script = (
        "import json, sys\n"
        "from kvpolicy.cli import main\n"
        "main(sys.argv[1:])\n"
        "names = sorted({name.partition('.')[0] for name in sys.modules})\n"
        "print(json.dumps(names), file=sys.stderr)"
    )
    command = [sys.executable, "-c", script, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    return set(json.loads(done.stderr.splitlines()[-1]))


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    """`kvpolicy --help` names each command with its summary and succeeds."""
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(name in text and command.summary in text for name, command in COMMANDS.items())


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_examples(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each command's --help succeeds and shows how it is used."""
    assert main([command, "--help"]) == 0
    text = capsys.readouterr().out
    assert "examples:" in text
    assert f"kvpolicy {command}" in text


@pytest.mark.parametrize("arguments", [["--help"], ["policies"], ["policies", "h2o"], ["doctor"]])
def test_light_command_loads_no_heavy_library(arguments: list[str]) -> None:
    """Looking things up is instant: neither torch nor a host is imported for it."""
    heavy = {"torch", "numpy", "transformers", "vllm", "kvpolicy_hf", "kvpolicy_vllm"}
    assert not heavy & loaded_by(*arguments)


@pytest.mark.parametrize("arguments", [[], ["nope"], ["policies", "--nope"], ["eval"]])
def test_bad_usage_exits_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Wrong commands and arguments are usage errors on stderr."""
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert "error: " in captured.err
    assert captured.out == ""


@pytest.mark.parametrize(
    "arguments",
    [
        ["policies", "h2"],
        ["eval", "--policy", "window:budget=0"],
        ["eval", "--policy", "window:budget=64", "--text", "no/such/file"],
        ["serve", "--kv-policy", "window"],
        ["policies", "--json", "no/such/folder/file"],
    ],
)
def test_error_is_one_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """A wrong spec or file gives one line without a traceback, and exit code 2."""
    assert main(arguments) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("kvpolicy: error: ")


def test_failed_check_exits_with_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A ledger that contradicts its law is a failed result, not bad usage."""

    def fail(arguments: list[str]) -> int:
        raise LedgerError("evicted too little")

    monkeypatch.setattr("kvpolicy.cli.policies.run", fail)
    assert main(["policies"]) == 1
    assert capsys.readouterr().err == "kvpolicy: error: evicted too little\n"


def test_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    """`kvpolicy --version` prints the package's version."""
    import kvpolicy

    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"kvpolicy {kvpolicy.__version__}\n"


def test_json_dash_is_alone_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    """With `--json -` stdout is one JSON document and nothing else."""
    assert main(["policies", "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["schema"] == 1


def test_json_file_comes_beside_the_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With `--json FILE` the text still goes to stdout."""
    target = tmp_path / "out.json"
    assert main(["policies", "--json", str(target)]) == 0
    assert "h2o" in capsys.readouterr().out
    assert json.loads(target.read_text("utf-8"))["schema"] == 1


def test_program_survives_a_closed_pipe() -> None:
    """A reader that goes away early, as in `kvpolicy policies | head -1`, is no error."""
    command = [sys.executable, "-m", "kvpolicy.cli", "policies", "--json", "-"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(120) == 0
