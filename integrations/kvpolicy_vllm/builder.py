"""Plans every forward of vLLM's model runner once for all layers under the policy."""

from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor
from vllm import _custom_ops as ops
from vllm import envs
from vllm.v1.attention.backends.cpu_attn import CPUAttentionMetadataBuilder
from vllm.v1.kv_cache_interface import AttentionSpec, SlidingWindowSpec

from kvpolicy_vllm import attention_rows
from kvpolicy_vllm.allotment import PageShape
from kvpolicy_vllm.engine import Engine
from kvpolicy_vllm.metadata import RetentionMetadata
from kvpolicy_vllm.parts import InPlace
from kvpolicy_vllm.plan import NULL_BLOCK, make_plan
from kvpolicy_vllm.rows import Row
from kvpolicy_vllm.sliding import SlidingMetadataBuilder

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.v1.attention.backend import CommonAttentionMetadata


class RetentionMetadataBuilder(CPUAttentionMetadataBuilder):
    """Plans every forward once for all layers under the policy."""

    def __new__(cls, kv_cache_spec: AttentionSpec, *args: Any) -> Any:
        """Make vLLM's own builder for layers that attend to a sliding window."""
        if type(kv_cache_spec) is SlidingWindowSpec:
            return SlidingMetadataBuilder(kv_cache_spec, *args)
        return super().__new__(cls)

    def __init__(
        self,
        kv_cache_spec: AttentionSpec,
        layer_names: list[str],
        vllm_config: "VllmConfig",
        device: "torch.device",
    ) -> None:
        """Find the engine, and tell it what a block holds and costs.

        Raises:
            UnsupportedError: The policy's layers have several block tables.
        """
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.engine = Engine.of(vllm_config)
        self.engine.rule(layer_names)
        self.engine.page = PageShape.of(kv_cache_spec, self.num_heads // self.num_kv_heads)
        self.engine.book.page_bytes = kv_cache_spec.page_size_bytes
        self.engine.book.full_page_bytes = kv_cache_spec.unpadded_page_size_bytes
        needs = {need for member in self.engine.policy.members for need in member.needs}
        if {"last_row", "accumulated"} & needs:
            attention_rows.prepare()  # not while a request waits

    def build(  # pyright: ignore[reportIncompatibleMethodOverride]: our own metadata
        self,
        common_prefix_len: int,
        common_attn_metadata: "CommonAttentionMetadata",
        fast_build: bool = False,
    ) -> RetentionMetadata:
        """Plan a forward from the batch's lengths and block table."""
        common = common_attn_metadata
        rows, table = self._rows(common), common.block_table_tensor
        metadata = self._planned(rows, table, common.num_actual_tokens)
        metadata.recorded = self.engine.recorded(rows, table)
        return metadata

    def _planned(self, rows: list[Row], table: Tensor, num_tokens: int) -> RetentionMetadata:
        """The plan of some of a batch's rows."""
        plan = make_plan(rows, table, self.block_size, num_tokens)
        schedule = None if plan.in_place is None else self._schedule(plan.in_place)
        again = partial(self._planned, table=table, num_tokens=num_tokens)
        return RetentionMetadata(rows, plan, schedule, again)

    def _rows(self, common: "CommonAttentionMetadata") -> list[Row]:
        """The rows of requests; dummy rows of warm-up own no blocks."""
        starts = common.query_start_loc_cpu.tolist()
        lengths = common.seq_lens.tolist()
        table = common.block_table_tensor
        first_blocks = table[:, 0].tolist()
        rows: list[Row] = []
        for index in range(common.num_reqs):
            count = starts[index + 1] - starts[index]
            if count == 0 or first_blocks[index] == NULL_BLOCK:
                continue
            policy, total = self.engine.policy_of_row(index), lengths[index]
            allotment, seen = self.engine.allotment_of(policy), total - count
            if allotment.law.needs_prompt:
                allotment = allotment.of_prompt(self.engine.prompt_of_row(index))
            # Blocks before that of the first token behind a kept prompt may be shared.
            own = min(allotment.kept, total - 1) // self.block_size
            block = first_blocks[index] if own == 0 else int(table[index, own])
            request_id = self.engine.request_id_of_row(index, block)
            account = self.engine.book.post(request_id, policy, allotment, seen=seen, total=total)
            rows.append(Row(index, policy, starts[index], count, seen, account))
        return rows

    def _schedule(self, part: InPlace) -> Tensor:
        """The kernel's own plan over the slots of the rows attended in place."""
        return ops.cpu_attn_get_scheduler_metadata(
            num_reqs=len(part.rows),
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            seq_lens=part.seq_lens,
            dtype=self.dtype,
            query_start_loc=part.query_start_loc,
            causal=True,
            sliding_window_size=-1,
            isa=self.isa,
            enable_kv_split=envs.VLLM_CPU_ATTN_SPLIT_KV,
            dynamic_causal=None,
            kv_cache_dtype=self.kv_cache_dtype,
        )
