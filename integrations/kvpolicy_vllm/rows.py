"""One request's share of a forward, and how it is to be processed."""

from dataclasses import dataclass

from kvpolicy import CachePolicy, EvictionPolicy, Occupancy
from kvpolicy.memory.policy import MemoryPolicy, SlotMemoryPolicy
from kvpolicy.policies.infini import Infini
from kvpolicy_vllm.allotment import Allotment, memory_policy
from kvpolicy_vllm.book import Account


@dataclass(frozen=True)
class Row:
    """One request's share of a forward.

    Attributes:
        index: Row of the batch.
        policy: Its policy.
        first_token: Index of its first token in the batch.
        num_tokens: Tokens in this forward.
        seen: Tokens processed before.
        account: Where to post what was evicted.
    """

    index: int
    policy: CachePolicy
    first_token: int
    num_tokens: int
    seen: int
    account: Account

    @property
    def allotment(self) -> Allotment:
        """What its blocks hold."""
        return self.account.allotment

    @property
    def law(self) -> Occupancy:
        """The occupancy law of its blocks."""
        return self.account.allotment.law

    @property
    def is_kept(self) -> bool:
        """Whether all of its tokens are of a prompt that is never evicted from."""
        return self.total <= self.allotment.kept

    @property
    def last_token(self) -> int:
        """Index of its last token in the batch."""
        return self.first_token + self.num_tokens - 1

    @property
    def total(self) -> int:
        """Tokens processed after this forward."""
        return self.seen + self.num_tokens

    @property
    def visible(self) -> int:
        """Token slots that the last token attends to."""
        return self.law.held(self.total - 1) + 1

    @property
    def surplus(self) -> int:
        """Token slots that an eviction drops after the last token; 0 if none is due."""
        return self.law.surplus(self.total)

    @property
    def is_due(self) -> bool:
        """Whether an eviction follows the last token."""
        return self.surplus > 0

    @property
    def observes(self) -> bool:
        """Whether the last token's attention counts in the statistic kept with the slots."""
        return any(self._observes(member) for member in self.policy.members)

    def _observes(self, policy: CachePolicy) -> bool:
        """Whether layers under this policy keep a statistic in which the last token counts."""
        if not isinstance(policy, EvictionPolicy) or "accumulated" not in policy.needs:
            return False
        try:
            window = policy.accumulation.window
        except Exception:  # fails again where attention is folded, and is contained there
            return True
        return window is None or self.law.window_age(self.total, window) > 0

    @property
    def memory(self) -> MemoryPolicy | None:
        """Its policy if that keeps a memory."""
        return memory_policy(self.policy)

    @property
    def stays_in_place(self) -> bool:
        """Whether the row's slots stay as they are, but for those of its new tokens."""
        if self.is_kept:
            return True
        due = self.law.next_due(self.seen) if self.num_tokens > 1 else None
        if due is not None and due < self.total:
            return False
        return all(self._stays_under(member) for member in self.policy.members)

    def _stays_under(self, policy: CachePolicy) -> bool:
        """Whether layers under this policy look at nothing but what is known in place."""
        if not isinstance(policy, EvictionPolicy):
            return True
        if policy.observes_every_token:
            return False
        if policy.rope == "reindex" and self.law.evicted(self.total - 1) > 0:
            return False
        if self.memory is not None:
            return self._only_reads(self.memory)
        return self.num_tokens == 1 or "accumulated" not in policy.needs

    def _only_reads(self, memory: MemoryPolicy) -> bool:
        """Whether the row reads a memory that was written before and does not change."""
        if self.num_tokens > 1 or self.seen == 0 or self.is_due:
            return False
        if self._is_boundary(memory):
            return False
        if isinstance(memory, SlotMemoryPolicy):
            return True
        # Other ways of reading are walked: here they are taken apart, around vLLM's kernel.
        return type(memory).attend is Infini.attend and not memory.needs

    def _is_boundary(self, memory: MemoryPolicy) -> bool:
        """Whether the policy rewrites its memory after the last token."""
        try:
            return memory.next_boundary(self.seen) == self.total
        except Exception:  # fails again where the row is walked, and is contained there
            return True

    @property
    def has_slot_memory(self) -> bool:
        """Whether memory slots are attended in one softmax with its tokens."""
        return self.allotment.cells > 0


def post_time(rows: list[Row], seconds: float) -> None:
    """Share the time of a policy's work evenly among its rows."""
    for row in rows:
        row.account.policy_seconds += seconds / len(rows)
