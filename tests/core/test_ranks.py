"""Heads spread over ranks: every rank decides what one process with all heads decides."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Barrier

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import kvpolicy
from kvpolicy.ranks import Ranks, check_spread
from kvpolicy.rehearsal import Case, Host, Row, Run
from oracles.dense import NEAR_TIE, replay_layer

CASE = Case(lengths=(40, 23), kv_heads=4, chunks=(13, 2, 25), layer=1)
SPECS = [
    "window:budget=7,interval=3",
    "random:budget=7,interval=2",
    "h2o:budget=7,interval=3",
    "h2o:budget=7,interval=3,scope=layer",
    "h2o:budget=7,interval=1,scope=layer,sinks=2,score=mean",
    "h2o:budget=7,interval=3,scope=layer,decay=0.7,score=relative",
    "tova:budget=7,interval=3",
    "tova:budget=7,interval=2,scope=head,group_pool=max",
]


class HeadBySquare(kvpolicy.ScorePolicy):
    """A score that is not linear in what it is shown and differs between heads."""

    needs = ("last_row", "accumulated")

    def score(self, view: kvpolicy.View) -> Tensor:
        """Rate a slot by squares, weighted by the head's index."""
        return view.weights**2 * (1 + view.kv_heads) + (view.accumulated - 1).abs()


class Exchange:
    """Ranks as threads: each waits for all others wherever they gather."""

    def __init__(self, count: int) -> None:
        self.barrier, self.parts = Barrier(count, timeout=60), [torch.empty(0)] * count
        self.calls = [0] * count

    def of(self, rank: int) -> Ranks:
        """What one of the threads is given."""

        def gather(x: Tensor) -> Tensor:
            self.parts[rank] = x
            self.calls[rank] += 1
            self.barrier.wait()
            gathered = torch.stack(self.parts)
            self.barrier.wait()  # nobody writes again before all have read
            return gathered

        return Ranks(len(self.parts), gather)


Advance = Callable[[Host], None]


def by_steps(host: Host) -> None:
    """Feed the shorter row and the longer one's beginning as a batch, then the rest."""
    while not host.is_done(1):
        host.step([0, 1])
    while not host.is_done(0):
        host.step([0])


def by_chunks(host: Host) -> None:
    """Feed rows one after the other, many tokens at once."""
    for row in (0, 1):
        for turn in range(40):
            if not host.is_done(row):
                host.extend(row, CASE.chunks[turn % len(CASE.chunks)])


def run_on(count: int, policy: kvpolicy.CachePolicy, case: Case, advance: Advance) -> "Spread":
    """Spread a case's heads over so many ranks and run them side by side."""
    exchange, kv_heads = Exchange(count), case.kv_heads // count

    def run(rank: int) -> Run:
        q, kv = (slice(rank * n, (rank + 1) * n) for n in (kv_heads * case.group, kv_heads))
        rows = [Row(row.q[q], row.k[kv], row.v[kv]) for row in case.rows()]
        first = rank * kv_heads
        host = Host(policy, case, rows, first_kv_head=first, ranks=exchange.of(rank))
        advance(host)
        return host.run

    with ThreadPoolExecutor(count) as pool:
        return Spread(list(pool.map(run, range(count))), exchange.calls)


class Spread:
    """What ranks gave, put together, and how often each of them gathered."""

    def __init__(self, runs: list[Run], calls: list[int]) -> None:
        rows = range(len(runs[0].outputs))
        self.outputs = [torch.cat([run.outputs[row] for run in runs]) for row in rows]
        self.retained = [
            {n: sum((run.retained[row][n] for run in runs), ()) for n in runs[0].retained[row]}
            for row in rows
        ]
        self.calls = calls


def certified(spec: str) -> Case:
    """Return inputs on which the oracle meets no near-tie."""
    for seed in range(50):
        case = replace(CASE, seed=seed)
        runs = [replay_layer(spec, *row, layer=case.layer) for row in case.rows()]
        if min(run.min_margin for run in runs) >= NEAR_TIE:
            return case
    raise AssertionError(f"{spec}: every one of 50 seeds has a near-tie")


@pytest.mark.parametrize("advance", [by_steps, by_chunks])
@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("spec", SPECS)
def test_ranks_decide_like_one_process(spec: str, count: int, advance: Advance) -> None:
    """Proves sets and outputs of steps and of look-ahead, on inputs without near-ties."""
    policy, case = kvpolicy.parse(spec), certified(spec)
    whole, spread = (run_on(n, policy, case, advance) for n in (1, count))
    assert spread.retained == whole.retained
    for ours, theirs in zip(spread.outputs, whole.outputs, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)


def test_any_score_is_given_the_whole_layer() -> None:
    """Proves equality for scores that are not linear in the weights and look at head indices."""
    policy = HeadBySquare(budget=7, interval=2, scope="layer")
    whole, spread = (run_on(n, policy, CASE, by_chunks) for n in (1, 2))
    assert spread.retained == whole.retained


@pytest.mark.parametrize("advance", [by_steps, by_chunks])
@pytest.mark.parametrize("spec", SPECS)
def test_ranks_exchange_once_per_eviction(spec: str, advance: Advance) -> None:
    """Proves that scope=layer gathers once per eviction, and other policies never."""
    policy = kvpolicy.parse(spec)
    evictions = [policy.occupancy.evictions(n) for n in CASE.lengths]
    # Rows that step together and are due together are decided together.
    expected = max(evictions) if advance is by_steps else sum(evictions)
    is_layerwise = getattr(policy, "scope", "head") == "layer"
    spread = run_on(2, policy, CASE, advance)
    assert spread.calls == [expected if is_layerwise else 0] * 2


def test_strangers_exchange_whether_they_failed_as_well() -> None:
    """Proves that only policies from outside the package cost a second exchange per eviction."""
    policy = HeadBySquare(budget=7, interval=2, scope="layer")
    evictions = sum(policy.occupancy.evictions(n) for n in CASE.lengths)
    assert run_on(2, policy, CASE, by_chunks).calls == [2 * evictions] * 2


@pytest.mark.parametrize("failing", [{1}, {0, 2}, {0, 1, 2}, set[int]()])
def test_a_failure_of_one_rank_is_one_of_all(failing: set[int]) -> None:
    """Proves that nobody goes on alone, and that each says what it knows of the failure."""
    exchange = Exchange(3)

    def run(rank: int) -> Tensor | Exception:
        def decide() -> Tensor:
            if rank in failing:
                raise ValueError(f"only on {rank}")
            return torch.tensor(rank)

        try:
            return exchange.of(rank).agree(decide, torch.device("cpu"))
        except Exception as error:
            return error

    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(run, range(3)))
    assert exchange.calls == [1] * 3
    for rank, result in enumerate(found):
        if not failing:
            assert result == rank
        elif rank in failing:
            assert str(result) == f"only on {rank}"
        else:
            assert isinstance(result, kvpolicy.PolicyError)
            assert f"failed on {min(failing)}" in str(result)


@pytest.mark.parametrize("gate", ["file", "calibrated"])
def test_memories_of_ranks_use_their_own_heads(gate: str, tmp_path: Path) -> None:
    """Proves that trained gates are those of a rank's heads, and others need no exchange."""
    path = tmp_path / "gates.safetensors"
    save_file({"beta": torch.randn(2, 8)}, path)
    spec = f"infini:segment=8,gate={path if gate == 'file' else gate}"
    whole, spread = (run_on(n, kvpolicy.parse(spec), CASE, by_chunks) for n in (1, 2))
    for ours, theirs in zip(spread.outputs, whole.outputs, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("fixtures.policies.FadingMaximum:budget=8,scope=layer", "observe"),
        ("fixtures.policies.RowTimesKeyNorm:budget=8,scope=layer", "keys"),
    ],
)
def test_what_would_need_more_exchanges_is_refused(spec: str, message: str) -> None:
    """Proves the refusals of scope=layer, and that scope=head is free of them."""
    with pytest.raises(kvpolicy.UnsupportedError, match=f"{message}.*use scope=head"):
        check_spread(kvpolicy.parse(spec))
    check_spread(kvpolicy.parse(spec.replace("layer", "head")))
