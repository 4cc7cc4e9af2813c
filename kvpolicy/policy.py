"""The interface of a retention policy: what it is configured with, sees and decides.

Three roles, three types. A policy (``CachePolicy``) is frozen configuration. The state of a
request (``kvpolicy.slots.Slots`` or the pages of a server) belongs to the host. A ``View``
shows a policy one layer of that state; its answer is a tensor of scores. Policies decide,
hosts move memory.

Axes: B rows (requests), H_kv KV heads, S slots, D head dimension.
"""

import math
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import (
    TYPE_CHECKING,
    Any,
    ClassVar,
    Literal,
    dataclass_transform,
    get_type_hints,
)

from kvpolicy.errors import PolicyError
from kvpolicy.occupancy import Occupancy, Prompts
from kvpolicy.parameter import Parameter, Protection, Spans, is_moderate, typed
from kvpolicy.spec import format_value, shown

if TYPE_CHECKING:
    from dataclasses import Field

    from torch import Tensor

NEEDS = ("last_row", "accumulated", "keys", "values")
"""What a policy may ask to see beside positions (``CachePolicy.needs``)."""


@dataclass(frozen=True)
class View:
    """One layer's slots as a policy sees them, after the newest token's attention.

    Slot order means nothing: slots carry explicit positions. Entries where `valid` is False
    are meaningless and must not influence the others. What a policy did not declare in
    `needs` is None.

    Attributes:
        positions: [B, H_kv, S] int64, number of real tokens before the slot's token.
        valid: [B, H_kv, S] bool, which slots are held.
        weights: [B, H_kv, S] float32, the newest token's attention row, reduced over the
            query heads as `group_pool` and `scope` say; zero where not valid.
        accumulated: [B, H_kv, S] float32, the statistic kept with each slot.
        keys: [B, H_kv, S, D] as cached (rotated at their original positions).
        values: [B, H_kv, S, D].
        n: [B, 1, 1] int64, tokens seen so far, the newest included.
        visible: [B, 1, 1] int64, slots the newest token attended to.
        kv_heads: [1, H_kv, 1] int64, index of each KV head in the whole model.
        budget: Slots kept per KV head after an eviction.
        layer: Index of the layer.
    """

    positions: "Tensor"
    valid: "Tensor"
    weights: "Tensor | None"
    accumulated: "Tensor | None"
    keys: "Tensor | None"
    values: "Tensor | None"
    n: "Tensor"
    visible: "Tensor"
    kv_heads: "Tensor"
    budget: int
    layer: int


@dataclass(frozen=True)
class Accumulation:
    """How hosts fold each attention row into a slot's accumulated statistic.

    For every token: accumulated <- decay * accumulated + weight * (visible if relative else 1).

    Attributes:
        decay: Factor applied before each token's addition (A2SF, arXiv 2407.20485).
        relative: Measure a weight in multiples of the uniform one, 1 / visible slots.
        window: Only so many tokens before an eviction count, none from before the eviction
            ahead of it; the statistic starts over with the first of them. None counts all.
    """

    decay: float = 1.0
    relative: bool = False
    window: int | None = None


@dataclass_transform(kw_only_default=True, frozen_default=True)
class CachePolicy:
    """Frozen configuration of a retention policy; subclasses become dataclasses.

    Public fields are the spec's keys, in order; ``field(metadata={"key": ...})`` renames one.

    Attributes:
        name: The policy's name in specs.
        paper: Where it was published.
        needs: What its decisions depend on beside positions, out of ``NEEDS``.
        rope_beyond: ``allow`` lets positions run past the model's trained length.
    """

    name: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    needs: ClassVar[tuple[str, ...]] = ()

    rope_beyond: Literal["refuse", "allow"] = "refuse"

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Turn every subclass into a frozen, keyword-only dataclass."""
        super().__init_subclass__(**kwargs)
        dataclass(frozen=True, kw_only=True, eq=False)(cls)

    def __post_init__(self) -> None:
        """Validate every parameter by its annotation, then the policy as a whole."""
        unknown = set(self.needs) - set(NEEDS)
        if unknown:
            raise PolicyError(f"{self}: unknown needs {sorted(unknown)}; choose from {NEEDS}")
        for key, parameter in parameters(type(self)).items():
            value = getattr(self, parameter.attribute)
            parameter.check(value, f"{self.label}:{key}")
            if parameter.kinds == (float,) and value is not None:
                object.__setattr__(self, parameter.attribute, float(value))
        self.validate()

    def validate(self) -> None:
        """Refuse impossible combinations of parameters with a PolicyError."""

    @property
    def occupancy(self) -> Occupancy:
        """The law that says how many slots are held; the base keeps everything."""
        return Occupancy(retained=None)

    @property
    def parameter_file(self) -> str | None:
        """The file that its parameters come from; None if it names none.

        Policies that read one say so: requests to a server must not make it read files.
        """
        return None

    @property
    def members(self) -> "tuple[CachePolicy, ...]":
        """The policies that rule layers: this one, unless it is composed of others."""
        return (self,)

    def of_layer(self, layer: int) -> "CachePolicy":
        """The policy that rules a layer: this one, unless it is composed of others."""
        del layer
        return self

    @cached_property
    def evicts(self) -> bool:
        """Whether any layer ever evicts."""
        return any(member.occupancy.retained is not None for member in self.members)

    @property
    def prompts(self) -> Prompts:
        """What layers that evict make of a prompt."""
        for member in self.members:
            if member.occupancy.retained is not None:
                return member.occupancy.prompts
        return "stream"

    @property
    def needs_prompt(self) -> bool:
        """Whether the law of any layer asks for a prompt's length."""
        return any(member.occupancy.needs_prompt for member in self.members)

    @property
    def implied(self) -> dict[str, Any]:
        """Values of parameters that a spec may leave out because the others imply them."""
        return {}

    @property
    def label(self) -> str:
        """What error messages call the policy."""
        return self.name or type(self).__name__

    def __eq__(self, other: object) -> bool:
        """Whether class, values and their types agree: ``recent=1`` is not ``recent=1.0``."""
        if type(other) is not type(self):
            return NotImplemented
        return self._typed_values == other._typed_values

    def __hash__(self) -> int:
        return hash((type(self), self._typed_values))

    @cached_property  # hosts look policies up for every row of every step
    def _typed_values(self) -> tuple[Any, ...]:
        return tuple(typed(getattr(self, item.name)) for item in _fields(type(self)))

    def __str__(self) -> str:
        """The canonical spec: required keys and whatever differs from its default."""
        items = [
            f"{key}={format_value(value)}"
            for key, parameter in parameters(type(self)).items()
            if typed(value := getattr(self, parameter.attribute))
            != typed(parameter.default_for(self))
        ]
        name = self.name if _is_registered(self) else import_path(type(self))
        return f"{name}:{','.join(items)}" if items else name


class EvictionPolicy(CachePolicy):
    """A policy that keeps a budget of tokens by evicting the lowest-scored slots.

    Attributes:
        budget: Slots kept per KV head of each layer after an eviction.
        interval: Tokens between two evictions; default max(1, budget // 16).
        prefill: ``stream`` evicts from the first token on, ``bulk`` once after the prompt.
        protect: Half-open position spans that are never evicted, ``(a:b,c:d)``; or ``prompt``:
            its tokens stay beside the budget, which counts the tokens behind them.
        rope: ``keep`` leaves keys at their original rotation, ``reindex`` attends at cache
            ranks (StreamingLLM); only where `reindexable`.

    Classes that keep nothing but their first and their newest tokens set `reindexable`; hosts may
    ask them about one layer and evict the same tokens in all.

    Classes whose evictions follow blocks or groups of tokens set `sets_prompts_apart` to False:
    they refuse ``prefill=bulk`` and ``protect=prompt``.
    """

    reindexable: ClassVar[bool] = False
    sets_prompts_apart: ClassVar[bool] = True
    smallest_budget: ClassVar[int] = 1

    budget: int
    interval: int | None = None
    prefill: Literal["stream", "bulk"] = "stream"
    protect: Protection = ()
    rope: Literal["keep", "reindex"] = "keep"

    def __post_init__(self) -> None:
        """Fill in the default interval before validating."""
        if self.interval is None and isinstance(self.budget, int):
            object.__setattr__(self, "interval", self.default_interval)
        super().__post_init__()

    def validate(self) -> None:
        """Refuse budgets that cannot hold what is protected."""
        if self.budget < self.smallest_budget or self.occupancy.interval < 1:
            raise PolicyError(
                f"{self.label}: budget and interval must be at least 1, "
                f"got budget={self.budget}, interval={self.interval}"
            )
        if not is_moderate(self.budget):  # it may be worked out from moderate parameters
            raise PolicyError(
                f"{self.label}: budget comes to {shown(self.budget)}, expected less than 2**62"
            )
        self._validate_prompts()
        for first, last in self.spans:
            if not 0 <= first < last:
                raise PolicyError(
                    f"{self.label}: protect span {first}:{last} protects nothing; need 0 <= a < b"
                )
        if len(self.spans) > self.budget:
            raise PolicyError(
                f"{self.label}: {len(self.spans)} protect spans but budget={self.budget}; "
                "merge those that overlap, or raise budget"
            )
        if self.rope == "reindex" and (not self.reindexable or self.protect):
            raise PolicyError(
                f"{self}: rope=reindex is exact only where the kept tokens are the first and "
                "the most recent ones (window, sinks, without protect); use rope=keep"
            )
        protected, room = self.protected_slots, self.occupancy.retained
        if room is None or room < 0 or protected > room:
            raise PolicyError(
                f"{self.label}: {protected} slots are protected but budget={self.budget} has "
                f"room for {room} tokens; raise budget or protect fewer tokens"
            )

    def _validate_prompts(self) -> None:
        """Refuse prompts set apart in two ways, or by a policy that cannot."""
        if self.keeps_prompt and self.prefill == "bulk":
            raise PolicyError(
                f"{self.label}: protect=prompt never evicts from the prompt, so that prefill=bulk "
                "has nothing to do; drop one of them"
            )
        if not self.sets_prompts_apart and (self.keeps_prompt or self.prefill == "bulk"):
            setting = "protect=prompt" if self.keeps_prompt else "prefill=bulk"
            raise PolicyError(
                f"{self.label}: it evicts whole blocks or groups of tokens, counted from the first "
                f"token on, which {setting} would break; drop {setting}"
            )

    @property
    def implied(self) -> dict[str, Any]:
        """The interval, unless said otherwise."""
        return {"interval": self.default_interval}

    @property
    def default_interval(self) -> int:
        """Tokens between evictions unless said otherwise: at most 6 % above the budget."""
        return max(1, self.budget // 16)

    @property
    def occupancy(self) -> Occupancy:
        """Sawtooth between `budget` and `budget` + `interval`; a prompt may be set apart."""
        assert self.interval is not None, "filled in by __post_init__"
        prompts = "keep" if self.keeps_prompt else self.prefill
        return Occupancy(retained=self.budget, interval=self.interval, prompts=prompts)

    @property
    def keeps_prompt(self) -> bool:
        """Whether a prompt's tokens stay beside the budget."""
        return self.protect == "prompt"

    @property
    def spans(self) -> Spans:
        """Positions that are never evicted, as half-open spans."""
        return () if self.protect == "prompt" else self.protect

    @property
    def sink_slots(self) -> int:
        """Number of first tokens that are never evicted."""
        return 0

    @property
    def recent_slots(self) -> int:
        """Number of newest tokens, the current one included, that are never evicted."""
        return 0

    @property
    def protected_slots(self) -> int:
        """Most slots that can be protected at once."""
        pinned, end = 0, self.sink_slots
        for first, last in sorted(self.spans):
            pinned += max(0, last - max(first, end))
            end = max(end, last)
        return self.sink_slots + self.recent_slots + pinned

    @property
    def scope_is_layer(self) -> bool:
        """Whether all KV heads of a layer keep one common set."""
        return False

    @property
    def group_reduction(self) -> str:
        """How a KV head's query heads are reduced: mean, max or sum."""
        return "mean"

    @property
    def accumulation(self) -> Accumulation:
        """How the accumulated statistic is kept; used when `needs` has ``accumulated``."""
        return Accumulation()

    def score(self, view: View) -> "Tensor":
        """Rate every slot for one eviction: [B, H_kv, S], any real dtype, higher is kept.

        Equal scores evict the lowest position first. Rows must not influence each other.
        """
        raise PolicyError(f"{type(self).__name__} defines no score(view) method; add one")

    def observe(self, view: View) -> "Tensor":
        """Give the slots' new accumulated statistic [B, H_kv, S], once per token.

        Overriding it replaces `accumulation` and makes hosts stop at every token, which is
        slower; the statistic of a new slot starts at zero.
        """
        raise PolicyError(f"{type(self).__name__} defines no observe(view) method")

    @property
    def observes_every_token(self) -> bool:
        """Whether the class brings its own `observe`."""
        return type(self).observe is not EvictionPolicy.observe


class GuardedPolicy(EvictionPolicy):
    """A policy that never evicts its first and its newest tokens.

    Attributes:
        sinks: First tokens that are never evicted.
        recent: Newest tokens that are never evicted; a float is a fraction of the budget.
    """

    sinks: int = 0
    recent: int | float = 0

    def validate(self) -> None:
        """Refuse protection that cannot fit."""
        if self.sinks < 0 or self.recent < 0:
            raise PolicyError(
                f"{self.label}: sinks and recent must not be negative, got "
                f"sinks={self.sinks}, recent={self.recent}"
            )
        if isinstance(self.recent, float) and self.recent > 1.0:
            raise PolicyError(
                f"{self.label}: recent={self.recent} is a fraction of the budget and must lie "
                "in 0.0..1.0; write an int for a number of tokens"
            )
        if self.sinks and self.budget <= self.sinks:
            raise PolicyError(
                f"{self.label}: budget must exceed sinks, got budget={self.budget}, "
                f"sinks={self.sinks}; raise budget or lower sinks"
            )
        super().validate()

    @property
    def sink_slots(self) -> int:
        """Number of first tokens that are never evicted."""
        return self.sinks

    @property
    def recent_slots(self) -> int:
        """Number of newest tokens that are never evicted."""
        if isinstance(self.recent, float):
            return math.floor(self.recent * self.budget)
        return self.recent


class ScorePolicy(GuardedPolicy):
    """The easy path for authors: subclass, declare `needs`, write ``score(view)``.

    Attributes:
        scope: ``head`` gives every KV head its own set, ``layer`` one set to all heads.
        group_pool: Reduction from the query heads of a KV head, for ``scope=head``.
    """

    scope: Literal["head", "layer"] = "head"
    group_pool: Literal["mean", "max", "sum"] = "mean"

    def validate(self) -> None:
        """Refuse protection that cannot fit and reductions that would be ignored."""
        if self.scope == "layer" and self.group_pool != "mean":
            raise PolicyError(
                f"{self.label}: scope=layer takes the mean over all query heads; "
                f"drop group_pool={self.group_pool} or use scope=head"
            )
        super().validate()

    @property
    def scope_is_layer(self) -> bool:
        """Whether all KV heads of a layer keep one common set."""
        return self.scope == "layer"

    @property
    def group_reduction(self) -> str:
        """How a KV head's query heads are reduced."""
        return self.group_pool


def parameters(cls: type[CachePolicy]) -> dict[str, Parameter]:
    """The spec keys of a policy class, required ones first, in declaration order."""
    hints = get_type_hints(cls)
    own_first = (f for f in _own_first(cls) if f.init)
    table = {_key(f): Parameter(f.name, hints[f.name], f.default) for f in own_first}
    return dict(sorted(table.items(), key=lambda item: not item[1].is_required))


def _own_first(cls: type[CachePolicy]) -> "list[Field[Any]]":
    """Dataclass fields with the class's own before the common ones."""
    inherited = {
        f.name for base in (ScorePolicy, EvictionPolicy, CachePolicy) for f in _fields(base)
    }
    return sorted(_fields(cls), key=lambda f: f.name in inherited)


def _fields(cls: type) -> "tuple[Field[Any], ...]":
    return fields(cls)


def _key(item: "Field[Any]") -> str:
    return item.metadata.get("key", item.name)


def spec_key(key: str, default: Any) -> Any:
    """Declare a field whose spec key differs from its attribute name."""
    return field(default=default, metadata={"key": key})


def import_path(cls: type) -> str:
    """Dotted path under which other processes can import a class."""
    return f"{cls.__module__}.{cls.__qualname__}"


def _is_registered(policy: CachePolicy) -> bool:
    from kvpolicy import registry

    return registry.is_registered(type(policy))


dataclass(frozen=True, kw_only=True, eq=False)(CachePolicy)
