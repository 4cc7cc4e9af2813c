"""`kvpolicy policies`: complete, and true about the hosts."""

import ast
import json
from pathlib import Path
from typing import get_args

import pytest

import kvpolicy
from kvpolicy import PolicyError
from kvpolicy.capabilities import HOSTS, Host, capability, settings
from kvpolicy.cli import main
from kvpolicy.cli.policies import describe
from kvpolicy.features import ENGINES, FEATURES
from kvpolicy.policy import parameters

ROOT = Path(__file__).parents[2]

PARAMETERS = {name: {"budget": 64} for name in kvpolicy.available()} | {
    "full": {},
    "snapkv": {"budget": 64, "window": 16},
    "bswa": {"block": 16, "segments": 2},
    "fam": {"block": 16, "segments": 2, "slots": 8},
    "infini": {"segment": 16},
    "mix": {"layers": "(0-:window)", "budget": 64},
}


def listed(*arguments: str, capsys: pytest.CaptureFixture[str]) -> list[dict]:
    """Run the command with `--json -` and return its policies."""
    assert main(["policies", *arguments, "--json", "-"]) == 0
    return json.loads(capsys.readouterr().out)["policies"]


def test_all_policies_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    """The list is what specs may name, each with summary, paper and hosts."""
    entries = listed(capsys=capsys)
    assert [entry["name"] for entry in entries] == list(kvpolicy.available())
    for entry in entries:
        assert entry["keeps"]
        assert entry["paper"]
        assert set(entry["hosts"]) == set(HOSTS)


@pytest.mark.parametrize("name", kvpolicy.available())
def test_parameters_are_those_of_the_spec(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A policy's entry names exactly the keys that its specs take, with their defaults."""
    (entry,) = listed(name, capsys=capsys)
    table = parameters(kvpolicy.available()[name])
    assert [p["key"] for p in entry["parameters"]] == list(table)
    assert [p["key"] for p in entry["parameters"] if p["required"]] == [
        key for key, parameter in table.items() if parameter.is_required
    ]


@pytest.mark.parametrize("name", kvpolicy.available())
def test_text_explains_every_key(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The text of one policy holds its docstring, paper and keys."""
    assert main(["policies", name]) == 0
    text = capsys.readouterr().out
    cls = kvpolicy.available()[name]
    assert cls.paper in text
    assert all(key in text for key in parameters(cls))
    assert all(f"{host}: " in text for host in HOSTS)


def test_import_path_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    """A policy without a registered name is found by its import path."""
    (entry,) = listed("kvpolicy.policies.h2o.H2O", capsys=capsys)
    assert entry["needs"] == ["accumulated"]


class Greedy(kvpolicy.ScorePolicy):
    """Wants to see what no host shows."""

    needs = ("values",)


def test_capability_follows_what_a_host_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    """A need that a host does not serve is a no with the reason."""
    monkeypatch.setitem(HOSTS, "blind", Host(needs=(), refuses=()))
    assert capability(Greedy, "blind") == "no: it needs values"
    assert describe("greedy", Greedy)["hosts"]["blind"].startswith("no")


@pytest.mark.parametrize("name", PARAMETERS)
@pytest.mark.parametrize("host", HOSTS)
def test_capabilities_are_what_the_hosts_do(name: str, host: str) -> None:
    """The literal table of capabilities agrees with what each host accepts and refuses."""
    cls = kvpolicy.available()[name]
    refusal = refusal_of(host, cls(**PARAMETERS[name]))
    assert (refusal is None) == capability(cls, host).startswith("yes")
    for key, value in {option for each in HOSTS.values() for option in each.refuses}:
        if key in parameters(cls) and value in get_args(parameters(cls)[key].kind):
            try:
                policy = cls(**PARAMETERS[name] | {key: value})
            except kvpolicy.PolicyError:
                continue  # no host is asked for what the class refuses itself
            refusal = refusal_of(host, policy)
            assert (refusal is not None) == (f"{key}={value}" in capability(cls, host))


def test_a_value_that_one_host_refuses_is_named() -> None:
    """A policy that a host runs in part says which part it does not."""
    from kvpolicy.policies.fam import FAM

    assert capability(FAM, "vllm") == "yes, not level=model"
    assert capability(FAM, "transformers") == "yes"
    assert capability(FAM, "simulator") == "yes"
    assert capability(kvpolicy.available()["mix"], "vllm").startswith("yes, only parts with equal")


@pytest.mark.parametrize("name", PARAMETERS)
def test_settings_are_what_the_classes_take(name: str) -> None:
    """A setting is listed as taken where the class can be made with it, and only there."""
    cls = kvpolicy.available()[name]
    for setting, is_taken in settings(cls).items():
        key, _, value = setting.partition("=")
        if key not in parameters(cls):
            assert not is_taken
            continue
        try:
            cls(**PARAMETERS[name] | {key: value})
        except kvpolicy.PolicyError:
            assert not is_taken, setting
        else:
            assert is_taken, setting


def test_features_are_listed_with_their_tests(capsys: pytest.CaptureFixture[str]) -> None:
    """JSON and text hold every feature; refusals come with what to do."""
    assert main(["policies", "--features", "--json", "-"]) == 0
    listed_features = json.loads(capsys.readouterr().out)["features"]
    assert [entry["name"] for entry in listed_features] == [row.name for row in FEATURES]
    for entry in listed_features:
        assert set(entry["engines"]) == set(ENGINES)
        assert set(entry["engines"].values()) != {"-"}
    assert main(["policies", "--features"]) == 0
    words = " ".join(capsys.readouterr().out.split())
    assert "drop --speculative-config" in words


def test_every_row_names_a_test_that_exists() -> None:
    """Nothing is said to work, or to be refused, that no test shows; names are not repeated."""
    for row in FEATURES:
        for answer in row.answers.values():
            file, _, function = answer.proof.partition("::")
            tree = ast.parse((ROOT / "tests" / file).read_text())
            names = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
            assert function in names, row.name
    assert len({row.name for row in FEATURES}) == len(FEATURES)


def test_the_readme_says_the_same() -> None:
    """The table "Policies and hosts" of the README agrees with the hosts."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    section = text.partition("## Policies and hosts")[2].partition("\n## ")[0]
    rows = [line.strip("| ").split(" | ") for line in section.splitlines() if line[:3] == "| `"]
    assert {row[0].split("`")[1] for row in rows} == set(PARAMETERS)
    for spec, _, *hosts in rows:
        name, *settings_of_row = spec.replace("`", "").split(", ")
        for host, answer in zip(HOSTS, hosts, strict=True):
            can = capability(kvpolicy.available()[name], host)
            refused = any(setting in can.partition("not ")[2] for setting in settings_of_row)
            assert (answer == "no") == (can.startswith("no") or refused), (spec, host)


def refusal_of(host: str, policy: kvpolicy.CachePolicy) -> str | None:
    """Why a host refuses a policy, whatever the model; None if it does not."""
    if host == "simulator":
        from fixtures.traces import Shape, header_of
        from kvpolicy_sim.support import require_supported

        try:
            require_supported(header_of(Shape()), [policy], "layer-local", has_weights=True)
        except PolicyError as error:
            return str(error)
        return None
    if host == "vllm":
        from kvpolicy_vllm.config import check_policy

        try:
            check_policy(policy)
        except PolicyError as error:
            return str(error)
        return None
    from fixtures.models import random_llama
    from kvpolicy_hf import PolicyCache

    model = random_llama(hidden_size=32, head_dim=8, intermediate_size=32, num_hidden_layers=1)
    try:
        PolicyCache(model, policy)
    except PolicyError as error:
        return str(error)
    return None
