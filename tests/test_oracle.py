"""The oracle's own sanity: identities that hold by definition, and transformers itself."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from fixtures.models import (
    LOGIT_MARGIN,
    certified_prompts,
    random_gemma,
    random_llama,
    random_mistral,
    random_prompt,
    random_qwen3,
)
from oracles.dense import (
    NEAR_TIE,
    Array,
    LayerOracle,
    parse,
    random_score,
    replay_layer,
    rotate,
    softmax,
    splitmix64,
    token_slots,
)
from oracles.llama import ModelOracle

THETA = 1e4
POLICIES = ("window", "sinks", "h2o", "tova", "random")
SCORED = ("h2o:budget=8", "h2o:budget=8,scope=layer", "tova:budget=8", "tova:budget=8,scope=head")
FAMILIES = (random_llama, random_qwen3, random_mistral, random_gemma)


def random_qkv(
    seed: int = 0, length: int = 40, num_query_heads: int = 4, num_kv_heads: int = 2
) -> tuple[Array, Array, Array]:
    """Draw q [H, T, D] and k, v [H_kv, T, D] with peaked logits."""
    draw = np.random.default_rng(seed).normal
    q = 2 * draw(size=(num_query_heads, length, 8))
    return q, draw(size=(num_kv_heads, length, 8)), draw(size=(num_kv_heads, length, 8))


def dense_attention(q: Array, k: Array, v: Array, is_visible: np.ndarray) -> Array:
    """Attend under a mask [T, T]; returns [H, T, D]."""
    k, v = (np.repeat(x, len(q) // len(x), axis=0) for x in (k, v))
    logits = q @ k.transpose(0, 2, 1) / np.sqrt(q.shape[-1])
    return softmax(np.where(is_visible, logits, -np.inf)) @ v


def causal(length: int) -> np.ndarray:
    """Return the mask [T, T] of full attention."""
    return np.tril(np.ones((length, length), bool))


@pytest.mark.parametrize("name", POLICIES)
def test_budget_of_the_whole_sequence_is_dense_attention(name: str) -> None:
    """Proves E1 T1: with nothing to evict every policy is causal softmax attention."""
    q, k, v = random_qkv()
    run = replay_layer(f"{name}:budget=40", q, k, v)
    np.testing.assert_allclose(run.outputs, dense_attention(q, k, v, causal(40)), atol=1e-12)
    assert run.retained[-1] == (tuple(range(40)),) * 2


def test_full_is_dense_attention_over_rotated_keys() -> None:
    """Proves that rotating by position inside equals rotating beforehand."""
    q, k, v = random_qkv()
    inside = replay_layer("full", q, k, v, theta=THETA)
    beforehand = replay_layer("full", rotate(q, range(40), THETA), rotate(k, range(40), THETA), v)
    np.testing.assert_allclose(inside.outputs, beforehand.outputs, atol=1e-12)


def test_window_is_dense_attention_under_a_band_mask() -> None:
    """Proves the window visible at each step, the evicted-after-attention slot included."""
    q, k, v = random_qkv()
    distance = np.subtract.outer(np.arange(40), np.arange(40))
    run = replay_layer("window:budget=8,interval=1", q, k, v)
    expected = dense_attention(q, k, v, causal(40) & (distance <= 8))
    np.testing.assert_allclose(run.outputs, expected, atol=1e-12)


def test_sinks_is_dense_attention_under_a_band_mask_with_sinks() -> None:
    """Proves StreamingLLM's visible set at original positions."""
    q, k, v = random_qkv()
    distance = np.subtract.outer(np.arange(40), np.arange(40))
    run = replay_layer("sinks:budget=8,sinks=3,interval=1", q, k, v)
    is_visible = causal(40) & ((distance <= 5) | (np.arange(40) < 3))
    np.testing.assert_allclose(run.outputs, dense_attention(q, k, v, is_visible), atol=1e-12)


@pytest.mark.parametrize("spec", [*SCORED, "random:budget=8", "h2o:budget=8,score=mean,decay=0.9"])
def test_outputs_are_dense_attention_under_the_mask_of_the_retained_sets(spec: str) -> None:
    """Proves that weights are renormalised over the visible set, each KV head its own."""
    q, k, v = random_qkv()
    run = replay_layer(f"{spec},interval=3", q, k, v)
    for head in range(2):
        is_visible = np.eye(40, dtype=bool)
        for n, retained in enumerate(run.retained[:-1], start=1):
            is_visible[n, list(retained[head])] = True
        group = slice(2 * head, 2 * head + 2)
        expected = dense_attention(q[group], k[head : head + 1], v[head : head + 1], is_visible)
        np.testing.assert_allclose(run.outputs[group], expected, atol=1e-12)


@given(seed=st.integers(0, 999), budget=st.integers(1, 12), interval=st.integers(1, 15))
@settings(max_examples=30)
def test_h2o_with_everything_recent_is_window(seed: int, budget: int, interval: int) -> None:
    """Proves E1 T3, first half: a recent share of 1.0 leaves attention no say."""
    q, k, v = random_qkv(seed)
    h2o = replay_layer(f"h2o:budget={budget},recent=1.0,interval={interval}", q, k, v)
    window = replay_layer(f"window:budget={budget},interval={interval}", q, k, v)
    assert h2o.retained == window.retained
    np.testing.assert_allclose(h2o.outputs, window.outputs, atol=1e-12)


@pytest.mark.parametrize("interval", [1, 4, 11])
def test_tova_on_uniform_attention_is_window(interval: int) -> None:
    """Proves E1 T3, second half, and that the lowest position loses a tie."""
    q, k, v = random_qkv()
    tova = replay_layer(f"tova:budget=8,interval={interval}", 0 * q, k, v)
    window = replay_layer(f"window:budget=8,interval={interval}", 0 * q, k, v)
    assert tova.retained == window.retained
    assert tova.min_margin == 0


@pytest.mark.parametrize("recent", [1, 4, 7])
def test_h2o_on_uniform_attention_is_sinks(recent: int) -> None:
    """Proves E1 T4: with equal weights the earliest slots have collected most."""
    q, k, v = random_qkv()
    h2o = replay_layer(f"h2o:budget=8,recent={recent},interval=1", 0 * q, k, v)
    sinks = replay_layer(f"sinks:budget=8,sinks={8 - recent},interval=1", 0 * q, k, v)
    assert h2o.retained == sinks.retained


@given(budget=st.integers(5, 20), interval=st.integers(1, 30), name=st.sampled_from(POLICIES))
@settings(max_examples=40)
def test_holds_what_the_occupancy_law_says(budget: int, interval: int, name: str) -> None:
    """Proves the law of design.md 3.2, written out by counting instead of by formula."""
    q, k, v = random_qkv(length=60)
    run = replay_layer(f"{name}:budget={budget},interval={interval}", q, k, v)
    held = 0
    for n, retained in enumerate(run.retained, start=1):
        held = budget if held + 1 == budget + interval else held + 1
        assert [len(kept) for kept in retained] == [held, held]
        assert token_slots(n, parse(f"{name}:budget={budget},interval={interval}")) == held
        assert all(list(kept) == sorted(set(kept)) for kept in retained)


@pytest.mark.parametrize("interval", [1, 3])
def test_reindex_is_dense_attention_on_the_compacted_sequence(interval: int) -> None:
    """Proves that rope=reindex sees its visible tokens as one gapless sequence."""
    q, k, v = random_qkv()
    run = replay_layer(
        f"sinks:budget=8,sinks=2,interval={interval},rope=reindex", q, k, v, theta=THETA
    )
    visible = [()] + [kept[0] for kept in run.retained[:-1]]
    for t, before in enumerate(visible):
        chosen = [*before, t]
        q_t, k_t = (rotate(x[:, chosen], range(len(chosen)), THETA) for x in (q, k))
        expected = dense_attention(q_t, k_t, v[:, chosen], causal(len(chosen)))[:, -1]
        np.testing.assert_allclose(run.outputs[:, t], expected, atol=1e-12)


def test_h2o_accumulates_the_column_sums_of_dense_attention() -> None:
    """Proves H2O's score before any eviction, pooled over the group by its mean."""
    q, k, v = random_qkv()
    oracle = LayerOracle(parse("h2o:budget=40"))
    for t in range(40):
        oracle.step(q[:, t], k[:, t], v[:, t])
    logits = q @ np.repeat(k, 2, axis=0).transpose(0, 2, 1) / np.sqrt(8)
    column_sums = softmax(np.where(causal(40), logits, -np.inf)).sum(axis=1)  # [H, T]
    np.testing.assert_allclose(
        oracle.accumulated, column_sums.reshape(2, 2, 40).mean(axis=1), atol=1e-12
    )


@pytest.mark.parametrize("score", ["mean", "relative"])
def test_h2o_averages_over_the_rows_a_slot_has_seen(score: str) -> None:
    """Proves that uniform attention leaves the averaged scores as computed by hand."""
    q, k, v = random_qkv(length=3)
    oracle = LayerOracle(parse(f"h2o:budget=8,score={score}"))
    for t in range(3):
        oracle.step(0 * q[:, t], k[:, t], v[:, t])
    by_hand = {"mean": [11 / 18, 5 / 12, 1 / 3], "relative": [1, 1, 1]}[score]
    np.testing.assert_allclose(oracle._scores()[0], by_hand, atol=1e-15)


def test_decay_shrinks_before_each_addition() -> None:
    """Proves the order: the newest row always counts in full."""
    q, k, v = random_qkv(length=3)
    oracle = LayerOracle(parse("h2o:budget=8,decay=0.5"))
    for t in range(3):
        oracle.step(0 * q[:, t], k[:, t], v[:, t])
    by_hand = [(1 / 2 + 1 / 2) / 2 + 1 / 3, 1 / 4 + 1 / 3, 1 / 3]
    np.testing.assert_allclose(oracle.accumulated[0], by_hand, atol=1e-15)


def test_random_hashes_like_the_published_splitmix64() -> None:
    """Proves the finaliser on its published first outputs, and that every field counts."""
    assert splitmix64(0) == 0xE220A8397B1DCDAF
    assert splitmix64(0x9E3779B97F4A7C15) == 0x6E789E6AA1B965F4
    fields = [(0, 0, 0, 0, 0)] + [tuple(int(i == j) for j in range(5)) for i in range(5)]
    assert len({random_score(*values) for values in fields}) == 6


@pytest.mark.parametrize("spec", SCORED)
def test_protected_positions_survive(spec: str) -> None:
    """Proves sinks, recent (current token included) and pinned spans in one."""
    run = replay_layer(f"{spec},sinks=2,recent=3,protect=(5:6,9:11)", *random_qkv())
    for decision in run.evictions:
        n = decision.num_tokens
        protected = {0, 1, n - 3, n - 2, n - 1} | {p for p in (5, 9, 10) if p < n}
        assert protected <= set(decision.kept)


@pytest.mark.parametrize("spec", SCORED)
def test_evicts_the_lowest_scores_and_reports_their_margin(spec: str) -> None:
    """Proves that no unprotected kept slot scores below an evicted one: margins are positive."""
    run = replay_layer(spec, *random_qkv())
    assert run.evictions
    assert all(0 < decision.margin <= 1 for decision in run.evictions)


def test_materialised_kv_heads_leave_layer_decisions_unchanged() -> None:
    """Proves E1 T15: scope=layer does not see how query heads share their keys."""
    q, k, v = random_qkv()
    shared = replay_layer("tova:budget=8", q, k, v)
    materialised = replay_layer(
        "tova:budget=8", q, np.repeat(k, 2, axis=0), np.repeat(v, 2, axis=0)
    )
    assert [kept[0] for kept in shared.retained] == [kept[0] for kept in materialised.retained]
    np.testing.assert_allclose(shared.outputs, materialised.outputs, atol=1e-12)


def test_follows_a_host_through_a_near_tie() -> None:
    """Proves that at equal scores the oracle continues from the host's choice and counts it."""
    q, k, v = random_qkv(length=4)
    oracle = LayerOracle(parse("tova:budget=3,interval=1"))
    for t in range(3):
        oracle.step(0 * q[:, t], k[:, t], v[:, t])
    oracle.step(0 * q[:, 3], k[:, 3], v[:, 3], host_retained=[(0, 1, 3)] * 2)
    assert oracle.retained == ((0, 1, 3),) * 2
    assert (oracle.near_ties, oracle.evictions[0].evicted) == (1, (2,))


@pytest.mark.parametrize(
    ("spec", "host", "why"),
    [
        ("tova:budget=3,interval=1", (1, 2, 3), "margin"),
        ("tova:budget=3,interval=1", (0, 1), "margin"),
        ("tova:budget=3,interval=1", (0, 1, 7), "margin"),
        ("window:budget=3,interval=1", (0, 2, 3), "margin"),
        ("window:budget=9", (0, 1, 2), "no eviction is due"),
    ],
)
def test_refuses_a_host_that_is_not_near_a_tie(spec: str, host: tuple[int, ...], why: str) -> None:
    """Proves that wrong scores, counts, positions and moments are all called out."""
    _, k, v = random_qkv(length=4)
    k[:, 0] = 1  # every query below prefers token 0
    oracle = LayerOracle(parse(spec))
    for t in range(3):
        oracle.step(np.ones((4, 8)), 0 * k[:, t] + (t == 0), v[:, t])
    with pytest.raises(AssertionError, match=why):
        oracle.step(np.ones((4, 8)), 0 * k[:, 3], v[:, 3], host_retained=[host] * 2)


@pytest.mark.parametrize(
    "text",
    [
        "lru:budget=4",
        "window",
        "window:budget=4,sinks=2",
        "sinks:budget=4",
        "h2o:budget=4,sinks=3",
        "tova:budget=4,group_pool=max",
        "h2o:budget=4,score=best",
        "h2o:budget=4,prefill=whole",
        "h2o:budget=4,prefill=bulk,protect=prompt",
        "bswa:block=2,segments=1,prefill=bulk",
    ],
)
def test_parse_refuses_what_the_definition_refuses(text: str) -> None:
    """Proves that a misspelt spec cannot silently test something else."""
    with pytest.raises(ValueError, match=text.split(":", maxsplit=1)[0]):
        parse(text)


def test_parse_tells_counts_from_shares() -> None:
    """Proves the reading of `recent` and the default interval."""
    assert parse("tova:budget=9,recent=1").recent == 1
    assert parse("tova:budget=9,recent=1.0").recent == 9
    assert parse("h2o:budget=33").recent == 16
    assert parse("h2o:budget=33").interval == 2
    assert parse("window:budget=9,protect=(0:2,5:6)").protect == ((0, 2), (5, 6))


class EverythingInFloat64(TorchFunctionMode):
    """Turns transformers' own casts to float32 (norms, RoPE, softmax) into float64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.float:
            return args[0].double()
        widen = {torch.float32: torch.float64}
        args = [widen.get(x, x) if isinstance(x, torch.dtype) else x for x in args]
        kwargs = {
            k: widen.get(x, x) if isinstance(x, torch.dtype) else x
            for k, x in (kwargs or {}).items()
        }
        return func(*args, **kwargs)


@torch.no_grad()
def transformers_logits(model: PreTrainedModel, ids: list[int]) -> Array:
    """Run transformers' own forward in float64 throughout; returns [T, vocab]."""
    model = copy.deepcopy(model).double()
    model.set_attn_implementation("eager")
    with EverythingInFloat64():
        rotary = model.model.rotary_emb
        rotary.inv_freq = rotary.compute_default_rope_parameters(model.config)[0]
        if hasattr(model.model.embed_tokens, "embed_scale"):
            model.model.embed_tokens.embed_scale = torch.tensor(
                model.config.hidden_size, dtype=torch.float64
            ).sqrt()
        return model(torch.tensor([ids])).logits[0].numpy()


@pytest.mark.parametrize("build", FAMILIES)
def test_full_cache_equals_transformers_in_float64(build: Any) -> None:
    """Proves the closed loop of every family against transformers' own forward."""
    model = build(3)
    ids = random_prompt(model, 40, seed=0)
    oracle = ModelOracle(model, "full")
    logits = np.stack([oracle.feed(token_id) for token_id in ids])
    np.testing.assert_allclose(logits, transformers_logits(model, ids), atol=1e-10)


def test_budget_of_the_whole_sequence_changes_no_logit() -> None:
    """Proves that a model under a policy with nothing to evict is the model."""
    model = random_llama(3)
    ids = random_prompt(model, 20, seed=0)
    full, tova = (ModelOracle(model, spec).generate(ids, 5) for spec in ("full", "tova:budget=24"))
    assert full == tova


def test_generate_is_greedy_and_feeds_all_but_the_last_token() -> None:
    """Proves the token bookkeeping that hosts are compared with."""
    model = random_qwen3(3)
    ids = random_prompt(model, 20, seed=0)
    run = ModelOracle(model, "window:budget=9,interval=1").generate(ids, 6)
    assert run.retained == [((*range(16, 25),),) * 2] * 2
    again = ModelOracle(model, "window:budget=9,interval=1")
    logits = [again.feed(token_id) for token_id in ids + run.tokens[:-1]]
    assert [int(row.argmax()) for row in logits[-6:]] == run.tokens


@pytest.mark.parametrize("spec", ["h2o:budget=16,interval=4", "tova:budget=16,interval=4"])
def test_certified_prompts_have_their_margins(spec: str) -> None:
    """Proves that a certified prompt has no near-tie, in evictions or in tokens."""
    model = random_mistral(3)
    (prompt,) = certified_prompts(model, [spec], [30], max_new_tokens=8)
    run = ModelOracle(model, spec).generate(prompt.ids, 8)
    assert run == prompt.run
    assert run.min_margin >= NEAR_TIE
    assert min(run.logit_margins) >= LOGIT_MARGIN
