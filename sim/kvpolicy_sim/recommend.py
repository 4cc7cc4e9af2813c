"""The smallest budget with which a policy keeps a share of the attention mass."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from kvpolicy import CachePolicy, EvictionPolicy, PolicyError, parse
from kvpolicy.policy import parameters
from kvpolicy.registry import find
from kvpolicy.trace import Trace
from kvpolicy_sim.replay import replay
from kvpolicy_sim.result import PolicyResult

CANDIDATES = ("window", "sinks", "h2o", "tova")
"""Policies tried unless told otherwise."""

_PRECISION = 64
"""Budgets are found to within one part in this many."""

_PROBES = 3
"""Budgets tried at once between two known ones."""


@dataclass(frozen=True)
class Recommendation:
    """A budget that was replayed and keeps the target; a slightly smaller one does not.

    Attributes:
        policy: The policy at that budget.
        retained_mass: Mean retained mass there.
        retention_ratio: Tokens kept at the end over tokens seen.
        bytes_kept: Keys, values and policy state per sequence.
        bytes_full: Keys and values of the full cache.
        tokens: Length of the longest sequence.
    """

    policy: CachePolicy
    retained_mass: float
    retention_ratio: float
    bytes_kept: int | float
    bytes_full: int
    tokens: int

    @property
    def budget(self) -> int:
        """Slots kept per KV head, those of a memory included."""
        assert isinstance(self.policy, EvictionPolicy), "candidates have budgets"
        return self.policy.budget


def recommend(
    trace: Trace | str | Path,
    target: float,
    candidates: Sequence[str] | None = None,
    *,
    layers: Sequence[int] | None = None,
    threads: int | None = None,
    advance: Callable[[str], object] = lambda _: None,
) -> list[Recommendation]:
    """Find each policy's smallest budget that keeps `target` of the attention mass.

    Every round replays a few budgets of all policies in one pass over the trace; retained mass
    is taken to grow with the budget between those tried.

    Args:
        trace: A trace or its path.
        target: Mean retained mass over steps beyond the budget, in (0, 1).
        candidates: Specs without a budget; default those of `CANDIDATES` that fit the trace.
        layers: Layers to replay; default all captured.
        threads: Layers at a time.
        advance: Told what each round tries.

    Raises:
        PolicyError: The target or a candidate is wrong.
    """
    if not 0 < target < 1:
        raise PolicyError(f"target must lie between 0 and 1, got {target}; try 0.95")
    if not isinstance(trace, Trace):
        with Trace.open(trace) as opened:
            return recommend(
                opened, target, candidates, layers=layers, threads=threads, advance=advance
            )
    tokens = max(sequence.tokens for sequence in trace.sequences)
    searches = _searches(candidates, target, tokens)
    while probes := [policy for search in searches for policy in search.probes()]:
        advance(", ".join(map(str, probes)))
        report = replay(trace, probes, layers=layers, outputs=False, details=False, threads=threads)
        for search in searches:
            for policy in search.probes():
                search.note(_recommendation(report.result(policy)))
            search.narrow()
    return [search.best for search in searches if search.best is not None]


def _searches(candidates: Sequence[str] | None, target: float, tokens: int) -> list["_Search"]:
    """A search per candidate; default ones that the trace is too short for are left out."""
    if candidates is not None:
        return [_Search(spec, target, tokens) for spec in candidates]
    found: list[_Search] = []
    for spec in CANDIDATES:
        with suppress(PolicyError):
            found.append(_Search(spec, target, tokens))
    return found


def _recommendation(result: PolicyResult) -> Recommendation:
    """What a replayed budget keeps."""
    ledgers = [result.ledger(sequence) for sequence in result.sequences]
    tokens = [ledger.logical_tokens for ledger in ledgers]
    return Recommendation(
        policy=result.policy,
        retained_mass=result.retained_mass["mean"],
        retention_ratio=sum(ledger.retained for ledger in ledgers) / sum(tokens),
        bytes_kept=sum(ledger.bytes_held for ledger in ledgers) / len(ledgers),
        bytes_full=sum(x.bytes_held + x.bytes_saved for x in ledgers) // len(ledgers),
        tokens=max(tokens),
    )


class _Search:
    """Narrows one policy's budget down between one that fails and one that does not."""

    def __init__(self, spec: str, target: float, tokens: int) -> None:
        name, _, keys = spec.partition(":")
        if any(key.startswith("budget=") for key in keys.split(",")):
            raise PolicyError(f"{spec}: the budget is what is looked for; leave it out")
        if "budget" not in parameters(find(name)):
            raise PolicyError(f"{spec}: {name} has no budget to recommend; choose another policy")
        self.spec, self.target = spec, target
        self.best: Recommendation | None = None
        high = self._largest(tokens)
        self._fails, self._keeps = self._smallest(high) - 1, high
        self._tried: dict[int, Recommendation] = {}
        self._open = self._spread(first=True)

    def probes(self) -> list[CachePolicy]:
        """Budgets to replay next."""
        return [self._at(budget) for budget in self._open]

    def note(self, found: Recommendation) -> None:
        """Learn what a budget keeps."""
        self._tried[found.budget] = found

    def narrow(self) -> None:
        """Move the two known budgets together."""
        keeping = [b for b in self._open if self._tried[b].retained_mass >= self.target]
        if keeping:
            self._keeps = min(keeping)
            self.best = self._tried[self._keeps]
        failing = [b for b in self._open if b < self._keeps]
        self._fails = max([self._fails, *failing])
        self._open = self._spread()

    def _spread(self, *, first: bool = False) -> list[int]:
        """Budgets between the known ones: by doubling at first, then evenly."""
        low, high = self._fails, self._keeps
        if first:
            doublings = {high >> shift for shift in range(1, high.bit_length())}
            return sorted({b for b in doublings if b > low} | {high})
        if high - low <= max(1, high // _PRECISION):
            return []
        step = (high - low) / (_PROBES + 1)
        return sorted({low + max(1, round(step * i)) for i in range(1, _PROBES + 1)} - {low, high})

    def _at(self, budget: int) -> CachePolicy:
        """The policy at a budget."""
        return parse(f"{self.spec}{',' if ':' in self.spec else ':'}budget={budget}")

    def _largest(self, tokens: int) -> int:
        """A budget that keeps every token, beside the slots of a memory.

        Raises:
            PolicyError: The policy does not accept one as large as the trace.
        """
        budget = tokens
        while (self._at(budget).occupancy.retained or tokens) < tokens:
            budget *= 2
        return budget

    def _smallest(self, high: int) -> int:
        """The smallest budget that the policy accepts, up to one that it does."""
        low = 0
        while high - low > 1:
            middle = (low + high) // 2
            try:
                self._at(middle)
            except PolicyError:
                low = middle
            else:
                high = middle
        return high
