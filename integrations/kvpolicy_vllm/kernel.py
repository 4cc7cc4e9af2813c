"""vLLM's own CPU attention kernel over one layer's pages."""

from dataclasses import dataclass

from torch import Tensor
from vllm import _custom_ops as ops


@dataclass(frozen=True)
class Kernel:
    """The kernel bound to a layer.

    Attributes:
        key_cache: [N, H_kv, P, D] view of the pages' first halves, in the kernel's packing.
        value_cache: [N, H_kv, P, D] view of the second halves.
        isa: Instruction set that the packing belongs to.
        scale: Factor on query-key products.
    """

    key_cache: Tensor
    value_cache: Tensor
    isa: str
    scale: float

    @classmethod
    def over(cls, cache: Tensor, isa: str, scale: float) -> "Kernel":
        """Bind to a layer's cache [N, H_kv, P, 2 D]."""
        num_blocks, kv_heads, block_size, width = cache.shape
        halves = cache.view(num_blocks, kv_heads, 2 * block_size, width // 2)
        key_cache, value_cache = halves.chunk(2, dim=2)
        return cls(key_cache, value_cache, isa, scale)

    def append(self, keys: Tensor, values: Tensor, slots: Tensor) -> None:
        """Write keys and values [T, H_kv, D] into physical slots [T]."""
        ops.cpu_attn_reshape_and_cache(
            keys, values, self.key_cache, self.value_cache, slots, self.isa
        )

    def attend(
        self,
        query: Tensor,
        output: Tensor,
        query_start_loc: Tensor,
        seq_lens: Tensor,
        block_table: Tensor,
        schedule: Tensor,
    ) -> None:
        """Attend from every row's tokens to its first `seq_lens` slots, causally at the end.

        Args:
            query: [T, H, D].
            output: [T, H, D], written.
            query_start_loc: [R + 1] int32, where each row's tokens begin.
            seq_lens: [R] int32 slots that each row's last token sees.
            block_table: [R, n] int32 physical blocks.
            schedule: The kernel's own plan for these lengths.
        """
        ops.cpu_attention_with_kv_cache(
            query=query,
            key_cache=self.key_cache,
            value_cache=self.value_cache,
            output=output,
            query_start_loc=query_start_loc,
            seq_lens=seq_lens,
            scale=self.scale,
            causal=True,
            alibi_slopes=None,
            sliding_window=-1,
            block_table=block_table,
            softcap=0,
            scheduler_metadata=schedule,
            s_aux=None,
        )
