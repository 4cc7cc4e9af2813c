"""From names to classes: built in, registered, installed, imported."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import kvpolicy
from kvpolicy import registry
from kvpolicy.policies.window import Window
from kvpolicy.registry import BUILT_IN, available, find, is_registered, parse, register


@pytest.fixture(autouse=True)
def fresh_registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Start and leave with nothing registered and no installed policies remembered."""
    monkeypatch.setattr(registry, "_registered", {})
    registry._known_paths.cache_clear()
    yield
    registry._known_paths.cache_clear()


class Own(kvpolicy.ScorePolicy):
    """A policy of this file."""

    name = "own"

    def score(self, view: kvpolicy.View) -> object:
        """Rate by position."""
        return view.positions


class AnotherOwn(Own):
    """A second policy of the same name."""


class Nameless(Own):
    """A policy without a name."""

    name = ""


def test_built_in_policies_are_available_under_their_own_names() -> None:
    """Proves that the literal table points to the classes it says."""
    assert {*BUILT_IN} <= {*available()}
    assert all(cls.name == name for name, cls in available().items())
    assert [*available()] == sorted(available())


def test_registered_policies_are_known_by_name() -> None:
    """Proves register, which may decorate, and the named canonical spec."""
    assert register(Own) is Own
    assert available()["own"] is Own
    policy = parse("own:budget=4")
    assert type(policy) is Own
    assert str(policy) == "own:budget=4"
    assert is_registered(Own)


def test_unregistered_policies_print_their_import_path() -> None:
    """Proves that str() never gives a name that parse would not know."""
    assert str(Own(budget=4)).endswith("test_registry.Own:budget=4")
    assert not is_registered(Own)
    assert not is_registered(AnotherOwn)


def test_registering_twice_is_harmless() -> None:
    """Proves idempotence for the same class."""
    assert register(register(Own)) is Own


@pytest.mark.parametrize("name", ["window", "own"])
def test_taken_names_are_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Proves that neither built-in nor registered policies can be replaced."""
    register(Own)
    monkeypatch.setattr(AnotherOwn, "name", name)
    with pytest.raises(kvpolicy.PolicyError, match=f"'{name}' is taken; give AnotherOwn another"):
        register(AnotherOwn)
    assert find("window") is Window
    assert find("own") is Own


@pytest.mark.parametrize("name", ["", "my-policy", "a.b", "a:b", "1st"])
def test_names_that_specs_cannot_hold_are_refused(name: str, monkeypatch: object) -> None:
    """Proves that a registered name can always be written in a spec."""
    monkeypatch.setattr(Nameless, "name", name)
    with pytest.raises(kvpolicy.PolicyError, match=r"Nameless\.name must be an identifier"):
        register(Nameless)


@pytest.mark.parametrize("thing", [None, 4, "window", dict, kvpolicy.Ledger])
def test_only_policies_can_be_registered(thing: object) -> None:
    """Proves that other things are refused and pointed to the base class."""
    with pytest.raises(kvpolicy.PolicyError, match=r"derive it from kvpolicy\.ScorePolicy"):
        register(thing)


def test_subclasses_of_built_in_policies_do_not_take_their_name() -> None:
    """Proves that an inherited name is not mistaken for the built-in policy."""
    assert str(InheritsName(budget=4)).endswith("InheritsName:budget=4")


class InheritsName(Window):
    """Has the name of another policy."""


# --- import paths -----------------------------------------------------------------------------


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Give a folder on the import path with a package of policies."""
    monkeypatch.syspath_prepend(tmp_path)
    package = tmp_path / "strangers"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "policies.py").write_text(
        "import kvpolicy\n"
        "class Newest(kvpolicy.ScorePolicy):\n"
        "    name = 'newest'\n"
        "    bonus: int = 0\n"
        "    def score(self, view):\n"
        "        return view.positions\n"
        "not_a_class = 4\n"
    )
    (package / "explodes.py").write_text("raise RuntimeError('not today')\n")
    (package / "garbled.py").write_text("def (\n")
    yield tmp_path
    for name in [name for name in sys.modules if name.partition(".")[0] == "strangers"]:
        del sys.modules[name]


def test_import_paths_are_specs(module: Path) -> None:
    """Proves that a dotted name is imported and printed back."""
    policy = parse("strangers.policies.Newest:budget=4,bonus=2")
    assert str(policy) == "strangers.policies.Newest:budget=4,bonus=2"
    assert "newest" not in available()


@pytest.mark.parametrize(
    ("path", "word"),
    [
        ("strangers.policies.Oldest", "AttributeError"),
        ("strangers.policies.not_a_class", "is not a retention policy"),
        ("strangers.explodes.Policy", "RuntimeError: not today"),
        ("strangers.garbled.Policy", "SyntaxError"),
        ("strangers.nowhere.Policy", "ModuleNotFoundError"),
        ("strangers.policies.Newest.Inner", "ModuleNotFoundError"),
        (".policies.Newest", "unknown policy"),
        ("strangers..Newest", "unknown policy"),
        ("strangers.policies.", "unknown policy"),
        ("strangers.pol icies.Newest", "unknown policy"),
    ],
)
def test_import_paths_that_lead_nowhere_are_policy_errors(
    module: Path, path: str, word: str
) -> None:
    """Proves that whatever a stranger's module does, the caller gets a PolicyError."""
    with pytest.raises(kvpolicy.PolicyError, match=word):
        parse(f"{path}:budget=4")


# --- entry points -----------------------------------------------------------------------------


def install(folder: Path, *lines: str) -> None:
    """Lay out a distribution's metadata as an installer does."""
    info = folder / "strangers-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: strangers\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("\n".join(["[kvpolicy.policies]", *lines, ""]))
    registry._known_paths.cache_clear()


def test_installed_policies_are_known_by_their_entry_point(module: Path) -> None:
    """Proves the group kvpolicy.policies, through importlib.metadata."""
    install(module, "newest = strangers.policies:Newest")
    assert available()["newest"].__module__ == "strangers.policies"
    policy = parse("newest:budget=4")
    assert str(policy) == "newest:budget=4"
    with pytest.raises(kvpolicy.PolicyError, match=r"known policies: .*newest"):
        parse("oldest:budget=4")


def test_installed_policies_cannot_replace_built_in_ones(module: Path) -> None:
    """Proves that `window` means the same everywhere."""
    install(module, "window = strangers.policies:Newest")
    assert find("window") is Window


def test_installed_names_cannot_be_registered_again(
    module: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Proves that a process cannot shadow what other processes would resolve otherwise."""
    install(module, "own = strangers.policies:Newest")
    with pytest.raises(kvpolicy.PolicyError, match="'own' is taken"):
        register(Own)


def test_policies_are_imported_only_when_asked_for(module: Path) -> None:
    """Proves that a broken distribution does not break the others' specs."""
    install(module, "broken = strangers.explodes:Policy")
    assert type(parse("window:budget=4")) is Window
    with pytest.raises(kvpolicy.PolicyError, match=r"cannot import policy 'broken'.*not today"):
        parse("broken:budget=4")
