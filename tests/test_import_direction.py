"""Imports point one way: hosts and simulator import the core, nothing else imports a host."""

import ast
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = {
    "kvpolicy": ROOT / "kvpolicy",
    "kvpolicy_vllm": ROOT / "integrations" / "kvpolicy_vllm",
    "kvpolicy_hf": ROOT / "integrations" / "kvpolicy_hf",
    "kvpolicy_sim": ROOT / "sim" / "kvpolicy_sim",
    "kvpolicy_xformers": ROOT / "integrations" / "kvpolicy_xformers",
}
HOSTS = {"kvpolicy_vllm", "kvpolicy_hf", "kvpolicy_sim", "kvpolicy_xformers"}
FORBIDDEN = {
    "kvpolicy": HOSTS | {"vllm", "transformers", "xformers"},
    "kvpolicy_vllm": (HOSTS - {"kvpolicy_vllm"}) | {"xformers"},
    "kvpolicy_hf": (HOSTS - {"kvpolicy_hf"}) | {"vllm", "xformers"},
    "kvpolicy_sim": (HOSTS - {"kvpolicy_sim"}) | {"vllm", "xformers"},
    "kvpolicy_xformers": (HOSTS - {"kvpolicy_xformers"}) | {"vllm", "transformers"},
}
# One console program serves every package, so its commands may reach them, but only when they run.
FUNCTIONS_MAY_IMPORT_ANYTHING = "kvpolicy.cli"


def imported_names(node: ast.AST) -> Iterator[str]:
    """Yield the modules that one node imports, by statement or by a literal import_module call."""
    match node:
        case ast.Import(names=names):
            yield from (alias.name for alias in names)
        case ast.ImportFrom(module=str(module), level=0):
            yield module
        case ast.Call(
            func=ast.Name(id="import_module" | "__import__")
            | ast.Attribute(attr="import_module" | "__import__"),
            args=[ast.Constant(value=str(module)), *_],
        ):
            yield module


def imports(node: ast.AST, *, in_function: bool = False) -> Iterator[tuple[str, int, bool]]:
    """Yield (module, line, whether inside a function) for every import below a node."""
    for child in ast.iter_child_nodes(node):
        for name in imported_names(child):
            yield name, getattr(child, "lineno", 0), in_function
        is_function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        yield from imports(child, in_function=in_function or is_function)


def violations(package: str, module: str, source: str) -> list[str]:
    """Return the imports of a module's source that its package may not make."""
    is_exempt = module == FUNCTIONS_MAY_IMPORT_ANYTHING or module.startswith(
        FUNCTIONS_MAY_IMPORT_ANYTHING + "."
    )
    return [
        f"{module}:{line} imports {name}"
        for name, line, in_function in imports(ast.parse(source))
        if name.partition(".")[0] in FORBIDDEN[package] and not (is_exempt and in_function)
    ]


def module_name(package: str, path: Path) -> str:
    """Return the dotted name of a file of a package."""
    parts = path.relative_to(SOURCES[package].parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@pytest.mark.parametrize("package", SOURCES)
def test_no_module_imports_against_the_direction(package: str) -> None:
    """Every file of every package imports only what its side of the tree may import."""
    files = sorted(SOURCES[package].rglob("*.py"))
    found = [
        violation
        for path in files
        for violation in violations(package, module_name(package, path), path.read_text("utf-8"))
    ]
    assert files, f"{package} has no files"
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("package", "module", "source"),
    [
        ("kvpolicy", "kvpolicy.registry", "import vllm.v1"),
        ("kvpolicy", "kvpolicy.policies.h2o", "def score():\n    from transformers import Cache"),
        ("kvpolicy", "kvpolicy.cli.demo", "from kvpolicy_vllm import ledger"),
        ("kvpolicy", "kvpolicy.cli", "class Demo:\n    import kvpolicy_sim"),
        ("kvpolicy", "kvpolicy.climb", "def run():\n    import kvpolicy_hf"),
        ("kvpolicy", "kvpolicy.spec", "import importlib\nimportlib.import_module('kvpolicy_hf')"),
        ("kvpolicy_hf", "kvpolicy_hf.cache", "if TYPE_CHECKING:\n    import kvpolicy_vllm"),
        ("kvpolicy_vllm", "kvpolicy_vllm.plugin", "from kvpolicy_hf.cache import PolicyCache"),
        ("kvpolicy_vllm", "kvpolicy_vllm.plugin", "async def f():\n    import kvpolicy_sim.trace"),
        ("kvpolicy_sim", "kvpolicy_sim.replay", "import kvpolicy_hf as host"),
        ("kvpolicy_hf", "kvpolicy_hf.cache", "import xformers.ops"),
        ("kvpolicy_xformers", "kvpolicy_xformers.loop", "import kvpolicy_hf"),
    ],
)
def test_planted_violation_is_found(package: str, module: str, source: str) -> None:
    """The check above is not blind: each kind of forbidden import is reported."""
    assert len(violations(package, module, source)) == 1


@pytest.mark.parametrize(
    ("package", "module", "source"),
    [
        ("kvpolicy", "kvpolicy.cli.demo", "def run():\n    import kvpolicy_vllm, kvpolicy_hf"),
        ("kvpolicy", "kvpolicy.policy", "import torch\nfrom kvpolicy.errors import PolicyError"),
        ("kvpolicy_vllm", "kvpolicy_vllm.spec", "from vllm.v1 import core\nimport kvpolicy"),
        ("kvpolicy_hf", "kvpolicy_hf.cache", "from .attention import attend\nimport transformers"),
    ],
)
def test_permitted_import_is_not_reported(package: str, module: str, source: str) -> None:
    """Arrows towards the core and lazy imports of the command line are allowed."""
    assert violations(package, module, source) == []


def test_numba_comes_from_where_vllm_starts_beside_it() -> None:
    """Whoever compiles gets numba as `kvpolicy.compiler` leaves it, whose proxy vLLM can read."""
    users = []
    for package, root in SOURCES.items():
        for path in root.rglob("*.py"):
            names = {name for name, *_ in imports(ast.parse(path.read_text("utf-8")))}
            if module_name(package, path) == "kvpolicy.compiler":
                continue
            if any(name.partition(".")[0] in ("numba", "llvmlite") for name in names):
                assert "kvpolicy.compiler" in names, path
            users += [path] if "kvpolicy.compiler" in names else []
    assert len(users) > 2
    import_module("kvpolicy.compiler")
    assert isinstance(vars(import_module("llvmlite.binding.ffi").lib), dict)
