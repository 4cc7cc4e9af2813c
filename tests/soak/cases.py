"""What clients of the soak ask for: prompts of very unequal lengths under mixed policies."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from kvpolicy import parse

SERVER_POLICY = "h2o:budget=256"

REQUEST_POLICIES = (
    None,
    "h2o:budget=64",
    "window:budget=96",
    "sinks:budget=128",
    "tova:budget=64",
    "random:budget=200,seed=3",
    "faulty_draw:budget=96,how=raise",
    "faulty_draw:budget=64,how=nan,start=150",
    "faulty_draw:budget=128,how=raise,start=60,where=1",
)
"""What requests bring; None leaves them to the server's.

The last three fail: at the first eviction, later on, and in one layer.
"""

SAME_ALONE = {"faulty_draw:budget=96,how=raise": "window:budget=96"}
"""Under what a case must answer the same alone, if not under its own policy."""

ALLOWED = "h2o,window,sinks,tova,random,faulty_draw"

SCORED = ("h2o", "tova")
"""Policies that decide by attention, so that rounding can change what they retain."""

LENGTHS = {3: 160, 11: 160, 40: 200, 90: 160, 180: 120, 350: 96, 700: 48, 1500: 24, 3000: 16}
"""Tokens generated, by the prompt's length: short prompts grow, which is what preempts others."""

_WEIGHTS = (6, 6, 8, 8, 8, 6, 4, 2, 1)
_PROMPTS_PER_LENGTH = 2

BAD_POLICIES = (
    "window:budget=4096",  # more than the server allots
    "window",
    "nope",
    "bswa:block=32,segments=2",  # known, but not allowed
    "h2o:budget=64,rope=reindex",
    "os.path.Class:budget=8",
)


@dataclass(frozen=True)
class Case:
    """A request's content, which decides its answer.

    Attributes:
        prompt: Token ids.
        policy: The spec that it brings; None leaves it to the server's.
        max_tokens: Tokens generated, never fewer.
    """

    prompt: tuple[int, ...]
    policy: str | None
    max_tokens: int

    @property
    def spec(self) -> str:
        """The policy that it runs under."""
        return self.policy or SERVER_POLICY

    @property
    def num_tokens(self) -> int:
        """Tokens that a server processes for it: the last one generated is never fed."""
        return len(self.prompt) + self.max_tokens - 1

    @property
    def alone(self) -> "Case":
        """What it is compared with when nothing else runs."""
        return replace(self, policy=SAME_ALONE.get(self.spec, self.policy))

    def fails(self, num_tokens: int) -> bool:
        """Whether its policy fails within so many tokens: at its first eviction from `start` on."""
        policy = parse(self.spec)
        start = getattr(policy, "start", None)
        if start is None:
            return False
        evictions = policy.occupancy.evictions
        return evictions(num_tokens) > evictions(max(0, start - 1))

    @property
    def decides_by_attention(self) -> bool:
        """Whether rounding can change what it retains."""
        return self.spec.startswith(SCORED)

    def __str__(self) -> str:
        return f"{len(self.prompt)} tokens ({self.prompt[:4]}...) under {self.spec}"


@dataclass(frozen=True)
class Catalogue:
    """Cases, few enough that each can be repeated alone afterwards."""

    cases: list[Case]
    weights: list[int]

    @classmethod
    def of(cls, text: Sequence[int], chance: random.Random) -> "Catalogue":
        """Cut prompts out of a text's token ids."""
        cases: list[Case] = []
        weights: list[int] = []
        for (length, max_tokens), weight in zip(LENGTHS.items(), _WEIGHTS, strict=True):
            for _ in range(_PROMPTS_PER_LENGTH):
                first = chance.randrange(len(text) - length)
                prompt = tuple(text[first : first + length])
                cases += [Case(prompt, policy, max_tokens) for policy in REQUEST_POLICIES]
                weights += [weight] * len(REQUEST_POLICIES)
        return cls(cases, weights)

    def draw(self, chance: random.Random) -> Case:
        """Pick a case, long prompts less often."""
        return chance.choices(self.cases, self.weights)[0]
