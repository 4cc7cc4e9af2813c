"""The report: the contract's keys, what they mean, and one clear error for bad input."""

import json

import numpy as np
import pytest

import kvpolicy_sim
from fixtures.traces import Shape, header_of, random_layers, write_trace
from kvpolicy import PolicyError, TraceError, UnsupportedError
from kvpolicy_sim.statistics import bootstrap_mean

SHAPE = Shape(tokens=120)
SPECS = ("full", "window:budget=32,interval=1", "h2o:budget=32")


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A trace of three sequences with a marked span."""
    path = tmp_path_factory.mktemp("traces") / "t.kvtrace"
    sequences = [random_layers(SHAPE, seed) for seed in range(3)]
    return write_trace(path, *sequences, header=header_of(SHAPE), marks=(("needle", 10, 20),))


@pytest.fixture(scope="module")
def report(path):
    """The trace replayed."""
    return kvpolicy_sim.replay(path, SPECS)


def test_json_has_the_keys_of_the_contract(report):
    """as_dict survives JSON and has every key that outside checks rely on."""
    result = json.loads(json.dumps(report.as_dict(), allow_nan=False))
    assert result["schema"] == 1
    assert result["semantics"] == 1
    assert set(result["trace"]) >= {"tokens", "layers", "kv_heads", "q_heads", "head_dim", "model"}
    assert [entry["policy"] for entry in result["results"]] == list(SPECS)
    for entry in result["results"]:
        assert set(entry) >= {
            *("policy", "budget", "level", "retention_ratio", "retained_mass", "output_error"),
            *("oracle_gap", "evicted", "merged", "bytes_kept", "seconds", "steps_per_second"),
        }
        assert set(entry["retained_mass"]) >= {"mean", "p5", "min"}
        assert set(entry["output_error"]) >= {"mean", "p95"}
        assert entry["level"] == "layer-local"


def test_full_cache_loses_nothing(report):
    """The full cache is really replayed, and its mass and error are those of no loss."""
    full = report.as_dict()["results"][0]
    assert full["retention_ratio"] == 1
    assert full["evicted"] == 0
    assert full["retained_mass"]["min"] == pytest.approx(1, abs=1e-5)
    assert full["output_error"]["p95"] < 1e-5
    assert full["recall"] == {"16": 1.0, "64": 1.0}


def test_only_steps_beyond_the_budget_count(report):
    """retained_mass averages the steps n > budget, over sequences, layers and query heads."""
    for spec in SPECS[1:]:
        result = report.result(spec)
        rows = [outcome.retained_mass[..., 32:] for outcome in result.outcomes.values()]
        assert result.retained_mass["mean"] == pytest.approx(np.mean(rows), rel=1e-6)
        assert result.retained_mass["min"] == np.min(rows)
        low, high = result.retained_mass["interval"]
        assert low <= result.retained_mass["mean"] <= high


def test_a_budget_that_holds_everything_counts_all_steps(path):
    """A policy that never had to evict retains everything at every step."""
    report = kvpolicy_sim.replay(path, ["h2o:budget=500"])
    assert report.result("h2o:budget=500").retained_mass["mean"] == pytest.approx(1, abs=1e-6)


def test_sequences_within_the_budget_do_not_flatter(tmp_path):
    """Where one sequence goes beyond the budget, another that does not has no step that counts."""
    spec, sequences = "window:budget=64", [random_layers(Shape(tokens=n)) for n in (100, 37)]
    path = write_trace(tmp_path / "t.kvtrace", *sequences, header=header_of(SHAPE))
    both, alone = (kvpolicy_sim.replay(path, [spec], sequences=s).result(spec) for s in (None, [0]))
    assert both.retained_mass == alone.retained_mass
    assert both.head_mass.tolist() == alone.head_mass.tolist()
    assert both.output_error == alone.output_error


def test_bytes_cover_keys_values_and_state(report):
    """bytes_kept is K and V of the slots held, and 8 bytes of state per evictable slot."""
    full, window, _ = report.as_dict()["results"]
    heads, cell = SHAPE.kv_heads * len(SHAPE.layers), 2 * SHAPE.head_dim * 4
    assert full["bytes_kept"] == SHAPE.tokens * heads * cell
    assert window["bytes_kept"] == 32 * heads * (cell + 8)


def test_retained_positions_after_any_token(report):
    """Positions are ascending, per KV head, and those of the window by definition."""
    spec = SPECS[1]
    assert report.retained_positions(spec, 1).tolist() == [list(range(88, 120))] * 2
    assert report.retained_positions(spec, 0, 2, tokens=50).tolist() == [list(range(18, 50))] * 2
    assert report.retained_positions("full", 0).shape == (2, 120)


def test_lifetimes_are_those_of_the_window_by_definition(report):
    """A FIFO window holds every token budget + 1 steps; the full cache evicts none."""
    full, window, _ = report.as_dict()["results"]
    assert full["lifetime"] is None
    assert window["lifetime"] == {"p5": 33, "median": 33, "p95": 33}


def test_marked_spans_are_followed(report):
    """A mark's retained share is 1 for the full cache and 0 for a window that has left it."""
    full, window, _ = report.as_dict()["results"]
    assert full["marks"][0]["name"] == "needle"
    assert full["marks"][0]["kept"] == 1
    assert full["marks"][0]["retained_mass"] == pytest.approx(1)
    assert window["marks"][0]["kept"] == 0
    assert 0 < window["marks"][0]["retained_mass"] < 1


def test_lost_mass_by_age_adds_up_to_what_was_lost(report):
    """The histogram's sum is one minus the retained mass, on the sampled steps."""
    for spec in SPECS:
        result = report.result(spec)
        lost = 1 - np.mean(
            [
                outcome.retained_mass[..., result.details[place].steps - 1][
                    ..., result.details[place].steps > (result.budget or 0)
                ].mean()
                for place, outcome in result.outcomes.items()
            ]
        )
        assert sum(result.lost_mass_by_age) == pytest.approx(lost, abs=1e-5)


def test_recall_and_ages_equal_a_plain_count(path, report):
    """Recall and lost ages equal a count over the full attention rows, token by token."""
    spec, x = SPECS[2], random_layers(SHAPE)[0]
    details = report.result(spec).details[0, 0]
    logits = (x.q.double() @ x.k.double().repeat_interleave(2, 0).mT) / SHAPE.head_dim**0.5
    future = np.triu(np.ones((SHAPE.tokens, SHAPE.tokens), bool), 1)
    weights = logits.masked_fill(torch_bool(future), -np.inf).softmax(-1)
    weights = weights.view(2, 2, SHAPE.tokens, SHAPE.tokens).mean(1).numpy()
    for index, n in enumerate(details.steps.tolist()):
        before = report.retained_positions(spec, 0, tokens=n - 1).tolist() if n > 1 else [[], []]
        for head in range(2):
            row, seen = weights[head, n - 1], {*before[head], n - 1}
            top = set(np.argsort(-row)[:16].tolist())
            if n >= 16:
                assert details.recall[head, index, 0] == pytest.approx(len(top & seen) / 16)
            ages = np.zeros(details.lost_by_age.shape[-1])
            for s in set(range(n)) - seen:
                ages[(n - 1 - s).bit_length() - 1] += row[s]
            np.testing.assert_allclose(details.lost_by_age[head, index], ages, atol=1e-6)


def torch_bool(x):
    """A numpy mask as a torch tensor."""
    import torch

    return torch.from_numpy(x)


@pytest.mark.parametrize(
    ("policies", "options", "error", "words"),
    [
        ([], {}, PolicyError, "nothing to replay"),
        (["full"], {"level": "closed-loop"}, PolicyError, "layer-local, open-loop"),
        (["full"], {"layers": [7]}, PolicyError, r"layers \[7\] are not in the trace"),
        (["full"], {"sequences": [3]}, PolicyError, r"sequences \[3\] are not in the trace"),
        (["window:budget=8,prefill=bulk"], {}, UnsupportedError, "120 tokens, all of them prompt"),
        (["windw:budget=8"], {}, PolicyError, "window"),
    ],
)
def test_bad_requests_are_refused(path, policies, options, error, words):
    """What cannot be replayed is refused before anything is read, naming what to change."""
    with pytest.raises(error, match=words):
        kvpolicy_sim.replay(path, policies, **options)


@pytest.mark.parametrize(
    ("changes", "spec", "words"),
    [
        ({"query_stride": 2}, "h2o:budget=16", "query_stride=1"),
        ({"query_stride": 2}, "sinks:budget=16,rope=reindex", "query_stride=1"),
        ({"kv_heads": (0,)}, "tova:budget=16", "capture all heads"),
        ({"rope": None}, "sinks:budget=16,rope=reindex", "plain RoPE"),
    ],
)
def test_policies_that_a_trace_cannot_serve_are_refused(tmp_path, changes, spec, words):
    """Sampled traces serve the policies whose decisions they determine, and no others."""
    layers = random_layers(SHAPE)
    if "kv_heads" in changes:
        layers = {i: type(x)(x.q[:2], x.k[:1], x.v[:1]) for i, x in layers.items()}
    path = write_trace(tmp_path / "t.kvtrace", layers, header=header_of(SHAPE, **changes))
    with pytest.raises(UnsupportedError, match=words):
        kvpolicy_sim.replay(path, [spec])


def test_the_oracle_needs_every_query(tmp_path):
    """A trace of sampled queries has no attention to take the optimum of."""
    header = header_of(SHAPE, query_stride=2)
    path = write_trace(tmp_path / "t.kvtrace", random_layers(SHAPE), header=header)
    with pytest.raises(UnsupportedError, match="capture with query_stride=1"):
        kvpolicy_sim.replay(path, ["window:budget=16"], oracle=True)


def test_numbers_that_are_not_finite_are_refused(tmp_path):
    """A trace with a NaN is named as the fault, rather than giving NaN results."""
    layers = random_layers(SHAPE)
    layers[1].k[0, 3, 2] = float("nan")
    path = write_trace(tmp_path / "t.kvtrace", layers, header=header_of(SHAPE))
    with pytest.raises(TraceError, match="k of layer 1, sequence 0 has values that are not finite"):
        kvpolicy_sim.replay(path, ["window:budget=16"])


def test_numbers_too_large_for_attention_are_refused(tmp_path):
    """Finite queries and keys whose products are not give one error, never NaN figures."""
    layers = {i: type(x)(x.q * 1e30, x.k * 1e30, x.v) for i, x in random_layers(SHAPE).items()}
    path = write_trace(tmp_path / "t.kvtrace", layers, header=header_of(SHAPE))
    with pytest.raises(TraceError, match="attention of layer 0, sequence 0"):
        kvpolicy_sim.replay(path, ["h2o:budget=16"], threads=1)


def test_sampled_rows_may_all_lie_within_the_budget(tmp_path):
    """Where no recorded row lies beyond the budget, all rows count, in every figure."""
    header = header_of(SHAPE, query_stride=16)
    path = write_trace(tmp_path / "t.kvtrace", random_layers(SHAPE), header=header)
    result = kvpolicy_sim.replay(path, "window:budget=118").result("window:budget=118")
    assert result.retained_mass["mean"] == pytest.approx(1, abs=1e-6)
    np.testing.assert_allclose(result.head_mass, 1, atol=1e-6)


def test_a_report_names_itself_briefly(report):
    """Typing a report's name shows a line, not its arrays."""
    assert len(repr(report)) < 200
    assert "h2o:budget=32" in repr(report)


def test_unknown_result_is_named(report):
    """Asking for a policy that was not replayed lists those that were."""
    with pytest.raises(PolicyError, match=r"tova:budget=8 was not replayed; .*h2o:budget=32"):
        report.retained_positions("tova:budget=8", 0)


def test_bootstrap_interval_covers_the_mean():
    """The interval brackets the mean, widens with spread, and needs two sequences."""
    assert bootstrap_mean([0.5]) is None
    low, high = bootstrap_mean([0.4, 0.5, 0.6])
    assert 0.4 <= low < 0.5 < high <= 0.6
