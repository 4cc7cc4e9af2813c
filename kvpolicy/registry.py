"""From names and specs to policies.

Built-in policies are a literal table, so that they work without installation metadata; other
distributions add theirs through the entry-point group ``kvpolicy.policies``; a spec whose
name contains a dot is imported. Classes are imported only when asked for.
"""

# pyright: reportUnnecessaryIsInstance=false

import importlib
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from inspect import isclass
from typing import TypeVar

from kvpolicy.errors import PolicyError
from kvpolicy.policy import CachePolicy, parameters
from kvpolicy.spec import shown, split_spec

P = TypeVar("P", bound=type[CachePolicy])

BUILT_IN = {
    "full": "kvpolicy.policies.full:Full",
    "window": "kvpolicy.policies.window:Window",
    "sinks": "kvpolicy.policies.sinks:Sinks",
    "h2o": "kvpolicy.policies.h2o:H2O",
    "tova": "kvpolicy.policies.tova:TOVA",
    "snapkv": "kvpolicy.policies.snapkv:SnapKV",
    "knorm": "kvpolicy.policies.knorm:KNorm",
    "keydiff": "kvpolicy.policies.keydiff:KeyDiff",
    "random": "kvpolicy.policies.random:Random",
    "bswa": "kvpolicy.policies.bswa:BSWA",
    "compressive": "kvpolicy.policies.compressive:Compressive",
    "centroid": "kvpolicy.policies.centroid:Centroid",
    "infini": "kvpolicy.policies.infini:Infini",
    "fam": "kvpolicy.policies.fam:FAM",
    "mix": "kvpolicy.policies.mix:Mix",
}
ENTRY_POINT_GROUP = "kvpolicy.policies"

_registered: dict[str, type[CachePolicy]] = {}


def register(cls: P) -> P:
    """Make a policy known by its name in this process, and return it.

    Worker processes do not see it: give them an entry point or an import-path spec.

    Raises:
        PolicyError: It has no name, or the name belongs to another policy.
    """
    _require_policy(cls, repr(cls))
    name = cls.name
    if not name.isidentifier():
        raise PolicyError(f"{cls.__name__}.name must be an identifier: got {name!r}; set `name`")
    if name in _known_paths() or _registered.get(name, cls) is not cls:
        raise PolicyError(f"the name {name!r} is taken; give {cls.__name__} another `name`")
    _registered[name] = cls
    return cls


def is_registered(cls: type[CachePolicy]) -> bool:
    """Whether specs may call this class by its name."""
    path = _known_paths().get(cls.name)
    return _registered.get(cls.name) is cls or path == f"{cls.__module__}:{cls.__qualname__}"


def available() -> dict[str, type[CachePolicy]]:
    """All policies that have a name, sorted: built in, installed and registered ones."""
    return {name: find(name) for name in sorted(known_names())}


def known_names() -> set[str]:
    """Names that specs may use, without importing any policy."""
    return {*_known_paths(), *_registered}


def find(name: str) -> type[CachePolicy]:
    """Give the policy class of a name or of an import path.

    Raises:
        PolicyError: Nothing of that name exists, or it is not a policy.
    """
    if name in _registered:
        return _registered[name]
    path = _known_paths().get(name)
    if path is None and not _is_import_path(name):
        known = ", ".join(sorted(known_names()))
        raise PolicyError(
            f"unknown policy {shown(name)}; known policies: {known}; "
            "or give an import path such as package.module.Class"
        )
    module_name, _, attribute = (path or ":".join(name.rsplit(".", 1))).partition(":")
    try:
        cls = getattr(importlib.import_module(module_name), attribute)
    except Exception as error:  # whatever a stranger's module does when it is imported
        raise PolicyError(
            f"cannot import policy {shown(name)}: {type(error).__name__}: {error}; "
            "the module must be importable in every process"
        ) from error
    return _require_policy(cls, name)


def parse(spec: "str | CachePolicy") -> CachePolicy:
    """Turn a spec such as ``h2o:budget=1024,recent=0.5`` into a policy.

    A policy passes through unchanged; ``parse(str(policy)) == policy``.

    Raises:
        PolicyError: Unknown name or key, missing or impossible value.
    """
    if isinstance(spec, CachePolicy):
        return spec
    if not isinstance(spec, str):
        raise PolicyError(
            f"a policy spec is a string such as 'window:budget=256', got {shown(spec)}"
        )
    name, texts = split_spec(spec)
    cls = find(name)
    table = parameters(cls)
    unknown = [key for key in texts if key not in table]
    if unknown:
        raise PolicyError(f"{name} has no key {shown(unknown[0])}; its keys: {', '.join(table)}")
    missing = [
        key for key, parameter in table.items() if parameter.is_required and key not in texts
    ]
    if missing:
        raise PolicyError(f"{name} needs {missing[0]}; write {name}:{missing[0]}=VALUE")
    return cls(
        **{table[k].attribute: table[k].read(text, f"{name}:{k}") for k, text in texts.items()}
    )


def _is_import_path(name: str) -> bool:
    return "." in name and all(part.isidentifier() for part in name.split("."))


def _require_policy(cls: object, name: str) -> type[CachePolicy]:
    if isclass(cls) and issubclass(cls, CachePolicy):
        return cls
    raise PolicyError(f"{name} is not a retention policy; derive it from kvpolicy.ScorePolicy")


@cache
def _known_paths() -> dict[str, str]:
    """Names of built-in and installed policies; built-in ones cannot be replaced."""
    installed: dict[str, EntryPoint] = {e.name: e for e in entry_points(group=ENTRY_POINT_GROUP)}
    return {**{name: e.value for name, e in installed.items()}, **BUILT_IN}
