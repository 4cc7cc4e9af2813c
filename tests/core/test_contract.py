"""The contract suite itself: each promise is broken on purpose and must be called out."""

import builtins
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import kvpolicy
from fixtures.broken_policies import ForgetsSinks, SeedsTorch, WantsFloat32
from kvpolicy import agreement, engine, lookahead, promises, rehearsal, selection, testing
from kvpolicy.attention import AttentionLayer
from kvpolicy.errors import ContractError
from kvpolicy.policy import View
from kvpolicy.rehearsal import Case
from kvpolicy.slots import Slots
from kvpolicy.testing import CONTRACT, check_policy, example_view, run_check, variants


class Sound(kvpolicy.ScorePolicy):
    """Keeps every promise; the broken ones below derive from it."""

    needs = ("last_row", "accumulated", "keys")

    def score(self, view: View) -> Tensor:
        """Rate by the newest row."""
        return view.weights


class Assignable(Sound):
    """Lets itself be changed."""


Assignable.__setattr__ = object.__setattr__


class LeansOnWeights(Sound):
    """Looks at what it has not declared."""

    needs = ()

    def score(self, view: View) -> Tensor:
        """Rate by the newest row, which it is not shown."""
        return view.weights * 2


class ComplexScores(Sound):
    """Gives numbers without an order."""

    def score(self, view: View) -> Tensor:
        """Rate by a complex number."""
        return view.weights + 1j


class FlatScores(Sound):
    """Forgets the heads."""

    def score(self, view: View) -> Tensor:
        """Rate whole tokens."""
        return view.weights.mean(dim=1)


class WritesIntoTheView(Sound):
    """Works in place."""

    def score(self, view: View) -> Tensor:
        """Rate, and spoil what was shown."""
        return view.accumulated.mul_(0.5)


class Hoards(Sound):
    """Keeps more than its budget."""

    @property
    def occupancy(self) -> kvpolicy.Occupancy:
        """A law of its own."""
        return kvpolicy.Occupancy(self.budget + 1, self.interval)


_calls = itertools.count()


class Moody(Sound):
    """Depends on how often it was asked."""

    def score(self, view: View) -> Tensor:
        """Rate by position, up or down."""
        return view.positions * (-1) ** (next(_calls) // 3)


class CountsColumns(Sound):
    """Depends on how many candidates it is shown, which is up to the host."""

    def score(self, view: View) -> Tensor:
        """Rate by a hash of position and columns."""
        return view.positions * view.positions.shape[-1] % 7


class ComparesRows(Sound):
    """Looks at other requests."""

    def score(self, view: View) -> Tensor:
        """Rate by the distance from half of the batch's largest weight."""
        return (view.weights - view.weights.amax() / 2).abs()


class SpreadsNaN(Sound):
    """Looks at other requests without changing anything, unless one is broken."""

    def score(self, view: View) -> Tensor:
        """Rate by the newest row plus nothing."""
        return view.weights + 0 * view.weights.sum()


class ComparesHeads(Sound):
    """Looks at other heads."""

    def score(self, view: View) -> Tensor:
        """Rate by the distance from the heads' mean."""
        return (view.weights - view.weights.mean(dim=1, keepdim=True)).abs()


class WeighsHeads(Sound):
    """Gives some heads of a layer more say than others."""

    def score(self, view: View) -> Tensor:
        """Rate by keys, the higher heads counting more."""
        return view.keys[..., 0] * view.kv_heads


class CountsSlots(Sound):
    """Takes the order of slots for the order of tokens."""

    def score(self, view: View) -> Tensor:
        """Rate by slot."""
        return torch.arange(view.positions.shape[-1]).expand_as(view.positions)


class MeansEverything(Sound):
    """Averages over slots that are not held."""

    def score(self, view: View) -> Tensor:
        """Rate by the distance from the mean key."""
        return (view.keys - view.keys.mean(dim=2, keepdim=True)).norm(dim=-1)


class MeansByMultiplying(Sound):
    """Hides slots that are not held by a factor of zero."""

    def score(self, view: View) -> Tensor:
        """Rate by the distance from the mean key."""
        valid = view.valid[..., None].float()
        mean = (view.keys * valid).sum(dim=2, keepdim=True) / valid.sum(dim=2, keepdim=True)
        return (view.keys - mean).norm(dim=-1)


class Noisy(Sound):
    """Rates all slots nearly alike, with noise that depends on the batch."""

    def score(self, view: View) -> Tensor:
        """Rate by very little."""
        return 1 + view.positions * len(view.positions) % 7 * 1e-5


BROKEN = {
    Assignable: "is_a_value",
    LeansOnWeights: "runs_on_what_it_declares",
    ComplexScores: "runs_on_what_it_declares",
    FlatScores: "runs_on_what_it_declares",
    WritesIntoTheView: "leaves_the_view_alone",
    SeedsTorch: "leaves_the_host_alone",
    WantsFloat32: "takes_half_precision",
    Hoards: "holds_what_the_law_says",
    Moody: "answers_the_same_again",
    CountsColumns: "is_the_same_in_any_chunking",
    ComparesRows: "rows_do_not_interact",
    SpreadsNaN: "nan_stays_in_its_row",
    ComparesHeads: "heads_do_not_interact",
    CountsSlots: "slot_order_means_nothing",
    MeansEverything: "unheld_slots_mean_nothing",
    MeansByMultiplying: "unheld_slots_mean_nothing",
}


def the_check(name: str) -> testing.Check:
    """Find a check by name."""
    return next(check for check in CONTRACT if check.__name__ == name)


@pytest.fixture(autouse=True)
def no_memory() -> Iterator[None]:
    """Forget reference runs, which mutations of the core would spoil."""
    rehearsal.reference.cache_clear()
    yield
    rehearsal.reference.cache_clear()


def test_a_sound_policy_passes() -> None:
    """Proves that the base of the broken ones is sound but for having no importable home."""
    check_policy(Sound(budget=8), checks=CONTRACT[1:], examples=3)
    check_policy(Sound(budget=8, scope="layer"), checks=CONTRACT[1:], examples=3)


@pytest.mark.parametrize(("cls", "name"), BROKEN.items(), ids=lambda x: getattr(x, "__name__", x))
def test_broken_policy_is_caught_by_its_check(cls: type, name: str, request: Any) -> None:
    """Proves that each promise has teeth, and that the message carries a failing example."""
    if cls is Assignable:
        kvpolicy.registry._registered["assignable"] = cls
        request.addfinalizer(lambda: kvpolicy.registry._registered.pop("assignable"))
        cls.name = "assignable"
    with pytest.raises(ContractError) as caught:
        check_policy(cls(budget=8), checks=(the_check(name),), examples=20)
    message = str(caught.value)
    assert f"breaks {name}: " in message
    assert f"smallest case: {name}(kvpolicy.parse(" in message
    assert "Case(lengths=" in message


def test_a_class_nobody_can_import_is_told_so() -> None:
    """Proves that policies in functions are sent to the top level of a module."""

    class Local(Sound):
        """Lives in a function."""

    with pytest.raises(ContractError, match="top level of an importable module"):
        check_policy(Local(budget=8), checks=CONTRACT[:1])


def test_layer_scope_must_not_depend_on_how_heads_share_keys() -> None:
    """Proves the check of E1 T15 on a policy that weighs heads."""
    with pytest.raises(ContractError, match="copied_kv_heads_decide_alike"):
        check_policy(
            WeighsHeads(budget=8, scope="layer"),
            checks=(promises.copied_kv_heads_decide_alike,),
        )


def test_differences_at_near_ties_are_excused_and_counted() -> None:
    """Proves that floating-point noise fails no policy."""
    (outcome,) = check_policy(Noisy(budget=8), checks=(promises.rows_do_not_interact,))
    assert 0 < outcome.near_ties < outcome.cases


def test_a_check_that_only_meets_near_ties_fails() -> None:
    """Proves that a check that proved nothing does not pass."""

    def undecided(policy: kvpolicy.CachePolicy, case: Case) -> None:
        raise agreement.NearTie

    with pytest.raises(ContractError, match="breaks undecided: every case is a near-tie"):
        check_policy("tova:budget=8", checks=(undecided,))


def nothing_protected(policy: kvpolicy.EvictionPolicy, view: View) -> Tensor:
    """Protect no slot."""
    return torch.zeros_like(view.valid)


def doubled(victims: Tensor, held: int, surplus: int) -> Tensor:
    """Keep one slot twice."""
    kept = rehearsal_survivors(victims, held, surplus)
    kept[..., -1] = kept[..., 0]
    return kept


rehearsal_survivors = engine.survivors


def summed(layer: AttentionLayer, weights: Tensor) -> Tensor:
    """Add up the group, whatever was asked for."""
    return weights.sum(dim=2)


def hot(layer: AttentionLayer, q: Tensor, keys: Tensor, evicted: Tensor) -> Tensor:
    """Logits at the wrong temperature."""
    return unchanged_logits(layer, q, keys, evicted) * 1.01


unchanged_logits = AttentionLayer.logits


def step_that_counts_first(layer: AttentionLayer, slots: Slots, *new: Tensor) -> Tensor:
    """Count the token before anything can fail."""
    before = list(slots.tokens)
    try:
        return engine.step(layer, slots, *new)
    except rehearsal.PlannedFailure:
        slots.tokens = [n + 1 for n in before]
        raise


def extend_that_counts(layer: AttentionLayer, slots: Slots, *new: Tensor) -> Tensor:
    """Take an empty chunk for a token."""
    output = lookahead.extend(layer, slots, *new)
    if new[0].shape[2] == 0:
        slots.tokens = [n + 1 for n in slots.tokens]
    return output


class Threshold(Sound):
    """Distinguishes much attention from little, so that the scale of weights matters."""

    def score(self, view: View) -> Tensor:
        """Rate by whether the newest row gives more than its fair share."""
        return (view.weights * view.visible > 1).float()


@pytest.mark.parametrize(
    ("name", "policy", "target", "attribute", "mutant"),
    [
        ("keeps_what_is_protected", "h2o:budget=8", selection, "protected", nothing_protected),
        ("forgets_for_good", "window:budget=8", engine, "survivors", doubled),
        ("equal_query_heads_count_once", Threshold(budget=8), AttentionLayer, "pool", summed),
        ("keeps_one_set_under_layer_scope", "tova:budget=8", AttentionLayer, "pool", summed),
        ("attends_densely_within_its_budget", "full", AttentionLayer, "logits", hot),
        ("a_failure_changes_nothing", "tova:budget=8", rehearsal, "step", step_that_counts_first),
        (
            "no_tokens_change_nothing",
            "tova:budget=8",
            rehearsal,
            "extend",
            extend_that_counts,
        ),
    ],
)
def test_broken_core_is_caught_by_its_check(
    name: str,
    policy: kvpolicy.CachePolicy | str,
    target: object,
    attribute: str,
    mutant: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Proves the checks whose promise the core keeps for every policy."""
    monkeypatch.setattr(target, attribute, mutant)
    if name == "keeps_one_set_under_layer_scope":
        monkeypatch.setattr(selection, "select_victims", None)
        monkeypatch.setattr(engine, "select_victims", without_layer_scope)
    with pytest.raises(ContractError, match=f"breaks {name}: "):
        check_policy(policy, checks=(the_check(name),))


def without_layer_scope(policy: kvpolicy.EvictionPolicy, view: View, surplus: int) -> Tensor:
    """Let every head decide for itself."""
    candidates = view.valid & ~selection.protected(policy, view)
    return selection.lowest(policy.score(view), view.positions, candidates, surplus)


def test_smallest_case_reproduces_the_failure() -> None:
    """Proves that the example in the message fails when the check is called with it."""
    with pytest.raises(ContractError) as caught:
        check_policy(ComparesRows(budget=8), checks=(promises.rows_do_not_interact,))
    told = str(caught.value).partition("smallest case: rows_do_not_interact(")[2]
    case = eval(told.partition("), ")[2].removesuffix(")"), {"Case": Case})  # noqa: S307
    spec = told.partition("'")[2].partition("'")[0]
    parameters = dict(pair.split("=") for pair in spec.partition(":")[2].split(","))
    policy = ComparesRows(**{key: int(value) for key, value in parameters.items()})
    with pytest.raises(ContractError):
        promises.rows_do_not_interact(policy, case)


def test_draws_are_the_same_in_every_run() -> None:
    """Proves that a check fails or passes for everyone alike."""
    seen: list[list[tuple[kvpolicy.CachePolicy, Case]]] = [[], []]
    for drawn in seen:
        check_policy(Sound(budget=8), checks=(lambda *at, to=drawn: to.append(at),), examples=10)
    assert seen[0] == seen[1]
    assert len({case for _, case in seen[0]}) > 5


def test_missing_hypothesis_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    """Proves that the extra is named when it is missing."""
    real_import = builtins.__import__

    def refuse(name: str, *args: Any) -> Any:
        if name.startswith("hypothesis"):
            raise ImportError(name)
        return real_import(name, *args)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ImportError, match=r"pip install 'kvpolicy\[testing\]'"):
        check_policy("full")


def test_wrong_specs_are_policy_errors() -> None:
    """Proves that check_policy takes specs and refuses bad ones as parse does."""
    with pytest.raises(kvpolicy.PolicyError, match="unknown policy 'lru'"):
        check_policy("lru:budget=4")


def test_protection_is_what_the_keys_say() -> None:
    """Proves that a class whose properties promise less than its keys is called out."""
    with pytest.raises(
        ContractError, match=r"breaks keeps_what_is_protected: row \d, KV head \d lost"
    ):
        check_policy(
            ForgetsSinks(budget=8, sinks=2), checks=(the_check("keeps_what_is_protected"),)
        )


def test_an_outcome_tells_the_failure_in_parts() -> None:
    """Proves that programs get the problem, the policy, the case, and a line that fails."""
    outcome = run_check(ComparesRows(budget=8), promises.rows_do_not_interact)
    assert outcome.failure is not None
    assert outcome.failure.case is not None
    assert isinstance(outcome.failure.policy, ComparesRows)
    assert outcome.example is not None
    assert repr(outcome.failure.case) in outcome.example
    sound = run_check(Sound(budget=8), promises.forgets_for_good, examples=2)
    assert (sound.failure, sound.example, sound.cases) == (None, None, 2)


def test_variants_change_what_a_class_takes_and_nobody_chose() -> None:
    """Proves that protection, scope and prompts are tried where they can be, and only there."""
    assert [str(policy) for policy in variants(kvpolicy.parse("tova:budget=16"))] == [
        "tova:budget=16",
        "tova:budget=16,sinks=2,recent=2",
        "tova:budget=16,scope=head",
        "tova:budget=16,protect=(1:3)",
        "tova:budget=16,protect=prompt",
        "tova:budget=16,prefill=bulk",
    ]
    assert [str(policy) for policy in variants(kvpolicy.parse("full"))] == ["full"]
    chosen = kvpolicy.parse("h2o:budget=16,recent=4,scope=layer,group_pool=mean,prefill=bulk")
    with_spans = kvpolicy.parse(f"{chosen},protect=(1:3)")
    assert variants(chosen) == [chosen, with_spans]


def test_an_example_view_shows_what_the_policy_declares() -> None:
    """Proves that authors get a view to test on: one request, two heads, nothing undeclared."""
    view = example_view(Sound(budget=8), slots=9)
    assert view.weights is not None
    assert view.weights.shape == (1, 2, 9)
    assert view.values is None
    assert bool(view.valid.all())
    with pytest.raises(kvpolicy.PolicyError, match="never evicts"):
        example_view(kvpolicy.parse("full"))


def test_every_check_says_what_it_promises() -> None:
    """Proves that each check is documented by one complete first line."""
    for check in CONTRACT:
        assert (check.__doc__ or "").partition("\n")[0].endswith("."), check.__name__
