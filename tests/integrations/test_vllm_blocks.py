"""What vLLM's scheduler hands out and takes back under a law: no engine, no model."""

from dataclasses import dataclass, field

import pytest
import torch

import kvpolicy

pytestmark = pytest.mark.vllm

SIZE = 16
BULK = "window:budget=40,interval=8,prefill=bulk"
KEEP = "window:budget=40,interval=8,protect=prompt"


@dataclass
class Server:
    """vLLM's own manager of blocks over one group of layers under a policy.

    `rows` is what a worker knows: it appends the blocks that each step adds, and is never told
    of blocks that were taken back.
    """

    policy: str
    num_blocks: int = 64
    caching: bool = True
    rows: dict[str, list[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        from vllm.utils.hashing import sha256
        from vllm.v1.core.kv_cache_manager import KVCacheManager
        from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
        from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec

        from kvpolicy_vllm.spec import RetentionSpec

        init_none_hash(sha256)
        self.hasher = get_request_block_hasher(SIZE, sha256)
        full = FullAttentionSpec(block_size=SIZE, num_kv_heads=1, head_size=32, dtype=torch.float32)
        spec = RetentionSpec.from_full(full, kvpolicy.parse(self.policy).occupancy)
        config = KVCacheConfig(self.num_blocks, [], [KVCacheGroupSpec(["layer"], spec)])
        self.manager = KVCacheManager(config, 4096, SIZE, SIZE, enable_caching=self.caching)

    @property
    def free(self) -> int:
        """Blocks in the pool."""
        return self.manager.block_pool.get_num_free_blocks()

    def request(self, name: str, prompt: list[int]):
        """A request that has not run."""
        from vllm import SamplingParams
        from vllm.v1.request import Request

        params = SamplingParams(max_tokens=1000)
        return Request(name, list(prompt), params, None, block_hasher=self.hasher)

    def admit(self, request, num_tokens: int | None = None, in_flight: int = 0) -> int | None:
        """Run a request's first or, after preemption, next first step; the tokens it shares."""
        blocks, shared, _ = self.manager.get_computed_blocks(request)
        rest = request.num_tokens - shared
        count = rest if num_tokens is None else min(num_tokens, rest)
        new = self.manager.allocate_slots(
            request,
            count,
            num_new_computed_tokens=shared,
            new_computed_blocks=blocks,
            full_sequence_must_fit=True,
        )
        if new is None:
            return None
        self.rows[request.request_id] = self.held(request)
        request.num_computed_tokens = shared + count
        return shared

    def advance(self, request, num_tokens: int = 1) -> bool:
        """Run a step of a running request, the tokens it needs generated on the way."""
        total = request.num_computed_tokens + num_tokens
        while request.num_tokens < total:
            request.append_output_token_ids(7 + request.num_tokens % 5)
        new = self.manager.allocate_slots(request, num_tokens)
        if new is None:
            return False
        self.rows[request.request_id] += new.get_block_ids()[0]
        request.num_computed_tokens = total
        return True

    def preempt(self, request) -> None:
        """Take a request's blocks."""
        self.manager.free(request)
        request.num_computed_tokens = 0
        request.num_preemptions += 1

    def held(self, request) -> list[int]:
        """Blocks of a request."""
        return list(self.manager.get_block_ids(request.request_id)[0])


def law(policy: str, prompt: int) -> kvpolicy.Occupancy:
    """A policy's law for prompts of a length."""
    return kvpolicy.parse(policy).occupancy.of_prompt(prompt)


@pytest.mark.parametrize("prompt", [1, 15, 16, 39, 40, 41, 47, 48, 49, 63, 64, 65, 200])
@pytest.mark.parametrize("chunk", [1, 16, 23, 1000])
def test_a_bulk_prompts_blocks_go_back_once_it_is_over(prompt, chunk):
    """Before every step a request holds the law's figure; the worker's row never shifts."""
    server = Server(BULK)
    request = server.request("a", list(range(prompt)))
    server.admit(request, chunk)
    while request.num_computed_tokens < prompt:
        server.advance(request, min(chunk, prompt - request.num_computed_tokens))
    assert len(server.held(request)) == -(-prompt // SIZE)
    for _ in range(100):
        server.advance(request)
        held = server.held(request)
        assert len(held) == law(BULK, prompt).num_blocks(request.num_computed_tokens, SIZE)
        assert server.rows["a"][: len(held)] == held
    server.manager.free(request)
    assert server.free == 63  # block 0 is vLLM's placeholder


@pytest.mark.parametrize("chunk", [10, 64, 100, 1000])
def test_a_resumed_bulk_request_computes_prompt_and_answer_again(chunk):
    """It needs room for its prompt, not for its answer, in whatever chunks it comes back."""
    server = Server(BULK, num_blocks=10)  # 9 can be used
    request = server.request("a", list(range(130)))
    server.admit(request)
    for _ in range(400):
        assert server.advance(request)
    server.preempt(request)
    assert server.free == 9
    assert server.admit(request, chunk) == 0
    while request.num_computed_tokens < 531:
        assert server.advance(request, min(chunk, 531 - request.num_computed_tokens))
        assert server.rows["a"][: len(server.held(request))] == server.held(request)
    assert len(server.held(request)) == law(BULK, 130).num_blocks(531, SIZE) == 3


def test_a_bulk_prompt_that_does_not_fit_waits():
    """A request is admitted only when its whole prompt fits."""
    server = Server(BULK, num_blocks=10)
    assert server.admit(server.request("a", list(range(130))), 16) == 0
    assert server.free == 8
    assert server.admit(server.request("b", list(range(130))), 16) is None
    assert server.admit(server.request("c", list(range(128))), 16) == 0


def test_blocks_in_use_by_a_step_under_way_stay():
    """With a step in flight that may still read the prompt, its blocks are not freed."""
    server = Server(BULK)
    request = server.request("a", list(range(200)))
    server.admit(request)
    request.num_in_flight_tokens = 200
    server.advance(request)
    assert len(server.held(request)) == 13
    request.num_in_flight_tokens = 1
    server.advance(request)
    assert len(server.held(request)) == 3


@pytest.mark.parametrize("prompt", [15, 16, 17, 31, 32, 33, 100, 128])
def test_a_repeated_prompt_shares_its_whole_blocks_but_for_the_last_token(prompt):
    """Full blocks of the prompt are found, counted once, and returned with the last user."""
    server = Server(KEEP)
    requests = [server.request(name, list(range(prompt))) for name in "abc"]
    shared = [server.admit(request) for request in requests]
    assert shared == [0] + [(prompt - 1) // SIZE * SIZE] * 2
    full = (prompt - 1) // SIZE
    first, *others = (server.held(request) for request in requests)
    for held in others:
        assert held[:full] == first[:full]
        assert not set(held[full:]) & set(first)
    for request in requests:
        for _ in range(80):
            server.advance(request)
        assert len(server.held(request)) == law(KEEP, prompt).num_blocks(prompt + 80, SIZE)
    for request in requests:
        server.manager.free(request)
    assert server.free == 63


def test_blocks_with_a_generated_token_are_never_found():
    """A prompt that repeats a request's prompt and answer shares the prompt's blocks only."""
    server = Server(KEEP)
    first = server.request("a", list(range(40)))
    server.admit(first)
    for _ in range(100):
        server.advance(first)
    second = server.request("b", list(first.all_token_ids))
    assert server.admit(second) == 32


def test_a_resumed_request_shares_no_more_than_its_own_prompt():
    """Its answer may be part of another's prompt; those blocks hold keys that it never computed."""
    server = Server(KEEP)
    first = server.request("a", list(range(40)))
    server.admit(first)
    for _ in range(60):
        server.advance(first)
    longer = server.request("b", list(first.all_token_ids))
    server.admit(longer)
    server.preempt(first)
    assert server.admit(first) == 32
    assert server.held(first)[:2] == server.held(longer)[:2]
    assert not set(server.held(first)[2:]) & set(server.held(longer))


def test_a_pool_too_small_counts_blocks_that_it_would_share():
    """Shared blocks that nobody uses leave the pool too, and are not handed out twice."""
    server = Server(KEEP, num_blocks=6)  # 5 can be used
    first = server.request("a", list(range(60)))
    assert server.admit(first) == 0
    server.manager.free(first)
    assert server.free == 5
    again = server.request("b", list(range(60)))
    assert server.admit(again) == 48
    assert server.free == 1
    assert server.admit(server.request("c", list(range(60)) + [1] * 30)) is None
    assert server.admit(server.request("d", list(range(60)))) == 48
    assert server.free == 0


def test_without_prefix_caching_nothing_is_shared():
    """The engine's switch still rules."""
    server = Server(KEEP, caching=False)
    requests = [server.request(name, list(range(64))) for name in "ab"]
    assert [server.admit(request) for request in requests] == [0, 0]
    assert server.advance(requests[0])


@pytest.mark.parametrize("policy", ["full", "window:budget=40", BULK])
def test_other_servers_share_nothing(policy):
    """Blocks that a policy rewrites belong to one request."""
    server = Server(policy)
    requests = [server.request(name, list(range(64))) for name in "ab"]
    assert [server.admit(request) for request in requests] == [0, 0]
