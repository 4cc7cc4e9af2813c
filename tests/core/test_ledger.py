"""The ledger: its keys, and that a policy that did not run cannot pass."""

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

import kvpolicy
from kvpolicy import Ledger, LedgerError, Occupancy
from kvpolicy.rehearsal import Case, Host
from strategies import LAWS

KEYS = (
    "semantics policy logical_tokens retained evicted merged slots_held blocks_held bytes_held "
    "bytes_saved evictions policy_seconds"
).split()


def a_ledger(law: Occupancy, n: int) -> Ledger:
    """Fill in a ledger as the law demands."""
    return Ledger(
        policy="window:budget=4",
        logical_tokens=n,
        retained=law.held(n),
        evicted=law.evicted(n),
        slots_held=law.held(n) + law.state_slots,
        blocks_held=0,
        bytes_held=0,
        bytes_saved=0,
        evictions=law.evictions(n),
        policy_seconds=0.0,
    )


def test_keys_are_those_of_the_contract() -> None:
    """Proves design.md section 3: the keys, JSON-ready, with the semantics' version."""
    ledger = a_ledger(Occupancy(4), 10)
    assert sorted(ledger.as_dict()) == sorted(KEYS)
    assert json.loads(json.dumps(ledger.as_dict())) == ledger.as_dict()
    assert ledger.as_dict()["semantics"] == kvpolicy.SEMANTICS == 1


@given(law=LAWS, n=st.integers(0, 200))
def test_what_the_law_demands_passes(law: Occupancy, n: int) -> None:
    """Proves that an honest ledger checks, and is returned for chaining."""
    ledger = a_ledger(law, n)
    assert ledger.check(law) is ledger


@given(law=LAWS, n=st.integers(0, 200), off=st.integers(-5, 5).filter(bool))
def test_any_other_number_of_evictions_is_an_error(law: Occupancy, n: int, off: int) -> None:
    """Proves that one token too many or too few is called out, with both figures."""
    ledger = a_ledger(law, n)
    wrong = replace(ledger, evicted=ledger.evicted + off)
    with pytest.raises(LedgerError) as caught:
        wrong.check(law)
    for figure in (wrong.evicted, ledger.evicted, n, "did not run as configured"):
        assert str(figure) in str(caught.value)


def test_a_policy_that_never_ran_is_caught() -> None:
    """Proves design.md 3.10: zero evictions past the budget are an error."""
    inert = replace(a_ledger(Occupancy(4), 10), evicted=0)
    with pytest.raises(LedgerError, match="evicted 0 of 10 tokens"):
        inert.check(Occupancy(4))
    assert inert.check(Occupancy(None)) is inert


def test_ledgers_are_frozen() -> None:
    """Proves that proof cannot be edited."""
    with pytest.raises(AttributeError):
        a_ledger(Occupancy(4), 10).evicted = 0


@pytest.mark.parametrize("spec", ["full", "window:budget=5,interval=3", "h2o:budget=6"])
def test_storage_counts_what_the_law_demands(spec: str) -> None:
    """Proves that the count kept by storage, in steps and look-ahead, passes the check."""
    policy, case = kvpolicy.parse(spec), Case(lengths=(30, 22), chunks=(7,))
    host = Host(policy, case, case.rows())
    host.extend(0, 8)
    for _ in range(22):
        host.step([0, 1])
    for row, n in enumerate((30, 22)):
        held = host.slots.tokens[row] - host.slots.evicted[row]
        counted = replace(
            a_ledger(policy.occupancy, n), evicted=host.slots.evicted[row], retained=held
        )
        assert counted.check(policy.occupancy).retained == len(host.run.retained[row][n][0])
