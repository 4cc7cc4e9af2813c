"""`kvpolicy check`: every fault is found and shown by example, and sound policies pass."""

import json
from pathlib import Path
from typing import Any

import pytest

import kvpolicy
from fixtures.broken_policies import CAUGHT_BY, FailsInModels
from kvpolicy.cli import main
from kvpolicy.cli.check import HOSTS, read_policy
from kvpolicy.cli.check_hosts import compare_hosts, verdict_of
from kvpolicy.cli.check_reference import Tally
from kvpolicy.errors import ContractError, PolicyError
from kvpolicy.promises import CONTRACT
from kvpolicy.registry import BUILT_IN

REQUIRED = {
    "bswa": "block=16,segments=2",
    "fam": "block=16,segments=1,slots=6",
    "infini": "segment=32",
    "mix": "layers=(0:window;1-:h2o),budget=48",
}
"""Parameters of built-in policies that take no budget."""


QUICKLY = ("sinks", "h2o", "snapkv", "compressive", "mix")
"""One policy for each kind of evidence, and for prompts, memories and layers."""


def spec_of(name: str) -> str:
    """A built-in policy as `kvpolicy check` is asked for it."""
    return f"{name}:{REQUIRED[name]}" if name in REQUIRED else name


def result_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, Any]]:
    """The exit code and the JSON of a check."""
    code = main(["check", *arguments, "--json", "-"])
    return code, json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("cls", "name"), CAUGHT_BY.items(), ids=lambda x: getattr(x, "__name__", x)
)
def test_fault_is_found_with_an_example_that_fails(
    cls: type, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each fault makes the check exit with 1, names the promise, and can be seen again by hand."""
    spec = f"fixtures.broken_policies:{cls.__name__}"
    code, result = result_of(capsys, spec, "--examples", "4")
    assert code == 1
    assert (result["hosts"], result["speed"]) == ([], [])
    assert result["passed"] is False
    broken = {each["check"]: each for each in result["contract"] if not each["passed"]}
    assert name in broken
    assert broken[name]["problem"]
    with pytest.raises(Exception) as caught:  # noqa: PT011  (a policy may raise anything)
        exec(broken[name]["example"], {})
    assert isinstance(caught.value, ContractError | PolicyError)


def test_text_shows_the_promise_the_problem_and_the_example(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A reader is told what is broken, where, and by which smallest case."""
    assert main(["check", "fixtures.broken_policies:HalvesInPlace", "--examples", "6"]) == 1
    text = capsys.readouterr().out
    assert "they change nothing that they are shown.   " in text
    assert "BROKEN" in text
    assert "score() changed view.accumulated in place; make a new tensor" in text
    assert "from kvpolicy.promises import leaves_the_view_alone" in text
    assert "Case(lengths=(" in text
    script = text.partition("the smallest case found:")[2].partition("\n\n")[0]
    with pytest.raises(ContractError):
        exec(script, {})  # as it stands there, wrapped lines included
    assert f"{len(CONTRACT)} promises checked, 1 broken" in text


def test_a_sound_policy_passes_with_all_its_figures(capsys: pytest.CaptureFixture[str]) -> None:
    """Contract kept, both hosts agree, speed stands beside four built-in policies, exit 0."""
    spec = "fixtures.policies:RowTimesKeyNorm:power=0.5"
    code, result = result_of(
        capsys, spec, "--examples", "1", "--hosts", "simulator", "transformers"
    )
    assert code == 0
    assert result["policy"] == "fixtures.policies.RowTimesKeyNorm:budget=48,power=0.5"
    assert [each["check"] for each in result["contract"]] == [c.__name__ for c in CONTRACT]
    assert all(each["passed"] and each["example"] is None for each in result["contract"])
    assert [each["outcome"] for each in result["hosts"]] == ["agrees", "agrees"]
    names = [each["policy"].partition(":")[0] for each in result["speed"]]
    assert names[1:] == ["window", "h2o", "tova", "keydiff"]
    assert all(
        0 < each["policy_seconds_per_token"] < each["step_seconds_per_token"]
        for each in result["speed"]
    )


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in QUICKLY else pytest.mark.slow) for name in BUILT_IN],
)
def test_built_in_policy_agrees_in_simulator_and_transformers(name: str) -> None:
    """Every policy of the package keeps the same positions in both, compared head by head."""
    policy = read_policy(spec_of(name))
    found = list(compare_hosts(policy, ("simulator", "transformers"), lambda _: None))
    assert [(verdict.host, verdict.outcome) for verdict in found] == [
        ("simulator", "agrees"),
        ("transformers", "agrees"),
    ], found


@pytest.mark.slow
@pytest.mark.parametrize("name", BUILT_IN)
def test_built_in_policy_keeps_the_contract_in_all_settings(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every policy of the package passes, with each setting changed that its class takes."""
    code, result = result_of(capsys, spec_of(name), "--no-hosts")
    assert code == 0, [each["problem"] for each in result["contract"]]


def test_a_failure_in_one_host_only_is_found() -> None:
    """What works on drawn cases and fails on a real model is told, with the host and the error."""
    policy = FailsInModels(budget=48)
    simulator, transformers = compare_hosts(policy, ("simulator", "transformers"), lambda _: None)
    assert simulator.outcome == "agrees"
    assert transformers.outcome == "differs"
    assert "it fails: ValueError: too many values to unpack" in transformers.detail


def test_a_host_that_refuses_says_why_and_fails_nothing() -> None:
    """A policy that a host cannot honour is refused there, before anything starts."""
    policy = kvpolicy.parse("fam:block=16,segments=1,slots=6,level=model")
    for verdict in compare_hosts(policy, ("simulator", "vllm"), lambda _: None):
        assert verdict.outcome == "refused"
        assert verdict.is_sound
        assert "weights" in verdict.detail


def test_a_host_that_is_not_installed_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hosts are compared as far as they are there; the others are named."""
    monkeypatch.setattr("kvpolicy.extras.find_spec", lambda _: None)
    policy = kvpolicy.parse("window:budget=48")
    found = list(compare_hosts(policy, HOSTS, lambda _: None))
    assert [verdict.outcome for verdict in found] == ["agrees", "not installed", "not installed"]
    assert all(verdict.is_sound for verdict in found)


def test_a_policy_that_fails_with_many_slots_only_fails_the_check(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What shows at the size of a real request is a failure too, not the program's end."""
    spec = "fixtures.broken_policies:FailsWhenLarge"
    code, result = result_of(capsys, spec, "--examples", "1", "--no-hosts")
    assert (code, result["speed"]) == (1, [])
    [verdict] = result["hosts"]
    assert verdict["host"] == "1,088 slots"
    assert verdict["detail"] == "it fails: IndexError: too many"


@pytest.mark.slow
@pytest.mark.vllm
def test_a_policy_that_knows_its_host_is_found(capsys: pytest.CaptureFixture[str]) -> None:
    """A policy that decides otherwise in vLLM alone passes the contract and fails the check."""
    spec = "fixtures.broken_policies:KnowsItsHost"
    code, result = result_of(capsys, spec, "--examples", "1")
    assert code == 1
    assert all(each["passed"] for each in result["contract"])
    outcomes = {each["host"]: each["outcome"] for each in result["hosts"]}
    assert outcomes == {"simulator": "agrees", "transformers": "agrees", "vllm": "differs"}
    assert "prompt of 70 tokens, layer 0, KV head 0" in result["hosts"][2]["detail"]


@pytest.mark.slow
@pytest.mark.vllm
def test_vllm_agrees_about_a_sound_policy() -> None:
    """A stranger's policy keeps in vLLM, in chunks and in a batch, what transformers keeps."""
    policy = kvpolicy.parse("fixtures.policies.FadingMaximum:budget=48")
    [verdict] = compare_hosts(policy, ("vllm",), lambda _: None)
    assert verdict.outcome == "agrees", verdict.detail


def test_a_module_in_the_working_directory_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file beside the user is enough: no installation, no path to be set."""
    source = (
        "import kvpolicy\n\n\nclass Newest(kvpolicy.ScorePolicy):\n"
        "    def score(self, view):\n        return view.positions\n"
    )
    (tmp_path / "beside_me.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*__import__("sys").path])
    code, result = result_of(capsys, "beside_me:Newest", "--no-hosts", "--examples", "1")
    assert (code, result["policy"]) == (0, "beside_me.Newest:budget=48")
    assert {path.name for path in tmp_path.iterdir()} <= {"beside_me.py", "__pycache__"}


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("fixtures.policies:FadingMaximum", "fixtures.policies.FadingMaximum:budget=48"),
        ("fixtures.policies.FadingMaximum", "fixtures.policies.FadingMaximum:budget=48"),
        ("fixtures.policies:FadingMaximum:budget=9", "fixtures.policies.FadingMaximum:budget=9"),
        ("h2o", "h2o:budget=48"),
        ("h2o:recent=0.25", "h2o:budget=48,recent=0.25"),
        ("bswa:block=8,segments=2", "bswa:block=8,segments=2"),
        ("full", "full"),
        ("snapkv", "snapkv:budget=96"),
    ],
)
def test_policies_are_named_by_module_and_class_or_by_spec(text: str, spec: str) -> None:
    """MODULE:CLASS, import paths, names and specs are read, and a budget is filled in."""
    assert str(read_policy(text)) == spec


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("nowhere:Mine", "cannot import policy 'nowhere.Mine'"),
        ("fixtures.policies:Missing", "has no attribute 'Missing'"),
        ("fixtures.policies:torch", "is not a retention policy"),
        ("fixtures.policies:FadingMaximum:power=2", "has no key 'power'; its keys: "),
        ("bswa", "bswa needs block"),
        ("h2o:sinks=200", "budget must exceed sinks, got budget=160"),
    ],
)
def test_bad_usage_is_one_line(text: str, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    """What names no policy exits with 2, in one line that says why."""
    assert main(["check", text]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert told in line


def test_a_policy_that_never_gets_to_evict_is_not_compared() -> None:
    """Hosts that evict nothing agree about nothing: the check asks for smaller parameters."""
    policy = kvpolicy.parse("bswa:block=512,segments=2")
    with pytest.raises(PolicyError, match="evicts nothing within 224 tokens"):
        list(compare_hosts(policy, HOSTS, lambda _: None))


def test_agreement_by_near_ties_alone_is_no_agreement() -> None:
    """A tally of excused differences is undecided; one real difference decides."""
    tally = Tally()
    tally.add("a near-tie", is_legal=True)
    assert verdict_of(tally, "vllm", "").outcome == "undecided"
    tally.add(None)
    assert verdict_of(tally, "vllm", "").outcome == "agrees"
    tally.add("a difference")
    assert verdict_of(tally, "vllm", "").detail == "a difference"
