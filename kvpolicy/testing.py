"""The contract suite: what every retention policy must pass, ours or a stranger's.

    kvpolicy.testing.check_policy("mypackage.policies.Mine:budget=8")

runs every check of ``CONTRACT`` (``kvpolicy.promises``) and raises a ContractError with a minimal
failing example. As tests, one per check:

    class TestMine(kvpolicy.testing.PolicyContract):
        policy = "mypackage.policies.Mine:budget=8"

hypothesis draws the policy, with small budgets and intervals and its other parameters as given,
and the case's lengths, chunks, heads and inputs. The draws are the same in every run.
``kvpolicy check`` runs the same on `variants` of a policy, and in the hosts.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from kvpolicy.agreement import NearTie
from kvpolicy.errors import ContractError, KVPolicyError, PolicyError
from kvpolicy.extras import how_to_install
from kvpolicy.parameter import typed
from kvpolicy.policy import CachePolicy, EvictionPolicy, View, parameters
from kvpolicy.promises import CONTRACT, Check
from kvpolicy.registry import parse
from kvpolicy.rehearsal import Case, by_steps

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

__all__ = [
    "CONTRACT",
    "Case",
    "Check",
    "Failure",
    "Outcome",
    "PolicyContract",
    "check_policy",
    "example_view",
    "run_check",
    "situations",
    "variants",
]


@dataclass(frozen=True)
class Failure:
    """The smallest case found in which a promise is broken.

    Attributes:
        problem: What went wrong.
        policy: The policy, with the budget and interval of the case.
        case: The case; None if the promise is broken without any.
        error: What was raised.
    """

    problem: str
    policy: CachePolicy
    case: Case | None
    error: Exception


@dataclass(frozen=True)
class Outcome:
    """How a check went.

    Attributes:
        check: Its name.
        promise: What it checks, in one line.
        cases: Cases tried.
        near_ties: Cases that proved nothing, because schedules met a near-tie.
        failure: Where the promise is broken; None if it is kept.
    """

    check: str
    promise: str
    cases: int
    near_ties: int
    failure: Failure | None = None

    @property
    def example(self) -> str | None:
        """A line of Python that fails; None if there is no failure or it has no case."""
        if self.failure is None or self.failure.case is None:
            return None
        spec = str(self.failure.policy)
        return f"{self.check}(kvpolicy.parse({spec!r}), {self.failure.case!r})"


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
    outcomes: list[Outcome] = []
    for check in checks:
        outcome = run_check(policy, check, examples=examples)
        if outcome.failure is not None:
            raise _report(outcome, outcome.failure) from outcome.failure.error
        outcomes.append(outcome)
    return outcomes


def variants(policy: CachePolicy) -> list[CachePolicy]:
    """The policy as given, and with each of the settings changed that its class takes.

    Protection, scope and prompts change what a policy sees. Settings that were chosen already
    stay.
    """
    if not isinstance(policy, EvictionPolicy):
        return [policy]
    scope = "head" if getattr(policy, "scope", "") == "layer" else "layer"
    changes: list[dict[str, Any]] = [
        {"sinks": 2, "recent": 2},
        {"scope": scope},
        {"protect": ((1, 3),)},
        {"protect": "prompt"},
        {"prefill": "bulk"},
    ]
    table = {x.attribute: x for x in parameters(type(policy)).values()}
    found: list[CachePolicy] = [policy]
    for change in changes:
        is_free = all(
            name in table and typed(getattr(policy, name)) == typed(table[name].default)
            for name in change
        )
        try:
            found += [replace(policy, **change)] if is_free else []
        except PolicyError:
            continue  # the class says no: that is its right
    return list(dict.fromkeys(found))


def example_view(policy: CachePolicy, slots: int = 12, seed: int = 0) -> View:
    """What a policy is shown of one random request, [1, 2, `slots`], when it has to evict one.

    For tests of a policy's own: replace its tensors by what matters. What the policy does not
    declare in `needs` is None.

    Raises:
        PolicyError: The policy evicts nothing, or protects as many slots.
    """
    if not isinstance(policy, EvictionPolicy):
        raise PolicyError(f"{policy} never evicts, so that it is never shown a view")
    small = replace(policy, budget=slots - 1, interval=1, prefill="stream", protect=())
    run = by_steps(small, Case(lengths=(slots,), seed=seed))
    return run.decisions[0, slots].view


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


def run_check(policy: CachePolicy, check: Check, *, examples: int = 20) -> Outcome:
    """Run one check over drawn cases; of a broken promise find the smallest one.

    Raises:
        ImportError: hypothesis is not installed.
    """
    try:
        import hypothesis
    except ImportError as error:
        raise ImportError(
            f"kvpolicy.testing needs hypothesis; {how_to_install('hypothesis')}"
        ) from error
    tried: list[bool] = []
    failures: list[Failure] = []

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
            failures.append(Failure(_told(error), *situation, error))
            raise
        else:
            tried.append(True)

    try:
        run()
    except Exception:
        if not failures:
            raise
    if not failures and not any(tried):
        problem = "every case is a near-tie, which proves nothing: scores lie too close together"
        failures.append(Failure(problem, policy, None, ContractError(problem)))
    promise = (check.__doc__ or "").partition("\n")[0]
    failure = failures[-1] if failures else None
    return Outcome(check.__name__, promise, len(tried), tried.count(False), failure)


def _told(error: Exception) -> str:
    """What an error says, with its name unless it is one of ours."""
    return str(error) if isinstance(error, KVPolicyError) else f"{type(error).__name__}: {error}"


def _report(outcome: Outcome, failure: Failure) -> ContractError:
    """Say which promise is broken, how, and on which smallest case."""
    message = (
        f"{failure.policy} breaks {outcome.check}: {failure.problem}\n  promise: {outcome.promise}"
    )
    if outcome.example is not None:
        message += f"\n  smallest case: {outcome.example}"
    return ContractError(message)
