"""Attention over slots, and what a policy gets to see of it.

Axes: B rows, H query heads, H_kv KV heads, G query heads per KV head, Q queries, S slots,
D head dimension. Logits and weights are float32 whatever the cache's dtype.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from kvpolicy.errors import UnsupportedError
from kvpolicy.memory.answers import attended
from kvpolicy.memory.decoder import Decoder
from kvpolicy.memory.policy import MemoryPolicy
from kvpolicy.memory.state import Attended, Memory, Passage, Question, Setting, Shape
from kvpolicy.occupancy import Occupancy
from kvpolicy.policy import CachePolicy, EvictionPolicy, View
from kvpolicy.ranks import ALONE, Ranks
from kvpolicy.rotary import Rotary
from kvpolicy.slots import Slots


@dataclass
class Stopwatch:
    """Adds up the host's time inside its ``with`` blocks; on a GPU, that of the launches.

    Attributes:
        seconds: Time so far.
    """

    seconds: float = 0.0
    _started: float = 0.0

    def __enter__(self) -> None:
        self._started = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.seconds += time.perf_counter() - self._started


class Answer(NamedTuple):
    """What a kernel computes.

    Attributes:
        output: [B, H, Q, D] in the dtype of the queries, or in float32.
        lse: [B, H, Q] float32, log-sum-exp of each query's scaled logits.
    """

    output: Tensor
    lse: Tensor


class Kernel(Protocol):
    """Attention that somebody else computes, over slots as they are stored."""

    def __call__(
        self, q: Tensor, keys: Tensor, values: Tensor, visible: Sequence[int], scale: float
    ) -> Answer:
        """Attend to the slots that a row's newest query sees; earlier queries see fewer.

        Args:
            q: [B, H, Q, D] queries of consecutive tokens.
            keys: [B, H_kv, C, D]; slots from `visible` on may hold anything.
            values: [B, H_kv, C, D], likewise.
            visible: Slots that each row's last query sees, the first of its storage in every
                head; those of its own Q tokens come last, in order.
            scale: Factor on query-key products.
        """
        ...


@dataclass(frozen=True)
class AttentionLayer:
    """One attention layer under a policy: everything that stays the same over a request.

    Attributes:
        policy: What is kept in this layer.
        index: The layer's index in the model.
        scale: Factor on query-key products, usually 1 / sqrt(D).
        rotary: The model's RoPE; needed by ``rope=reindex`` and by memories.
        decoder: The layer's weights; needed by policies that say so.
        first_kv_head: Index of the first KV head here, when heads are spread over processes.
        ranks: These processes.
        kernel: Computes attention, from eviction to eviction; None for this module's own.
        stopwatch: Time spent on observing, scoring and evicting, for ledgers.
    """

    policy: CachePolicy
    index: int
    scale: float
    rotary: Rotary | None = None
    first_kv_head: int = 0
    ranks: Ranks = ALONE
    decoder: Decoder | None = None
    kernel: Kernel | None = None
    stopwatch: Stopwatch = field(default_factory=Stopwatch, compare=False, repr=False)

    def __post_init__(self) -> None:
        """Of a policy that is composed of others, take the one that rules this layer.

        Raises:
            UnsupportedError: There is a kernel, and the policy has a memory or turns queries.
        """
        object.__setattr__(self, "policy", self.policy.of_layer(self.index))
        if self.kernel is not None:
            self._require_slots_alone()

    def _require_slots_alone(self) -> None:
        """Refuse a kernel where attention is more than a softmax over slots."""
        if self.memory_policy is not None:
            raise UnsupportedError(
                f"{self.policy}: a memory is attended together with the slots, which an attention "
                "kernel does not do; leave the kernel out, or use a policy that only evicts"
            )
        if getattr(self.policy, "rope", "keep") != "keep":
            raise UnsupportedError(
                f"{self.policy}: rope=reindex turns queries differently for sinks, which an "
                "attention kernel does not do; leave the kernel out, or use rope=keep"
            )

    @cached_property
    def occupancy(self) -> Occupancy:
        """The policy's occupancy law; the prompt of a row settles it (`Slots.laws`)."""
        return self.policy.occupancy

    @property
    def eviction(self) -> EvictionPolicy | None:
        """The policy if it ever evicts."""
        return self.policy if isinstance(self.policy, EvictionPolicy) else None

    @cached_property
    def memory_policy(self) -> MemoryPolicy | None:
        """The policy if it keeps a memory beside tokens."""
        policy = self.policy
        return policy if isinstance(policy, MemoryPolicy) and policy.has_memory else None

    def new_slots(
        self, q: Tensor, k: Tensor, v: Tensor, prompts: Sequence[int] | None = None
    ) -> Slots:
        """Storage of rows that have seen nothing, for inputs of these shapes.

        Args:
            q: [B, H, ..., D].
            k: [B, H_kv, ..., D].
            v: [B, H_kv, ..., D].
            prompts: Tokens of each row's prompt; None if no row has a prompt.

        Raises:
            UnsupportedError: The host gave no rotary embedding, or no weights where needed.
            PolicyError: The policy's parameters do not fit the model.
        """
        slots, policy = Slots.empty(k, v), self.memory_policy
        slots.prompts = slots.prompts if prompts is None else list(prompts)
        if policy is None:
            return slots
        if policy.needs_decoder and self.decoder is None:
            raise UnsupportedError(
                f"{policy}: its memory needs the layer's weights, which this host has not"
            )
        slots.memory = policy.new_memory(Shape.of(q, k, v), self.setting)
        return slots

    @cached_property
    def setting(self) -> Setting:
        """The layer as memories see it."""
        if self.rotary is None:
            raise UnsupportedError(f"{self.policy}: its memory needs plain rotary embeddings")
        return Setting(
            self.index, self.scale, self.rotary, self.first_kv_head, self.decoder, self.ranks.count
        )

    def attend(
        self,
        memory: Memory,
        q: Tensor,
        logits: Tensor,
        values: Tensor,
        positions: Tensor,
        evicted: Tensor,
    ) -> Attended:
        """Attend to tokens and memory.

        Args:
            memory: Of the rows.
            q: [B, H, Q, D], rotated.
            logits: [B, H_kv, G, Q, S] over token slots, -inf where one is not seen.
            values: [B, H_kv, S, D].
            positions: [Q] or [B, 1, Q] of the queries.
            evicted: [Q] or [B, 1, Q] tokens evicted before each query.
        """
        policy = self.memory_policy
        assert policy is not None, "it made the memory"
        question = Question(q.float(), positions, evicted, logits, values, self.setting)
        return attended(policy, memory, question)

    def passage(
        self,
        slots: Slots,
        chosen: Tensor,
        count: int,
        *,
        n: Tensor,
        query: Tensor,
        lse: Tensor,
    ) -> Passage:
        """Take tokens out of slots for a memory, oldest first.

        Args:
            slots: With S slots.
            chosen: [B, H_kv, S] bool, `count` of them per row and head.
            count: E.
            n: [B] tokens seen.
            query: [B, H, D] of the newest token.
            lse: [B, H_kv, G] of its logits.
        """
        last = torch.iinfo(torch.int64).max  # past what unwritten slots may hold
        order = slots.positions.where(chosen, last).argsort(dim=-1)[..., :count]
        taken = slots.keep(order)
        return Passage(
            rotated_keys=taken.keys.float(),
            values=taken.values.float(),
            positions=taken.positions,
            accumulated=taken.accumulated,
            n=n.view(-1, 1, 1),
            query=query.float().unflatten(1, lse.shape[1:]),
            lse=lse,
            setting=self.setting,
        )

    @property
    def needs_weights(self) -> bool:
        """Whether decisions depend on attention weights."""
        policy = self.eviction
        return policy is not None and (
            "last_row" in policy.needs or self.accumulates or policy.observes_every_token
        )

    @property
    def accumulates(self) -> bool:
        """Whether every token's weights are folded into the slots' statistic."""
        return self.eviction is not None and "accumulated" in self.eviction.needs

    def reads_weights(self, *, due: bool) -> bool:
        """Whether the policy looks at the weights of tokens now.

        Args:
            due: Whether an eviction comes after the last of them.
        """
        if not self.needs_weights:
            return False
        return due or self.accumulates or bool(self.eviction and self.eviction.observes_every_token)

    def logits(self, q: Tensor, keys: Tensor, evicted: Tensor) -> Tensor:
        """Scaled query-key products, [B, H_kv, G, Q, S] float32.

        Args:
            q: [B, H, Q, D].
            keys: [B, H_kv, S, D]; with ``rope=reindex`` the sinks are the first slots.
            evicted: Tokens evicted before each query, broadcastable to [B, H, Q].
        """
        logits = query_key_products(q, keys, self.scale)
        policy = self.eviction
        if policy is None or policy.rope == "keep" or policy.sink_slots == 0:
            return logits
        assert self.rotary is not None, "hosts give the rotary embedding for rope=reindex"
        turned = self.rotary.shift(q.float(), -evicted)
        sinks = keys[:, :, : policy.sink_slots]
        logits[..., : sinks.shape[2]] = query_key_products(turned, sinks, self.scale)
        return logits

    def pool(self, weights: Tensor) -> Tensor:
        """Reduce weights [B, H_kv, G, Q, S] over query heads to [B, H_kv, Q, S]."""
        policy = self.eviction
        if policy is not None and policy.scope_is_layer:
            return weights.mean(dim=(1, 2), keepdim=True)[:, :, 0].expand(
                -1, weights.shape[1], -1, -1
            )
        match policy.group_reduction if policy is not None else "mean":
            case "max":
                return weights.amax(dim=2)
            case "sum":
                return weights.sum(dim=2)
            case _:
                return weights.mean(dim=2)

    def view(
        self,
        *,
        positions: Tensor,
        valid: Tensor,
        n: Tensor,
        visible: Tensor,
        weights: Tensor | None,
        accumulated: Tensor | None,
        keys: Tensor | None = None,
        values: Tensor | None = None,
        prompts: Sequence[int] | None = None,
    ) -> View:
        """Show the policy one moment: what it declared in `needs`, and no more.

        Under ``protect=prompt`` the slots of the rows' `prompts` are not the policy's business:
        they are attended, but not shown as valid.
        """
        policy = self.eviction
        assert policy is not None, "only policies that evict look at slots"
        if policy.keeps_prompt:
            assert prompts is not None, "protect=prompt needs to know the prompts"
            first = torch.tensor(prompts, device=positions.device)
            valid = valid & (positions >= first[:, None, None])
            weights = None if weights is None else weights.where(valid, 0.0)
        heads = torch.arange(positions.shape[1], device=positions.device)
        return View(
            positions=positions,
            valid=valid,
            weights=weights if "last_row" in policy.needs else None,
            accumulated=accumulated if self.accumulates else None,
            keys=keys if "keys" in policy.needs else None,
            values=values if "values" in policy.needs else None,
            n=n.view(-1, 1, 1),
            visible=visible.view(-1, 1, 1),
            kv_heads=(heads + self.first_kv_head)[None, :, None],
            budget=policy.budget,
            layer=self.index,
        )

    def window_ages(self, laws: Sequence[Occupancy], tokens: Sequence[int]) -> Tensor | None:
        """How far tokens are into the windows that count; None if all tokens count.

        Args:
            laws: [X] settled laws of the tokens' rows.
            tokens: [X] number of each token in its row, from 1 on.

        Returns:
            [X] int64, see `Occupancy.window_age`.
        """
        window = None if self.eviction is None else self.eviction.accumulation.window
        if window is None:
            return None
        return torch.tensor(
            [law.window_age(n, window) for law, n in zip(laws, tokens, strict=True)]
        )

    def fold(
        self,
        accumulated: Tensor,
        weights: Tensor,
        visible: Tensor,
        ages: Tensor | None = None,
    ) -> Tensor:
        """Fold consecutive attention rows into the slots' statistic.

        Args:
            accumulated: [B, H_kv, S] before the first of the rows.
            weights: [B, H_kv, Q, S] pooled rows; zero where a query does not see a slot.
            visible: Slots that each query sees, broadcastable to [B, 1, Q].
            ages: What `window_ages` says of the queries, broadcastable to [B, 1, Q].

        Returns:
            [B, H_kv, S] after the last row.
        """
        assert self.eviction is not None
        rule = self.eviction.accumulation
        if ages is not None:
            assert rule.window is not None, "all tokens count without one"
            ages = ages.to(weights.device)
            accumulated = accumulated.where(ages[..., :1] > 1, 0.0)
            weights = weights.where((ages > 0)[..., None], 0.0)
        if rule.decay == 1.0 and not rule.relative:
            return accumulated + weights.sum(dim=2)
        num_rows = weights.shape[2]
        later = torch.arange(num_rows - 1, -1, -1, device=weights.device)
        factors = rule.decay ** later.float() * (visible if rule.relative else 1)  # [B, 1, Q]
        added = (weights * factors[..., None]).sum(dim=2)
        return accumulated * rule.decay**num_rows + added


def weights_of(logits: Tensor, lse: Tensor) -> Tensor:
    """Attention weights of logits [B, H_kv, G, Q, S] whose log-sum-exp [B, H, Q] is known."""
    return (logits - lse.reshape(*logits.shape[:4], 1)).exp()


def query_key_products(q: Tensor, keys: Tensor, scale: float) -> Tensor:
    """Multiply q [B, H, Q, D] with keys [B, H_kv, S, D]: [B, H_kv, G, Q, S] float32."""
    batch, heads, queries, dim = q.shape
    kv_heads, slots = keys.shape[1:3]
    rows = (q.float() * scale).reshape(batch, kv_heads, heads // kv_heads * queries, dim)
    products = rows @ keys.float().transpose(-1, -2)
    return products.view(batch, kv_heads, heads // kv_heads, queries, slots)


def weighted_values(weights: Tensor, values: Tensor) -> Tensor:
    """Weights [B, H_kv, G, Q, S] over values [B, H_kv, S, D]: [B, H, Q, D] float32."""
    batch, kv_heads, group, queries, slots = weights.shape
    mixed = weights.reshape(batch, kv_heads, group * queries, slots) @ values.float()
    return mixed.view(batch, kv_heads * group, queries, values.shape[-1])
