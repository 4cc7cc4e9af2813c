"""The memories of the oracle: identities that hold by definition, and transformers itself."""

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch

from fixtures.models import (
    certified_prompts,
    random_gemma,
    random_llama,
    random_mistral,
    random_prompt,
    random_qwen3,
)
from oracles.arithmetic import NEAR_TIE, Array, log_sum_exp, rotate, softmax
from oracles.compressive import Compressive
from oracles.dense import LayerOracle, parse, replay_layer
from oracles.feedback import FeedbackRows, first_rows
from oracles.llama import ModelOracle, read_decoder, to_float64
from oracles.memory import Centroids, Infini

THETA = 1e4
FAMILIES = (random_llama, random_qwen3, random_mistral, random_gemma)
SPECS = [
    "compressive:budget=12,interval=6",
    "compressive:budget=12,interval=6,fn=most-used",
    "compressive:budget=12,interval=6,fn=conv",
    "compressive:budget=12,interval=6,fn=attention,sinks=1",
    "centroid:budget=12,slots=4",
    "fam:block=4,segments=1,slots=3",
    "infini:segment=6,gate=0.4",
    "infini:segment=6,gate=calibrated,update=delta",
]


def random_qkv(seed: int = 0, length: int = 40) -> tuple[Array, Array, Array]:
    """Draw q [4, T, 8] and k, v [2, T, 8] with peaked logits."""
    draw = np.random.default_rng(seed).normal
    shape = (2, length, 8)
    return 2 * draw(size=(4, length, 8)), draw(size=shape), draw(size=shape)


def fed(spec: str, length: int = 40, **settings: Any) -> LayerOracle:
    """Feed a random text to one layer."""
    oracle = LayerOracle(parse(spec), theta=THETA, **settings)
    q, k, v = random_qkv(length=length)
    for t in range(length):
        oracle.step(q[:, t], k[:, t], v[:, t])
    return oracle


@pytest.mark.parametrize("spec", SPECS)
def test_rotating_inside_equals_rotating_beforehand(spec: str) -> None:
    """Proves that memories find the same raw vectors, given or turned back."""
    q, k, v = random_qkv()
    inside = replay_layer(spec, q, k, v, theta=THETA)
    q, k = (rotate(x, range(40), THETA) for x in (q, k))
    beforehand = replay_layer(spec, q, k, v, rotated_by=THETA)
    np.testing.assert_allclose(inside.outputs, beforehand.outputs, atol=1e-10)
    assert inside.retained == beforehand.retained


def test_a_memory_needs_to_know_the_rotation() -> None:
    """Proves that rotated keys cannot be taken for raw ones by mistake."""
    for settings in ({}, {"theta": THETA, "rotated_by": THETA}):
        with pytest.raises(ValueError, match="either theta or rotated_by"):
            LayerOracle(parse(SPECS[0]), **settings)


@pytest.mark.parametrize("spec", SPECS)
def test_attention_is_dense_until_the_first_eviction(spec: str) -> None:
    """Proves that an empty memory adds nothing."""
    law = parse(spec)
    assert law.budget is not None
    inputs = random_qkv(length=law.budget - law.state_slots + law.interval)
    dense = replay_layer("full", *inputs, theta=THETA)
    run = replay_layer(spec, *inputs, theta=THETA)
    np.testing.assert_allclose(run.outputs, dense.outputs, atol=1e-12)


def test_parse_derives_tokens_slots_and_intervals() -> None:
    """Proves the reading of budgets, shares, blocks and rounded intervals."""
    compressive = parse("compressive:budget=100,interval=7")
    assert (compressive.budget, compressive.state_slots, compressive.interval) == (100, 50, 9)
    assert parse("compressive:budget=9,memory=4").state_slots == 4
    assert parse("centroid:budget=99").state_slots == 24
    fam = parse("fam:block=4,segments=2,sinks=1")
    assert (fam.budget, fam.state_slots, fam.interval) == (73, 64, 4)
    assert parse("fam:block=4,budget=73,sinks=1") == fam
    assert parse("bswa:block=4,segments=2,sinks=1").budget == 9
    infini = parse("infini:segment=6,gate=1")
    assert (infini.budget, infini.interval, infini.gate) == (0, 6, 1)
    assert not parse("infini:segment=6,gate=0.0").has_memory


@pytest.mark.parametrize(
    "text",
    [
        "bswa:block=4,segments=1,budget=4",
        "compressive:budget=9,protect=(0:1)",
        "compressive:budget=9,memory=9",
        "compressive:budget=9,fn=median",
        "centroid:budget=9,slots=8,sinks=2",
        "fam:block=4,segments=1,budget=9",
        "infini:segment=4,interval=4",
    ],
)
def test_parse_refuses_what_the_definition_refuses(text: str) -> None:
    """Proves that a misspelt spec cannot silently test something else."""
    with pytest.raises(ValueError, match=text.split(":", maxsplit=1)[0]):
        parse(text)


# --- margins ----------------------------------------------------------------------------------


def test_equal_centroids_are_a_tie() -> None:
    """Proves that the gap between the two best slots is reported, and the lowest wins."""
    q, k, v = random_qkv(length=5)
    k[:] = k[:, :1]
    oracle = LayerOracle(parse("centroid:budget=4,slots=2,interval=1"), theta=THETA)
    for t in range(5):
        oracle.step(q[:, t], k[:, t], v[:, t])
    assert oracle.min_margin == 0
    assert isinstance(oracle.memory, Centroids)
    assert [slot.mass for slot in oracle.memory.heads[0]] == [2, 1]


def test_close_use_is_a_tie() -> None:
    """Proves that most-used reports its gap: equal attention over equally many rows has none."""
    q, k, v = random_qkv(length=6)
    oracle = LayerOracle(
        parse("compressive:budget=4,memory=2,rate=2,interval=4,fn=most-used"), theta=THETA
    )
    for t in range(6):
        oracle.step(0 * q[:, t], k[:, t], v[:, t])
    assert isinstance(oracle.memory, Compressive)
    average = [np.mean([1 / n for n in range(p + 1, 7)]) for p in range(4)]  # rows that saw p
    assert oracle.min_margin == pytest.approx((average[1] - average[2]) / average[1])


def test_similarity_close_to_its_threshold_is_a_tie() -> None:
    """Proves that the distance to min_similarity is reported, and that equal keys have cosine 1."""
    q, k, v = random_qkv(length=12)
    k[:] = k[:, :1]
    run = replay_layer("compressive:budget=12,min_similarity=0.8", q, k, v, theta=THETA)
    assert run.min_margin == pytest.approx(0.2)


def test_memories_can_be_certified() -> None:
    """Proves that prompts without any near-tie are found for memories of whole models."""
    model = random_mistral(3)
    specs = ["centroid:budget=16,slots=4,interval=4", "compressive:budget=16,fn=most-used"]
    for certified in certified_prompts(model, specs, [30], max_new_tokens=8):
        assert NEAR_TIE <= certified.run.min_margin < math.inf


# --- what memories hold -----------------------------------------------------------------------


def test_attention_preserving_slots_answer_the_reference_query() -> None:
    """Proves exactness for one query head: the group's log-mass and its mean value."""
    draw = np.random.default_rng(0).normal
    oracle = LayerOracle(parse("compressive:budget=6,interval=3,fn=attention"), theta=THETA)
    inputs = [draw(size=(3, 1, 8)) for _ in range(6)]
    for q, k, v in inputs:
        oracle.step(q, k, v)
    assert oracle.memory is not None
    (slot,) = oracle.memory.heads[0]
    q = rotate(inputs[-1][0][0], 5, THETA)
    keys = np.stack([rotate(k[0], position, THETA) for position, (_, k, _) in enumerate(inputs)])
    logits = keys[:3] @ q / math.sqrt(8)
    assert q @ slot.key / math.sqrt(8) + slot.bias == pytest.approx(log_sum_exp(logits))
    assert 0 <= slot.bias <= math.log(3)
    values = np.stack([v[0] for _, _, v in inputs[:3]])
    np.testing.assert_allclose(slot.value, softmax(logits) @ values, atol=1e-12)


def test_calibration_reproduces_the_segments_it_saw() -> None:
    """Proves that one sample fixes the level: a lone segment has its true log-mass."""
    oracle = fed("infini:segment=6,gate=calibrated", length=6)
    assert isinstance(oracle.memory, Infini)
    ((x, y),) = oracle.memory.samples[0]
    np.testing.assert_allclose(oracle.memory._log_mass(0, x), y)
    np.testing.assert_allclose(oracle.memory._log_mass(0, x + 1), y + 1)


# --- rows through the model's layers ----------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("build", FAMILIES)
def test_first_rows_are_transformers_hidden_states(build: Any) -> None:
    """Proves F_0 of every layer: transformers' own forward over the rows, nothing masked."""
    model, spec = build(3), parse("fam:block=4,segments=1,slots=5,level=model")
    rows = [layer.attention.given.rows for layer in ModelOracle(model, spec).layers]
    body = copy.deepcopy(model.model).eval()
    start = torch.from_numpy(rows[0]).float()[None]
    seen = body(
        inputs_embeds=start,
        position_ids=torch.arange(-5, 0)[None],
        attention_mask=torch.zeros(1, 1, 5, 5),
        output_hidden_states=True,
        use_cache=False,
    ).hidden_states
    for ours, theirs in zip(rows, seen[:-1], strict=True):
        assert ours is not None
        np.testing.assert_allclose(ours, theirs[0].numpy(), rtol=1e-4, atol=1e-4)
    embedding = to_float64(body.embed_tokens.weight).mean(axis=0)
    scale = math.sqrt(model.config.hidden_size) if build is random_gemma else 1.0
    np.testing.assert_allclose(rows[0], np.tile(embedding * scale, (5, 1)))


def test_rows_that_nothing_can_see_change_nothing() -> None:
    """Proves fam:slots=0 == bswa at both levels, whole model."""
    model = random_qwen3(3)
    ids = random_prompt(model, 20, seed=0)
    bswa, *others = (
        ModelOracle(model, spec).generate(ids, 4)
        for spec in (
            "bswa:block=4,segments=1",
            "fam:block=4,segments=1,slots=0",
            "fam:block=4,segments=1,slots=0,level=model",
        )
    )
    assert all(run == bswa for run in others)


def attend(q: Array, k: Array, v: Array, is_visible: np.ndarray) -> Array:
    """Attend q [X, H, D] over k, v [Y, H_kv, D] under a mask [X, Y]; [X, H, D]."""
    k, v = (np.repeat(x, q.shape[1] // x.shape[1], axis=1) for x in (k, v))
    logits = np.einsum("xhd,yhd->hxy", q, k) / math.sqrt(q.shape[-1])
    return np.einsum("hxy,yhd->xhd", softmax(np.where(is_visible, logits, -np.inf)), v)


def turned(x: Array, first: int) -> Array:
    """Rotate [X, heads, D] at consecutive positions."""
    return rotate(x, np.arange(first, first + len(x))[:, None], THETA)


@pytest.mark.parametrize("build", [random_mistral, random_gemma])
@pytest.mark.parametrize("query", ["current", "previous"])
def test_algorithm_2_block_by_block_equals_token_by_token(build: Any, query: str) -> None:
    """Proves TransformerFAM's own formulation: blocks and rows jointly through each layer.

    In a block, tokens see the block before, the rows and themselves causally; rows see rows and
    the block, and are fed back to the same layer.
    """
    model, block, num_rows = build(3), 4, 3
    spec = f"fam:block={block},segments=1,slots={num_rows},level=model,query={query}"
    oracle = ModelOracle(model, spec)
    ids = random_prompt(model, 5 * block, seed=0)
    token_by_token = np.stack([oracle.feed(token_id) for token_id in ids])

    layers = [read_decoder(module, model.config) for module in model.model.layers]
    mean = oracle.embeddings.mean(axis=0) * oracle.embedding_scale
    rows = first_rows(layers, mean, parse(spec), THETA)
    older: list[tuple[Array, Array] | None] = [None] * len(layers)
    logits = []
    for begin in range(0, len(ids), block):
        x = oracle.embeddings[ids[begin : begin + block]] * oracle.embedding_scale
        stand = begin - num_rows  # the last rows' worth of the block before, or -F..-1
        for index, layer in enumerate(layers):
            q, k, v = layer.project(x)
            q, k = turned(q, begin), turned(k, begin)
            asked, row_keys, row_values = layer.project(rows[index])
            row_keys = turned(row_keys, stand)
            old = older[index] or (k[:0], v[:0])
            parts = [(*old, True), (row_keys, row_values, True), (k, v, False)]
            keys, values = (np.concatenate([part[i] for part in parts]) for i in (0, 1))
            is_visible = np.concatenate(
                [np.ones((block, len(keys) - block), bool), np.tri(block, dtype=bool)], axis=1
            )
            x = layer.finish(attend(q, keys, values, is_visible), x)
            asked = turned(asked, stand + (block if query == "current" else 0))
            keys, values = np.concatenate([row_keys, k]), np.concatenate([row_values, v])
            everything = np.ones((num_rows, len(keys)), bool)
            residual = rows[index] if begin else 0.0
            rows[index] = layer.finish(attend(asked, keys, values, everything), residual)
            older[index] = (k, v)
        logits.append(oracle.lm_head(oracle.norm(x)))
    np.testing.assert_allclose(token_by_token, np.concatenate(logits), atol=1e-9)
    assert all(isinstance(layer.attention.memory, FeedbackRows) for layer in oracle.layers)
