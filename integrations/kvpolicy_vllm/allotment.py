"""How much of a request's blocks a policy's memory takes, at their front.

vLLM allots nothing but blocks, so that a memory lies where tokens would: a request's token
slot s is slot `law.state_slots` + s of its blocks. Memory slots are cells of the cache, like
tokens. A memory of plain numbers fills whole blocks, so that vLLM's kernel can attend the blocks
behind them as they are.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from kvpolicy import CachePolicy, Occupancy, UnsupportedError
from kvpolicy.footprint import floats_beside, law_in_pages
from kvpolicy.memory.policy import MemoryPolicy

if TYPE_CHECKING:
    from vllm.v1.kv_cache_interface import AttentionSpec


@dataclass(frozen=True)
class PageShape:
    """What a block holds of one KV head in one layer.

    Attributes:
        block_size: Slots.
        head_dim: Size of a key, and of a value.
        element_bytes: Bytes of one number of the cache's dtype.
        group: Query heads per KV head.
    """

    block_size: int
    head_dim: int
    element_bytes: int
    group: int

    @classmethod
    def of(cls, spec: "AttentionSpec", group: int) -> "PageShape":
        """That of a layer of vLLM with so many query heads per KV head."""
        return cls(spec.block_size, spec.head_size, spec.dtype.itemsize, group)

    @property
    def cell_bytes(self) -> int:
        """Key and value of one slot."""
        return 2 * self.head_dim * self.element_bytes


@dataclass(frozen=True)
class Allotment:
    """What a request under a policy holds.

    Attributes:
        law: The policy's occupancy law, with all slots that its memory takes as state slots.
        cells: Memory slots at the front of the first block; they are cells of the cache.
        state_blocks: Whole blocks at the front that hold a memory's numbers.
        kept: Tokens of a prompt that is never evicted from, in the first slots.
    """

    law: Occupancy
    cells: int = 0
    state_blocks: int = 0
    kept: int = 0

    def of_prompt(self, prompt_tokens: int) -> "Allotment":
        """That of a request with a prompt of this many tokens."""
        if not self.law.needs_prompt:
            return self
        kept = prompt_tokens if self.law.prompts == "keep" else 0
        return replace(self, law=self.law.of_prompt(prompt_tokens), kept=kept)

    @property
    def prompt(self) -> int:
        """Tokens of the prompt if the law sets it apart, otherwise 0."""
        return self.kept or self.law.prompt_tokens or 0


def memory_policy(policy: CachePolicy) -> MemoryPolicy | None:
    """The policy if it keeps a memory beside tokens."""
    return policy if isinstance(policy, MemoryPolicy) and policy.has_memory else None


def allotment_of(policy: CachePolicy, page: PageShape) -> Allotment:
    """Work out what a policy's requests hold.

    Raises:
        UnsupportedError: Its memory is both slots and numbers.
    """
    law, numbers = policy.occupancy, floats_beside(policy, page.head_dim, page.group)
    if numbers and law.state_slots:
        raise UnsupportedError(
            f"{policy}: its memory is {law.state_slots} slots and {numbers} numbers; vLLM's pages "
            "take one or the other, so keep the numbers in slots or leave the slots out"
        )
    if not numbers:
        return Allotment(law, cells=law.state_slots)
    in_pages = law_in_pages(law, numbers, page.block_size, page.cell_bytes)
    return Allotment(in_pages, state_blocks=in_pages.state_slots // page.block_size)
