"""A stranger's project, as a type checker sees it against the installed wheel: all is right here.

It is checked, not run. `assert_type` fails where a public name has become Any or something else.
"""

from pathlib import Path
from typing import Any, assert_type

from torch import Tensor
from transformers import PreTrainedModel

import kvpolicy
import kvpolicy.testing
import kvpolicy_sim
import kvpolicy_vllm
from kvpolicy.trace import Header
from kvpolicy_hf import PolicyCache


class Keen(kvpolicy.ScorePolicy):
    """A policy of one's own: annotated attributes are parameters."""

    name = "keen"
    needs = ("last_row", "keys")

    power: float = 1.0

    def score(self, view: kvpolicy.View) -> Tensor:
        """What `needs` did not name would be None."""
        assert_type(view.positions, Tensor)
        assert_type(view.layer, int)
        assert view.weights is not None
        assert view.keys is not None
        return view.weights * view.keys.float().square().sum(dim=-1) ** self.power


def configure() -> kvpolicy.CachePolicy:
    """Specs, names and laws."""
    assert_type(kvpolicy.available(), dict[str, type[kvpolicy.CachePolicy]])
    assert_type(kvpolicy.register(Keen), type[Keen])
    semantics: int = kvpolicy.SEMANTICS
    assert semantics
    policy = kvpolicy.parse("h2o:budget=64")
    assert_type(policy, kvpolicy.CachePolicy)
    assert_type(policy.occupancy, kvpolicy.Occupancy)
    assert_type(policy.occupancy.held(1000), int)
    mine = Keen(budget=64, power=2.0)
    assert_type(mine.power, float)
    assert_type(mine.budget, int)
    assert_type(kvpolicy.bundled_model(), str)
    return mine


def errors(spec: str) -> str | None:
    """Errors form a tree."""
    try:
        kvpolicy.parse(spec)
    except kvpolicy.UnsupportedError as error:
        refused: kvpolicy.PolicyError = error
        return str(refused)
    except kvpolicy.PolicyError as error:
        value_error: ValueError = error
        return str(value_error)
    return None


def in_transformers(model: PreTrainedModel, policy: kvpolicy.CachePolicy) -> dict[str, Any]:
    """The cache, its ledger and what it retains."""
    cache = PolicyCache(model, policy)
    PolicyCache(model, "tova:budget=64", prompt_tokens=[3, 4])
    assert_type(cache.retained_positions(0, row=1), Tensor)
    assert_type(cache.ledger(row=0), kvpolicy.Ledger)
    assert_type(cache.ledger().evictions, int)
    return cache.ledger().as_dict()


def in_the_simulator(model: PreTrainedModel, ids: Tensor, path: Path) -> None:
    """Capture, replay, recommend."""
    assert_type(kvpolicy_sim.capture(model, ids, path), kvpolicy_sim.Trace)
    with kvpolicy_sim.Trace.open(path) as trace:
        assert_type(trace.header, Header)
        report = kvpolicy_sim.replay(trace, ["full", Keen(budget=64)], oracle=True)
    assert_type(report, kvpolicy_sim.Report)
    assert_type(report.as_dict(), dict[str, Any])
    assert_type(report.to_png("pictures"), list[Path])
    assert_type(report.retained_positions("full", 0).ndim, int)


def in_vllm() -> None:
    """Arguments of an engine, and what to ask it."""
    arguments = kvpolicy_vllm.engine_args("h2o:budget=64", allow=["tova"], max_model_len=1024)
    assert_type(arguments, dict[str, Any])
    kvpolicy_vllm.Capture("traces")


class TestKeen(kvpolicy.testing.PolicyContract):
    """The contract, for a policy of one's own."""

    policy = "consumer:Keen:budget=8"


def contract() -> None:
    """The contract as a function."""
    assert_type(kvpolicy.testing.check_policy(Keen(budget=8)), list[kvpolicy.testing.Outcome])
    assert_type(kvpolicy.testing.example_view(Keen(budget=8)), kvpolicy.View)
