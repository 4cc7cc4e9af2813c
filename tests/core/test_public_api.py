"""The public door: names, order, and what opening it costs."""

import subprocess
import sys
from pathlib import Path

import pytest

import kvpolicy

ROOT = Path(__file__).parents[2]


def test_names_and_signatures_are_those_reviewed(request: pytest.FixtureRequest) -> None:
    """Proves that no public name, member or signature of any package changes unseen."""
    reviewed = Path(__file__).with_name("public_api.txt")
    script = [sys.executable, "fixtures/public_api.py", str(ROOT / "docs" / "reference")]
    done = subprocess.run(script, cwd=ROOT / "tests", capture_output=True, text=True, check=True)
    if request.config.getoption("--write-api"):
        reviewed.write_text(done.stdout, encoding="utf-8")
    assert done.stdout == reviewed.read_text("utf-8"), "a change that is meant: --write-api"


def test_doors_of_every_package_are_reviewed() -> None:
    """Proves that the reviewed list covers each package, and more than its door where there is."""
    text = Path(__file__).with_name("public_api.txt").read_text("utf-8")
    modules = {line for line in text.splitlines() if line and not line.startswith(" ")}
    packages = {"kvpolicy", "kvpolicy_hf", "kvpolicy_sim", "kvpolicy_vllm", "kvpolicy_xformers"}
    assert packages | {"kvpolicy.testing", "kvpolicy.trace"} <= modules


def test_all_is_sorted_and_importable() -> None:
    """Proves that every public name exists, once: constants, then classes, then functions."""
    order = sorted({*kvpolicy.__all__}, key=lambda x: (not x.isupper(), not x[0].isupper(), x))
    assert kvpolicy.__all__ == order
    assert all(hasattr(kvpolicy, name) for name in kvpolicy.__all__)
    assert len(kvpolicy.__all__) <= 20


def test_all_is_what_the_package_defines() -> None:
    """Proves that no public name is missing from `__all__`: the rest are submodules."""
    public = {name for name in vars(kvpolicy) if not name.startswith("_")}
    folder = Path(kvpolicy.__file__).parent
    modules = {path.stem for path in folder.iterdir() if path.suffix == ".py" or path.is_dir()}
    assert public - modules == {*kvpolicy.__all__}


def test_names_of_the_contract_are_there() -> None:
    """Proves design.md section 5, by name."""
    contract = "parse available register ScorePolicy CachePolicy PolicyError bundled_model".split()
    assert {*contract} <= {*kvpolicy.__all__}


HEAVY = ("torch", "numpy", "transformers", "vllm", "hypothesis", "pytest", "msgpack")


@pytest.mark.parametrize(
    "program",
    [
        "import kvpolicy",
        "import kvpolicy; kvpolicy.available()",
        "import kvpolicy; str(kvpolicy.parse('h2o:budget=1024,recent=0.5'))",
        "import kvpolicy; kvpolicy.parse('tova:budget=8').occupancy.held(10**9)",
    ],
)
def test_configuration_needs_no_tensor_library(program: str) -> None:
    """Proves that importing kvpolicy and reading specs load neither torch nor numpy."""
    check = f"{program}; import sys; print([m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_testing_loads_its_extra_only_when_it_runs() -> None:
    """Proves that kvpolicy.testing can be imported without hypothesis and pytest."""
    check = (
        "import kvpolicy.testing, sys; "
        "print([m for m in ('hypothesis', 'pytest') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_errors_form_one_small_tree() -> None:
    """Proves that one except clause catches everything, and ValueError the bad specs."""
    assert issubclass(kvpolicy.PolicyError, (kvpolicy.KVPolicyError, ValueError))
    assert issubclass(kvpolicy.UnsupportedError, kvpolicy.PolicyError)
    assert issubclass(kvpolicy.LedgerError, kvpolicy.KVPolicyError)
    assert issubclass(kvpolicy.errors.ContractError, (kvpolicy.KVPolicyError, AssertionError))


@pytest.mark.parametrize("name", sorted(kvpolicy.registry.BUILT_IN))
def test_policies_are_documented(name: str) -> None:
    """Proves that every built-in policy has a docstring and names its paper."""
    cls = kvpolicy.available()[name]
    assert cls.__doc__
    assert cls.paper
