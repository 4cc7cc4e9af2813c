"""docs/reference/json.md: every key and type of what commands write, and none besides."""

import json
import re
from collections.abc import Iterator
from contextlib import chdir
from pathlib import Path
from typing import Any

import pytest

from fixtures.documents import ROOT
from kvpolicy.cli import main

PAGE = ROOT / "docs" / "reference" / "json.md"

TYPES: dict[str, tuple[type, ...]] = {
    "integer": (int,),
    "number": (int, float),
    "text": (str,),
    "boolean": (bool,),
    "object": (dict,),
    "list": (list,),
    "null": (type(None),),
}

Place = tuple[str, ...]
"""Keys from the outside in; ``[]`` for the items of a list."""

GRID = """
budgets = [16]
policies = ["window"]
[[replay]]
traces = ["t.kvtrace"]
[[eval]]
contexts = [48]
samples = 2
"""

BROKEN = """
import kvpolicy
class Broken(kvpolicy.ScorePolicy):
    name = "broken"
    needs = ("last_row",)
    def score(self, view):
        return -view.weights * view.positions.shape[-1]
"""

COMMANDS = {
    "policies": ["policies"],
    "doctor": ["doctor"],
    "capture": [
        "capture --tokens 96 --sequences 2 --out t.kvtrace",
        "trace synth --pattern needle --tokens 96 --prompt-len 80 --out n.kvtrace",
    ],
    "inspect": [
        "inspect n.kvtrace --verify --slice tokens=0:48 --out s.kvtrace --export s.safetensors",
        "inspect cut.kvtrace",
    ],
    "inspect, with --repair": ["inspect n.kvtrace --repair r.kvtrace"],
    "replay": [
        "replay t.kvtrace --policy window:budget=16 centroid:budget=16 --oracle",
        "replay n.kvtrace --policy window:budget=16 --no-details --no-outputs",
        "replay n.kvtrace --policy window:budget=16",
    ],
    "replay, with --dry-run": ["replay n.kvtrace --policy window:budget=16 --dry-run"],
    "sweep, with --dry-run": ["sweep grid.toml --out swept --dry-run"],
    "fit": ["fit t.kvtrace --policy compressive:budget=32,fn=conv --steps 2 --out k.safetensors"],
    "allocate": ["allocate t.kvtrace --policy window:budget=16 --out b.safetensors"],
    "recommend": ["recommend t.kvtrace --policy window h2o"],
    "plan": ["plan --policy h2o:budget=256,rope_beyond=allow --context 4096,1000000"],
    "new": ["new keen"],
    "eval": [
        "eval --policy window:budget=16 --context 48 --samples 2",
        "eval --task passkey --policy window:budget=16 --context 96 --samples 2",
        "eval --task reuse --pairs 2 --policy window:budget=16 --context 192 --samples 1",
        "eval --task recall --pairs 2 --policy window:budget=16 --context 128 --samples 2",
        "eval --task needle --policy window:budget=16 --context 192 --samples 2",
        "eval --task repeat --policy window:budget=16 --context 192 --samples 1",
    ],
}
"""What is run for each table; the rest takes longer."""

SLOW = {
    "check": [
        "check h2o:budget=8 --examples 2 --hosts simulator",
        "check broken:Broken --no-hosts",
    ],
    "sweep": ["sweep grid.toml --out swept"],
    "demo": ["demo --rounds 1 --windows 1"],
}


def tables() -> dict[str, dict[Place, list[str]]]:
    """Places and types of each table: a heading's first, and those of a sentence "With ...:"."""
    found: dict[str, dict[Place, list[str]]] = {}
    name = ""
    for line in PAGE.read_text("utf-8").splitlines():
        if line.startswith("## "):
            name = heading = line.removeprefix("## ")
        elif option := re.fullmatch(r"With `(--\S+)`:", line):
            name = f"{heading}, with {option[1]}"
        elif line.startswith("| `"):
            keys, types, _ = line.removeprefix("| ").split(" | ", maxsplit=2)
            for key in re.findall(r"`([^`]+)`", keys):
                found.setdefault(name, {})[place_of(key)] = re.split(r", | or ", types.strip())
    return found


def place_of(key: str) -> Place:
    """The place that a key such as ``results[].regret.lower`` names."""
    return tuple(part for part in re.split(r"\.|(\[\])", key) if part)


def fits(place: Place, documented: Place) -> bool:
    """Whether a place is the documented one, in which capitals stand for any key."""
    return len(place) == len(documented) and all(
        (part in (key, "[]") and part == key) or (key.isupper() and part != "[]")
        for part, key in zip(place, documented, strict=True)
    )


def leaves(value: Any, whole: set[Place], place: Place = ()) -> Iterator[tuple[Place, Any]]:
    """Every value that has no further place in it; what is documented as a whole is one."""
    is_whole = any(fits(place, each) for each in whole)
    if isinstance(value, dict) and value and not is_whole:
        for key, item in value.items():
            yield from leaves(item, whole, (*place, key))
    elif isinstance(value, list) and value and not is_whole:
        for item in value:
            yield from leaves(item, whole, (*place, "[]"))
    else:
        yield place, value


def compare(documented: dict[Place, list[str]], results: list[Any]) -> list[str]:
    """What is wrong with a table, seen the results."""
    whole = {place for place, types in documented.items() if {"object", "list"} & {*types}}
    wrong: list[str] = []
    seen: set[Place] = set()
    for place, value in (leaf for result in results for leaf in leaves(result, whole)):
        found = [each for each in documented if fits(place, each)]
        if not found and value in (None, [], {}):  # instead of what would be in it
            inner = [each for each in documented if fits(place, each[: len(place)])]
            seen.update(inner if value == [] else ())
            found = inner
        elif found:
            allowed = [t for name in documented[found[0]] for t in TYPES[name]]
            if type(value) not in allowed:
                wrong.append(f"{'.'.join(place)} is {value!r}, not {documented[found[0]]}")
        if not found:
            wrong.append(f"{'.'.join(place)} is not documented")
        seen.update(found)
    wrong += [f"{'.'.join(each)} was not seen" for each in documented if each not in seen]
    return sorted({*wrong})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where commands run, one after the other."""
    made = tmp_path_factory.mktemp("json")
    (made / "grid.toml").write_text(GRID)
    (made / "broken.py").write_text(BROKEN)
    return made


def results_of(commands: list[str], folder: Path) -> list[Any]:
    """What commands write."""
    results = []
    with chdir(folder):
        for command in commands:
            target = Path("result.json")
            target.unlink(missing_ok=True)
            main([*command.split(), "--json", str(target)])
            results.append(json.loads(target.read_text("utf-8")))
    return results


@pytest.fixture(scope="module")
def traces(folder: Path) -> list[Any]:
    """The traces that other commands read, and what is written about them."""
    results = results_of(COMMANDS["capture"], folder)
    whole = (folder / "n.kvtrace").read_bytes()
    (folder / "cut.kvtrace").write_bytes(whole[: len(whole) // 2])
    return results


def test_every_table_is_checked() -> None:
    """No table of the page is left out below."""
    assert {*tables()} == {*COMMANDS, *SLOW, "Ledgers"}


@pytest.mark.parametrize("name", COMMANDS)
def test_keys_and_types_are_those_of_the_page(name: str, folder: Path, traces: list[Any]) -> None:
    """What commands really write has the keys and types of the page, all of them, and no others."""
    results = traces if name == "capture" else results_of(COMMANDS[name], folder)
    assert compare(tables()[name], results) == []
    if name == "replay":
        ledgers = [x for result in results for each in result["results"] for x in each["ledgers"]]
        assert compare(tables()["Ledgers"], ledgers) == []


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.parametrize("name", SLOW)
def test_keys_of_slow_commands(name: str, folder: Path, traces: list[Any]) -> None:
    """So have those that start processes or measure speed."""
    assert compare(tables()[name], results_of(SLOW[name], folder)) == []


def test_differences_are_seen() -> None:
    """The comparison is not blind: keys too many, keys too few, other types."""
    page = {("a", "[]", "b"): ["integer"], ("c",): ["text", "null"], ("d", "X"): ["list"]}
    right = {"a": [{"b": 1}], "c": None, "d": {"any": [1]}}
    assert compare(page, [right]) == []
    assert compare(page, [right | {"a": []}]) == []
    assert compare(page, [right | {"e": 1}]) == ["e is not documented"]
    assert compare(page, [right | {"a": [{"b": True}]}]) == ["a.[].b is True, not ['integer']"]
    assert compare(page, [{"a": [{"b": 1}], "d": {"any": []}}]) == ["c was not seen"]
