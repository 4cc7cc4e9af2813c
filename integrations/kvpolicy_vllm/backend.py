"""vLLM's CPU attention over retained slots.

The backend is vLLM's own, with another page layout (a state tail), a plan instead of plain
metadata, and an implementation that writes, attends and evicts in that order.
"""

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.model_executor.models.utils import extract_layer_index
from vllm.utils.torch_utils import set_default_torch_dtype
from vllm.v1.attention.backend import AttentionType
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
)
from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec, SlidingWindowSpec

from kvpolicy import CachePolicy, UnsupportedError
from kvpolicy.attention import AttentionLayer
from kvpolicy.memory.state import Shape
from kvpolicy.rotary import Rotary
from kvpolicy_vllm.allotment import PageShape, allotment_of, memory_policy
from kvpolicy_vllm.builder import RetentionMetadataBuilder
from kvpolicy_vllm.config import check_engine, reindexes
from kvpolicy_vllm.containment import contain
from kvpolicy_vllm.dispatch import forget_choice
from kvpolicy_vllm.engine import Engine
from kvpolicy_vllm.execution import LayerBatch, attend_in_place, decide, place, walk
from kvpolicy_vllm.kernel import Kernel
from kvpolicy_vllm.memory import PagedMemory, rehearse
from kvpolicy_vllm.metadata import RetentionMetadata
from kvpolicy_vllm.observation import observe
from kvpolicy_vllm.pages import Pages
from kvpolicy_vllm.parts import Decision, Observation, Part, Recollection, Walk
from kvpolicy_vllm.ranks import tensor_ranks
from kvpolicy_vllm.recollection import recollect
from kvpolicy_vllm.rows import Row
from kvpolicy_vllm.sliding import SlidingImpl
from kvpolicy_vllm.spec import RetentionSpec

if TYPE_CHECKING:
    from vllm.config import VllmConfig


_MAX_POLICIES = 256
"""Distinct policies that a layer remembers; requests may bring any number."""

PLAIN_ROTARY = ("llama", "qwen3", "mistral", "gemma")
"""Model types whose rotary embedding is known to be half-split and in every layer."""


class RetentionBackend(CPUAttentionBackend):
    """CPU attention under a policy; `backend_for` makes one subclass per engine.

    Attributes:
        policy: The server's policy.
        group: Query heads per KV head.
    """

    forward_includes_kv_cache_update = True
    policy: ClassVar[CachePolicy]
    group: ClassVar[int]

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        """Exchange a full-attention layer's spec for one whose slots are reused.

        That of a layer that attends to a sliding window stays as it is.

        Raises:
            UnsupportedError: The layer is neither.
        """
        if type(spec) is SlidingWindowSpec:
            return spec
        if type(spec) is not FullAttentionSpec or spec.head_size_v != spec.head_size:
            raise UnsupportedError(
                f"kv_policy={cls.policy} needs layers of plain full attention or a sliding window, "
                f"got {type(spec).__name__}; choose another model or drop the policy"
            )
        return RetentionSpec.from_full(
            spec, allotment_of(cls.policy, PageShape.of(spec, cls.group)).law
        )

    @staticmethod
    def get_impl_cls() -> type["RetentionImpl"]:
        """The attention implementation; asked for once the backend has been chosen."""
        forget_choice()
        return RetentionImpl

    @staticmethod
    def get_builder_cls() -> type["RetentionMetadataBuilder"]:
        """The planner."""
        return RetentionMetadataBuilder


def backend_for(vllm_config: "VllmConfig", policy: CachePolicy) -> type[RetentionBackend]:
    """The backend class of one engine: specs are made where no configuration is current.

    Raises:
        UnsupportedError: The engine uses a feature that the policy cannot work with.
    """
    check_engine(vllm_config, policy)
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    group = model.get_num_attention_heads(parallel) // model.get_num_kv_heads(parallel)
    members = {"policy": policy, "group": group}
    return type(RetentionBackend.__name__, (RetentionBackend,), members)


class RetentionImpl(CPUAttentionBackendImpl):
    """Append, attend, observe, evict: design order, for every row of a batch."""

    def __new__(
        cls,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int,
        alibi_slopes: list[float] | None,
        sliding_window: int | None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Make vLLM's own implementation for a layer that attends to a sliding window."""
        if sliding_window is None:
            return super().__new__(cls)
        sizes = (num_heads, head_size, scale, num_kv_heads)
        return SlidingImpl(*sizes, alibi_slopes, sliding_window, *args, **kwargs)

    def __init__(self, num_heads: int, head_size: int, *args: Any, **kwargs: Any) -> None:
        """Refuse engines and layers under which the policy could not keep its promises."""
        super().__init__(num_heads, head_size, *args, **kwargs)
        vllm_config = get_current_vllm_config()
        self.engine = Engine.of(vllm_config)
        self._check_layer()
        self.rotary = _plain_rotary(vllm_config.model_config.hf_text_config, head_size)
        self.ranks = tensor_ranks()
        self.first_kv_head = get_tensor_model_parallel_rank() * self.num_kv_heads
        self._check_rotary()
        if not self.engine.has_layers:  # once for all layers
            self._rehearse(vllm_config)
        self.engine.has_layers = True
        self._layers: dict[CachePolicy, AttentionLayer] = {}
        self._memories: dict[CachePolicy, PagedMemory] = {}
        self._bound_to: int | None = None
        self._index: int
        self._kernel: Kernel
        self._pages: Pages

    def _check_layer(self) -> None:
        """Refuse attention that is more than a causal softmax over keys."""
        features = {
            "ALiBi": self.alibi_slopes is not None,
            "logit soft-capping": self.logits_soft_cap != 0,
            "attention sinks as parameters": self.sinks is not None,
            "shared KV layers": self.kv_sharing_target_layer_name is not None,
            f"{self.attn_type} attention": self.attn_type != AttentionType.DECODER,
        }
        for feature, is_used in features.items():
            if is_used:
                raise UnsupportedError(
                    f"kv_policy={self.engine.policy} does not work with {feature}; "
                    "choose another model or drop the policy"
                )

    def _check_rotary(self) -> None:
        """Refuse policies that turn keys or queries in models that rotate them otherwise."""
        policy = self.engine.policy
        if self.rotary is not None:
            return
        for applies, what, instead in (
            (reindexes(policy), "rope=reindex", "use rope=keep"),
            (memory_policy(policy) is not None, "its memory", "use a policy that only evicts"),
        ):
            if applies:
                raise UnsupportedError(
                    f"{policy}: {what} needs plain rotary embeddings without scaling, in a model "
                    f"of type {', '.join(PLAIN_ROTARY)}; {instead}"
                )

    def _rehearse(self, vllm_config: "VllmConfig") -> None:
        """Refuse a server's policy whose parameters do not fit the model."""
        policy = memory_policy(self.engine.policy)
        if policy is None:
            return
        assert self.rotary is not None, "checked before"
        shape = Shape(
            rows=1,
            kv_heads=self.num_kv_heads,
            group=self.num_queries_per_kv,
            head_dim=self.head_size,
            value_dim=self.head_size,
            dtype=torch.float32,
            device=torch.device("cpu"),
        )
        layers = vllm_config.model_config.get_layers_start_end_indices(vllm_config.parallel_config)
        with set_default_torch_dtype(torch.float32):  # as in a forward; here it is the model's
            for index in range(*layers):
                rehearse(policy, self._view_of(policy, index).setting, shape)

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]: our own metadata
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: RetentionMetadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Attend with the layer's retained slots and bring them up to date.

        Args:
            layer: vLLM's attention layer.
            query: [T, H, D].
            key: [T, H_kv, D], rotated.
            value: [T, H_kv, D].
            kv_cache: [N, H_kv, P, 2 D] pages.
            attn_metadata: The plan; None while vLLM profiles memory.
            output: [T, H, D], written.
        """
        if attn_metadata is None:
            return output
        self._bind(kv_cache, layer)
        index = self._index
        batch, metadata = LayerBatch(query, key, value, output), attn_metadata.of_layer(index)

        def run(row: Row) -> None:
            alone = metadata.planned([row])
            self._place(alone, batch)
            for part in alone.plan.parts:
                self._carry_out(part, index, batch)

        self._place(metadata, batch)
        for part in metadata.plan.parts:
            try:
                self._carry_out(part, index, batch)
            except Exception:  # of whose making shows with each row alone
                contain(part.rows, index, run, self.engine.book)
        for row in attn_metadata.recorded:
            row.record(index, batch, self._pages, self.scale)
        return output

    def _place(self, metadata: RetentionMetadata, batch: LayerBatch) -> None:
        """Append tokens to their slots, and attend where the slots stay as they are."""
        plan = metadata.plan
        if len(plan.entered):
            # vLLM's kernel multiplies all of a block's values, unwritten ones by zero, and what a
            # request left behind may be no number: its values were none, or halves of float32.
            self._pages.clear(plan.entered)
        if plan.placement is not None:
            place(plan.placement, self._kernel, self._pages, batch)
        if plan.in_place is not None:
            assert metadata.schedule is not None, "made with the plan"
            attend_in_place(plan.in_place, self._kernel, batch, metadata.schedule)

    def _carry_out(self, part: Part, index: int, batch: LayerBatch) -> None:
        """Ask a policy about its rows; if that fails, their slots are as they were."""
        layer, memory = self._layer(part.policy, index), self._memory(part.policy, index)
        match part:
            case Decision():
                decide(part.of_layer(index), layer, self._pages, batch.query)
            case Observation():
                if layer.accumulates:  # otherwise only layers under another policy do
                    observe(part.of_layer(index), layer, self._pages, batch.query)
            case Recollection():
                assert memory is not None, "only policies with a memory read one"
                recollect(part, memory, batch)
            case Walk():
                walk(part, layer, self._pages, batch, memory)

    def _layer(self, policy: CachePolicy, index: int) -> AttentionLayer:
        """The core's view of this layer under a policy."""
        layer = self._layers.get(policy)
        if layer is None:
            if len(self._layers) >= _MAX_POLICIES:
                self._layers.clear()
                self._memories.clear()
            layer = self._layers[policy] = self._view_of(policy, index)
        return layer

    def _view_of(self, policy: CachePolicy, index: int) -> AttentionLayer:
        """Make the core's view of a layer."""
        return AttentionLayer(
            policy, index, self.scale, self.rotary, self.first_kv_head, self.ranks
        )

    def _memory(self, policy: CachePolicy, index: int) -> PagedMemory | None:
        """Where memories of a policy's requests lie in this layer, if they have any."""
        remembering = memory_policy(policy)
        if remembering is None:
            return None
        memory = self._memories.get(policy)
        if memory is None:
            memory = self._memories[policy] = PagedMemory(
                layer=self._layer(policy, index),
                policy=remembering,
                pages=self._pages,
                allotment=self.engine.allotment_of(policy),
                group=self.num_queries_per_kv,
            )
        return memory

    def _bind(self, kv_cache: Tensor, layer: Any) -> None:
        """View this layer's cache when vLLM first hands it over, or another one."""
        if self._bound_to != kv_cache.data_ptr():
            self._bound_to = kv_cache.data_ptr()
            self._memories.clear()
            self._index = extract_layer_index(layer.layer_name)
            self._kernel = Kernel.over(kv_cache, layer.isa, self.scale)
            self._pages = Pages.of(kv_cache, layer.isa, self.engine.scratch)
            self.engine.book.layers[self._index] = self._pages


def _plain_rotary(config: Any, head_size: int) -> Rotary | None:
    """The model's RoPE if it is known to be plain: half-split, full head width, no scaling."""
    if getattr(config, "model_type", None) not in PLAIN_ROTARY:
        return None
    parameters = getattr(config, "rope_parameters", None) or {}
    theta = parameters.get("rope_theta", getattr(config, "rope_theta", None))
    is_plain = parameters.get("rope_type", "default") == "default"
    is_whole = parameters.get("partial_rotary_factor", 1.0) == 1.0
    return Rotary.from_theta(theta, head_size) if theta and is_plain and is_whole else None
