"""A package for a policy of one's own, written from templates.

It comes with a policy that works, its entry point and its tests, which pass.
"""

import importlib.util
import keyword
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from string import Template

from kvpolicy.errors import PolicyError
from kvpolicy.registry import known_names
from kvpolicy.spec import shown

_TEMPLATES = Path(__file__).parent / "templates"

_FILES = {
    "pyproject.toml": "pyproject.toml.template",
    "README.md": "README.md.template",
    "src/{package}/__init__.py": "init.py.template",
    "src/{package}/policy.py": "policy.py.template",
    "src/{package}/py.typed": None,
    "tests/test_policy.py": "test_policy.py.template",
}
"""Files of the package and what they are made from; None is an empty one."""


@dataclass(frozen=True)
class Names:
    """What a package and its policy are called.

    Attributes:
        distribution: What pip installs, and the folder.
        package: What Python imports, and the policy's name in specs.
        policy_class: The class.
    """

    distribution: str
    package: str
    policy_class: str

    @classmethod
    def of(cls, name: str) -> "Names":
        """Derive them from a name such as ``keen`` or ``keen-eye``.

        Raises:
            PolicyError: It is no name for a package, or is taken.
        """
        package = name.replace("-", "_")
        if not re.fullmatch(r"[a-z][a-z0-9]*([-_][a-z0-9]+)*", name) or keyword.iskeyword(package):
            raise PolicyError(
                f"got the name {shown(name)}, expected lower-case letters and digits in words "
                "joined by - or _, such as keen-eye, and no keyword of Python"
            )
        if package in known_names():
            raise PolicyError(f"there is a policy called {package!r} already; choose another name")
        if importlib.util.find_spec(package) is not None:
            raise PolicyError(
                f"there is a module called {package!r} already, which would hide the new package "
                "or be hidden by it; choose another name"
            )
        camel = "".join(word.capitalize() for word in package.split("_"))
        return cls(name.replace("_", "-"), package, camel)


def write_package(names: Names, parent: Path) -> list[Path]:
    """Write the package's folder, completely or not at all; give its files.

    Raises:
        PolicyError: There is no such parent, or something of that name in it.
    """
    target = parent / names.distribution
    if not parent.is_dir():
        raise PolicyError(f"{str(parent)!r} is no folder to put a package in; make it first")
    if target.exists() or target.is_symlink():
        raise PolicyError(f"{str(target)!r} is there already; choose another name, or move it away")
    with tempfile.TemporaryDirectory(prefix=f".{names.distribution}-", dir=parent) as folder:
        draft = Path(folder) / names.distribution
        for file, template in _FILES.items():
            path = draft / file.format(package=names.package)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("" if template is None else _filled(template, names), "utf-8")
        draft.rename(target)
    return [target / file.format(package=names.package) for file in _FILES]


def _filled(template: str, names: Names) -> str:
    """A template with the names in it."""
    text = (_TEMPLATES / template).read_text("utf-8")
    return Template(text).substitute(vars(names))
