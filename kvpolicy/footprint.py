"""What a request costs in memory: slots, blocks and bytes, all of them exact integers.

Layers that attend to a sliding window are under no policy and hold what their window does.

An occupancy law says how many slots a request holds, a layout what a slot takes in each host,
and a pool how many requests find room. Counts are those of a request's fullest moment so far,
which lies inside a step.
"""

from bisect import bisect_right
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from kvpolicy.errors import PolicyError
from kvpolicy.memory.policy import MemoryPolicy
from kvpolicy.occupancy import Occupancy
from kvpolicy.policy import CachePolicy

PAGE_STATE_BYTES = 8
"""Policy state of one slot of one KV head in vLLM's pages: int32 position, float32 statistic."""

DENSE_STATE_BYTES = 12
"""The same in dense storage (`kvpolicy.slots.Slots`): int64 position, float32 statistic."""


FLOAT_BYTES = 4
"""A number of a memory that is kept beside slots."""


def floats_beside(policy: CachePolicy, head_dim: int, group: int) -> int:
    """Float32 numbers per KV head that a policy keeps beside slots; `group` query heads each."""
    return policy.memory_floats(head_dim, group) if isinstance(policy, MemoryPolicy) else 0


def law_in_pages(law: Occupancy, num_floats: int, block_size: int, cell_bytes: int) -> Occupancy:
    """The law of slots in vLLM's pages, where numbers beside slots take whole blocks.

    Args:
        law: The policy's.
        num_floats: Numbers per KV head, `floats_beside`.
        block_size: Slots of a block.
        cell_bytes: Key and value of one slot of one KV head.
    """
    blocks = -(-num_floats * FLOAT_BYTES // (block_size * cell_bytes))
    return replace(law, state_slots=law.state_slots + blocks * block_size)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What one slot takes, of a model or of one tensor-parallel rank's share of it.

    Every page carries state for each of its slots, whatever the policy: requests of one engine
    may bring different policies.

    Attributes:
        num_layers: Layers under the policy.
        num_kv_heads: KV heads of each layer that are held here.
        head_dim: Size of one head's key, and of its value.
        element_bytes: Bytes of one number of the cache's dtype.
        num_sliding: Layers that attend to a sliding window.
        window: Tokens that these attend to, the newest included.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    element_bytes: int
    num_sliding: int = 0
    window: int = 1

    def __post_init__(self) -> None:
        """Refuse sizes that are none."""
        _require_positive(
            num_layers=self.num_layers,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            element_bytes=self.element_bytes,
            window=self.window,
        )

    @property
    def layers_per_block(self) -> int:
        """Layers that share a block table in vLLM, where kinds of layers have tables of their own.

        As many as there are of the rarer kind, unless the other one has hardly more.
        """
        if not self.num_sliding:
            return self.num_layers
        fewer, more = sorted((self.num_layers, self.num_sliding))
        return more if more < 1.5 * fewer else fewer

    @property
    def num_tables(self) -> int:
        """Block tables of the layers under the policy."""
        return -(-self.num_layers // self.layers_per_block)

    @property
    def num_sliding_tables(self) -> int:
        """Block tables of the layers that attend to a sliding window."""
        return -(-self.num_sliding // self.layers_per_block)

    @property
    def cell_bytes(self) -> int:
        """Key and value of one slot of one KV head in one layer."""
        return 2 * self.head_dim * self.element_bytes

    @property
    def token_bytes(self) -> int:
        """Keys and values of one token in all layers, without policy state."""
        return (self.num_layers + self.num_sliding) * self.num_kv_heads * self.cell_bytes

    def page_bytes(self, block_size: int) -> int:
        """One layer's page of a block in vLLM, its tail of policy state included."""
        return block_size * self.num_kv_heads * (self.cell_bytes + PAGE_STATE_BYTES)

    def block_bytes(self, block_size: int) -> int:
        """A block in vLLM, over the layers that share it, policy state included."""
        return self.layers_per_block * self.page_bytes(block_size)

    def stock_block_bytes(self, block_size: int) -> int:
        """A block in stock vLLM, over the layers that share it: no policy, no state."""
        return self.layers_per_block * block_size * self.num_kv_heads * self.cell_bytes

    def dense_bytes(self, num_slots: int, num_floats: int = 0) -> int:
        """Slots in dense storage, over all layers under the policy, policy state included.

        Args:
            num_slots: Slots of a KV head, those of a memory included.
            num_floats: Numbers that a memory keeps per KV head beside slots.
        """
        per_head = num_slots * (self.cell_bytes + DENSE_STATE_BYTES) + num_floats * FLOAT_BYTES
        return self.num_layers * self.num_kv_heads * per_head

    def dense_window_bytes(self, tokens: int) -> int:
        """What sliding layers hold of a request in transformers."""
        held = min(tokens, self.window - 1)
        return self.num_sliding * self.num_kv_heads * held * self.cell_bytes


class Footprint(NamedTuple):
    """What one request costs once it has `tokens` tokens, and how many such requests fit.

    Attributes:
        tokens: Prompt and output together.
        slots: Most slots that a KV head under the policy has held by then, reserved ones included.
        blocks: Blocks of vLLM that hold them, and those of sliding layers.
        bytes: Of these blocks, policy state included.
        dense_bytes: Of exactly these slots in dense storage, policy state included, and of what
            sliding layers hold.
        requests: Such requests that fit into the pool together: vLLM's maximum concurrency.
    """

    tokens: int
    slots: int
    blocks: int
    bytes: int
    dense_bytes: int
    requests: int


class Reach(NamedTuple):
    """The longest request that can run alone.

    Attributes:
        tokens: Prompt and output together; None where nothing limits it.
        limit: What ends it: the pool's room, the model's positions, or nothing.
    """

    tokens: int | None
    limit: Literal["pool", "positions"] | None


@dataclass(frozen=True, kw_only=True)
class Pool:
    """vLLM's KV cache: equal blocks, of which each request holds whole ones.

    Attributes:
        layout: What a slot takes.
        block_size: Slots of a block.
        memory: Bytes of the pool.
        has_state: Whether pages carry policy state; stock vLLM's do not.
    """

    layout: Layout
    block_size: int
    memory: int
    has_state: bool = True

    def __post_init__(self) -> None:
        """Refuse sizes that are none."""
        _require_positive(block_size=self.block_size, memory=self.memory)

    @property
    def block_bytes(self) -> int:
        """Bytes of one block over the layers that share it."""
        if self.has_state:
            return self.layout.block_bytes(self.block_size)
        return self.layout.stock_block_bytes(self.block_size)

    @property
    def num_blocks(self) -> int:
        """Whole blocks that the pool's memory holds."""
        return self.memory // self.block_bytes

    def footprint(self, law: Occupancy, tokens: int, num_floats: int = 0) -> Footprint:
        """Give what a request of `tokens` tokens costs under a law, at its fullest moment.

        Args:
            law: The policy's.
            tokens: Prompt and output together.
            num_floats: Numbers per KV head that the policy keeps beside slots.
        """
        _require_positive(tokens=tokens)
        blocks = self._num_blocks(self._in_pages(law, num_floats), tokens)
        slots = peak_slots(law, tokens)
        dense_bytes = self.layout.dense_bytes(slots, num_floats)
        return Footprint(
            tokens=tokens,
            slots=slots,
            blocks=blocks,
            bytes=blocks * self.block_bytes,
            dense_bytes=dense_bytes + self.layout.dense_window_bytes(tokens),
            requests=self.num_blocks // blocks,
        )

    def reach(self, law: Occupancy, positions: int | None, num_floats: int = 0) -> Reach:
        """Give the longest request that fits alone and stays within so many positions.

        As vLLM's start-up check does, it leaves out the one block that vLLM never hands out.
        """
        law, room = self._in_pages(law, num_floats), max(0, self.num_blocks - 1)
        too_long = room * self.block_size + 1  # for a request that grows with every token
        lengths = range(1, too_long + 1)
        longest = bisect_right(lengths, room, key=lambda tokens: self._num_blocks(law, tokens))
        if longest == too_long:
            return Reach(positions, None if positions is None else "positions")
        if positions is None or longest < positions:
            return Reach(longest, "pool")
        return Reach(positions, "positions")

    def _num_blocks(self, law: Occupancy, tokens: int) -> int:
        """Most blocks that a request has held once `tokens` tokens were processed."""
        layout, size = self.layout, self.block_size
        # The window may begin inside a block.
        sliding = min(-(-tokens // size), 1 + -(-(layout.window - 1) // size))
        own = law.num_blocks(tokens, size)
        return layout.num_tables * own + layout.num_sliding_tables * sliding

    def _in_pages(self, law: Occupancy, num_floats: int) -> Occupancy:
        return law_in_pages(law, num_floats, self.block_size, self.layout.cell_bytes)


def peak_slots(law: Occupancy, tokens: int) -> int:
    """Most slots that a KV head has held once `tokens` tokens were processed."""
    prompt = law.prompt_tokens or 0
    if not prompt or law.retained is None or tokens <= prompt:
        return law.num_blocks(tokens, 1)
    behind = law.retained + min(tokens - prompt, law.interval)
    return max(prompt, behind) + law.state_slots  # a bulk prompt's end may be the peak


def window_blocks(tokens: int, window: int, block_size: int) -> int:
    """Blocks of vLLM that a sliding layer holds once token number `tokens` was decoded."""
    return -(-tokens // block_size) - max(0, tokens - window) // block_size


def position_limit(policy: CachePolicy, positions: int | None) -> int | None:
    """Most tokens of a request on a model with so many trained positions; None for no limit."""
    is_reindexed = getattr(policy, "rope", "keep") == "reindex"
    return None if is_reindexed or policy.rope_beyond == "allow" else positions


def _require_positive(**sizes: int) -> None:
    for name, value in sizes.items():
        if value < 1:
            raise PolicyError(f"{name} must be at least 1, got {value}")
