"""KV bytes of one request from a thousand to a million tokens, as the ledger and the pool say."""

import time

import pytest

import kvpolicy_vllm
from fixtures.engines import BLOCK_SIZE, generate, start_engine
from fixtures.models import SMALL_SHAPE, random_llama, random_prompt, save_model

pytestmark = [pytest.mark.bench, pytest.mark.vllm]

LENGTHS = (1_000, 10_000, 100_000, 1_000_000)
BUDGET = 256
POLICIES = (f"window:budget={BUDGET}", f"h2o:budget={BUDGET}")


@pytest.mark.parametrize("policy", POLICIES)
def test_bytes_are_constant_in_length(policy, tmp_path, capsys):
    """Prints blocks, bytes and seconds per length; blocks in use are those of the ledger."""
    model = random_llama(**SMALL_SHAPE | {"max_position_embeddings": 1 << 20})
    llm = start_engine(
        save_model(model, tmp_path),
        policy,
        max_model_len=LENGTHS[-1] + 64,
        max_num_batched_tokens=4096,
        max_num_seqs=1,
        kv_cache_memory_bytes=8 << 20,
    )
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    pool = scheduler.kv_cache_manager.block_pool
    free, most = pool.get_num_free_blocks(), [0]
    original = pool.get_new_blocks

    def get_new_blocks(count):
        blocks = original(count)
        most[0] = max(most[0], free - pool.get_num_free_blocks())
        return blocks

    pool.get_new_blocks = get_new_blocks
    held = set()
    with capsys.disabled():
        print(f"\n{policy}: one request, blocks of {BLOCK_SIZE}")
        print("   tokens   blocks      bytes   evicted   seconds")
        for length in LENGTHS:
            most[0], begin = 0, time.perf_counter()
            [output] = generate(llm, [random_prompt(model, length, seed=1)], 2)
            entry = kvpolicy_vllm.ledger(llm)["requests"][output.request_id]
            assert entry["blocks_held"] == most[0], "the ledger says what the pool gave"
            held.add((entry["blocks_held"], entry["bytes_held"]))
            print(
                f"{length:9,} {entry['blocks_held']:8} {entry['bytes_held']:10,} "
                f"{entry['evicted']:9,} {time.perf_counter() - begin:9.1f}"
            )
    assert len(held) == 1, "bytes depend on the length"
