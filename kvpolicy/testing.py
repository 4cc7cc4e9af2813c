"""The contract suite: what every retention policy must pass, ours or a stranger's.

    kvpolicy.testing.check_policy("mypackage.policies.Mine:budget=8")

runs every check of ``CONTRACT`` and raises a ContractError with a minimal failing example. As
tests, one per check:

    class TestMine(kvpolicy.testing.PolicyContract):
        policy = "mypackage.policies.Mine:budget=8"

A check is a plain function of a policy and a ``Case`` (``kvpolicy.rehearsal``). hypothesis
draws both: the policy with small budgets and intervals, its other parameters as given, and the
case's lengths, chunks, heads and inputs. The draws are the same in every run.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from kvpolicy.errors import ContractError, KVPolicyError, PolicyError
from kvpolicy.policy import NEEDS, CachePolicy, EvictionPolicy, View, parameters
from kvpolicy.registry import parse
from kvpolicy.rehearsal import (
    Case,
    Decision,
    Host,
    PlannedFailure,
    Row,
    Run,
    by_chunks,
    by_steps,
    margin,
    reference,
)

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

NEAR_TIE = 1e-3
"""Relative score difference below which two schedules may legally decide differently."""

TOLERANCE = 2e-5
"""Largest difference of two attention outputs that counts as floating-point noise."""


class NearTie(Exception):  # noqa: N818  (not an error: the case decides nothing)
    """Two schedules differ where scores differ by less than `NEAR_TIE`."""


# --- the checks -------------------------------------------------------------------------------


def is_a_value(policy: CachePolicy, _: Case) -> None:
    """A policy is frozen and hashable, and its canonical spec parses back to it."""
    spec = str(policy)
    try:
        again = parse(spec)
    except PolicyError as error:
        raise ContractError(
            f"its spec {spec!r} does not parse back: {error}; define the class at the top level "
            "of an importable module, or register it"
        ) from error
    _require(again == policy, f"its spec {spec!r} parses back to something else: {again!r}")
    _require(hash(again) == hash(policy), "equal policies have different hashes")
    _require(str(again) == spec, f"its spec changes when it is parsed: {spec!r}, then {again}")
    for parameter in parameters(type(policy)).values():
        name = parameter.attribute
        try:
            setattr(policy, name, getattr(policy, name))
        except AttributeError:
            continue
        raise ContractError(f"{name} can be assigned; state belongs to the host")


def runs_on_what_it_declares(policy: CachePolicy, case: Case) -> None:
    """Everything the policy looks at is declared in `needs`; the rest it is not shown."""
    unknown = set(policy.needs) - set(NEEDS)
    _require(not unknown, f"unknown needs {sorted(unknown)}; choose from {NEEDS}")
    try:
        reference(policy, case)
    except KVPolicyError:
        raise
    except Exception as error:
        raise ContractError(
            f"it failed when shown positions and needs={policy.needs}: "
            f"{type(error).__name__}: {error}; what is not declared in `needs` is None"
        ) from error


def scores_can_be_ordered(policy: CachePolicy, case: Case) -> None:
    """Scores are real numbers in the shape and on the device of the view's positions."""
    for made in _decisions(policy, case):
        scores, positions = made.scores, made.view.positions
        _require(
            scores.shape == positions.shape,
            f"scores must be [B, H_kv, S] = {tuple(positions.shape)}, got {tuple(scores.shape)}",
        )
        _require(not scores.is_complex(), f"scores must be real, got {scores.dtype}")
        _require(scores.device == positions.device, f"scores moved to {scores.device}")


def leaves_the_view_alone(policy: CachePolicy, case: Case) -> None:
    """score() and observe() compute; they change nothing that they are shown."""
    for made in _decisions(policy, case):
        for ask in _questions(policy):
            shown = _mapped(made.view, lambda x: x.clone())
            ask(shown)
            for name, before in _slot_tensors(made.view):
                _require(
                    _is_equal(getattr(shown, name), before),
                    f"{ask.__name__}() changed view.{name} in place; make a new tensor",
                )


def holds_what_the_law_says(policy: CachePolicy, case: Case) -> None:
    """After every token exactly as many slots are held as the occupancy law says."""
    law, most = policy.occupancy, getattr(policy, "budget", None)
    if most is not None and law.retained is not None:
        _require(law.retained + law.state_slots <= most, f"the law keeps more than budget={most}")
    run = reference(policy, case)
    for index, retained in enumerate(run.retained):
        prompt = case.prompt(index)
        beside, bulk = (prompt if law.prompts == mode else 0 for mode in ("keep", "bulk"))
        held = 0
        for n in sorted(retained):
            held += 1
            if law.retained is not None and n >= bulk and held >= law.retained + beside:
                over = n == bulk or held == law.retained + beside + law.interval
                held = law.retained + beside if over else held
            counts = {len(positions) for positions in retained[n]}
            _require(
                counts == {held}, f"row {index} holds {counts} slots after {n} tokens, not {held}"
            )


def keeps_what_is_protected(policy: CachePolicy, case: Case) -> None:
    """Sinks, recent tokens, pinned spans and a kept prompt are held after every token."""
    if not isinstance(policy, EvictionPolicy):
        return
    run = reference(policy, case)
    for index, retained in enumerate(run.retained):
        for n, kept in retained.items():
            wanted = {*range(policy.sink_slots), *range(max(0, n - policy.recent_slots), n)}
            wanted.update(*(range(*span) for span in policy.spans))
            wanted.update(range(case.prompt(index) if policy.keeps_prompt else 0))
            wanted &= {*range(n)}
            for head, positions in enumerate(kept):
                lost = sorted(wanted - {*positions})
                _require(not lost, f"row {index}, KV head {head} lost {lost} after {n} tokens")


def forgets_for_good(policy: CachePolicy, case: Case) -> None:
    """Retained positions are distinct, within range, and were held before or are new."""
    for retained in reference(policy, case).retained:
        before: list[set[int]] = [set() for _ in range(case.kv_heads)]
        for n, kept in sorted(retained.items()):
            for head, positions in enumerate(kept):
                _require(len({*positions}) == len(positions), f"a position twice: {positions}")
                strange = {*positions} - before[head] - {n - 1}
                _require(not strange, f"after {n} tokens {sorted(strange)} came from nowhere")
            before = [{*positions} for positions in kept]


def keeps_one_set_under_layer_scope(policy: CachePolicy, case: Case) -> None:
    """With scope=layer all KV heads of a layer hold the same positions."""
    if isinstance(policy, EvictionPolicy) and policy.scope_is_layer:
        for retained in reference(policy, case).retained:
            for n, kept in retained.items():
                _require(len({*kept}) == 1, f"after {n} tokens the heads hold {kept}")


def answers_the_same_again(policy: CachePolicy, case: Case) -> None:
    """The same input gives the same answer, bit by bit, whatever was asked in between."""
    first = reference(policy, case)
    by_steps(policy, replace(case, seed=case.seed + 1))
    second = by_steps(policy, case)
    _require(first.retained == second.retained, "a second run kept other positions")
    same = map(torch.equal, first.outputs, second.outputs)
    _require(all(same), "a second run gave other outputs")


def is_the_same_in_any_chunking(policy: CachePolicy, case: Case) -> None:
    """Look-ahead over chunks equals one token at a time, in outputs and sets."""
    _require_same(reference(policy, case), by_chunks(policy, case), "in chunks")


def rows_do_not_interact(policy: CachePolicy, case: Case) -> None:
    """A row alone equals the same row in a batch of unequal lengths."""
    batch = reference(policy, case)
    for index, row in enumerate(case.rows()):
        alone = by_steps(policy, case.alone(index), [row])
        _require_same(alone, batch.row(index), f"as row {index} of a batch")


def nan_stays_in_its_row(policy: CachePolicy, case: Case) -> None:
    """Inputs that are not numbers spoil their own row and no other."""
    rows = case.rows()
    bad = case.seed % rows[0].length
    for x in rows[0]:
        x[:, bad] = torch.nan
    spoilt, clean = by_steps(policy, case, rows), reference(policy, case)
    for index in range(1, len(rows)):
        _require_same(clean.row(index), spoilt.row(index), "beside a row with NaN")


def heads_do_not_interact(policy: CachePolicy, case: Case) -> None:
    """With scope=head a KV head decides alone what it decides among others."""
    if not isinstance(policy, EvictionPolicy) or policy.scope_is_layer:
        return
    row = case.rows()[0]
    together = reference(policy, case).row(0)
    for head in range(case.kv_heads):
        heads, queries = slice(head, head + 1), slice(head * case.group, (head + 1) * case.group)
        part = Row(row.q[queries], row.k[heads], row.v[heads])
        alone = by_steps(policy, case, [part], first_kv_head=head)
        _require_same(alone, together.row(0, heads, queries), f"as KV head {head}")


def equal_query_heads_count_once(policy: CachePolicy, case: Case) -> None:
    """A group of equal query heads decides like one of them: GQA is MHA at group size 1."""
    if isinstance(policy, EvictionPolicy) and policy.group_reduction == "sum":
        return
    row = case.rows()[0]
    one = row._replace(q=row.q[:: case.group])
    many = row._replace(q=one.q.repeat_interleave(case.group, dim=0))
    grouped = by_steps(policy, case, [many]).row(0, queries=slice(None, None, case.group))
    _require_same(by_steps(policy, case, [one]), grouped, f"in groups of {case.group}")


def copied_kv_heads_decide_alike(policy: CachePolicy, case: Case) -> None:
    """With scope=layer, giving every query head its own copy of the KV head changes nothing."""
    if not isinstance(policy, EvictionPolicy) or not policy.scope_is_layer:
        return
    row = case.rows()[0]
    copies = (x.repeat_interleave(case.group, dim=0) for x in (row.k, row.v))
    copied = by_steps(policy, case, [Row(row.q, *copies)])
    shared = slice(None, None, case.group)
    _require_same(reference(policy, case).row(0), copied.row(0, shared), "with copied KV heads")


def slot_order_means_nothing(policy: CachePolicy, case: Case) -> None:
    """Permuting the slots permutes the scores."""
    for made in _decisions(policy, case):
        generator = torch.Generator().manual_seed(case.seed)
        order = torch.rand(made.view.positions.shape, generator=generator).argsort(dim=-1)
        if isinstance(policy, EvictionPolicy) and policy.scope_is_layer:
            order = order[:, :1].expand_as(order)
        shuffled = _mapped(made.view, lambda x, at=order: _gathered(x, at))
        for ask in _questions(policy):
            _require(
                _is_close(ask(shuffled), _gathered(ask(made.view), order), shuffled.valid),
                f"{ask.__name__}() depends on the order of slots; look at view.positions instead",
            )


def unheld_slots_mean_nothing(policy: CachePolicy, case: Case) -> None:
    """Slots that are not valid influence no valid one, whatever they hold."""
    for made in _decisions(policy, case):
        held = made.view.positions.shape[-1]
        wider = _with_rubbish(made.view)
        for ask in _questions(policy):
            _require(
                _is_close(ask(wider)[..., :held], ask(made.view), made.view.valid),
                f"{ask.__name__}() depends on slots that are not held; hide them with "
                "torch.where(view.valid, ...), because 0 x NaN is NaN",
            )


def a_failure_changes_nothing(policy: CachePolicy, case: Case) -> None:
    """When score() fails, the slots stay as they were, and the step can be taken again."""
    row = case.rows()[0]
    num_decisions = sum(index == 0 for index, _ in reference(policy, case).decisions)
    if num_decisions == 0:
        return
    for size in (0, case.chunks[0]):
        host = Host(policy, case, [row])
        host.notes.fail_at = case.seed % num_decisions
        while not host.is_done(0):
            before = host.state()
            try:
                host.extend(0, size) if size else host.step([0])
            except PlannedFailure:
                _require(before.equals(host.state()), "a failed call changed the slots")
                host.notes.fail_at = None
        again = by_steps(policy, case, [row])
        _require_same(again, host.run, "after a failure")


def attends_densely_within_its_budget(policy: CachePolicy, case: Case) -> None:
    """As long as nothing has been evicted, outputs are those of causal attention."""
    run = reference(policy, case)
    for index, row in enumerate(case.rows()):
        first_eviction = policy.occupancy.of_prompt(case.prompt(index)).next_due(0)
        length = row.length if first_eviction is None else min(row.length, first_eviction)
        expected = _causal_attention(row.first(length))
        error = (run.outputs[index][:, :length] - expected).abs().max().item()
        _require(error <= TOLERANCE, f"row {index} is off dense attention by {error:.2g}")


Check = Callable[[CachePolicy, Case], None]

CONTRACT: tuple[Check, ...] = (
    is_a_value,
    runs_on_what_it_declares,
    scores_can_be_ordered,
    leaves_the_view_alone,
    holds_what_the_law_says,
    keeps_what_is_protected,
    forgets_for_good,
    keeps_one_set_under_layer_scope,
    answers_the_same_again,
    is_the_same_in_any_chunking,
    rows_do_not_interact,
    nan_stays_in_its_row,
    heads_do_not_interact,
    equal_query_heads_count_once,
    copied_kv_heads_decide_alike,
    slot_order_means_nothing,
    unheld_slots_mean_nothing,
    a_failure_changes_nothing,
    attends_densely_within_its_budget,
)
"""Every check, cheap and telling ones first. A check's docstring is its promise."""


# --- running them -----------------------------------------------------------------------------


class Outcome(NamedTuple):
    """How a check went.

    Attributes:
        check: Its name.
        cases: Cases tried.
        near_ties: Cases that proved nothing, because schedules met a near-tie.
    """

    check: str
    cases: int
    near_ties: int


def check_policy(
    policy: CachePolicy | str, *, checks: Sequence[Check] = CONTRACT, examples: int = 20
) -> list[Outcome]:
    """Check that a policy keeps the contract that hosts and users rely on.

    Args:
        policy: A policy or its spec. Budget and interval are varied, the rest is not.
        checks: Which promises to check.
        examples: Cases per check.

    Raises:
        ContractError: A promise is broken; the message has a minimal failing example.
        PolicyError: The spec is wrong.
        ImportError: hypothesis is not installed.
    """
    policy = parse(policy)
    return [_check(policy, check, examples) for check in checks]


class PolicyContract:
    """Base class of a pytest class that runs every check on a policy, one test per check.

    Attributes:
        policy: The policy or its spec.
        examples: Cases per check.
    """

    policy: ClassVar[CachePolicy | str]
    examples: ClassVar[int] = 20

    def pytest_generate_tests(self, metafunc: Any) -> None:
        """Give pytest the checks."""
        if "check" in metafunc.fixturenames:
            metafunc.parametrize("check", CONTRACT, ids=lambda check: check.__name__)

    def test_contract(self, check: Check) -> None:
        """The policy keeps this promise."""
        check_policy(self.policy, checks=(check,), examples=self.examples)


def situations(policy: CachePolicy) -> "SearchStrategy[tuple[CachePolicy, Case]]":
    """Hypothesis strategy: the policy with a small budget and interval, and a case for it."""
    from hypothesis import strategies as st

    smallest = _smallest_budget(policy)

    @st.composite
    def draw_situation(draw: Any) -> tuple[CachePolicy, Case]:
        variant = policy
        if isinstance(policy, EvictionPolicy) and smallest is not None:
            budget = draw(st.integers(0, 8))
            interval = draw(st.integers(1, 4) | st.integers(1, 12))
            variant = replace(policy, budget=smallest + budget, interval=interval)
        law = variant.occupancy
        capacity = law.capacity or 8
        longest = capacity + 2 * law.interval + 8
        first = draw(st.integers(1, longest) | st.integers(capacity, longest))
        # Rows of which one is longer by whole intervals evict in the same steps.
        others = st.integers(1, longest) | st.sampled_from([first, first + law.interval])
        prompts = st.lists(st.integers(0, longest), max_size=3).map(tuple)
        case = st.builds(
            Case,
            lengths=st.lists(others, min_size=1, max_size=2).map(lambda found: (first, *found)),
            chunks=st.lists(st.integers(1, longest), min_size=1, max_size=3).map(tuple),
            kv_heads=st.integers(1, 2),
            group=st.integers(1, 3),
            layer=st.integers(0, 3),
            seed=st.integers(0, 999),
            prompts=st.just(()) if law.prompts == "stream" else prompts,
        )
        return variant, draw(case)

    return draw_situation()


def _smallest_budget(policy: CachePolicy) -> int | None:
    """The smallest budget that its other parameters allow; None if it takes no budget."""
    if not isinstance(policy, EvictionPolicy) or "budget" not in parameters(type(policy)):
        return None
    for budget in range(1, policy.budget + 1):
        try:
            replace(policy, budget=budget, interval=1)
        except PolicyError:
            continue
        return budget
    return None


def _check(policy: CachePolicy, check: Check, examples: int) -> Outcome:
    """Run one check over drawn cases; on failure report the smallest one found."""
    try:
        import hypothesis
    except ImportError as error:
        raise ImportError(
            "kvpolicy.testing needs hypothesis: pip install 'kvpolicy[testing]'"
        ) from error
    tried: list[bool] = []
    failures: list[tuple[CachePolicy, Case, Exception]] = []

    @hypothesis.seed(0)
    @hypothesis.settings(
        max_examples=examples,
        deadline=None,
        database=None,
        print_blob=False,
        report_multiple_bugs=False,
        phases=[hypothesis.Phase.generate, hypothesis.Phase.shrink],
        suppress_health_check=[
            hypothesis.HealthCheck.too_slow,
            hypothesis.HealthCheck.filter_too_much,
            hypothesis.HealthCheck.nested_given,
        ],
    )
    @hypothesis.given(situations(policy))
    def run(situation: tuple[CachePolicy, Case]) -> None:
        try:
            check(*situation)
        except NearTie:
            tried.append(False)
        except Exception as error:
            failures.append((*situation, error))
            raise
        else:
            tried.append(True)

    try:
        run()
    except Exception as error:
        if not failures:
            raise
        raise _report(check, *failures[-1]) from error
    if not any(tried):
        raise ContractError(f"{policy}: every case of {check.__name__} is a near-tie")
    return Outcome(check.__name__, len(tried), tried.count(False))


def _report(check: Check, policy: CachePolicy, case: Case, error: Exception) -> ContractError:
    """Say which promise is broken, how, and on which smallest case."""
    told = str(error) if isinstance(error, KVPolicyError) else f"{type(error).__name__}: {error}"
    promise = (check.__doc__ or "").partition("\n")[0]
    return ContractError(
        f"{policy} breaks {check.__name__}: {told}\n"
        f"  promise: {promise}\n"
        f"  smallest case: {check.__name__}(kvpolicy.parse({str(policy)!r}), {case!r})"
    )


# --- comparing --------------------------------------------------------------------------------


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ContractError(message)


def _require_same(expected: Run, got: Run, how: str) -> None:
    """Require equal sets and outputs, unless a near-tie may have parted the runs."""
    for row, (ours, theirs) in enumerate(zip(expected.retained, got.retained, strict=True)):
        for n in sorted(ours.keys() & theirs.keys()):
            if ours[n] != theirs[n]:
                _excuse(expected, got, row, n)
                raise ContractError(f"after {n} tokens it kept {ours[n]}, {how} {theirs[n]}")
        apart = (expected.outputs[row] - got.outputs[row]).abs().amax(dim=(0, 2))  # [T]
        off = (~(apart <= TOLERANCE)).nonzero().flatten().tolist()
        if off:
            _excuse(expected, got, row, off[0])
            raise ContractError(f"{how}, the output at position {off[0]} is off by {apart[off[0]]}")


def _excuse(expected: Run, got: Run, row: int, n: int) -> None:
    """Raise NearTie if noise may have turned a decision of the row within its first n tokens.

    Then the decision was close in both runs. Exact ties in both are no noise: the position
    decides them.
    """
    for moment in expected.decisions.keys() & got.decisions.keys():
        if moment[0] == row and moment[1] <= n:
            margins = margin(expected.decisions[moment]), margin(got.decisions[moment])
            if 0 < max(margins) < NEAR_TIE:
                raise NearTie


def _is_close(got: Tensor, expected: Tensor, where: Tensor) -> bool:
    """Whether scores agree at some slots: floats up to noise, integers exactly."""
    got, expected = got[where], expected[where]
    if not got.is_floating_point():
        return torch.equal(got, expected)
    return torch.allclose(got, expected, rtol=1e-4, atol=1e-6)


def _is_equal(got: Tensor | None, expected: Tensor) -> bool:
    return got is not None and torch.equal(got.nan_to_num(), expected.nan_to_num())


def _causal_attention(row: Row) -> Tensor:
    """Dense attention in float64, written without the core; [H, T, D]."""
    group = row.q.shape[0] // row.k.shape[0]
    k, v = (x.double().repeat_interleave(group, dim=0) for x in (row.k, row.v))
    logits = row.q.double() @ k.transpose(1, 2) / math.sqrt(row.q.shape[-1])
    future = torch.ones(row.length, row.length, dtype=torch.bool).triu(1)
    return (logits.masked_fill(future, -math.inf).softmax(dim=-1) @ v).float()


def _decisions(policy: CachePolicy, case: Case, most: int = 4) -> list[Decision]:
    """Some of the decisions of the reference run, from all over it."""
    made = list({id(x.view): x for x in reference(policy, case).decisions.values()}.values())
    return made[:: max(1, len(made) // most)]


def _questions(policy: CachePolicy) -> list[Callable[[View], Tensor]]:
    """What hosts ask of a policy."""
    assert isinstance(policy, EvictionPolicy), "others make no decisions"
    return [policy.score, *([policy.observe] if policy.observes_every_token else [])]


def _slot_tensors(view: View) -> list[tuple[str, Tensor]]:
    """The tensors of a view that have slots, by name."""
    names = ("positions", "valid", "weights", "accumulated", "keys", "values")
    return [(name, x) for name in names if (x := getattr(view, name)) is not None]


def _mapped(view: View, change: Callable[[Tensor], Tensor]) -> View:
    return replace(view, **{name: change(x) for name, x in _slot_tensors(view)})


def _gathered(x: Tensor, order: Tensor) -> Tensor:
    """Reorder the slots of [B, H_kv, S] or [B, H_kv, S, D]."""
    return x.gather(2, order if x.dim() == 3 else order[..., None].expand_as(x))


def _with_rubbish(view: View) -> View:
    """The view with three more slots that are not held and hold the worst."""
    rubbish = {"positions": -7, "valid": False, "weights": 0.0}
    return replace(
        view,
        **{
            name: torch.cat([x, torch.full_like(x[:, :, :1], rubbish.get(name, math.nan))], dim=2)
            for name, x in _slot_tensors(view)
        },
    )
