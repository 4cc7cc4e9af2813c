"""Packages that only some tasks need, and the extra of kvpolicy that brings each."""

from importlib.util import find_spec

from kvpolicy.errors import UnsupportedError

EXTRAS = {
    "hypothesis": "testing",
    "matplotlib": "report",
    "numba": "sim",
    "ray": "ray",
    "safetensors": "hf",
    "tokenizers": "hf",
    "transformers": "hf",
    "vllm": "vllm",
}
"""The extra that brings a package."""

_GUIDE = "docs/how-to/install.md"


def is_installed(package: str) -> bool:
    """Tell, without importing it, whether a package is there."""
    return find_spec(package) is not None


def how_to_install(package: str) -> str:
    """What to do about a package that is missing, as the end of an error message."""
    extra = EXTRAS[package]
    # The CPU build is another distribution, and pip alone cannot install it.
    choice = f", on a CPU the extra cpu: see {_GUIDE}" if extra == "vllm" else ""
    return f"install the extra {extra} of kvpolicy: pip install 'kvpolicy[{extra}]'{choice}"


def require(package: str, task: str = "this command") -> None:
    """Raise UnsupportedError, with what to install, unless a package is there.

    Args:
        package: What has to be importable.
        task: What needs it, as the subject of a sentence in the singular.
    """
    if not is_installed(package):
        raise UnsupportedError(
            f"{task} needs {package}, which is not installed; {how_to_install(package)}"
        )
