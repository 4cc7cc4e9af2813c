"""What an engine under a policy holds, refuses and leaves alone."""

import json
from types import SimpleNamespace

import pytest
from transformers import Gemma2Config, Gemma2ForCausalLM
from vllm import LLM
from vllm.engine.arg_utils import EngineArgs
from vllm.exceptions import VLLMValidationError
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend, CPUAttentionBackendImpl
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager

import kvpolicy
import kvpolicy_vllm
from fixtures.engines import (
    BLOCK_SIZE,
    assert_equals_reference,
    generate,
    reference,
    start_engine,
)
from fixtures.models import SMALL_SHAPE, random_mistral, random_prompt, save_model, seeded
from kvpolicy_vllm.config import check_engine

pytestmark = pytest.mark.vllm

NUM_TOKENS = 12


@pytest.fixture(scope="module")
def engine(path) -> LLM:
    """An engine that sizes its requests for h2o."""
    return start_engine(
        path, "h2o:budget=256", max_model_len=20480, max_num_batched_tokens=512, max_num_seqs=4
    )


def attention_layers(llm: LLM) -> list[Attention]:
    """The attention layers of an engine in this process."""
    context = llm.llm_engine.vllm_config.compilation_config.static_forward_context
    return [layer for layer in context.values() if isinstance(layer, Attention)]


def manager(llm: LLM):
    """What hands out an engine's blocks."""
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    return scheduler.kv_cache_manager.coordinator.single_type_managers[0]


def book(llm: LLM):
    """The accounts of an engine in this process."""
    return attention_layers(llm)[0].impl.engine.book


@pytest.mark.parametrize("policy", ["h2o:budget=256", "window:budget=256"])
def test_blocks_follow_the_occupancy_law_at_any_length(engine, model, policy):
    """A request of 100, 2,000 or 20,000 tokens holds what the law says, and no more."""
    occupancy = kvpolicy.parse(policy).occupancy
    for length in (100, 2_000, 20_000):
        [output] = generate(engine, [random_prompt(model, length, seed=1)], 2, policy)
        entry = kvpolicy_vllm.ledger(engine)["requests"][output.request_id]
        tokens = length + 1  # the last generated token is never fed back
        assert entry["logical_tokens"] == tokens
        assert entry["blocks_held"] == -(-min(tokens, 256 + 16) // BLOCK_SIZE)
        assert entry["retained"] == entry["slots_held"] == occupancy.held(tokens)
        assert entry["evicted"] == occupancy.evicted(tokens)
        assert entry["evictions"] == occupancy.evictions(tokens)


def test_ledger_bytes_are_the_pages_bytes(engine, model):
    """Bytes held are blocks times the page that vLLM allotted, policy state included."""
    [output] = generate(engine, [random_prompt(model, 600, seed=2)], 2)
    entry = kvpolicy_vllm.ledger(engine)["requests"][output.request_id]
    spec = manager(engine).kv_cache_spec
    state = 8 * spec.num_kv_heads * BLOCK_SIZE
    assert spec.page_size_bytes == spec.num_kv_heads * BLOCK_SIZE * 2 * 64 * 4 + state
    assert entry["bytes_held"] == entry["blocks_held"] * spec.page_size_bytes * 2
    full = -(-601 // BLOCK_SIZE) * spec.unpadded_page_size_bytes * 2
    assert entry["bytes_saved"] == full - entry["bytes_held"]
    json.dumps(kvpolicy_vllm.ledger(engine))


def test_a_repeated_prompt_finds_nothing_in_the_prefix_cache(engine, model):
    """Prefix caching stays on, but blocks that a policy rewrote are never shared."""
    prompt = random_prompt(model, 500, seed=3)
    first, second = (generate(engine, [prompt], NUM_TOKENS)[0] for _ in range(2))
    assert engine.llm_engine.vllm_config.cache_config.enable_prefix_caching
    assert second.num_cached_tokens == 0
    assert first.outputs[0].token_ids == second.outputs[0].token_ids


def test_all_blocks_return_to_the_pool(engine, model):
    """Finished requests leave no blocks behind."""
    pool = manager(engine).block_pool
    free = pool.get_num_free_blocks()
    generate(engine, [random_prompt(model, n, seed=n) for n in (5, 300, 700)], NUM_TOKENS)
    assert pool.get_num_free_blocks() == free


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("h2o:budget=300", "318 slots"),
        ("full", "unboundedly many"),
        ("nonsense:budget=4", "this server takes bswa"),
        ("h2o:budget=64,prefill=bulk", "drop prefill=bulk"),
        ("h2o:budget=64,protect=prompt", "drop protect=prompt"),
        ("sinks:budget=64,rope=reindex", "server's rope=keep"),
        ("h2o:budget=64,rope_beyond=allow", "server's rope_beyond=refuse"),
        ("fixtures.policies.FadingMaximum:budget=64", "import paths"),
    ],
)
def test_a_bad_request_policy_is_refused_and_the_engine_lives(engine, model, spec, message):
    """A request whose policy is wrong, too large or an import path fails alone, with the reason."""
    prompt = random_prompt(model, 40, seed=4)
    with pytest.raises(VLLMValidationError, match=message):
        generate(engine, [prompt], 2, spec)
    assert len(generate(engine, [prompt], 2)[0].outputs[0].token_ids) == 2


def test_unknown_requests_have_no_positions(engine):
    """Asking for a request that never was says so."""
    with pytest.raises(kvpolicy.PolicyError, match="no retained positions"):
        kvpolicy_vllm.retained_positions(engine, "never", 0)


def test_stock_and_policies_share_a_process(path, model):
    """Stock, h2o, stock and window in one process: each engine runs its own classes."""
    prompt = random_prompt(model, 90, seed=5)
    for policy in (None, "h2o:budget=48", None, "window:budget=48"):
        llm = start_engine(path, policy)
        [output] = generate(llm, [prompt], NUM_TOKENS)
        expected = reference(model, policy or "full", prompt, NUM_TOKENS)
        if policy is None:
            assert list(output.outputs[0].token_ids) == expected.tokens
            assert {layer.attn_backend for layer in attention_layers(llm)} == {CPUAttentionBackend}
            assert {type(layer.impl) for layer in attention_layers(llm)} == {
                CPUAttentionBackendImpl
            }
            assert type(manager(llm)) is FullAttentionManager
            with pytest.raises(kvpolicy.PolicyError, match="keeps no ledger"):
                kvpolicy_vllm.ledger(llm)
        else:
            assert_equals_reference(llm, output, expected)


def test_additional_config_alone_runs_the_policy(path, model):
    """The plain way, without engine_args, is never inert."""
    llm = start_engine(path, additional_config={"kv_policy": "tova:budget=48"})
    prompt = random_prompt(model, 90, seed=6)
    [output] = generate(llm, [prompt], NUM_TOKENS)
    expected = reference(model, "tova:budget=48", prompt, NUM_TOKENS)
    assert list(output.outputs[0].token_ids) == expected.tokens
    [account] = book(llm).accounts.values()
    occupancy = kvpolicy.parse("tova:budget=48").occupancy
    assert account.evicted_cells == occupancy.evicted(90 + NUM_TOKENS - 1) * 2 * 2


def test_spread_heads_refuse_what_needs_all_of_them(path, tmp_path):
    """Under tensor parallelism, policies and captures that would miss heads do not start."""
    config = EngineArgs(model=str(path), tensor_parallel_size=2).create_engine_config()
    check_engine(config, kvpolicy.parse("fixtures.policies.FadingMaximum:budget=8"))
    with pytest.raises(kvpolicy.UnsupportedError, match="heads spread over processes"):
        check_engine(config, kvpolicy.parse("fixtures.policies.FadingMaximum:budget=8,scope=layer"))
    config.additional_config["kv_policy_capture"] = {"directory": str(tmp_path)}
    with pytest.raises(kvpolicy.UnsupportedError, match="spread over 2"):
        check_engine(config, kvpolicy.parse("full"))


def test_captures_refuse_adapters(path, tmp_path):
    """A trace is the model's own, so that nothing of an adapter is recorded in it."""
    arguments = kvpolicy_vllm.engine_args("full", capture=tmp_path, enable_lora=True)
    config = EngineArgs(model=str(path), **arguments).create_engine_config()
    with pytest.raises(kvpolicy.UnsupportedError, match="which adapter a request had"):
        check_engine(config, kvpolicy.parse("full"))


def test_contexts_past_the_trained_length_need_a_word(path):
    """A context beyond the model's positions is refused unless the policy says how to go there."""
    config = EngineArgs(model=str(path), max_model_len=2048).create_engine_config()
    config.model_config.hf_text_config.max_position_embeddings = 1024
    with pytest.raises(kvpolicy.UnsupportedError, match="rope_beyond=allow"):
        check_engine(config, kvpolicy.parse("h2o:budget=48"))
    for spec in ("h2o:budget=48,rope_beyond=allow", "sinks:budget=48,rope=reindex"):
        check_engine(config, kvpolicy.parse(spec))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kv_cache_dtype": "fp8"}, "quantised KV cache"),
        ({"additional_config": {"kv_policy_alow": ["window"]}}, "unknown setting"),
    ],
)
def test_a_refused_engine_does_not_start(path, arguments, message):
    """The refusal reaches whoever constructs the engine."""
    with pytest.raises(ValueError, match=message):
        start_engine(path, "window:budget=48", **arguments)


def test_sliding_window_models_are_refused(tmp_path):
    """A model with its own retention rule is refused, saying which."""
    save_model(random_mistral(sliding_window=64), tmp_path)
    with pytest.raises(ValueError, match="sliding windows in all layers"):
        start_engine(tmp_path, "window:budget=48")


def test_soft_capping_models_are_refused(tmp_path):
    """A model whose logits are capped, which policies' scores would not know, is refused."""
    config = Gemma2Config(**SMALL_SHAPE, layer_types=["full_attention"] * 2, sliding_window=None)
    save_model(seeded(Gemma2ForCausalLM(config)), tmp_path)
    with pytest.raises(ValueError, match="soft-capping"):
        start_engine(tmp_path, "window:budget=48")


def test_an_unsupported_release_is_refused(monkeypatch):
    """Releases whose extension points were not verified are named, with those that were."""
    from kvpolicy_vllm import plugin

    monkeypatch.setattr(plugin, "vllm_version", lambda: "0.99.0")
    with pytest.raises(kvpolicy.UnsupportedError, match=r"supports vLLM 0\.32, found 0\.99\.0"):
        kvpolicy_vllm.engine_args("window:budget=48")


def test_a_ledger_that_disagrees_with_the_law_is_an_error(engine, model, monkeypatch):
    """An eviction that never happened cannot pass unnoticed."""
    monkeypatch.setattr("kvpolicy_vllm.backend.decide", lambda *_: None)
    generate(engine, [random_prompt(model, 100, seed=7)], 200)
    with pytest.raises(kvpolicy.LedgerError, match="the policy did not run as configured"):
        kvpolicy_vllm.ledger(engine)
    monkeypatch.undo()
    generate(engine, [random_prompt(model, 10, seed=7)], 2)  # the fault is noted with this step
    assert len(book(engine).faults) == 1
    book(engine).faults.clear()


def test_engine_args_merge_with_the_users_own(monkeypatch):
    """Settings of the user survive, and a bad spec is refused before anything starts."""
    settings = kvpolicy_vllm.engine_args(
        "h2o:budget=64", additional_config={"mine": 1}, max_model_len=99
    )
    assert settings["additional_config"] == {"mine": 1, "kv_policy": "h2o:budget=64"}
    assert settings["max_model_len"] == 99
    with pytest.raises(kvpolicy.PolicyError, match="h2o needs budget"):
        kvpolicy_vllm.engine_args("h2o")


def test_the_row_tracker_is_fit_for_both_model_runners():
    """VLLM loads the entry point into stock engines of either runner, and it must not stop them."""
    from vllm.v1.sample.logits_processor import _load_logitsprocs_plugins
    from vllm.v1.worker.gpu.sample.logits_processor.loader import _load_v2_logitsprocs_plugins

    from kvpolicy_vllm.tap import RequestPolicies

    assert RequestPolicies in _load_logitsprocs_plugins()
    assert RequestPolicies in _load_v2_logitsprocs_plugins()
    assert not RequestPolicies.__abstractmethods__


def test_rows_follow_their_requests_through_the_batch():
    """Removals, additions, moves and swaps keep every row's policy with its request."""
    from vllm import SamplingParams
    from vllm.v1.sample.logits_processor.interface import BatchUpdate, MoveDirectionality

    from kvpolicy_vllm.allotment import PageShape
    from kvpolicy_vllm.engine import Engine
    from kvpolicy_vllm.tap import RequestPolicies

    page = PageShape(block_size=32, head_dim=32, element_bytes=4, group=2)
    tap = object.__new__(RequestPolicies)
    tap.engine = Engine(
        kvpolicy.parse("full"), allowed=("tova", "window"), has_layers=True, page=page
    )

    def asking(spec):
        return SamplingParams(extra_args={"kv_policy": spec} if spec else None)

    def update(removed=(), added=(), moved=()):
        rows = [(row, asking(spec), None, []) for row, spec in added]
        tap.update_state(BatchUpdate(batch_size=4, removed=removed, added=rows, moved=moved))
        return {row: str(policy) for row, policy in sorted(tap.engine.rows.items())}

    one, two = "window:budget=8", "tova:budget=9"
    assert update(added=[(0, one), (1, None), (2, two)]) == {0: one, 2: two}
    assert update(moved=[(0, 1, MoveDirectionality.SWAP)]) == {1: one, 2: two}
    assert update(removed=[1], moved=[(2, 0, MoveDirectionality.UNIDIRECTIONAL)]) == {0: two}
    assert update(removed=[0], added=[(0, None)]) == {}


@pytest.mark.slow
def test_separate_processes_find_a_custom_policy_by_its_import_path(path, model, monkeypatch):
    """With the engine in its own process, ledger, positions and import paths still work."""
    from pathlib import Path

    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    spec = "fixtures.policies.RowTimesKeyNorm:budget=48"
    llm = start_engine(path, spec)
    prompt = random_prompt(model, 90, seed=8)
    [output] = generate(llm, [prompt], NUM_TOKENS)
    assert_equals_reference(llm, output, reference(model, spec, prompt, NUM_TOKENS))
    assert kvpolicy_vllm.ledger(llm)["totals"]["requests"] == 1
    llm.llm_engine.engine_core.shutdown()


def test_backends_other_than_cpu_attention_are_refused(monkeypatch):
    """A backend that carries no policies refuses one instead of ignoring it."""
    from kvpolicy_vllm import dispatch

    config = SimpleNamespace(additional_config={"kv_policy": "window:budget=8"})
    monkeypatch.setattr(dispatch, "get_current_vllm_config_or_none", lambda: config)
    with pytest.raises(kvpolicy.UnsupportedError, match="CPU_MLA"):
        dispatch.__getattr__("CPU_MLA")
