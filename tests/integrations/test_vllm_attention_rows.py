"""Attention rows of decoding tokens, against torch in float64 over a copy of the keys."""

from dataclasses import replace

import pytest
import torch

import kvpolicy
from kvpolicy.attention import AttentionLayer
from kvpolicy.selection import select_victims
from kvpolicy_vllm import attention_rows, execution, observation
from kvpolicy_vllm import threads as sharing
from kvpolicy_vllm.allotment import Allotment
from kvpolicy_vllm.book import Account
from kvpolicy_vllm.execution import LayerBatch, decide, walk
from kvpolicy_vllm.observation import MAX_BACKLOG, catch_up, observe
from kvpolicy_vllm.pages import Pages, put_rows, rows_of
from kvpolicy_vllm.parts import Decision, Observation, Walk
from kvpolicy_vllm.rows import Row
from kvpolicy_vllm.spec import STATE_BYTES

NUM_BLOCKS, KV_HEADS, GROUP, DIM = 17, 2, 3, 64
VISIBLE = (70, 1, 96, 33)
"""Slots of four rows: a part of a block, a single one, whole blocks, one over."""

LAST_TOKENS = torch.tensor([3, 0, 2, 1])
"""Which token of a batch is each row's newest."""

DUE = 6
"""Slots that the first row drops under a budget of 64 and this interval; no other row is due."""

RULES = {
    "mean": "",
    "max": ",group_pool=max",
    "sum": ",group_pool=sum",
    "layer": ",scope=layer",
    "relative": ",score=relative",
    "decay": ",decay=0.9",
}
LAYOUTS = [("vec", torch.float32), ("vec", torch.bfloat16), ("amx", torch.bfloat16)]


class LatestVotes(kvpolicy.EvictionPolicy):
    """Counts the last tokens before an eviction alone."""

    needs = ("accumulated",)
    votes: int = 1

    @property
    def accumulation(self) -> kvpolicy.Accumulation:
        """Sums over `votes` tokens."""
        return kvpolicy.Accumulation(window=self.votes)

    def score(self, view: kvpolicy.View) -> torch.Tensor:
        """Rate a slot by its votes."""
        assert view.accumulated is not None
        return view.accumulated


class Undecided(kvpolicy.EvictionPolicy):
    """Fails when it is asked how attention counts."""

    needs = ("accumulated",)

    @property
    def accumulation(self) -> kvpolicy.Accumulation:
        """Nobody knows."""
        raise RuntimeError("undecided")

    def score(self, view: kvpolicy.View) -> torch.Tensor:
        """Rate a slot by its votes."""
        assert view.accumulated is not None
        return view.accumulated


def filled_pages(packing: str, dtype: torch.dtype, size: int) -> Pages:
    """Pages with a tail, of random keys, values and statistics, rubbish in the null block."""
    generator = torch.Generator().manual_seed(size)
    page = KV_HEADS * size * 2 * DIM * dtype.itemsize
    stride = page + KV_HEADS * size * STATE_BYTES
    raw = torch.zeros(NUM_BLOCKS * stride, dtype=torch.int8)
    cell = 2 * DIM * dtype.itemsize
    strides = (stride, size * cell, cell, 1)
    cache = raw.as_strided((NUM_BLOCKS, KV_HEADS, size, cell), strides).view(dtype)
    pages = Pages.of(cache, packing)
    blocks = torch.arange(NUM_BLOCKS)[None]
    shape = (1, KV_HEADS, NUM_BLOCKS * size, DIM)
    keys, values = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    pages.write_blocks(blocks, keys, values)
    pages.accumulated.copy_(torch.rand(pages.accumulated.shape, generator=generator))
    pages.runs[0] = torch.nan
    pages.accumulated[0] = torch.nan
    return pages


def observation_of(policy: kvpolicy.EvictionPolicy, size: int) -> Observation:
    """Four rows over permuted blocks, none of them due."""
    counts = [-(-slots // size) for slots in VISIBLE]
    order = torch.randperm(NUM_BLOCKS - 1, generator=torch.Generator().manual_seed(1)) + 1
    blocks = torch.zeros(len(VISIBLE), max(counts), dtype=torch.int64)
    for row, count in enumerate(counts):
        blocks[row, :count] = order[row * 3 : row * 3 + count]
    rows = [
        Row(
            i, policy, i, 1, slots - 1, Account(f"request {i}", policy, Allotment(policy.occupancy))
        )
        for i, slots in enumerate(VISIBLE)
    ]
    return Observation(policy, rows, LAST_TOKENS, blocks, torch.tensor(VISIBLE), written=blocks)


def observe_at_once(
    part: Observation, layer: AttentionLayer, pages: Pages, query: torch.Tensor
) -> None:
    """Observe tokens, and fold their attention without waiting for more."""
    observe(part, layer, pages, query)
    catch_up(part.rows, part.blocks, part.written, layer, pages)


def fold_one_by_one(
    part: Observation, layer: AttentionLayer, pages: Pages, query: torch.Tensor
) -> None:
    """The same token by token, from gathered float64 keys."""
    for row, slots in enumerate(part.visible.tolist()):
        blocks = part.blocks[row : row + 1, : -(-slots // pages.block_size)]
        keys = pages.read_keys(blocks)[:, :, :slots].double()
        newest = query[part.last_tokens[row]].double().view(1, KV_HEADS, GROUP, DIM)
        weights = (0.3 * newest @ keys.transpose(-1, -2)).softmax(dim=-1)
        kept = rows_of(pages.accumulated, blocks, slots)
        pooled = layer.pool(weights[:, :, :, None]).float()
        put_rows(pages.accumulated, blocks, layer.fold(kept, pooled, torch.tensor([[[slots]]])))


def assert_same_statistic(pages: Pages, expected: Pages) -> None:
    """Every slot's is, that of the null block too."""
    torch.testing.assert_close(
        pages.accumulated, expected.accumulated, rtol=2e-5, atol=1e-6, equal_nan=True
    )


@pytest.mark.parametrize("size", [32, 48])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("packing", "dtype"), LAYOUTS)
def test_tokens_are_observed_as_over_a_copy(packing, dtype, rule, size):
    """Tokens that wait count as if each had been folded at once, from gathered float64 keys."""
    policy = kvpolicy.parse(f"h2o:budget=200,interval=4{RULES[rule]}")
    layer = AttentionLayer(policy, 0, scale=0.3)
    pages, expected = (filled_pages(packing, dtype, size) for _ in range(2))
    part = observation_of(policy, size)
    for wait in range(5):
        query = torch.randn(4, KV_HEADS * GROUP, DIM).to(dtype)
        visible = torch.tensor(VISIBLE) - 4 * (torch.tensor(VISIBLE) > 4) + wait
        part = replace(part, visible=visible)
        before = pages.accumulated.clone()
        observe(part, layer, pages, query)
        assert torch.equal(pages.accumulated.nan_to_num(), before.nan_to_num())
        fold_one_by_one(part, layer, expected, query)
    catch_up(part.rows, part.blocks, part.written, layer, pages)
    assert_same_statistic(pages, expected)


@pytest.mark.parametrize(("packing", "dtype"), LAYOUTS)
def test_no_more_tokens_wait_than_a_backlog_holds(packing, dtype):
    """The last that fits makes its row catch up, and no other row."""
    policy = kvpolicy.parse("h2o:budget=200,interval=40")
    layer = AttentionLayer(policy, 0, scale=0.3)
    pages, expected = (filled_pages(packing, dtype, 32) for _ in range(2))
    whole = observation_of(policy, 32)
    first = replace(
        whole,
        rows=whole.rows[:1],
        last_tokens=whole.last_tokens[:1],
        blocks=whole.blocks[:1],
        visible=whole.visible[:1],
        written=whole.written[:1],
    )
    for wait in range(MAX_BACKLOG):
        part = first if wait == 0 else whole
        query = torch.randn(4, KV_HEADS * GROUP, DIM).to(dtype)
        observe(part, layer, pages, query)
        fold_one_by_one(first, layer, expected, query)
    assert_same_statistic(pages, expected)
    assert [len(row.account.backlogs[0]) for row in whole.rows] == [0] + [MAX_BACKLOG - 1] * 3


def test_many_rows_catch_up_in_parts(monkeypatch):
    """However few weights may be held at once, the statistic is the same to the bit."""
    policy = kvpolicy.parse("h2o:budget=200,interval=4")
    layer, found = AttentionLayer(policy, 0, scale=0.3), []
    for most in (1 << 22, 1):
        monkeypatch.setattr(observation, "_MAX_WEIGHTS", most)
        pages, part = filled_pages("vec", torch.float32, 32), observation_of(policy, 32)
        generator = torch.Generator().manual_seed(0)
        for _ in range(3):
            observe(part, layer, pages, torch.randn(4, KV_HEADS * GROUP, DIM, generator=generator))
        catch_up(part.rows, part.blocks, part.written, layer, pages)
        found.append(pages.accumulated)
    assert torch.equal(found[0].nan_to_num(), found[1].nan_to_num())


def test_a_walk_begins_with_what_waits():
    """A prompt that goes on after decoding finds the statistic of all tokens before it."""
    policy = kvpolicy.parse("h2o:budget=200,interval=4")
    layer, found = AttentionLayer(policy, 0, scale=0.3), []
    generator = torch.Generator().manual_seed(0)
    heads = (KV_HEADS * GROUP, KV_HEADS, KV_HEADS, KV_HEADS * GROUP)
    decoded = torch.randn(4, KV_HEADS * GROUP, DIM, generator=generator)
    batch = LayerBatch(*(torch.randn(2, each, DIM, generator=generator) for each in heads))
    for observed in (observe, observe_at_once):
        pages, part = filled_pages("vec", torch.float32, 32), observation_of(policy, 32)
        observed(part, layer, pages, decoded)
        row = replace(part.rows[0], first_token=0, num_tokens=2, seen=VISIBLE[0])
        tokens = torch.tensor([[0, 1]])
        walk(Walk(policy, [row], tokens, part.blocks[:1]), layer, pages, batch, None)
        found.append(rows_of(pages.accumulated, part.blocks[:1], VISIBLE[0] + 2))
    assert torch.equal(*found)


def test_blocks_of_a_kept_prompt_are_read_and_not_written():
    """A block that another request may share keeps its statistics, and the rest is the same."""
    policy = kvpolicy.parse("h2o:budget=96,interval=4")
    layer, query = AttentionLayer(policy, 0, scale=0.3), torch.randn(4, KV_HEADS * GROUP, DIM)
    whole, shared = (filled_pages("vec", torch.float32, 32) for _ in range(2))
    part, other = (observation_of(policy, 32) for _ in range(2))
    before, kept = shared.accumulated.clone(), part.blocks[0, 0]
    written = part.blocks.clone()
    written[0, 0] = 0
    observe_at_once(part, layer, whole, query)
    observe_at_once(replace(other, written=written), layer, shared, query)
    assert torch.equal(shared.accumulated[kept], before[kept])
    others = [block for block in range(1, NUM_BLOCKS) if block != kept]
    assert torch.equal(shared.accumulated[others], whole.accumulated[others])
    assert not torch.equal(whole.accumulated[kept], before[kept])


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("queries", [1, 5])
@pytest.mark.parametrize("threads", [2, 3])
def test_threads_share_the_work(threads, queries, rows, monkeypatch):
    """However many threads take rows, or heads of a single one, every number is the same."""
    pages = filled_pages("vec", torch.float32, 32)
    part = observation_of(kvpolicy.parse("h2o:budget=96"), 32)
    query = torch.randn(rows, queries, KV_HEADS, GROUP, DIM)
    blocks, visible = part.blocks[:rows], part.visible[:rows, None].expand(-1, queries)

    def pooled() -> torch.Tensor:
        found = torch.full((rows, KV_HEADS, queries, blocks.shape[1] * 32), torch.nan)
        arguments = (pages.memory, pages.key_runs, blocks, visible, query, found)
        attention_rows.pooled_rows(*arguments, attention_rows.POOLS["mean"])
        return found

    alone = pooled()
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert sharing._runtime() is not None
    assert torch.equal(pooled(), alone)
    monkeypatch.setattr(sharing, "_runtime", lambda: None)
    assert torch.equal(pooled(), alone)


def test_a_row_that_is_no_number_stays_alone():
    """Infinite and missing logits make their own row NaN, as in torch, and no other."""
    policy = kvpolicy.parse("h2o:budget=96,interval=4")
    layer, pages = AttentionLayer(policy, 0, scale=0.3), filled_pages("vec", torch.float32, 32)
    part, query = observation_of(policy, 32), torch.randn(4, KV_HEADS * GROUP, DIM)
    query[3], query[2, :, 0] = torch.nan, torch.inf
    observe_at_once(part, layer, pages, query)
    lost = [
        bool(rows_of(pages.accumulated, part.blocks[row : row + 1], slots).isnan().all())
        for row, slots in enumerate(VISIBLE)
    ]
    assert lost == [True, False, True, False]


def test_a_window_of_votes_starts_over_with_its_first_token():
    """What a slot had before is forgotten then, no number included, and added to from then on."""
    policy = LatestVotes(budget=96, interval=4, votes=100)  # the next eviction is at 100
    layer, pages = AttentionLayer(policy, 0, scale=0.3), filled_pages("vec", torch.float32, 32)
    part, before = observation_of(policy, 32), pages.accumulated.clone()
    starting, going_on = (part.blocks[row : row + 1] for row in (1, 2))
    pages.accumulated[starting] = torch.nan
    observe_at_once(part, layer, pages, torch.randn(4, KV_HEADS * GROUP, DIM))
    assert torch.equal(rows_of(pages.accumulated, starting, 1), torch.ones(1, KV_HEADS, 1))
    added = rows_of(pages.accumulated - before, going_on, 96).sum(dim=-1)
    torch.testing.assert_close(added, torch.ones(1, KV_HEADS), rtol=0, atol=2e-5)


def test_a_policy_that_cannot_say_what_counts_leaves_no_backlog():
    """A failure while tokens are observed keeps nothing of any row, so that each may try again."""
    policy = Undecided(budget=96, interval=4)
    part, pages = observation_of(policy, 32), filled_pages("vec", torch.float32, 32)
    with pytest.raises(RuntimeError, match="undecided"):
        observe(part, AttentionLayer(policy, 0, scale=0.3), pages, torch.randn(4, 6, DIM))
    assert [dict(row.account.backlogs) for row in part.rows] == [{}] * 4


def test_tokens_before_a_window_of_votes_are_not_observed():
    """Of eight tokens between two evictions the last three are, so that five cost no pass."""
    policy = LatestVotes(budget=16, interval=8, votes=3)
    account = Account("request", policy, Allotment(policy.occupancy))
    rows = [Row(0, policy, 0, 1, seen, account) for seen in range(24, 32)]
    assert [row.observes for row in rows] == [False] * 5 + [True] * 3
    assert [row.is_due for row in rows] == [False] * 7 + [True]


@pytest.mark.parametrize(
    ("spec", "choices"),
    [("window", 1), ("sinks", 1), ("tova", 2), ("h2o", 2)],
)
def test_layers_share_what_no_layer_can_decide_otherwise(spec, choices, monkeypatch):
    """Policies that keep the first and newest tokens choose once for both layers, others twice."""
    chosen = []
    monkeypatch.setattr(
        execution,
        "select_victims",
        lambda *args: chosen.append(select_victims(*args)) or chosen[-1],
    )
    policy = kvpolicy.parse(f"{spec}:budget=64,interval={DUE}")
    rows, held = observation_of(policy, 32), torch.arange(VISIBLE[0], dtype=torch.int32)
    decision = Decision(
        policy, rows.rows[:1], LAST_TOKENS[:1], rows.blocks[:1], rows.visible[:1], rows.written[:1]
    )
    query = torch.randn(4, KV_HEADS * GROUP, DIM)
    for index in range(2):
        pages = filled_pages("vec", torch.float32, 32)
        put_rows(pages.positions, decision.blocks, held.expand(1, KV_HEADS, -1))
        decide(decision, AttentionLayer(policy, index, scale=0.3), pages, query)
        kept = rows_of(pages.positions, decision.blocks, 64).sort(dim=-1).values
        dropped = chosen[-1].nonzero()[:, 2].view(KV_HEADS, DUE)
        for head in range(KV_HEADS):
            assert set(held.tolist()) - set(kept[0, head].tolist()) == set(dropped[head].tolist())
    assert len(chosen) == choices
    assert decision.rows[0].account.evicted_cells == 2 * KV_HEADS * DUE
