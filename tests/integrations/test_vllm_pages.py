"""Pages of vLLM's CPU cache, read and written as slots."""

import pytest
import torch

from kvpolicy_vllm.pages import Cells, Moves, Pages, fill_holes, put_rows, rows_of
from kvpolicy_vllm.spec import STATE_BYTES

NUM_BLOCKS, KV_HEADS, SIZE, DIM = 7, 2, 32, 64


def make_pages(packing: str, dtype: torch.dtype) -> tuple[Pages, torch.Tensor]:
    """Pages over a cache whose blocks end in a tail, as vLLM lays them out; and the cache."""
    page = KV_HEADS * SIZE * 2 * DIM * dtype.itemsize
    stride = page + KV_HEADS * SIZE * STATE_BYTES
    raw = torch.zeros(NUM_BLOCKS * stride, dtype=torch.int8)
    cell = 2 * DIM * dtype.itemsize
    strides = (stride, SIZE * cell, cell, 1)
    cache = raw.as_strided((NUM_BLOCKS, KV_HEADS, SIZE, cell), strides).view(dtype)
    return Pages.of(cache, packing), cache


LAYOUTS = [("vec", torch.float32), ("vec", torch.bfloat16), ("amx", torch.bfloat16)]


@pytest.mark.parametrize(("packing", "dtype"), LAYOUTS)
def test_blocks_read_back_as_written(packing, dtype):
    """Whole blocks survive the kernel's packing."""
    pages, _ = make_pages(packing, dtype)
    blocks = torch.tensor([[3, 1], [0, 5]])
    keys, values = (torch.randn(2, KV_HEADS, 2 * SIZE, DIM).to(dtype) for _ in range(2))
    pages.write_blocks(blocks, keys, values)
    assert torch.equal(pages.read_keys(blocks), keys)
    assert torch.equal(pages.read_keys_transposed(blocks).transpose(-1, -2).flatten(2, 3), keys)
    assert torch.equal(pages.read_values(blocks), values)


@pytest.mark.parametrize(("packing", "dtype"), LAYOUTS)
def test_the_packing_is_vllms_own(packing, dtype):
    """What vLLM's kernel stores token by token is what we read."""
    ops = pytest.importorskip("vllm._custom_ops")
    pages, cache = make_pages(packing, dtype)
    key_cache, value_cache = cache.view(NUM_BLOCKS, KV_HEADS, 2 * SIZE, DIM).chunk(2, dim=2)
    keys, values = (torch.randn(2 * SIZE, KV_HEADS, DIM).to(dtype) for _ in range(2))
    slots = torch.cat([torch.arange(SIZE) + 4 * SIZE, torch.arange(SIZE) + 2 * SIZE])
    ops.cpu_attn_reshape_and_cache(keys, values, key_cache, value_cache, slots, packing)
    blocks = torch.tensor([[4, 2]])
    assert torch.equal(pages.read_keys(blocks)[0].transpose(0, 1), keys)
    assert torch.equal(pages.read_values(blocks)[0].transpose(0, 1), values)


@pytest.mark.parametrize(("packing", "dtype"), LAYOUTS)
def test_moving_cells_takes_their_state_along(packing, dtype):
    """A moved cell keeps its key, value, position and statistic; others are untouched."""
    pages, _ = make_pages(packing, dtype)
    blocks = torch.arange(NUM_BLOCKS)[None]
    keys, values = (torch.randn(1, KV_HEADS, NUM_BLOCKS * SIZE, DIM).to(dtype) for _ in range(2))
    pages.write_blocks(blocks, keys, values)
    pages.positions.copy_(torch.arange(pages.positions.numel()).view_as(pages.positions))
    pages.accumulated.normal_()
    state = pages.positions.clone(), pages.accumulated.clone()
    source = Cells(torch.tensor([1, 2]), torch.tensor([0, 1]), torch.tensor([31, 5]))
    target = Cells(torch.tensor([6, 0]), torch.tensor([0, 1]), torch.tensor([17, 0]))
    pages.move(Moves(source, target, dropped=[1]))
    for found, before in (
        (by_block(pages.read_keys(blocks)), by_block(keys)),
        (by_block(pages.read_values(blocks)), by_block(values)),
        (pages.positions, state[0]),
        (pages.accumulated, state[1]),
    ):
        expected = before.clone()
        expected[target] = before[source]
        assert torch.equal(found, expected)


def by_block(slots: torch.Tensor) -> torch.Tensor:
    """Slots [1, H_kv, N P, D] of all blocks as [N, H_kv, P, D]."""
    return slots[0].unflatten(1, (NUM_BLOCKS, SIZE)).transpose(0, 1)


def test_state_rows_read_back_as_written():
    """Policy state of rows is addressed by block; slots past the row keep theirs."""
    pages, _ = make_pages("vec", torch.float32)
    pages.accumulated.fill_(7.0)
    blocks, rows = torch.tensor([[2, 6]]), torch.randn(1, KV_HEADS, SIZE + 3)
    put_rows(pages.accumulated, blocks, rows)
    assert torch.equal(rows_of(pages.accumulated, blocks, SIZE + 3), rows)
    assert (rows_of(pages.accumulated, blocks, 2 * SIZE)[..., SIZE + 3 :] == 7.0).all()
    assert (pages.accumulated[[0, 1, 3, 4, 5]] == 7.0).all()


def test_filling_holes_keeps_the_survivors_and_only_them():
    """After an eviction every head's survivors lie below `retained`, each head its own."""
    pages, _ = make_pages("vec", torch.float32)
    blocks, held, retained = torch.tensor([[3, 1], [5, 2]]), 50, 37
    positions = torch.stack([torch.randperm(held) for _ in range(2 * KV_HEADS)])
    put_rows(pages.positions, blocks, positions.view(2, KV_HEADS, held).int())
    order = torch.rand(2, KV_HEADS, held).argsort(-1)
    victims = torch.zeros(2, KV_HEADS, held, dtype=torch.bool)
    victims.scatter_(-1, order[..., : held - retained], value=True)
    before = rows_of(pages.positions, blocks, held)
    pages.move(fill_holes(blocks, victims, retained, SIZE))
    after = rows_of(pages.positions, blocks, retained)
    for row in range(2):
        for head in range(KV_HEADS):
            survivors = before[row, head][~victims[row, head]]
            assert sorted(after[row, head].tolist()) == sorted(survivors.tolist())


@pytest.mark.parametrize(("packing", "dtype"), LAYOUTS)
def test_numbers_fill_whole_blocks_and_nothing_else(packing, dtype):
    """A memory's numbers survive in whatever dtype the cache has; other pages keep theirs."""
    pages, cache = make_pages(packing, dtype)
    cache.fill_(3.0)
    pages.positions.fill_(7)
    blocks = torch.tensor([[4, 2], [0, 6]])
    numbers = torch.randn(2, KV_HEADS, SIZE * DIM + 11)
    pages.write_numbers(blocks, numbers)
    assert torch.equal(pages.read_numbers(blocks)[..., : numbers.shape[-1]], numbers)
    assert (cache[[1, 3, 5]] == 3.0).all()
    assert (pages.positions == 7).all()
