"""`kvpolicy policies`: complete, and true about the hosts."""

import json
from typing import get_args

import pytest

import kvpolicy
from kvpolicy import PolicyError
from kvpolicy.cli import main
from kvpolicy.cli.policies import HOSTS, capability, describe
from kvpolicy.policy import parameters

PARAMETERS = {name: {"budget": 64} for name in kvpolicy.available()} | {
    "full": {},
    "snapkv": {"budget": 64, "window": 16},
    "bswa": {"block": 16, "segments": 2},
    "fam": {"block": 16, "segments": 2, "slots": 8},
    "infini": {"segment": 16},
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
    from kvpolicy.cli.policies import Host

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

    assert capability(FAM, "vllm") == "yes, not prefill=bulk, level=model"
    assert capability(FAM, "transformers") == "yes"
    assert capability(FAM, "simulator") == "yes"


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
