"""Layers that attend to a sliding window: vLLM's own, beside layers under a policy.

They have blocks, block tables and metadata of their own, from the pool that all layers share. All
pages of a pool are equally large, so that theirs are as wide as those of the other layers, whose
state they leave alone.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
)
from vllm.v1.kv_cache_interface import SlidingWindowSpec

from kvpolicy import CachePolicy, UnsupportedError
from kvpolicy_vllm.allotment import memory_policy
from kvpolicy_vllm.config import refusal, reindexes
from kvpolicy_vllm.engine import Engine
from kvpolicy_vllm.windows import SlidingGroup

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.attention.backend import CommonAttentionMetadata


@dataclass
class SlidingMetadata(CPUAttentionMetadata):
    """vLLM's, and the blocks in which requests write their first token.

    Attributes:
        entered: [X].
    """

    entered: Tensor = field(kw_only=True)


class SlidingImpl(CPUAttentionBackendImpl):
    """vLLM's attention, which also writes what it is handed, as the backend says of all layers.

    The kernel multiplies a block's unwritten values by zero, and what a request that overflowed
    left there is no number; so blocks are cleared when a request first uses them.
    """

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]: our own metadata
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: SlidingMetadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Append keys and values [T, H_kv, D], and attend; see `RetentionImpl.forward`."""
        if attn_metadata is not None:
            count = attn_metadata.num_actual_tokens
            slots = attn_metadata.slot_mapping[:count]
            kv_cache[attn_metadata.entered] = 0
            self.do_kv_cache_update(layer, key[:count], value[:count], kv_cache, slots)
        return super().forward(
            layer,
            query,
            key,
            value,
            kv_cache,
            attn_metadata,
            output,
            output_scale,
            output_block_scale,
        )


class SlidingMetadataBuilder(CPUAttentionMetadataBuilder):
    """vLLM's, which tells the engine's book what the layers hold and finds blocks new to them."""

    def __init__(
        self,
        kv_cache_spec: SlidingWindowSpec,
        layer_names: list[str],
        vllm_config: "VllmConfig",
        device: torch.device,
    ) -> None:
        """Refuse engines whose policy cannot rule the other layers only.

        Raises:
            UnsupportedError: There are no others, or the policy is not shown to be right there.
        """
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        engine = Engine.of(vllm_config)
        require_supported(engine, vllm_config.parallel_config.world_size)
        engine.book.sliding[tuple(layer_names)] = SlidingGroup(
            window=kv_cache_spec.sliding_window,
            block_size=kv_cache_spec.block_size,
            num_layers=len(layer_names),
            page_bytes=kv_cache_spec.page_size_bytes,
            full_page_bytes=kv_cache_spec.unpadded_page_size_bytes,
        )

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: "CommonAttentionMetadata",
        fast_build: bool = False,
    ) -> SlidingMetadata:
        """Plan a forward."""
        plain = super().build(common_prefix_len, common_attn_metadata, fast_build)
        return SlidingMetadata(**vars(plain), entered=self._entered(common_attn_metadata))

    def _entered(self, common: "CommonAttentionMetadata") -> Tensor:
        """Blocks in which requests write their first token in this forward: [X]."""
        starts, size = common.query_start_loc_cpu.tolist(), self.block_size
        entered = [
            common.block_table_tensor[row, -(-seen // size) : -(-total // size)]
            for row, total in enumerate(common.seq_lens.tolist()[: common.num_reqs])
            for seen in [total - (starts[row + 1] - starts[row])]
        ]
        return torch.cat(entered) if entered else common.block_table_tensor.new_empty(0)


def require_supported(engine: Engine, processes: int = 1) -> None:
    """Raise UnsupportedError unless the engine's policy may rule some layers only."""
    policy: CachePolicy = engine.policy
    if processes > 1:
        raise UnsupportedError(
            f"kv_policy={policy} is not tested over {processes} processes in models of which some "
            "layers attend to a sliding window; drop --tensor-parallel-size and "
            "--pipeline-parallel-size"
        )
    if not engine.has_layers:
        raise UnsupportedError(
            f"kv_policy={policy} does not work with {refusal('sliding windows in all layers')}"
        )
    for applies, what, instead in (
        (reindexes(policy), "rope=reindex", "use rope=keep"),
        (memory_policy(policy) is not None, "its memory", "use a policy that only evicts"),
    ):
        if applies:
            raise UnsupportedError(
                f"{policy}: {what} is not tested beside layers that attend to a sliding window; "
                f"{instead}"
            )
