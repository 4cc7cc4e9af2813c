"""What vLLM's scheduler knows of a policy: the size of a page and the need of a request.

Importing this module registers both classes with vLLM. The engine process unpickles specs
that workers send, which imports it exactly where it is needed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager
from vllm.v1.kv_cache_interface import AttentionSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from kvpolicy import Occupancy

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.kv_cache_utils import KVCacheBlock

STATE_BYTES = 8
"""Policy state of one slot of one KV head: int32 position, float32 statistic."""


@dataclass(frozen=True, kw_only=True)
class RetentionSpec(AttentionSpec):
    """A layer whose slots are reused: a request never holds more than its law's capacity.

    Not a FullAttentionSpec, because slots are not addressed by token. Every page ends in a
    tail with the policy state of its slots, so that state follows the blocks everywhere and
    vLLM's memory accounting includes it.

    Attributes:
        occupancy: The server policy's law.
    """

    dcp_sharded: bool = False
    occupancy: Occupancy

    @classmethod
    def from_full(cls, spec: AttentionSpec, occupancy: Occupancy) -> "RetentionSpec":
        """Replace a full-attention layer's spec; K and V stay where vLLM's kernel wants them."""
        cells = spec.block_size * spec.num_kv_heads
        return cls(
            block_size=spec.block_size,
            num_kv_heads=spec.num_kv_heads,
            head_size=spec.head_size,
            head_size_v=spec.head_size_v,
            dtype=spec.dtype,
            page_size_padded=spec.unpadded_page_size_bytes + cells * STATE_BYTES,
            occupancy=occupancy,
        )

    @property
    def prefix_cacheable(self) -> bool:
        """Never: a block that a policy has rewritten belongs to one request."""
        return False

    @property
    def block_table_token_alignment(self) -> int | None:
        """Slots need no alignment to tokens."""
        return None

    def max_memory_usage_bytes(self, vllm_config: "VllmConfig") -> int:
        """Bytes of one layer that the longest request holds at its peak."""
        longest = vllm_config.model_config.max_model_len
        return self.occupancy.num_blocks(longest, self.block_size) * self.page_size_bytes


class RetentionManager(SingleTypeKVCacheManager):
    """Hands out blocks lazily, by the occupancy law, and never shares them."""

    kv_cache_spec: RetentionSpec

    def _num_missing_blocks(self, request_id: str, num_tokens: int) -> int:
        needed = self.kv_cache_spec.occupancy.num_blocks(num_tokens, self.block_size)
        return max(0, needed - len(self.req_to_blocks.get(request_id, ())))

    def get_num_blocks_to_allocate(
        self, request_id: str, num_tokens: int, *args: Any, **kwargs: Any
    ) -> int:
        """Blocks to add before the request holds `num_tokens` tokens."""
        return self._num_missing_blocks(request_id, num_tokens)

    def allocate_new_blocks(
        self, request_id: str, num_tokens: int, num_tokens_main_model: int
    ) -> "list[KVCacheBlock]":
        """Add the blocks that `num_tokens` tokens need beyond those held."""
        missing = self._num_missing_blocks(request_id, num_tokens)
        added = self.block_pool.get_new_blocks(missing) if missing else []
        self.req_to_blocks[request_id].extend(added)
        return added

    def allocate_external_computed_blocks(self, *args: Any, **kwargs: Any) -> None:
        """Refuse K/V computed elsewhere: it is addressed by token, not by slot."""
        raise AssertionError("KV connectors are refused when the engine starts")

    def add_local_computed_blocks(self, *args: Any, **kwargs: Any) -> None:
        """Nothing is ever found in the prefix cache."""

    def cache_blocks(self, *args: Any, **kwargs: Any) -> None:
        """Nothing is ever put into the prefix cache."""

    def remove_skipped_blocks(self, *args: Any, **kwargs: Any) -> None:
        """Blocks are reused in place, never skipped."""

    def get_num_common_prefix_blocks(self, running_request_id: str) -> int:
        """Requests have no blocks in common."""
        return 0

    @classmethod
    def find_longest_cache_hit(
        cls,
        block_hashes: Any,
        max_length: int,
        kv_cache_group_ids: Sequence[int],
        *_: Any,
        **__: Any,
    ) -> "tuple[tuple[list[KVCacheBlock], ...], int]":
        """No block is ever shared."""
        return tuple([] for _ in kv_cache_group_ids), 0


# Registering before the built-in specs would suppress them.
KVCacheSpecRegistry._ensure_registered()  # pyright: ignore[reportPrivateUsage]
KVCacheSpecRegistry.register(RetentionSpec, RetentionManager)
