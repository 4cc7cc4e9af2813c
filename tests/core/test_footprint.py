"""Memory arithmetic: against counts, against real storage, and against vLLM's own spec."""

import importlib.util
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvpolicy import Occupancy, PolicyError, parse
from kvpolicy.cli.plan import BLOCK_SIZE
from kvpolicy.footprint import (
    DENSE_STATE_BYTES,
    PAGE_STATE_BYTES,
    Layout,
    Pool,
    floats_beside,
    peak_slots,
    position_limit,
    window_blocks,
)
from kvpolicy.rehearsal import HEAD_DIM, Case, Host
from kvpolicy.slots import Slots
from strategies import LAWS, PROMPT_LAWS

LLAMA_3_8B = Layout(num_layers=32, num_kv_heads=8, head_dim=128, element_bytes=2)

FULL = st.builds(Occupancy, retained=st.none(), state_slots=st.integers(0, 4))
ANY_LAW = st.one_of(LAWS, FULL)
TOKENS = st.integers(1, 200)
BLOCK_SIZES = st.integers(1, 48)
LAYOUTS = st.builds(
    Layout,
    num_layers=st.integers(1, 4),
    num_kv_heads=st.integers(1, 8),
    head_dim=st.integers(1, 128),
    element_bytes=st.sampled_from([2, 4]),
)
POOLS = st.builds(
    Pool,
    layout=LAYOUTS,
    block_size=BLOCK_SIZES,
    memory=st.integers(1, 1 << 26),
    has_state=st.booleans(),
)
HYBRID_POOLS = st.builds(
    Pool,
    layout=st.builds(
        Layout,
        num_layers=st.integers(1, 6),
        num_kv_heads=st.integers(1, 2),
        head_dim=st.integers(1, 16),
        element_bytes=st.sampled_from([2, 4]),
        num_sliding=st.integers(1, 6),
        window=st.integers(1, 60),
    ),
    block_size=BLOCK_SIZES,
    memory=st.integers(1, 1 << 20),
)
ANY_POOL = st.one_of(POOLS, HYBRID_POOLS)


@given(law=LAWS, pool=POOLS)
def test_blocks_at_the_peak_hold_the_capacity_and_no_block_more(law: Occupancy, pool: Pool) -> None:
    """Proves blocks x block_size >= capacity > (blocks - 1) x block_size."""
    capacity = law.capacity
    assert capacity is not None
    for tokens in (capacity, capacity + 1, 10**12):
        peak = pool.footprint(law, tokens)
        assert peak.slots == capacity
        assert peak.blocks * pool.block_size >= capacity > (peak.blocks - 1) * pool.block_size


@given(law=ANY_LAW, pool=POOLS, tokens=TOKENS)
def test_footprint_is_the_laws(law: Occupancy, pool: Pool, tokens: int) -> None:
    """Proves slots by counting step by step, and blocks as schedulers compute them."""
    fullest = max(law.held(n - 1) + 1 for n in range(1, tokens + 1)) + law.state_slots
    at = pool.footprint(law, tokens)
    assert at.tokens == tokens
    assert at.slots == peak_slots(law, tokens) == fullest
    assert at.blocks == law.num_blocks(tokens, pool.block_size)
    assert at.bytes == at.blocks * pool.block_bytes
    assert at.dense_bytes == pool.layout.dense_bytes(fullest)


@given(law=PROMPT_LAWS, prompt=st.integers(0, 60), tokens=st.integers(1, 120))
def test_peak_of_a_prompt_set_apart_is_a_count(law: Occupancy, prompt: int, tokens: int) -> None:
    """Proves that the fullest moment of bulk and kept prompts is found, be it the prompt's end."""
    law = law.of_prompt(prompt)
    fullest = max(law.held(n - 1) + 1 for n in range(1, tokens + 1)) + law.state_slots
    assert peak_slots(law, tokens) == fullest


@given(law=ANY_LAW, pool=HYBRID_POOLS, tokens=TOKENS)
def test_sliding_layers_hold_what_their_window_does(
    law: Occupancy, pool: Pool, tokens: int
) -> None:
    """Proves their blocks by counting token by token, one table for so many layers of a kind."""
    layout, size = pool.layout, pool.block_size
    at, in_window = pool.footprint(law, tokens), range(max(0, tokens - layout.window), tokens)
    held = window_blocks(tokens, layout.window, size)
    assert held == len({position // size for position in in_window})
    fullest = max(window_blocks(n, layout.window, size) for n in range(1, tokens + 1))
    own = law.num_blocks(tokens, size)
    assert at.blocks == layout.num_tables * own + layout.num_sliding_tables * fullest
    assert at.bytes == at.blocks * layout.layers_per_block * layout.page_bytes(size)
    cells = layout.num_sliding * layout.num_kv_heads * min(tokens, layout.window - 1)
    ruled = layout.dense_bytes(peak_slots(law, tokens))
    assert at.dense_bytes == ruled + cells * layout.cell_bytes


@given(law=ANY_LAW, pool=ANY_POOL, tokens=TOKENS)
def test_longer_requests_never_cost_less(law: Occupancy, pool: Pool, tokens: int) -> None:
    """Proves that costs rise with the context, up to the law's capacity, and requests fall."""
    now, later = pool.footprint(law, tokens), pool.footprint(law, tokens + 1)
    assert now[:5] <= later[:5]
    assert all(a <= b for a, b in zip(now[:5], later[:5], strict=True))
    assert now.requests >= later.requests
    settled = pool.layout.window + pool.block_size if pool.layout.num_sliding else 0
    if law.capacity is not None and tokens >= max(law.capacity, settled):
        assert now[1:] == later[1:]


@given(law=ANY_LAW, pool=POOLS, tokens=TOKENS)
def test_requests_fill_the_memory_and_one_more_does_not_fit(
    law: Occupancy, pool: Pool, tokens: int
) -> None:
    """Proves requests x bytes <= memory < (requests + 1) x bytes, without any rounding."""
    at = pool.footprint(law, tokens)
    assert at.requests * at.bytes <= pool.memory < (at.requests + 1) * at.bytes


@given(law=ANY_LAW, pool=ANY_POOL, positions=st.none() | st.integers(1, 400))
def test_longest_request_fits_and_a_longer_one_does_not(
    law: Occupancy, pool: Pool, positions: int | None
) -> None:
    """Proves the reach and its reason; one block is vLLM's own."""
    tokens, limit = pool.reach(law, positions)
    usable = pool.num_blocks - 1
    if tokens is None:
        assert (positions, limit) == (None, None)
        assert law.capacity is not None
        assert pool.footprint(law, law.capacity + 1000).blocks <= usable
        return
    if tokens:
        assert pool.footprint(law, tokens).blocks <= usable
    if limit == "pool":
        assert positions is None or tokens < positions
        assert pool.footprint(law, tokens + 1).blocks > usable
    else:
        assert (tokens, limit) == (positions, "positions")


@given(layout=LAYOUTS, block_size=BLOCK_SIZES)
def test_a_block_is_its_slots_with_their_state(layout: Layout, block_size: int) -> None:
    """Proves that a block adds exactly 8 bytes per slot of a KV head and layer to stock vLLM's."""
    cells = block_size * layout.num_layers * layout.num_kv_heads
    assert layout.stock_block_bytes(block_size) == block_size * layout.token_bytes
    stock = layout.stock_block_bytes(block_size)
    assert layout.block_bytes(block_size) - stock == cells * PAGE_STATE_BYTES
    assert layout.block_bytes(block_size) == layout.num_layers * layout.page_bytes(block_size)
    assert layout.dense_bytes(block_size) - stock == cells * DENSE_STATE_BYTES


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dense_bytes_are_those_of_real_storage(dtype: torch.dtype) -> None:
    """Proves the figure for transformers against storage that has reached its capacity."""
    layout = Layout(num_layers=1, num_kv_heads=3, head_dim=20, element_bytes=dtype.itemsize)
    law = parse("window:budget=90,interval=7").occupancy
    like = torch.zeros(1, 3, 1, 20, dtype=dtype)
    slots = Slots.empty(like, like)
    for num_slots in range(1, law.capacity + 1):
        slots.reserve(num_slots, law.capacity)
    assert slots.num_bytes == layout.dense_bytes(law.capacity)


def test_figures_of_an_8b_model() -> None:
    """Proves Llama-3-8B's well-known 128 KiB per token, and a budget's price by hand."""
    assert LLAMA_3_8B.token_bytes == 128 << 10
    pool = Pool(layout=LLAMA_3_8B, block_size=16, memory=24 << 30)
    h2o = pool.footprint(parse("h2o:budget=1024").occupancy, 8192)
    assert (h2o.slots, h2o.blocks) == (1088, 68)
    assert h2o.bytes == 1088 * (128 * 1024 + 32 * 8 * 8)
    assert h2o.requests == 177
    full = pool.footprint(parse("full").occupancy, 8192)
    assert (full.slots, full.blocks, full.requests) == (8192, 512, 23)


def test_state_slots_lie_inside_the_budget() -> None:
    """Proves that reserved slots are there from the first token on and count once."""
    law = Occupancy(retained=12, interval=4, state_slots=4)
    assert [peak_slots(law, n) for n in (1, 12, 16, 100)] == [5, 16, 20, 20]


@pytest.mark.parametrize(
    ("spec", "positions", "reach"),
    [
        ("window:budget=60,interval=4", None, (None, None)),
        ("window:budget=60,interval=4", 9, (9, "positions")),
        ("window:budget=60,interval=5", None, (64, "pool")),
        ("full", None, (64, "pool")),
        ("full", 65, (64, "pool")),
        ("full", 64, (64, "positions")),
    ],
)
def test_reach_at_its_edges(spec: str, positions: int | None, reach: tuple) -> None:
    """Proves what happens where capacity or positions fill the four usable blocks exactly."""
    block = LLAMA_3_8B.block_bytes(16)
    pool = Pool(layout=LLAMA_3_8B, block_size=16, memory=6 * block - 1)
    assert pool.num_blocks == 5
    assert pool.reach(parse(spec).occupancy, positions) == reach


def test_pool_without_a_block_has_no_room() -> None:
    """Proves that a pool smaller than one block fits nothing, instead of failing."""
    pool = Pool(layout=LLAMA_3_8B, block_size=16, memory=1 << 20)
    law = parse("window:budget=64").occupancy
    assert pool.num_blocks == 0
    assert pool.footprint(law, 1).requests == 0
    assert pool.reach(law, 8192) == (0, "pool")


@pytest.mark.parametrize("name", ["num_layers", "num_kv_heads", "head_dim", "element_bytes"])
def test_size_below_one_is_refused(name: str) -> None:
    """Proves that no layout, pool or request of size zero is computed with."""
    sizes = {"num_layers": 1, "num_kv_heads": 1, "head_dim": 1, "element_bytes": 2}
    with pytest.raises(PolicyError, match=f"{name} must be at least 1, got 0"):
        Layout(**sizes | {name: 0})
    layout = Layout(**sizes)
    with pytest.raises(PolicyError, match="block_size"):
        Pool(layout=layout, block_size=0, memory=1)
    with pytest.raises(PolicyError, match="memory"):
        Pool(layout=layout, block_size=1, memory=-1)
    with pytest.raises(PolicyError, match="tokens"):
        Pool(layout=layout, block_size=1, memory=1).footprint(Occupancy(None), 0)


@pytest.mark.parametrize(
    ("spec", "limit"),
    [
        ("full", 100),
        ("h2o:budget=8", 100),
        ("full:rope_beyond=allow", None),
        ("h2o:budget=8,rope_beyond=allow", None),
        ("sinks:budget=8,rope=reindex", None),
    ],
)
def test_positions_limit_requests_as_in_transformers(spec: str, limit: int | None) -> None:
    """Proves that a plan ends contexts where a PolicyCache does."""
    from kvpolicy_hf import support

    model = SimpleNamespace(config=SimpleNamespace(max_position_embeddings=100))
    assert position_limit(parse(spec), 100) == limit == support.position_limit(model, parse(spec))
    assert position_limit(parse(spec), None) is None


@pytest.mark.vllm
def test_pages_and_needs_are_those_of_vllms_spec() -> None:
    """Proves that planned bytes and blocks are what the vLLM host tells vLLM's scheduler."""
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    from kvpolicy_vllm.spec import STATE_BYTES, RetentionSpec

    assert STATE_BYTES == PAGE_STATE_BYTES
    shapes = [
        (torch.bfloat16, 8, 128, 16),
        (torch.float32, 2, 64, 32),
        (torch.float16, 1, 80, 128),
        (torch.float32, 3, 20, 48),
    ]
    laws = [
        *(parse(x).occupancy for x in ("full", "h2o:budget=100", "window:budget=1,interval=70")),
        Occupancy(retained=50, interval=9, state_slots=14),
    ]
    for dtype, heads, head_dim, block_size in shapes:
        layout = Layout(
            num_layers=5, num_kv_heads=heads, head_dim=head_dim, element_bytes=dtype.itemsize
        )
        stock = FullAttentionSpec(
            block_size=block_size, num_kv_heads=heads, head_size=head_dim, dtype=dtype
        )
        assert 5 * stock.page_size_bytes == layout.stock_block_bytes(block_size)
        pool = Pool(layout=layout, block_size=block_size, memory=1 << 30)
        for law in laws:
            spec = RetentionSpec.from_full(stock, law)
            assert spec.page_size_bytes == layout.page_bytes(block_size)
            for tokens in (1, 63, 64, 109, 1000, 131072):
                config = SimpleNamespace(model_config=SimpleNamespace(max_model_len=tokens))
                need = 5 * spec.max_memory_usage_bytes(config)
                assert need == pool.footprint(law, tokens).bytes


@pytest.mark.vllm
@pytest.mark.parametrize(
    ("num_layers", "num_sliding"), [(4, 22), (5, 25), (2, 4), (3, 4), (4, 3), (3, 1), (13, 12)]
)
def test_block_tables_are_those_that_vllm_makes(num_layers: int, num_sliding: int) -> None:
    """Proves how layers of both kinds share tables and blocks, against vLLM's own grouping."""
    from vllm.v1.core import kv_cache_utils
    from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec

    from kvpolicy_vllm.spec import RetentionSpec

    sizes = {"block_size": 32, "num_kv_heads": 2, "head_size": 64, "dtype": torch.float32}
    law = parse("h2o:budget=100").occupancy
    ruled = RetentionSpec.from_full(FullAttentionSpec(**sizes), law)
    slides = SlidingWindowSpec(**sizes, sliding_window=70)
    specs = {f"r{i}": ruled for i in range(num_layers)}
    specs |= {f"s{i}": slides for i in range(num_sliding)}
    unified = kv_cache_utils.unify_kv_cache_spec_page_size(specs)
    groups = kv_cache_utils._get_kv_cache_groups_uniform_page_size(unified)
    layout = Layout(
        num_layers=num_layers,
        num_kv_heads=2,
        head_dim=64,
        element_bytes=4,
        num_sliding=num_sliding,
        window=70,
    )
    kinds = [type(group.kv_cache_spec) for group in groups]
    assert layout.num_tables == kinds.count(RetentionSpec)
    assert layout.num_sliding_tables == kinds.count(SlidingWindowSpec)
    assert layout.layers_per_block == max(len(group.layer_names) for group in groups)
    assert {group.kv_cache_spec.page_size_bytes for group in groups} == {layout.page_bytes(32)}


@pytest.mark.vllm
def test_default_block_size_is_vllms_on_a_cpu() -> None:
    """Proves the default against the line of the installed vLLM that sets it, without a start."""
    found = importlib.util.find_spec("vllm")
    assert found is not None
    assert found.submodule_search_locations is not None
    source = Path(found.submodule_search_locations[0], "platforms", "cpu.py").read_text("utf-8")
    (default,) = re.findall(
        r"elif not cache_config\.user_specified_block_size:\s+cache_config\.block_size = (\d+)",
        source,
    )
    assert int(default) == BLOCK_SIZE


def test_numbers_beside_slots_take_whole_blocks_from_the_start() -> None:
    """Proves infini's price by hand: a 64 x 64 matrix, a normaliser and 5 statistics a head."""
    policy = parse("infini:segment=100,gate=0.5")
    assert floats_beside(policy, 64, 3) == 64 * 64 + 64 + 5 * 3
    assert floats_beside(parse("infini:segment=100"), 64, 3) == 0
    layout = Layout(num_layers=2, num_kv_heads=5, head_dim=64, element_bytes=4)
    pool = Pool(layout=layout, block_size=16, memory=1 << 24)
    floats = floats_beside(policy, 64, 3)
    at = pool.footprint(policy.occupancy, 250, floats)
    assert at.slots == 100
    assert at.blocks == 3 + 7  # 4175 numbers fill 2.04 blocks of 2048, 100 tokens 6.25 of 16
    assert at.dense_bytes == 2 * 5 * (100 * (512 + DENSE_STATE_BYTES) + floats * 4)
    assert pool.footprint(policy.occupancy, 1, floats).blocks == 3 + 1


@pytest.mark.parametrize("spec", ["centroid:budget=40", "infini:segment=24,gate=0.5"])
def test_dense_bytes_are_those_of_real_memories(spec: str) -> None:
    """Proves the figure for transformers against storage that a memory policy has filled."""
    policy, case = parse(spec), Case(lengths=(90, 90), kv_heads=3, group=2)
    host = Host(policy, case, case.rows())
    for _ in range(90):
        host.step([0, 1])
    law = policy.occupancy
    layout = Layout(num_layers=1, num_kv_heads=3, head_dim=HEAD_DIM, element_bytes=4)
    floats = floats_beside(policy, HEAD_DIM, 2)
    assert host.slots.num_bytes == 2 * layout.dense_bytes(law.capacity, floats)
