"""What is built and installed: contents of wheel and sdist, entry points, pins, cost of import."""

import configparser
import email
import importlib.metadata
import io
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from collections.abc import Iterable
from itertools import chain
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from fixtures.installations import (
    HARMFUL,
    PYPROJECT,
    ROOT,
    build,
    closure,
    pins,
    requirements_of,
)
from kvpolicy.extras import EXTRAS

PACKAGE_FOLDERS = [
    ROOT / folder for folder in PYPROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
]
PACKAGES = {folder.name for folder in PACKAGE_FOLDERS}


def package_files(base: Path, folder: Path) -> set[str]:
    """Return the files of a package, relative to a base, less what the interpreter writes."""
    return {
        path.relative_to(base).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


@pytest.fixture(scope="module")
def wheel(built: Path) -> Iterable[zipfile.ZipFile]:
    """Open the built wheel."""
    with zipfile.ZipFile(next(built.glob("*.whl"))) as archive:
        yield archive


@pytest.mark.parametrize("root", ["integrations", "sim", "tests"])
def test_source_root_is_not_a_package(root: str) -> None:
    """A source root has no __init__.py, so no module can be imported under two names."""
    assert not (ROOT / root / "__init__.py").exists()


def test_every_package_is_declared() -> None:
    """The wheel's package list names every package below the three source roots."""
    found = {
        p.parent.name for r in ("integrations", "sim") for p in (ROOT / r).glob("*/__init__.py")
    }
    assert found | {"kvpolicy"} == PACKAGES


def test_every_package_is_marked_as_typed() -> None:
    """Type checkers of users see our annotations: each package has its py.typed."""
    assert [f.name for f in PACKAGE_FOLDERS if not (f / "py.typed").is_file()] == []


def test_wheel_holds_exactly_the_files_of_the_packages(wheel: zipfile.ZipFile) -> None:
    """Code, py.typed and data files are all in the wheel; tests, docs and tools are not."""
    expected = {name for f in PACKAGE_FOLDERS for name in package_files(f.parent, f)}
    found = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert found == expected


def test_wheel_carries_the_bundled_model(wheel: zipfile.ZipFile) -> None:
    """The weights, the tokenizer and the held-out text travel with the package."""
    folder = ROOT / "kvpolicy" / "bundled"
    if not list(folder.rglob("*.safetensors")):
        pytest.skip("the bundled model has not been exported yet")
    names = {Path(name).name for name in wheel.namelist() if name.startswith("kvpolicy/bundled/")}
    assert {"model.safetensors", "config.json", "tokenizer.json", "heldout.txt"} <= names


def test_wheel_declares_its_entry_points(wheel: zipfile.ZipFile) -> None:
    """One program and what vLLM looks for; the policy group stays free for third parties."""
    name = next(n for n in wheel.namelist() if n.endswith(".dist-info/entry_points.txt"))
    entry_points = configparser.ConfigParser(delimiters="=")
    entry_points.read_string(wheel.read(name).decode())
    assert {section: dict(entry_points[section]) for section in entry_points.sections()} == {
        "console_scripts": {"kvpolicy": "kvpolicy.cli:main"},
        "vllm.general_plugins": {"kvpolicy": "kvpolicy_vllm:register"},
        "vllm.logits_processors": {"kvpolicy": "kvpolicy_vllm.tap:RequestPolicies"},
    }


def test_wheel_from_the_sdist_equals_that_from_the_tree(built: Path, tmp_path: Path) -> None:
    """Whoever builds from the sdist gets byte for byte what is published as a wheel."""
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        archive.extractall(tmp_path, filter="data")
    [source] = tmp_path.iterdir()
    build(source, tmp_path / "dist", "wheel")
    [again], [published] = (tmp_path / "dist").glob("*.whl"), built.glob("*.whl")
    assert again.name == published.name
    assert again.read_bytes() == published.read_bytes()


def test_sdist_holds_only_what_is_tracked(built: Path) -> None:
    """Nothing that lies about in a working tree is published: no caches, results or captures."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        names = {member.name.partition("/")[2] for member in archive if member.isfile()}
    assert names - {*listed.split("\0")} == {"PKG-INFO"}


def test_wheel_tells_what_an_index_shows(wheel: zipfile.ZipFile) -> None:
    """Name, Python, licence, README and every extra are in the metadata."""
    name = next(n for n in wheel.namelist() if n.endswith(".dist-info/METADATA"))
    told = email.message_from_string(wheel.read(name).decode("utf-8"))
    assert (told["Name"], told["Requires-Python"]) == ("kvpolicy", "<3.14,>=3.11")
    assert told["License-Expression"] == "Apache-2.0"
    assert {*told.get_all("Provides-Extra", [])} == {*PYPROJECT["project"]["optional-dependencies"]}
    assert told.get_payload() == (ROOT / "README.md").read_text("utf-8")


def test_extras_named_in_errors_bring_what_is_missing() -> None:
    """An error's advice is true: the extra that it names asks for the package."""
    for package, extra in EXTRAS.items():
        needs = PYPROJECT["project"]["optional-dependencies"][extra]
        # transformers asks for safetensors and tokenizers itself, the extra says so all the same.
        assert package in {canonicalize_name(Requirement(need).name) for need in needs}


def test_every_requirement_has_a_lowest_release() -> None:
    """What `make test-minimum` tries is promised: each requirement has a lower bound or a pin."""
    project = PYPROJECT["project"]
    needs = [*project["dependencies"], *chain(*project["optional-dependencies"].values())]
    specifiers = {need: {s.operator for s in Requirement(need).specifier} for need in needs}
    assert [need for need, has in specifiers.items() if not has & {">=", "=="}] == []


def test_minimum_releases_are_those_promised() -> None:
    """The environment of `make test-minimum` pins each lower bound of pyproject.toml."""
    lines = (ROOT / "tests" / "requirements-minimum.txt").read_text("utf-8").splitlines()
    pinned = [Requirement(line) for line in lines if line and line[0] != "#"]
    oldest: dict[str, Version] = {}
    for need in pinned:
        for exact in need.specifier:
            found = Version(exact.version)
            oldest[need.name] = min(found, oldest.get(need.name, found))
    promised = {
        need.name: Version(bound.version)
        for need in map(Requirement, requirements_of(["hf", "sim", "report", "testing"]))
        for bound in need.specifier
        if bound.operator == ">="
    }
    assert oldest == promised


def test_wheel_carries_the_licence(wheel: zipfile.ZipFile) -> None:
    """The Apache licence text is part of what is distributed."""
    name = next(n for n in wheel.namelist() if n.endswith(".dist-info/licenses/LICENSE"))
    assert b"Apache License" in wheel.read(name)


def test_sdist_holds_all_that_the_wheel_and_the_tests_need(built: Path) -> None:
    """From the sdist alone one can build the wheel and run the tests."""
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    expected = {name for folder in PACKAGE_FOLDERS for name in package_files(ROOT, folder)}
    expected |= {"pyproject.toml", "Makefile", "constraints.txt", "LICENSE", "CHANGELOG.md"}
    expected |= {"CONTRIBUTING.md", "SECURITY.md"}
    expected |= {"tests/conftest.py", "docs/index.md", ".ci/run"}
    assert expected - names == set()


def test_importing_kvpolicy_loads_no_heavy_library() -> None:
    """`import kvpolicy` stays cheap: vLLM imports the plugin in each of its processes."""
    script = "import json, sys, kvpolicy; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    loaded = {name.partition(".")[0] for name in json.load(io.StringIO(done.stdout))}
    heavy = {
        "torch",
        "numpy",
        "vllm",
        "transformers",
        "xformers",
        "msgpack",
        "safetensors",
        "numba",
        "matplotlib",
    }
    assert loaded & heavy == set()
    assert loaded & (PACKAGES - {"kvpolicy"}) == set()


def test_constraints_pin_all_that_make_install_needs() -> None:
    """constraints.txt is complete, so installing it without resolving leaves nothing out."""
    wanted = requirements_of(["hf", "cpu", "sim", "report", "testing"])
    needed = closure([*wanted, *PYPROJECT["dependency-groups"]["dev"]])
    # A CUDA build of torch brings libraries that torch itself pins.
    needed = {name: version for name, version in needed.items() if not is_cuda_library(name)}
    assert sorted(needed.keys() - pins().keys()) == []


def test_environment_of_make_install_matches_the_constraints() -> None:
    """What runs here is what is pinned, so that results can be reproduced."""
    if not (Path(sys.prefix) / ".installed").exists():
        pytest.skip("this environment was not built by `make install`")
    installed = {
        canonicalize_name(d.name): d.version.partition("+")[0]
        # Not the whole path: setuptools, once imported, adds its own vendored distributions.
        for d in importlib.metadata.distributions(path=[sysconfig.get_path("purelib")])
    }
    stale = {n: (v, installed[n]) for n, v in pins().items() if installed.get(n, v) != v}
    assert stale == {}
    assert HARMFUL & installed.keys() == set()


def is_cuda_library(name: str) -> bool:
    """Tell whether a distribution comes with a CUDA build of torch only."""
    return name.startswith(("nvidia-", "cuda-"))


def test_continuous_integration_runs_make_test() -> None:
    """.ci/run is executable and runs `make test`, nothing else."""
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert script.read_text("utf-8").rstrip().endswith("exec make test")
