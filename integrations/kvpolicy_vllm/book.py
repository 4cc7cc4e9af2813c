"""The engine's book: which request owns which blocks, and what was really evicted from it.

The scheduler side opens and closes accounts by request; the worker side posts what it did
to the account of a row, found by the row's first block, which no other live request has.
Both live in the engine's process.
"""

import re
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from vllm.logger import init_logger

from kvpolicy import CachePolicy, Ledger, LedgerError
from kvpolicy_vllm.pages import Pages, rows_of

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_utils import KVCacheBlock

logger = init_logger(__name__)

_INTERNAL_SUFFIX = re.compile(r"-[0-9a-f]{8}$")

_SUMMED = ("logical_tokens", "retained", "evicted", "merged", "evictions", "policy_seconds")
"""Ledger entries that add up over requests."""

_MAX_LEDGERS = 4096
"""Finished requests whose ledgers are kept, the latest ones."""

_MAX_STATES = 64
"""Finished requests whose retained positions are kept, the latest ones."""


@dataclass
class Account:
    """What happened to one request so far.

    Attributes:
        blocks: The manager's own list of the request's blocks, first one never replaced.
        policy: Its policy; None until its first forward.
        tokens: Tokens processed.
        evicted_cells: Slots evicted, counted over all layers and KV heads.
        policy_seconds: Time spent observing and evicting.
    """

    blocks: "list[KVCacheBlock]"
    policy: CachePolicy | None = None
    tokens: int = 0
    evicted_cells: int = 0
    policy_seconds: float = 0.0

    @property
    def block_ids(self) -> list[int]:
        """Physical indices of the blocks held."""
        return [block.block_id for block in self.blocks]


@dataclass
class Book:
    """Accounts of one engine.

    Attributes:
        layers: The pages of every layer, by layer index.
        page_bytes: Bytes of a block in one layer, state included.
        full_page_bytes: Bytes of a block in one layer of stock vLLM.
        accounts: Live requests.
        owners: First block of every live request, to its id.
        ledgers: Finished requests.
        states: Retained positions of finished requests, by layer.
        faults: What went wrong, one line each.
    """

    layers: dict[int, Pages] = field(default_factory=dict)
    page_bytes: int = 0
    full_page_bytes: int = 0
    accounts: dict[str, Account] = field(default_factory=dict)
    owners: dict[int, str] = field(default_factory=dict)
    ledgers: OrderedDict[str, Ledger] = field(default_factory=OrderedDict)
    states: OrderedDict[str, dict[int, Tensor]] = field(default_factory=OrderedDict)
    faults: list[str] = field(default_factory=list)

    def open(self, request_id: str, blocks: "list[KVCacheBlock]") -> None:
        """Start (or, after preemption, start again) the account of a request with blocks."""
        self.accounts[request_id] = Account(blocks)
        self.owners[blocks[0].block_id] = request_id

    def account_at(self, first_block: int) -> Account | None:
        """The account of the live request that owns a block; None for dummy rows."""
        owner = self.owners.get(first_block)
        return None if owner is None else self.accounts.get(owner)

    def close(self, request_id: str) -> None:
        """Turn a request's account into its ledger, and remember what it retained."""
        account = self.accounts.pop(request_id, None)
        if account is None:
            return
        self.owners.pop(account.blocks[0].block_id, None)
        if account.policy is None:
            return
        name = external_id(request_id)
        self.ledgers[name] = ledger = self._ledger(account, account.policy)
        self.states[name] = self._retained(account, account.policy)
        for store, limit in ((self.ledgers, _MAX_LEDGERS), (self.states, _MAX_STATES)):
            if len(store) > limit:
                store.popitem(last=False)
        try:
            ledger.check(account.policy.occupancy)
        except LedgerError as error:
            self.faults.append(f"request {name}: {error}")
            logger.error("kvpolicy: %s", self.faults[-1])

    def _ledger(self, account: Account, policy: CachePolicy) -> Ledger:
        """Measured figures of a request; tokens are means over layers and KV heads."""
        block_size = next(iter(self.layers.values())).block_size
        heads = sum(pages.positions.shape[1] for pages in self.layers.values())
        evicted = account.evicted_cells / heads
        evicted = int(evicted) if evicted.is_integer() else evicted
        num_blocks, num_layers = len(account.blocks), len(self.layers)
        full_blocks = -(-account.tokens // block_size)
        return Ledger(
            policy=str(policy),
            logical_tokens=account.tokens,
            retained=account.tokens - evicted,
            evicted=evicted,
            slots_held=account.tokens - evicted + policy.occupancy.state_slots,
            blocks_held=num_blocks,
            bytes_held=num_blocks * self.page_bytes * num_layers,
            bytes_saved=(full_blocks * self.full_page_bytes - num_blocks * self.page_bytes)
            * num_layers,
            evictions=int(evicted // policy.occupancy.interval),
            policy_seconds=account.policy_seconds,
        )

    def _retained(self, account: Account, policy: CachePolicy) -> dict[int, Tensor]:
        """Positions held in every layer: [H_kv, kept] int64, ascending."""
        held, blocks = policy.occupancy.held(account.tokens), torch.tensor([account.block_ids])
        return {
            layer: rows_of(pages.positions, blocks, held)[0].long().sort(dim=-1).values
            for layer, pages in self.layers.items()
        }

    def report(self) -> dict[str, Any]:
        """Ledgers of finished requests and their totals, JSON-ready.

        Raises:
            LedgerError: A request's evictions differ from its occupancy law.
        """
        if self.faults:
            raise LedgerError(self.faults[0])
        requests = {request_id: ledger.as_dict() for request_id, ledger in self.ledgers.items()}
        totals = {key: sum(entry[key] for entry in requests.values()) for key in _SUMMED}
        return {"totals": {"requests": len(requests), **totals}, "requests": requests}

    def retained_positions(self, request_id: str, layer: int) -> Tensor | None:
        """Positions a live or recently finished request holds in a layer: [H_kv, kept].

        None if the request or the layer is unknown, or its state is gone.
        """
        for live_id, account in self.accounts.items():
            if external_id(live_id) == request_id and account.policy is not None:
                return self._retained(account, account.policy).get(layer)
        return self.states.get(request_id, {}).get(layer)


def external_id(request_id: str) -> str:
    """The id a user knows: the engine appends eight random hexadecimal digits."""
    return _INTERNAL_SUFFIX.sub("", request_id)

