"""What one engine's worker shares between attention, batch tracking and ledgers."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

from vllm.logger import init_logger

from kvpolicy import CachePolicy, PolicyError, UnsupportedError
from kvpolicy.ranks import check_spread
from kvpolicy_vllm.allotment import Allotment, PageShape, allotment_of
from kvpolicy_vllm.book import Book
from kvpolicy_vllm.config import (
    check_request,
    configured_names,
    configured_policy,
    keeps_everything,
    request_capture,
    request_policy,
)
from kvpolicy_vllm.pages import Scratch

if TYPE_CHECKING:
    from torch import Tensor
    from vllm.config import VllmConfig
    from vllm.sampling_params import SamplingParams
    from vllm.v1.sample.logits_processor.interface import BatchUpdate
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    from kvpolicy_vllm.metrics import Meter
    from kvpolicy_vllm.recorder import Recorder
    from kvpolicy_vllm.recording import RecordedRow
    from kvpolicy_vllm.rows import Row

logger = init_logger(__name__)

_MAX_POLICIES = 256
"""Distinct policies whose allotments are remembered; requests may bring any number."""

_engines: "WeakValueDictionary[str, Engine]" = WeakValueDictionary()
"""Engines by their configuration's `instance_id`; vLLM's own objects keep them alive."""


@dataclass
class Engine:
    """One engine under a policy.

    Attributes:
        policy: The server's policy, which sizes every request's allotment.
        book: Accounts of its requests.
        allowed: Names of the policies that requests may bring.
        rows: Policies that requests asked for, by row of the running batch.
        prompts: Tokens of the prompts, by row of the running batch.
        named_prompts: Tokens of the prompts, by request, where these are known. A session may
            lengthen its prompt later; its law follows the first one.
        has_layers: Whether a layer has been built with this host's attention.
        ruled: Names of the layers under the policy; None before vLLM has made its pages.
        page: What a block holds of one head; None before vLLM has made its pages.
        scratch: Memory that all layers use in turn.
        runner: vLLM's model runner, which knows the requests; None where the engine was
            configured without `kvpolicy_vllm.worker`.
        is_spread: Whether its heads are spread over processes.
        recorder: Writes requests to traces; None where nothing is captured.
        meter: Its figures for ``/metrics``; None where nobody looks.
    """

    policy: CachePolicy
    book: Book = field(default_factory=Book)
    allowed: tuple[str, ...] = ()
    rows: dict[int, CachePolicy] = field(default_factory=dict)
    prompts: dict[int, int] = field(default_factory=dict)
    named_prompts: dict[str, int] = field(default_factory=dict)
    has_layers: bool = False
    ruled: tuple[str, ...] | None = None
    page: PageShape | None = None
    scratch: Scratch = field(default_factory=Scratch)
    runner: "GPUModelRunner | None" = None
    is_spread: bool = False
    recorder: "Recorder | None" = None
    meter: "Meter | None" = None
    _allotments: dict[CachePolicy, Allotment] = field(default_factory=dict)

    @classmethod
    def start(cls, vllm_config: "VllmConfig") -> "Engine | None":
        """Begin the engine of a configuration; None when it runs stock vLLM."""
        policy = configured_policy(vllm_config)
        if policy is None:
            _engines.pop(vllm_config.instance_id, None)
            return None
        book, allowed = Book(str(policy)), configured_names(vllm_config, policy)
        is_spread = vllm_config.parallel_config.tensor_parallel_size > 1
        engine = cls(policy, book, allowed, is_spread=is_spread)
        _engines[vllm_config.instance_id] = engine
        return engine

    @staticmethod
    def of(vllm_config: "VllmConfig") -> "Engine":
        """The engine of a configuration that was started in this process."""
        return _engines[vllm_config.instance_id]

    @staticmethod
    def find(vllm_config: "VllmConfig") -> "Engine | None":
        """The engine of a configuration; None when it runs stock vLLM."""
        return _engines.get(vllm_config.instance_id)

    def rule(self, layer_names: Sequence[str]) -> None:
        """Note the layers under the policy, which share a block table.

        Raises:
            UnsupportedError: They do not, because there are more of them than sliding layers.
        """
        if self.ruled not in (None, tuple(layer_names)):
            raise UnsupportedError(
                f"kv_policy={self.policy}: vLLM splits this model's layers of full attention into "
                f"groups with block tables of their own, {len(layer_names)} layers each, because "
                "fewer layers attend to a sliding window; a policy needs one table for all of "
                "them, so choose a model with as many sliding layers as others, or none"
            )
        self.ruled = tuple(layer_names)

    def request_id_of_row(self, row: int, block: int) -> str:
        """Name of the request in a row: vLLM's id, or a block of its own where that is unknown."""
        if self.runner is None:
            return f"block {block}"
        return self.runner.input_batch.req_ids[row]

    def blocks_of(self, request_id: str) -> list[int]:
        """Physical blocks of a request that the model runner still knows.

        The model runner is not told which blocks went back to the pool after a prompt.
        """
        assert self.runner is not None, "only asked for where requests are known"
        blocks = list(self.runner.requests[request_id].block_ids[self._group])
        if self.policy.occupancy.prompts != "bulk":
            return blocks
        assert self.page is not None, "requests come after vLLM has made its pages"
        prompt = self.runner.requests[request_id].num_prompt_tokens
        prompt = self.named_prompts.get(request_id, prompt)
        law = self.allotment_of(self.policy).of_prompt(prompt).law
        tokens = self.book.accounts[request_id].tokens
        return blocks[: law.num_blocks(tokens, self.page.block_size)]

    @property
    def _group(self) -> int:
        """Index of the block table of layers under the policy."""
        assert self.runner is not None, "only asked for where requests are known"
        groups = self.runner.kv_cache_config.kv_cache_groups
        return next(i for i, g in enumerate(groups) if tuple(g.layer_names) == self.ruled)

    def close(self, request_ids: Iterable[str]) -> None:
        """Close the accounts of requests while their pages still stand."""
        for request_id in request_ids:
            if request_id in self.book.accounts:
                self.book.close(request_id, self.blocks_of(request_id))
            self.named_prompts.pop(request_id, None)

    def show(self) -> None:
        """Bring the figures of running requests up to date, if it is time."""
        meter, book = self.meter, self.book
        if meter is None or not meter.is_due(len(book.accounts)):
            return
        meter.show(book.running({name: len(self.blocks_of(name)) for name in book.accounts}))

    def meet(self, request_id: str, params: "SamplingParams | None") -> None:
        """Decide about recording a request that runs for the first time."""
        if self.recorder is None or params is None:
            return
        policy = self.requested_policy(params) or self.policy
        try:
            wish = request_capture(params)
        except PolicyError as error:  # refused where requests enter; this one got past that
            logger.warning("kvpolicy: %s", error)
            wish = None
        if keeps_everything(policy):
            self.recorder.meet(request_id, wish)

    def recorded(self, rows: "list[Row]", block_table: "Tensor") -> "list[RecordedRow]":
        """Those rows of the running batch that are recorded."""
        if self.recorder is None:
            return []
        assert self.runner is not None, "captures are refused where requests are not known"
        return self.recorder.plan(rows, block_table, self.runner.input_batch)

    def policy_of_row(self, row: int) -> CachePolicy:
        """Policy of a row of the running batch."""
        return self.rows.get(row, self.policy)

    def allotment_of(self, policy: CachePolicy) -> Allotment:
        """What a request under a policy holds in this engine's blocks."""
        found = self._allotments.get(policy)
        if found is None:
            assert self.page is not None, "requests come after vLLM has made its pages"
            if len(self._allotments) >= _MAX_POLICIES:
                self._allotments.clear()
            found = self._allotments[policy] = allotment_of(policy, self.page)
        return found

    def prompt_of_row(self, row: int) -> int:
        """Tokens of the prompt of a row of the running batch, also after preemption."""
        if self.runner is None:
            return self.prompts[row]
        batch = self.runner.input_batch
        return self.named_prompts.setdefault(batch.req_ids[row], int(batch.num_prompt_tokens[row]))

    def follow(self, update: "BatchUpdate") -> None:
        """Keep what is known of rows with their requests: removed, then added, then moved rows.

        Raises:
            UnsupportedError: No attention layer carries the policy.
        """
        if not self.has_layers:
            raise UnsupportedError(
                f"kv_policy={self.policy} is configured but vLLM chose an attention backend "
                "without it; on this platform only CPU_ATTN carries policies"
            )
        policies = {row: self.requested_policy(params) for row, params, *_ in update.added}
        _follow(self.rows, policies, update)
        _follow(self.prompts, {row: len(ids or ()) for row, _, ids, _ in update.added}, update)

    def _require_room(self, policy: CachePolicy) -> None:
        """Refuse a request's policy whose memory of numbers is larger than the server's.

        Where requests enter, the model is not known that says how many numbers there are.
        """
        needed, allotted = (
            self.allotment_of(each).law.state_slots for each in (policy, self.policy)
        )
        if needed > allotted:
            raise PolicyError(
                f"{policy} keeps a memory of {needed} slots in this model, the server's "
                f"{self.policy} allots {allotted}"
            )

    def requested_policy(self, params: "SamplingParams") -> CachePolicy | None:
        """The policy a request asks for, if it is allowed and fits the server's allotment.

        Other requests were already refused where they entered; one that got past that (another
        front end) runs under the server's policy, and its ledger says so.
        """
        try:
            policy = request_policy(params, self.allowed)
            if policy is not None:
                check_request(policy, self.policy)
                if self.is_spread:
                    check_spread(policy)
                self._require_room(policy)
        except PolicyError as error:
            logger.warning("kvpolicy: %s; the request runs under %s", error, self.policy)
            return None
        return policy


def _follow(rows: dict[int, Any], added: Mapping[int, Any], update: "BatchUpdate") -> None:
    """Bring what is known by row up to date; None where nothing is known of a row."""

    def put(row: int, value: Any) -> None:
        rows.pop(row, None)
        if value is not None:
            rows[row] = value

    for row in update.removed:
        rows.pop(row, None)
    for row, value in added.items():
        put(row, value)
    for source, target, direction in update.moved:
        moved, replaced = rows.pop(source, None), rows.pop(target, None)
        put(target, moved)
        if direction.name == "SWAP":
            put(source, replaced)
