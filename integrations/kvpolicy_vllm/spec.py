"""What vLLM's scheduler knows of a policy: the size of a page and the need of a request.

Importing this module registers both classes with vLLM. The engine process unpickles specs
that workers send, which imports it exactly where it is needed.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager
from vllm.v1.kv_cache_interface import AttentionSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry
from vllm.v1.request import Request

from kvpolicy import Occupancy

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.kv_cache_utils import BlockHashList, KVCacheBlock

STATE_BYTES = 8
"""Policy state of one slot of one KV head: int32 position, float32 statistic."""

_MAX_PROMPTS = 1 << 14
"""Prompts' lengths that are remembered, the latest ones: preempted requests come back."""


@dataclass(frozen=True, kw_only=True)
class RetentionSpec(AttentionSpec):
    """A layer whose slots are reused: a request never holds more than its law's capacity.

    Not a FullAttentionSpec, because slots are not addressed by token. Every page ends in a
    tail with the policy state of its slots, so that state follows the blocks everywhere and
    vLLM's memory accounting includes it.

    Attributes:
        occupancy: The server policy's law.
    """

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
    def shares_prompts(self) -> bool:
        """Only if prompts stay as they are: a block that a policy rewrote is one request's.

        Nothing is found otherwise, but looked for: a hit is the shortest among the groups of
        layers, and layers that attend to a sliding window would find some by themselves.
        """
        return self.occupancy.prompts == "keep"

    @property
    def block_table_token_alignment(self) -> int | None:
        """Slots need no alignment to tokens."""
        return None

    def max_memory_usage_bytes(self, vllm_config: "VllmConfig") -> int:
        """Bytes of one layer that the longest request holds at its peak."""
        longest = vllm_config.model_config.max_model_len
        return self.occupancy.num_blocks(longest, self.block_size) * self.page_size_bytes


class RetentionManager(SingleTypeKVCacheManager):
    """Hands out blocks lazily, by the occupancy law, and takes back what only a prompt needed.

    Blocks are shared where the server's law keeps prompts, and then only whole blocks of prompt
    tokens: they are never written again.
    """

    kv_cache_spec: RetentionSpec

    def __init__(self, kv_cache_spec: RetentionSpec, *args: Any, **kwargs: Any) -> None:
        """Begin without requests."""
        super().__init__(kv_cache_spec, *args, **kwargs)
        self._prompts: OrderedDict[str, int] = OrderedDict()
        self._owners: WeakValueDictionary[int, Request] = WeakValueDictionary()
        if kv_cache_spec.shares_prompts:
            # The class method that vLLM declares would not know whose hashes it is given.
            self.find_longest_cache_hit = self._find_within_prompt

    def _law(self, request_id: str) -> Occupancy:
        """A request's law; nothing settles it before its first blocks are asked for."""
        law, prompt = self.kv_cache_spec.occupancy, self._prompts.get(request_id)
        return law if prompt is None else law.of_prompt(prompt)

    def _num_missing_blocks(self, request_id: str, num_tokens: int) -> int:
        needed = self._law(request_id).num_blocks(num_tokens, self.block_size)
        return max(0, needed - len(self.req_to_blocks.get(request_id, ())))

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: "Sequence[KVCacheBlock]",
        *args: Any,
        apply_admission_cap: bool = False,
        **kwargs: Any,
    ) -> int:
        """Blocks to take from the pool before the request holds `num_tokens` tokens.

        Args:
            request_id: The request.
            num_tokens: Tokens processed or about to be.
            new_computed_blocks: Blocks that it is about to share.
            *args: What the law does not depend on.
            apply_admission_cap: Whether the request is to be admitted with all these tokens,
                which it may process in several steps: its prompt has to fit too.
            **kwargs: What the law does not depend on.
        """
        missing = self._num_missing_blocks(request_id, num_tokens)
        if apply_admission_cap:
            prompt = self._prompts.get(request_id, num_tokens)
            within = min(prompt, num_tokens)
            missing = max(missing, self._num_missing_blocks(request_id, within))
        unused = self._get_num_evictable_blocks(new_computed_blocks)
        return max(0, missing - len(new_computed_blocks)) + unused

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

    def remove_skipped_blocks(
        self,
        request_id: str,
        processed_computed_tokens: int,
        num_prompt_tokens: int | None = None,
    ) -> None:
        """Learn a request's prompt, and free what only the prompt needed once it is over.

        vLLM calls this before it asks for a request's blocks. The worker's copy of the block
        table keeps the entries of freed blocks. They are behind all that the law uses from then
        on, and no block is ever added after them: where the law leaves room to grow, nothing is
        freed.
        """
        if num_prompt_tokens is None or not self.kv_cache_spec.occupancy.needs_prompt:
            return
        # A session may lengthen its prompt later; its blocks follow the first one.
        self._prompts.setdefault(request_id, num_prompt_tokens)
        self._prompts.move_to_end(request_id)
        if len(self._prompts) > _MAX_PROMPTS:
            self._prompts.popitem(last=False)
        prompt = self._law(request_id).prompt_tokens
        if prompt is None or processed_computed_tokens < prompt:
            return
        blocks = self.req_to_blocks.get(request_id, [])
        kept = self._law(request_id).num_blocks(prompt + 1, self.block_size)
        if kept < len(blocks):
            surplus = blocks[kept:]
            del blocks[kept:]
            self.block_pool.free_blocks(reversed(surplus))

    def cache_blocks(self, request: "Request", num_tokens: int, *args: Any, **kwargs: Any) -> None:
        """Offer whole blocks of prompt tokens to other requests, where prompts are kept."""
        if self.kv_cache_spec.shares_prompts:
            self._owners[id(request.block_hashes)] = request
            prompt = self._prompts[request.request_id]
            super().cache_blocks(request, min(num_tokens, prompt), *args, **kwargs)

    def get_num_common_prefix_blocks(self, running_request_id: str) -> int:
        """Nothing is gained from knowing blocks that all requests share."""
        return 0

    def _find_within_prompt(
        self, block_hashes: "BlockHashList", max_length: int, *_: Any, **__: Any
    ) -> "tuple[tuple[list[KVCacheBlock], ...], int]":
        """Find blocks that hold the beginning of a request's prompt.

        A preempted request brings the hashes of what it generated too. These may be part of
        another request's prompt, whose blocks hold other keys, because it evicted nothing there.
        """
        owner = self._owners.get(id(block_hashes))
        if owner is not None and owner.block_hashes is block_hashes:
            max_length = min(max_length, self._prompts.get(owner.request_id, 0))
        found: list[KVCacheBlock] = []
        for block_hash in islice(block_hashes, max_length // self.block_size):
            cached = self.block_pool.get_cached_block(block_hash, [self.kv_cache_group_id])
            if not cached:
                break
            found += cached
        return (found,), len(found) * self.block_size

    @classmethod
    def find_longest_cache_hit(
        cls,
        block_hashes: Any,
        max_length: int,
        kv_cache_group_ids: Sequence[int],
        *_: Any,
        **__: Any,
    ) -> "tuple[tuple[list[KVCacheBlock], ...], int]":
        """Without a request nothing can be shared."""
        return tuple([] for _ in kv_cache_group_ids), 0


# Registering before the built-in specs would suppress them.
KVCacheSpecRegistry._ensure_registered()  # pyright: ignore[reportPrivateUsage]
KVCacheSpecRegistry.register(RetentionSpec, RetentionManager)
