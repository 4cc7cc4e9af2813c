"""``prefill=bulk`` and ``protect=prompt`` in a replay: as defined, and as hosts do."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kvpolicy_sim
from fixtures.pages import parse_page
from fixtures.replays import (
    assert_follows_oracle,
)
from fixtures.traces import Shape, header_of, random_layers, write_trace
from kvpolicy import UnsupportedError, parse
from kvpolicy.trace import Trace
from kvpolicy_sim import layerwise
from kvpolicy_sim.estimate import estimate
from kvpolicy_sim.page.html import document
from kvpolicy_sim.recommend import recommend
from strategies import SEEDS, prompt_specs

SHAPE = Shape(tokens=180)
PROMPT = 110

SPECS = (
    "window:budget=40,prefill=bulk",
    "sinks:budget=33,interval=7,prefill=bulk",
    "sinks:budget=33,interval=7,rope=reindex,prefill=bulk",
    "random:budget=24,interval=1,protect=(3:9),prefill=bulk",
    "tova:budget=40,prefill=bulk",
    "h2o:budget=40,interval=1,prefill=bulk",
    "h2o:budget=32,score=mean,decay=0.97,scope=layer,prefill=bulk",
    "h2o:budget=140,prefill=bulk",
    "window:budget=24,protect=prompt",
    "random:budget=24,interval=1,protect=prompt",
    "tova:budget=24,scope=head,interval=1,sinks=4,protect=prompt",
    "h2o:budget=24,protect=prompt",
    "h2o:budget=20,score=relative,recent=3,interval=30,protect=prompt",
)
BULK, KEPT = SPECS[5], SPECS[11]


@pytest.fixture(scope="module")
def layers():
    """Random tensors of two layers."""
    return random_layers(SHAPE)


@pytest.fixture(scope="module")
def path(layers, tmp_path_factory):
    """A trace of them, with a prompt that ends within a block."""
    path = tmp_path_factory.mktemp("traces") / "t.kvtrace"
    return write_trace(path, layers, header=header_of(SHAPE), prompt_len=PROMPT)


@pytest.fixture(scope="module")
def report(path):
    """Every spec replayed, with the offline optimum."""
    return kvpolicy_sim.replay(path, ["full", *SPECS], oracle=True)


@pytest.mark.parametrize("spec", [spec for spec in SPECS if "reindex" not in spec])
def test_replay_follows_the_oracle(spec, layers, report):
    """Sets after every token, retained mass and output error equal the oracle's."""
    for layer, x in layers.items():
        assert_follows_oracle(report, spec, layer, x, prompt=PROMPT)


@given(spec=prompt_specs(), seed=SEEDS, tokens=st.integers(2, 150), share=st.floats(0, 1))
@settings(max_examples=30)
def test_any_policy_and_prompt_follow_the_oracle(spec, seed, tokens, share, tmp_path_factory):
    """Wherever the prompt ends, within the budget or beyond, decisions are the oracle's."""
    prompt, shape = 1 + round(share * (tokens - 2)), Shape(tokens, (2,), 2, 2, 8)
    layers = random_layers(shape, seed)
    path = tmp_path_factory.mktemp("traces") / "t.kvtrace"
    write_trace(path, layers, header=header_of(shape), prompt_len=prompt)
    report = kvpolicy_sim.replay(path, [spec], details=False, threads=1)
    assert_follows_oracle(report, spec, 2, layers[2], prompt=prompt)


@pytest.mark.parametrize("level", ["layer-local", "open-loop"])
def test_compiled_walk_equals_the_core(path, level, monkeypatch):
    """The compiled walk and the core's look-ahead set prompts apart alike, at both levels."""
    compiled = kvpolicy_sim.replay(path, SPECS, level=level)
    monkeypatch.setattr(layerwise, "is_compiled", lambda _: False)
    core = kvpolicy_sim.replay(path, SPECS, level=level)
    for spec in SPECS:
        for place, outcome in compiled.result(spec).outcomes.items():
            other = core.result(spec).outcomes[place]
            np.testing.assert_array_equal(outcome.evicted_at, other.evicted_at, err_msg=spec)
            np.testing.assert_allclose(
                outcome.retained_mass, other.retained_mass, rtol=2e-5, atol=1e-7
            )


def test_only_steps_behind_what_is_kept_count(report):
    """Figures average steps behind a bulk prompt, or behind a kept one and the budget."""
    for spec, first in ((BULK, PROMPT), (KEPT, PROMPT + 24), (SPECS[7], 140)):
        result = report.result(spec)
        rows = [outcome.retained_mass[..., first:] for outcome in result.outcomes.values()]
        assert result.retained_mass["mean"] == pytest.approx(np.mean(rows), rel=1e-6)
        errors = [outcome.output_error[first:] for outcome in result.outcomes.values()]
        assert result.output_error["mean"] == pytest.approx(np.mean(errors), rel=1e-6)
        lost = [
            1 - result.outcomes[place].retained_mass[..., found.steps[found.steps > first] - 1]
            for place, found in result.details.items()
        ]
        assert sum(result.lost_mass_by_age) == pytest.approx(np.mean(lost), abs=1e-5)


def test_bytes_at_peak_are_those_of_the_prompt(report):
    """A bulk request's fullest moment is its prompt's end; a kept prompt lies beside the budget."""
    heads, cell = SHAPE.kv_heads * len(SHAPE.layers), 2 * SHAPE.head_dim * 4 + 8
    entries = {entry["policy"]: entry for entry in report.as_dict()["results"]}
    assert entries[BULK]["bytes_at_peak"] == PROMPT * heads * cell
    assert entries[BULK]["bytes_kept"] == 40 * heads * cell
    assert entries[KEPT]["bytes_at_peak"] == (PROMPT + 24 + 1) * heads * cell


@pytest.mark.parametrize("spec", SPECS)
def test_ledgers_follow_the_settled_law(spec, report):
    """Evicted tokens and evictions are the law's, the prompt's own eviction counted as one."""
    ledger, law = report.result(spec).ledger(0), parse(spec).occupancy.of_prompt(PROMPT)
    assert ledger.evicted == law.evicted(SHAPE.tokens)
    assert ledger.evictions == law.evictions(SHAPE.tokens) > 0


@pytest.mark.parametrize("spec", SPECS)
def test_no_policy_beats_the_optimum_of_its_law(spec, report):
    """The optimum sees the same law and keeps the same prompt, so nothing lies above it."""
    regret = report.result(spec).regret
    mass = np.mean(report.result(spec).head_mass)
    assert regret["mass"] == pytest.approx(mass, rel=1e-6)
    assert mass < regret["optimum_lower"] <= regret["optimum_upper"] + 1e-9
    assert regret["upper"] > 0


@pytest.mark.parametrize("prompt", [0, SHAPE.tokens])
@pytest.mark.parametrize("spec", [BULK, KEPT])
def test_traces_without_a_prompt_or_nothing_behind_it_are_refused(spec, prompt, layers, tmp_path):
    """Nothing is guessed: a prompt is missing, or nothing sees what is left of it."""
    path = tmp_path / "t.kvtrace"
    write_trace(path, layers, header=header_of(SHAPE), prompt_len=prompt)
    with pytest.raises(UnsupportedError, match=r"sequence 0 of .* --prompt-len N"):
        kvpolicy_sim.replay(path, ["window:budget=16", spec])
    assert kvpolicy_sim.replay(path, "window:budget=16").result("window:budget=16").regret is None


def test_each_sequence_has_a_prompt_of_its_own(layers, tmp_path):
    """Sequences with different prompts are each what they are alone, in one report."""
    specs, prompts = (BULK, KEPT, "tova:budget=24,prefill=bulk"), (20, 110, 150)
    path = tmp_path / "t.kvtrace"
    write_trace(path, *[layers] * 3, header=header_of(SHAPE), prompt_len=prompts)
    together = kvpolicy_sim.replay(path, specs)
    for sequence, prompt in enumerate(prompts):
        alone = kvpolicy_sim.replay(path, specs, sequences=[sequence])
        for spec in specs:
            law = parse(spec).occupancy.of_prompt(prompt)
            assert together.result(spec).ledger(sequence).evicted == law.evicted(SHAPE.tokens)
            for layer in SHAPE.layers:
                np.testing.assert_array_equal(
                    together.retained_positions(spec, layer, sequence),
                    alone.retained_positions(spec, layer),
                )


def test_estimates_cover_a_bulk_prompt(tmp_path):
    """The bound on memory, and the time, are those of a prompt that is held whole."""
    shape = Shape(tokens=2000, layers=(0,), kv_heads=16)
    path = tmp_path / "t.kvtrace"
    write_trace(path, random_layers(shape), header=header_of(shape), prompt_len=1800)
    spec = "h2o:budget=64,scope=layer"
    with Trace.open(path) as trace:
        stream, bulk, whole = (
            estimate(trace.header, trace.sequences, 1, [parse(spec)], 1)
            for spec in (spec, f"{spec},prefill=bulk", "h2o:budget=2000,scope=layer")
        )
        with_oracle = estimate(
            trace.header, trace.sequences, 1, [parse(f"{spec},prefill=bulk")], 1, oracle=True
        )
    buffers = 4 * 64 * 32 * 4  # bytes of a column of a block, over 32 query heads
    assert bulk.bytes - stream.bytes > buffers * 800
    assert bulk.bytes <= whole.bytes
    assert stream.seconds < bulk.seconds < whole.seconds
    assert with_oracle.bytes - bulk.bytes >= 8 * sum(range(1800, 2000, 4))


def test_budgets_of_bulk_policies_are_recommended(path):
    """A search over budgets replays each with its prompt, and finds one that keeps the target."""
    found = recommend(path, 0.8, ["h2o:prefill=bulk"])[0]
    assert found.retained_mass >= 0.8
    assert str(found.policy).endswith("prefill=bulk")
    less = kvpolicy_sim.replay(path, f"h2o:budget={found.budget // 2},prefill=bulk")
    (entry,) = less.as_dict()["results"]
    assert entry["retained_mass"]["mean"] < 0.8


def test_the_page_marks_where_prompts_end(report):
    """A page of these policies has every section, and says where evictions begin."""
    root = parse_page(document(report).html())
    assert "a bulk prompt ends" in root.text
    assert all(spec in root.text for spec in ("prefill=bulk", "protect=prompt"))
