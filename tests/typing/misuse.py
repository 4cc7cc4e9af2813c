"""What a type checker has to find: every line that ends in `# wrong` is, and no other."""

from torch import Tensor
from transformers import PreTrainedModel

import kvpolicy
import kvpolicy_sim
import kvpolicy_vllm
from kvpolicy_hf import PolicyCache


class Keen(kvpolicy.ScorePolicy):
    """A policy whose method has another signature."""

    name = "keen"

    def score(self, view: kvpolicy.View, temperature: float) -> Tensor:  # wrong
        return view.positions * temperature


class Sharp(kvpolicy.ScorePolicy):
    """A policy with a parameter."""

    name = "sharp"
    power: float = 1.0


def configure(policy: Sharp) -> None:
    """Specs, names and parameters."""
    kvpolicy.parse(64)  # wrong
    kvpolicy.register(policy)  # wrong
    kvpolicy.register(Tensor)  # wrong
    policy.budget = 128  # wrong
    Sharp(budget="64")  # wrong
    Sharp(budgets=64)  # wrong
    Sharp(64)  # wrong
    Sharp(budget=64, power="much")  # wrong
    Sharp()  # wrong
    kvpolicy.favourite()  # wrong


def use(model: PreTrainedModel, cache: PolicyCache) -> None:
    """Hosts and the simulator."""
    PolicyCache(model)  # wrong
    PolicyCache("folder", "h2o:budget=64")  # wrong
    cache.ledger("0")  # wrong
    tokens: str = cache.ledger().logical_tokens  # wrong
    kvpolicy_sim.replay("t.kvtrace", 64)  # wrong
    kvpolicy_sim.Trace.open("t.kvtrace").rewind()  # wrong
    kvpolicy_vllm.engine_args(64)  # wrong
    kvpolicy_vllm.engine_args("full", log="yes")  # wrong
    print(tokens)
