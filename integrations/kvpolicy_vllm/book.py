"""The worker's book: what was really evicted from every request, and what it holds.

Forwards post to the account of a row's request. When a request finishes, its account becomes
a ledger while its pages still stand.
"""

import re
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from vllm.logger import init_logger

from kvpolicy import CachePolicy, Ledger, LedgerError
from kvpolicy_vllm.allotment import Allotment
from kvpolicy_vllm.memory import PagedMemory
from kvpolicy_vllm.metrics import Running
from kvpolicy_vllm.pages import Pages, rows_of
from kvpolicy_vllm.windows import Beside, SlidingGroup, beside

logger = init_logger(__name__)

_log = init_logger("vllm.kvpolicy")
"""Below vLLM's own logger, whose handlers and level it shares."""

_INTERNAL_SUFFIX = re.compile(r"-[0-9a-f]{8}$")

_SUMMED = ("logical_tokens", "retained", "evicted", "merged", "evictions", "policy_seconds")
"""Ledger entries that add up over requests."""

_MAX_LEDGERS = 4096
"""Finished requests whose ledgers are kept, the latest ones."""

_MAX_STATES = 64
"""Finished requests whose retained positions are kept, the latest ones."""

_MAX_STATE_BYTES = 64 << 20
"""Most memory for these positions; the latest request's are kept in any case."""

_MAX_FAULTS = 100


@dataclass(frozen=True, kw_only=True)
class RequestLedger(Ledger):
    """What one request of a server cost and lost.

    Attributes:
        allotted_by: Spec of the server's policy, by which blocks are allotted whatever the
            request brings.
        fault: At which token and why its policy failed first, and in how many layers; None if it
            never did.
    """

    allotted_by: str
    fault: str | None = None


class Fault(NamedTuple):
    """A policy's first failure for a request in a layer, where a window goes on from then on.

    Attributes:
        token: Tokens that the request had seen, the one of the failure included.
        layer: The layer.
        reason: What went wrong, on one line.
    """

    token: int
    layer: int
    reason: str


class Observed(NamedTuple):
    """A token whose attention is yet to be folded into the statistic.

    Attributes:
        query: [H, D].
        visible: Slots that it attends to.
        fading: Factor on the statistic as it was before the token.
        gain: Factor on the token's weights before they are added.
    """

    query: Tensor
    visible: int
    fading: float
    gain: float


@dataclass
class Account:
    """What happened to one request so far.

    Attributes:
        name: The request's id.
        policy: Its policy.
        allotment: What its blocks hold.
        tokens: Tokens processed.
        evicted_cells: Slots evicted, counted over all layers and KV heads.
        policy_seconds: Time spent observing and evicting.
        memories: Where its memory lies, by layer; only layers in which it was written.
        faults: Where its policy failed, by layer.
        backlogs: Tokens whose attention is yet to be folded, by layer.
    """

    name: str
    policy: CachePolicy
    allotment: Allotment
    tokens: int = 0
    evicted_cells: int = 0
    policy_seconds: float = 0.0
    memories: dict[int, PagedMemory] = field(default_factory=dict)
    faults: dict[int, Fault] = field(default_factory=dict)
    backlogs: dict[int, list[Observed]] = field(default_factory=lambda: defaultdict(list))

    @property
    def fault(self) -> str | None:
        """Its earliest failure, and in how many layers there was one; None without any."""
        if not self.faults:
            return None
        first, count = min(self.faults.values()), len(self.faults)
        where = "1 layer" if count == 1 else f"{count} layers"
        return f"token {first.token}, layer {first.layer}: {first.reason} ({where} under a window)"


class Finished(NamedTuple):
    """A finished request, as observers see it.

    Attributes:
        request_id: The id that its user knows.
        policy: Its policy.
        ledger: Its ledger.
        is_sound: Whether what was evicted is the occupancy law's figure.
    """

    request_id: str
    policy: CachePolicy
    ledger: RequestLedger
    is_sound: bool


@dataclass
class Book:
    """Accounts of one engine.

    Attributes:
        allotted_by: Spec of the engine's policy.
        layers: The pages of every layer under the policy, by layer index.
        page_bytes: Bytes of a block in one layer, state included.
        full_page_bytes: Bytes of a block in one layer of stock vLLM.
        sliding: What layers that no policy rules hold, by their names.
        accounts: Requests that are running or whose end is not known here yet.
        ledgers: Finished requests.
        states: Retained positions of finished requests, by layer.
        faults: What went wrong, one line each.
        contained: Requests whose policy failed, so that a window goes on for it.
        observers: Told of every finished request.
    """

    allotted_by: str = ""
    layers: dict[int, Pages] = field(default_factory=dict)
    page_bytes: int = 0
    full_page_bytes: int = 0
    sliding: dict[tuple[str, ...], SlidingGroup] = field(default_factory=dict)
    accounts: dict[str, Account] = field(default_factory=dict)
    ledgers: OrderedDict[str, RequestLedger] = field(default_factory=OrderedDict)
    states: OrderedDict[str, dict[int, Tensor]] = field(default_factory=OrderedDict)
    faults: deque[str] = field(default_factory=lambda: deque(maxlen=_MAX_FAULTS))
    contained: int = 0
    observers: list[Callable[[Finished], None]] = field(default_factory=list)

    def post(
        self, request_id: str, policy: CachePolicy, allotment: Allotment, *, seen: int, total: int
    ) -> Account:
        """The account of a request that advances from `seen` to `total` tokens.

        A request that starts over, after preemption, gets a new account. Where prompts are kept
        it may do so behind blocks of its prompt that it found in the prefix cache.
        """
        account = self.accounts.get(request_id)
        if account is None or seen <= allotment.kept:
            if account is not None:
                self._check(request_id, account)
            account = self.accounts[request_id] = Account(
                external_id(request_id), policy, allotment
            )
        account.tokens = total
        return account

    def contain(self, account: Account, fault: Fault) -> None:
        """Note that a request's policy failed in a layer; of its first failure the log tells."""
        if not account.faults:
            self.contained += 1
            _log.warning(
                "kvpolicy: request %s under %s: %s (token %d, layer %d); a window goes on there",
                account.name,
                account.policy,
                fault.reason,
                fault.token,
                fault.layer,
            )
        account.faults[fault.layer] = fault

    def close(self, request_id: str, blocks: Sequence[int]) -> None:
        """Turn a request's account into its ledger, and remember what it retained."""
        account = self.accounts.pop(request_id, None)
        if account is None:
            return
        name = external_id(request_id)
        is_sound = self._check(name, account)
        ledger = self.ledgers[name] = self._ledger(account, blocks)
        for observe in self.observers:
            observe(Finished(name, account.policy, ledger, is_sound))
        self.states[name] = _retained(self.layers, account, blocks)
        if len(self.ledgers) > _MAX_LEDGERS:
            self.ledgers.popitem(last=False)
        while len(self.states) > 1 and (
            len(self.states) > _MAX_STATES or _num_bytes(self.states) > _MAX_STATE_BYTES
        ):
            self.states.popitem(last=False)

    def drop(self, request_ids: Iterable[str]) -> None:
        """Forget requests that lost their blocks and will start over."""
        for request_id in request_ids:
            self.accounts.pop(request_id, None)

    def _check(self, name: str, account: Account) -> bool:
        """Whether what was evicted is the occupancy law's figure; a fault is noted if not."""
        try:
            self._ledger(account, ()).check(account.allotment.law)
        except LedgerError as error:
            self.faults.append(f"request {name}: {error}")
            logger.error("kvpolicy: %s", self.faults[-1])
            return False
        return True

    def _ledger(self, account: Account, blocks: Sequence[int]) -> RequestLedger:
        """Measured figures of a request; tokens are means over layers and KV heads.

        Blocks and bytes are also those of layers that attend to a sliding window. Without
        blocks they leave out what these hold.
        """
        block_size = next(iter(self.layers.values())).block_size
        evicted = _plain(account.evicted_cells / self._num_heads)
        num_layers, policy, num_blocks = len(self.layers), account.policy, len(blocks)
        full_blocks, beside = -(-account.tokens // block_size), self._beside(account)
        return RequestLedger(
            policy=str(policy),
            logical_tokens=account.tokens,
            retained=account.tokens - evicted,
            evicted=evicted,
            slots_held=account.tokens - evicted + policy.occupancy.state_slots,
            blocks_held=num_blocks + beside.blocks,
            bytes_held=num_blocks * self.page_bytes * num_layers + beside.num_bytes,
            bytes_saved=(full_blocks * self.full_page_bytes - num_blocks * self.page_bytes)
            * num_layers
            + beside.bytes_saved,
            evictions=account.allotment.law.evictions(account.tokens),
            policy_seconds=account.policy_seconds,
            merged=self._merged(account, blocks, evicted) if blocks else 0,
            allotted_by=self.allotted_by,
            fault=account.fault,
        )

    def _merged(self, account: Account, blocks: Sequence[int], evicted: int | float) -> int | float:
        """Evicted tokens that a request's memories stand for, mean over layers and KV heads.

        Nobody reads a memory any more in a layer where the policy failed.
        """
        index, total = torch.tensor([list(blocks)]), 0.0
        for layer, memory in account.memories.items():
            if layer in account.faults:
                continue
            try:
                count = memory.policy.merged(memory.load(index), 0, evicted)  # pyright: ignore[reportArgumentType]
                total += float(count)
            except Exception as error:
                reason = f"merged() raised {type(error).__name__}: {error}"
                self.contain(account, Fault(account.tokens, layer, reason))
        return _plain(total / max(len(account.memories), 1))

    def _beside(self, account: Account) -> Beside:
        """What layers that no policy rules hold of a request."""
        return beside(self.sliding.values(), account.tokens)

    @property
    def _num_heads(self) -> int:
        """KV heads of all layers under the policy."""
        return sum(pages.positions.shape[1] for pages in self.layers.values())

    def retained(self, request_id: str, blocks: Sequence[int]) -> dict[int, Tensor]:
        """Positions that a request with an open account holds, by layer."""
        return _retained(self.layers, self.accounts[request_id], blocks)

    def running(self, num_blocks: Mapping[str, int]) -> Iterator[Running]:
        """What requests with open accounts hold.

        Args:
            num_blocks: Blocks of each, by internal id.
        """
        block_bytes = self.page_bytes * len(self.layers)
        for request_id, count in num_blocks.items():
            account = self.accounts[request_id]
            retained = account.tokens - account.evicted_cells / self._num_heads
            beside = self._beside(account)
            yield Running(
                account.policy,
                retained,
                count + beside.blocks,
                count * block_bytes + beside.num_bytes,
            )

    def report(self, open_blocks: Mapping[str, Sequence[int]]) -> dict[str, Any]:
        """Ledgers of requests, their totals, and the KV heads they speak for; JSON-ready.

        Args:
            open_blocks: Blocks of the requests whose accounts are open, by internal id.

        Raises:
            LedgerError: A request's evictions differ from its occupancy law.
        """
        if self.faults:
            raise LedgerError(self.faults[0])
        ledgers = dict(self.ledgers)
        for request_id, blocks in open_blocks.items():
            account = self.accounts[request_id]
            ledger = self._ledger(account, blocks).check(account.allotment.law)
            ledgers[external_id(request_id)] = ledger
        requests = {name: ledger.as_dict() for name, ledger in ledgers.items()}
        return {"totals": totals(requests), "requests": requests, "heads": self._num_heads}


def totals(requests: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Add up the ledgers of requests."""
    sums = {key: sum(entry[key] for entry in requests.values()) for key in _SUMMED}
    return {"requests": len(requests), **sums}


def external_id(request_id: str) -> str:
    """The id a user knows: the engine appends eight random hexadecimal digits."""
    return _INTERNAL_SUFFIX.sub("", request_id)


def _retained(
    layers: Mapping[int, Pages], account: Account, blocks: Sequence[int]
) -> dict[int, Tensor]:
    """Positions held in every layer: [H_kv, kept] int32, ascending."""
    law, index = account.allotment.law, torch.tensor([list(blocks)])
    first, held = law.state_slots, law.held(account.tokens)
    return {
        layer: rows_of(pages.positions, index, first + held)[0, :, first:].sort(dim=-1).values
        for layer, pages in layers.items()
    }


def _plain(mean: float) -> int | float:
    """The mean as an integer where it is one."""
    return int(mean) if mean.is_integer() else mean


def _num_bytes(states: Mapping[str, Mapping[int, Tensor]]) -> int:
    return sum(t.numel() * t.element_size() for layers in states.values() for t in layers.values())
