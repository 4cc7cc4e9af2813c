"""Different policies in different layers."""

import math
import re
from dataclasses import replace
from functools import cached_property
from itertools import pairwise
from typing import ClassVar, NamedTuple

from kvpolicy.errors import PolicyError, UnsupportedError
from kvpolicy.occupancy import Occupancy
from kvpolicy.policy import CachePolicy, EvictionPolicy, parameters
from kvpolicy.registry import find, parse
from kvpolicy.spec import format_value, shown, split_parts, split_spec

_MEAN_TOLERANCE = 1e-3
"""By which the mean of shares may miss 1: they are written as float32."""


class Part(NamedTuple):
    """Consecutive layers under one policy.

    Attributes:
        first: The first layer.
        last: The last one; None goes on to the model's last.
        policy: Their policy.
        given: Keys that the part gives by itself.
    """

    first: int
    last: int | None
    policy: CachePolicy
    given: frozenset[str]

    def __str__(self) -> str:
        """Layers as the spec writes them."""
        if self.last == self.first:
            return str(self.first)
        return f"{self.first}-{'' if self.last is None else self.last}"


class Mix(CachePolicy):
    """Let other policies rule one part of the layers each.

    All hosts run it. In vLLM all layers of a request share a block table, so that all parts must
    hold equally many slots: equal budgets and intervals, and no `full` beside policies that evict.

    Attributes:
        layers: Which policy rules which layers, ``(0-3:full;4-:h2o)``: both ends included, from
            layer 0 on without a gap; ``4-`` goes on to the last layer of any model.
        budget: Of parts that take one and do not give it.
        interval: Likewise.
        budgets: ``equal``, or a safetensors file (``kvpolicy allocate``) of each layer's share of
            `budget`, as floats ``share`` [layers] that are 1 on average; rounded down.
    """

    name: ClassVar[str] = "mix"
    paper: ClassVar[str] = "budgets by layer: Cai et al. 2024, arXiv 2406.02069"

    layers: str
    budget: int | None = None
    interval: int | None = None
    budgets: str = "equal"

    def validate(self) -> None:
        """Refuse layers without a policy or with two, and policies that cannot be parts.

        Raises:
            PolicyError: With the layers, and how to write them.
        """
        parts = self.parts
        if self.budgets != "equal" and self.budget is None:
            raise PolicyError(f"mix: budgets={self.budgets} are shares of a budget; give budget")
        for before, after in pairwise(parts):
            if before.last is None or after.first != before.last + 1:
                raise self._malformed(f"layers {after} do not follow on {before}")
        if parts[0].first != 0:
            raise self._malformed(f"the first layers are {parts[0]}")
        for part in parts:
            if isinstance(part.policy, EvictionPolicy) and part.policy.rope == "reindex":
                raise PolicyError(
                    f"{self}: with rope=reindex in some layers a text could go on past the "
                    f"positions of the others; use rope=keep in layers {part}"
                )
        prompts = {policy.prompts for policy in self.members if policy.evicts}
        if len(prompts) > 1:
            raise PolicyError(
                f"{self}: its parts treat prompts in different ways ({', '.join(sorted(prompts))});"
                " use one prefill= and protect= in all"
            )
        for key in ("budget", "interval"):
            is_used = any(
                key in parameters(type(part.policy)) and key not in part.given for part in parts
            )
            if getattr(self, key) is not None and not is_used:
                raise PolicyError(f"{self}: no part of it takes {key} from it; leave it out")

    @cached_property
    def parts(self) -> tuple[Part, ...]:
        """The parts, in the order of layers."""
        text = self.layers
        if not (text.startswith("(") and text.endswith(")") and text[1:-1].strip()):
            raise self._malformed(f"got {shown(text)}")
        return tuple(self._part(item) for item in split_parts(text[1:-1], ";", text))

    def _part(self, item: str) -> Part:
        layers, colon, spec = item.strip().partition(":")
        found = re.fullmatch(r"(\d{1,6})(-(\d{0,6}))?", layers.strip())
        if found is None or not colon:
            raise self._malformed(f"got {shown(item)}")
        first, last = int(found[1]), found[3]
        last = first if last is None else int(last) if last else None
        if last is not None and last < first:
            raise self._malformed(f"got {shown(item)}")
        policy = self._policy(spec)
        return Part(first, last, policy, frozenset(split_spec(spec).parameters))

    def _policy(self, spec: str) -> CachePolicy:
        """A part's policy, with the common keys that it takes and does not give."""
        name, given = split_spec(spec)
        cls = find(name)
        if issubclass(cls, Mix):
            raise PolicyError(f"mix:layers: a part cannot be a mix, got {shown(spec)}")
        table = parameters(cls)
        for key in ("budget", "interval", "rope_beyond"):
            value = getattr(self, key)
            if key in table and value is not None and value != table[key].default:
                given.setdefault(key, format_value(value))
        items = ",".join(f"{key}={value}" for key, value in given.items())
        return parse(f"{name}:{items}" if items else name)

    def _malformed(self, problem: str) -> PolicyError:
        return PolicyError(
            f"mix:layers: {problem}, expected every layer once, such as "
            "(0-3:full;4-:h2o:recent=0.25)"
        )

    @property
    def members(self) -> tuple[CachePolicy, ...]:
        """The different policies of its layers."""
        return self._members

    @cached_property  # hosts ask for every row of every step
    def _members(self) -> tuple[CachePolicy, ...]:
        if self.shares is None:
            return tuple(dict.fromkeys(part.policy for part in self.parts))
        return tuple(dict.fromkeys(map(self.of_layer, range(len(self.shares)))))

    @property
    def parameter_file(self) -> str | None:
        """The file of budgets."""
        return None if self.budgets == "equal" else self.budgets

    @cached_property
    def shares(self) -> tuple[float, ...] | None:
        """Each layer's share of the budget; None where all have the same.

        Raises:
            PolicyError: The file has no shares.
        """
        if self.budgets == "equal":
            return None
        from kvpolicy.memory.parameters import load_parameters

        share = load_parameters(self.budgets).get("share")
        if share is None or share.dim() != 1 or len(share) == 0 or float(share.min()) <= 0:
            raise PolicyError(
                f"{self.budgets}: expected a tensor 'share' [layers] of positive numbers; make the "
                "file with `kvpolicy allocate`"
            )
        mean = float(share.double().mean())
        if abs(mean - 1.0) > _MEAN_TOLERANCE:
            raise PolicyError(f"{self.budgets}: shares must be 1 on average, got {mean:.4g}")
        return tuple(share.tolist())

    def of_layer(self, layer: int) -> CachePolicy:
        """The policy of the part that a layer belongs to, with the layer's budget.

        Raises:
            PolicyError: It belongs to none.
        """
        for part in self.parts:
            if part.last is None or layer <= part.last:
                return self._with_share(part, layer)
        raise PolicyError(
            f"{self} has no policy for layer {layer}; let its last layers be open: "
            f"{self.parts[-1].first}-"
        )

    def _with_share(self, part: Part, layer: int) -> CachePolicy:
        shares, policy = self.shares, part.policy
        if shares is None or "budget" in part.given or not isinstance(policy, EvictionPolicy):
            return policy
        if "budget" not in parameters(type(policy)):
            return policy
        if layer >= len(shares):
            raise PolicyError(
                f"{self.budgets} has budgets of {len(shares)} layers, and this model has a layer "
                f"{layer}; allocate on a trace of the same model"
            )
        assert self.budget is not None, "checked when the policy was made"
        budget = max(1, math.floor(self.budget * shares[layer]))
        is_given = self.interval is not None or "interval" in part.given
        return replace(policy, budget=budget, interval=policy.interval if is_given else None)

    @property
    def occupancy(self) -> Occupancy:
        """The law of all layers.

        Raises:
            UnsupportedError: They have different ones.
        """
        laws = {policy.occupancy for policy in self.members}
        if len(laws) > 1:
            raise UnsupportedError(
                f"{self}: its layers hold different numbers of slots, where all must hold as many "
                "(in vLLM they share a block table); give all parts one budget and interval, or "
                "use transformers or the simulator"
            )
        return laws.pop()
