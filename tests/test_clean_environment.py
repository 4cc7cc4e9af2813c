"""The wheel as a stranger has it: installed beside what it asks for and nothing else, and used.

By default what it asks for is linked from this environment, which takes a second. Under the marker
`release` pip resolves it, from the package index that pip is configured for.
"""

import json
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fixtures.installations import (
    files_of,
    install_linked,
    install_resolved,
    link,
    pip,
    requirements_of,
)
from fixtures.venvs import Venv
from kvpolicy.cli import main
from kvpolicy.extras import EXTRAS

ALL = ("hf", "sim", "report", "testing")
"""Extras that can be installed together on any machine."""

INSTALLERS = [
    pytest.param(install_linked, id="linked"),
    pytest.param(install_resolved, id="resolved", marks=pytest.mark.release),
]
SPECS = "window:budget=32 h2o:budget=32 tova:budget=32"

# Runs in the clean environment, all commands in one process: torch is imported once.
TALK = """
import contextlib, io, json, sys
from kvpolicy.cli import main
found = []
for command in json.load(sys.stdin):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(command)
    found.append([code, out.getvalue(), err.getvalue()])
json.dump(found, sys.stdout)
"""


@pytest.fixture(scope="module", params=INSTALLERS)
def clean(
    request: pytest.FixtureRequest, built: Path, tmp_path_factory: pytest.TempPathFactory
) -> Venv:
    """An environment with the wheel and what it declares, without any extra."""
    return installed(request.param, built, tmp_path_factory.mktemp("clean"))


def installed(
    install: Callable[..., None], built: Path, folder: Path, extras: tuple[str, ...] = ()
) -> Venv:
    """Install the wheel into a new environment."""
    environment = Venv.bare(folder / "venv")
    install(environment, next(built.glob("*.whl")), extras)
    return environment


def run(environment: Venv, command: str, cwd: Path) -> str:
    """Run a command that must succeed, with the environment's own programs only."""
    done = environment.run(command, cwd, PATH=f"{environment.bin}:/usr/bin:/bin")
    assert done.returncode == 0, done.stdout
    return done.stdout


def talk(environment: Venv, commands: list[list[str]], cwd: Path) -> list[tuple[int, str, str]]:
    """Give the program several commands; exit code, stdout and stderr of each."""
    done = subprocess.run(
        [str(environment.bin / "python"), "-c", TALK],
        input=json.dumps(commands),
        cwd=cwd,
        env=environment.environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [(code, out, err) for code, out, err in json.loads(done.stdout)]


@pytest.fixture(scope="module")
def trace(clean: Venv, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A synthetic trace, made by the installed program."""
    folder = tmp_path_factory.mktemp("trace")
    command = "kvpolicy trace synth --pattern heavy --tokens 160 --layers 2 --out t.kvtrace"
    run(clean, command, folder)
    return folder / "t.kvtrace"


def test_nothing_is_there_but_what_is_declared(clean: Venv, tmp_path: Path) -> None:
    """No package of an extra can be imported, and kvpolicy comes from the wheel, not the tree."""
    script = (
        "import json, sys; from importlib.util import find_spec; import kvpolicy;"
        "print(json.dumps([[n for n in sys.argv[1:] if find_spec(n)], kvpolicy.__file__]))"
    )
    names = shlex.join([*EXTRAS, "xformers", "pytest", "jaxtyping", "scipy", "hatchling"])
    extras, file = json.loads(run(clean, f'python -c "{script}" {names}', tmp_path))
    assert extras == []
    assert Path(file).is_relative_to(clean.site)


def test_nothing_declared_is_missing_or_at_odds(clean: Venv) -> None:
    """Pip finds every requirement of every distribution there met."""
    pip(clean, "check")


def test_what_needs_no_model_answers(clean: Venv, tmp_path: Path) -> None:
    """Help, policies, versions and plans come from the wheel alone, the bundled model included."""
    run(clean, "kvpolicy --help && kvpolicy --version && kvpolicy doctor", tmp_path)
    policies = json.loads(run(clean, "kvpolicy policies --json -", tmp_path))
    command = "kvpolicy plan --policy h2o:budget=64 --json -"
    plan = json.loads(run(clean, command, tmp_path))
    assert policies == _answer_here(["policies", "--json", "-"])
    assert plan == _answer_here(command.split()[1:])
    assert list(tmp_path.iterdir()) == []


def _answer_here(arguments: list[str]) -> object:
    """What the tree's own program answers."""
    command = [sys.executable, "-m", "kvpolicy.cli", *arguments]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def test_a_trace_is_replayed_from_end_to_end(clean: Venv, trace: Path, tmp_path: Path) -> None:
    """A trace is made, verified and replayed; the figures are those of the compiled replay here."""
    run(clean, f"kvpolicy inspect {trace} --verify", tmp_path)
    command = f"replay {trace} --policy {SPECS} --json"
    run(clean, f"kvpolicy {command} there.json", tmp_path)
    assert main([*command.split(), str(tmp_path / "here.json")]) == 0
    there, here = (
        json.loads((tmp_path / name).read_text("utf-8"))["results"]
        for name in ("there.json", "here.json")
    )
    assert len(there) >= len(SPECS.split())
    for one, other in zip(there, here, strict=True):
        for key in ("policy", "evicted", "merged", "bytes_kept"):
            assert one[key] == other[key]
        assert one["retained_mass"]["mean"] == pytest.approx(other["retained_mass"]["mean"], 1e-5)


GRID = """
policies = ["window:budget=32"]

[[replay]]
traces = ["t.kvtrace"]
"""

LACKING = {
    "eval --policy window:budget=64": "transformers",
    "capture --out c.kvtrace": "transformers",
    "demo": "vllm",
    "serve bundled --kv-policy window:budget=64": "vllm",
    "check window": "hypothesis",
    "sweep grid.toml --out swept": "matplotlib",
    "sweep grid.toml --out swept --engine ray": "ray",
    "replay t.kvtrace --policy window:budget=32 --oracle": "numba",
    "replay t.kvtrace --policy window:budget=32 --html r.html": "matplotlib",
    "inspect t.kvtrace --export t.safetensors": "safetensors",
    "fit t.kvtrace --policy compressive:budget=32,fn=conv --out k.safetensors": "safetensors",
    "allocate t.kvtrace --policy window:budget=32 --out b.safetensors": "safetensors",
}
"""Commands that need more than is declared, and what they need."""


def test_a_missing_extra_is_named(clean: Venv, trace: Path, tmp_path: Path) -> None:
    """Each command that needs an extra says so on one line, exit 2, and leaves nothing behind."""
    (tmp_path / "t.kvtrace").write_bytes(trace.read_bytes())
    (tmp_path / "grid.toml").write_text(GRID)
    before = {path.name for path in tmp_path.iterdir()}
    answers = talk(clean, [command.split() for command in LACKING], tmp_path)
    for (command, package), (code, out, err) in zip(LACKING.items(), answers, strict=True):
        [line] = err.splitlines()
        assert (code, out) == (2, ""), (command, line)
        assert line.startswith("kvpolicy"), command
        assert f"needs {package}, which is not installed" in line, command
        assert f"pip install 'kvpolicy[{EXTRAS[package]}]'" in line, command
    assert {*LACKING.values()} == EXTRAS.keys() - {"tokenizers"}  # which comes with matplotlib
    assert {path.name for path in tmp_path.iterdir()} == before


def test_a_strangers_policy_is_seen(clean: Venv, trace: Path, tmp_path: Path) -> None:
    """A policy of another distribution is listed by its entry point, runs, and goes with it."""
    run(clean, "kvpolicy new keen", tmp_path)
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-index",
        "--no-deps",
        "--no-build-isolation",
    ]
    subprocess.run([*build, "./keen", "-w", "dist"], cwd=tmp_path, check=True)
    [wheel] = (tmp_path / "dist").glob("*.whl")
    before = files_of(clean)
    pip(clean, "install", "--no-deps", str(wheel))
    assert "keen" in run(clean, "kvpolicy policies", tmp_path)
    run(clean, f"kvpolicy replay {trace} --policy keen:budget=32 --json r.json", tmp_path)
    found = json.loads((tmp_path / "r.json").read_text("utf-8"))["results"]
    assert "keen:budget=32" in [result["policy"] for result in found]
    pip(clean, "uninstall", "--yes", "keen")
    assert files_of(clean) == before
    assert clean.run("kvpolicy policies keen", tmp_path).returncode == 2


def test_uninstalling_leaves_nothing(built: Path, tmp_path: Path) -> None:
    """What pip installed and Python compiled on use is gone: the environment is as it was."""
    environment = Venv.bare(tmp_path / "venv")
    link(environment, requirements_of(()))
    before, programs = files_of(environment), {*environment.bin.iterdir()}
    pip(environment, "install", "--no-deps", str(next(built.glob("*.whl"))))
    run(environment, "kvpolicy trace synth --pattern sink --tokens 64 --out t.kvtrace", tmp_path)
    run(environment, f"kvpolicy replay t.kvtrace --policy {SPECS}", tmp_path)
    pip(environment, "uninstall", "--yes", "kvpolicy")
    assert files_of(environment) == before
    assert {*environment.bin.iterdir()} == programs


@pytest.mark.release
@pytest.mark.parametrize("install", INSTALLERS)
def test_extras_bring_what_their_commands_need(
    install: Callable[..., None], built: Path, tmp_path: Path
) -> None:
    """With its extras the wheel captures, replays against the oracle, draws, evaluates, checks."""
    environment = installed(install, built, tmp_path, ALL)
    pip(environment, "check")
    for command in (
        "kvpolicy capture --tokens 192 --out t.kvtrace",
        f"kvpolicy replay t.kvtrace --policy {SPECS} --oracle --html r.html --json r.json",
        "kvpolicy eval --policy h2o:budget=64 --context 192 --samples 2 --json e.json",
        "kvpolicy fit t.kvtrace --policy infini:segment=64 --out g.safetensors",
        "kvpolicy check window --examples 1 --hosts simulator transformers",
    ):
        run(environment, command, tmp_path)
    replayed, evaluated = (
        json.loads((tmp_path / name).read_text("utf-8"))["results"] for name in ("r.json", "e.json")
    )
    assert all(r["oracle_gap"] is not None for r in replayed if r["policy"] != "full")
    assert {r["policy"] for r in evaluated} == {"full", "sinks:budget=64", "h2o:budget=64"}
    assert (tmp_path / "r.html").stat().st_size > 10_000
