"""Figures, comparisons, JSON and CSV of a small evaluation, worked out by hand."""

import csv
import io
import json
import math

import pytest

from fixtures.evaluations import Table, ones
from kvpolicy import parse
from kvpolicy.evaluation.measured import Measured
from kvpolicy.evaluation.result import Evaluation, question_of
from kvpolicy.evaluation.run import Run, evaluate
from kvpolicy.evaluation.tasks.passkey import Passkey
from kvpolicy.evaluation.tasks.ppl import Perplexity
from kvpolicy.evaluation.tasks.reuse import Reuse
from kvpolicy.series import series_of

CHANCES = {
    "full": [0.9, 0.8, 0.7, 0.95, 0.6],
    "sinks:budget=8": [0.6, 0.4, 0.7, 0.8, 0.3],
    "window:budget=8": [0.1, 0.2, 0.6, 0.3, 0.55],
}
PERPLEXITY = Perplexity()
SAMPLES = {5: [ones(0), ones(1)], 9: [ones(2, size=4)]}


def found(task=PERPLEXITY):
    """All three policies on three samples."""
    policies = [parse(spec) for spec in CHANCES]
    return Evaluation(task, SAMPLES, evaluate(Table(CHANCES), SAMPLES, policies))


def chances_of(spec, number, size):
    """The probabilities of the right tokens of a sample, in order."""
    return [CHANCES[spec][(i + number) % 5] for i in range(2 * size)]


def test_perplexity_is_pooled_over_tokens():
    """The exponential of the mean over all predicted tokens, in all samples."""
    evaluation = found()
    for run, spec in zip(evaluation.runs, CHANCES, strict=True):
        every = [p for n, size in ((0, 2), (1, 2), (2, 4)) for p in chances_of(spec, n, size)]
        expected = math.exp(-sum(map(math.log, every)) / len(every))
        assert evaluation.value(run) == pytest.approx(expected, rel=1e-5)
    assert evaluation.num_predicted == 16
    assert evaluation.num_processed == 5 + 5 + 9


def test_exact_answers_need_every_token():
    """A target counts when all its tokens are the likeliest ones; a share of tokens is another."""
    exact, tokens = found(Passkey()), found(Reuse())
    window = 2
    every = [chances_of("window:budget=8", n, size) for n, size in ((0, 2), (1, 2), (2, 4))]
    targets = [half for each in every for half in (each[: len(each) // 2], each[len(each) // 2 :])]
    right = [[p > 0.5 for p in target] for target in targets]
    expected = sum(all(target) for target in right) / len(right)
    assert exact.value(exact.runs[window]) == pytest.approx(expected)
    expected = sum(map(sum, right)) / sum(map(len, right))
    assert tokens.value(tokens.runs[window]) == pytest.approx(expected)


def test_places_hold_the_targets_of_one_group_at_one_length():
    """A curve's point is worked out from its own targets only."""
    evaluation = found(Reuse())
    assert evaluation.places == [(5, (0, 1)), (5, (1, 2)), (9, (0, 1)), (9, (1, 2))]
    sinks = evaluation.runs[1]
    first = [p > 0.5 for n in (0, 1) for p in chances_of("sinks:budget=8", n, 2)[:2]]
    assert evaluation.value(sinks, (5, (0, 1))) == pytest.approx(sum(first) / 4)
    assert evaluation.interval(sinks, (9, (0, 1))) is None  # of one sample


def test_policies_are_compared_with_full_and_with_sinks_of_their_budget():
    """Ratios of perplexities and differences of shares; the interval holds the value."""
    evaluation = found()
    full, sinks, window = evaluation.runs
    assert evaluation.sinks_beside(window) is sinks
    assert evaluation.sinks_beside(sinks) is None
    assert evaluation.sinks_beside(full) is None
    beside = evaluation.compare(window, sinks)
    assert beside.value == pytest.approx(evaluation.value(window) / evaluation.value(sinks))
    assert beside.interval[0] < beside.value < beside.interval[1]
    low, high = evaluation.beside(window, full)
    assert low < evaluation.value(window) < high
    shares = found(Passkey())
    difference = shares.compare(shares.runs[2], shares.runs[0])
    assert difference.value == shares.value(shares.runs[2]) - shares.value(shares.runs[0]) < 0


def test_sinks_stand_beside_policies_that_treat_prompts_alike():
    """A policy that evicts behind the prompt is not compared with sinks that stream."""
    specs = ("full", "sinks:budget=8", "sinks:budget=8,prefill=bulk", "h2o:budget=8,prefill=bulk")
    runs = [Run(parse(spec), []) for spec in specs]
    evaluation = Evaluation(Perplexity(), SAMPLES, runs)
    assert evaluation.sinks_beside(runs[3]) is runs[2]


@pytest.mark.parametrize(
    ("diverged", "median"),
    [([3, 1, 2], 2), ([4, None, None], None), ([1, 5, None], 5), ([2, None], 2)],
)
def test_the_first_divergence_is_a_median(diverged, median):
    """Samples that never differ count as differing after all the others."""
    entries = [Measured(nll=[], right=[], kl=[], agreed=[], diverged=number) for number in diverged]
    run = Run(parse("full"), entries)
    assert Evaluation(Perplexity(), {}, [run]).first_divergence(run) == median


def test_json_has_every_task_and_valid_numbers():
    """What other tasks measure is null; the full cache is at no distance from itself."""
    evaluation = found(Passkey())
    written = [evaluation.as_dict(run) for run in evaluation.runs]
    json.dumps(written, allow_nan=False)
    full, sinks, window = written
    for entry in written:
        assert [entry[name] for name in ("ppl", "recall", "needle", "reuse", "repeat")] == [
            None
        ] * 5
        assert entry["tokens"] == 16
    assert (full["logit_kl"], full["top1_agreement"], full["never_diverged"]) == (0.0, 1.0, 1.0)
    assert full["against_full"]["interval"] == (0.0, 0.0)
    assert sinks["against_sinks"] is None
    assert window["against_sinks"]["policy"] == "sinks:budget=8"
    assert [point["depth"] for point in window["curve"]] == [[0, 1], [1, 2]] * 2
    assert "ppl_ratio" not in window
    assert found().as_dict(evaluation.runs[2])["ppl_ratio"][0] > 1


def test_csv_has_a_line_per_policy_and_place():
    """Read back, its figures are those of the evaluation."""
    evaluation = found()
    lines = list(csv.DictReader(io.StringIO(evaluation.as_csv())))
    assert len(lines) == 3 * (1 + 4)
    window = evaluation.runs[2]
    assert lines[2]["policy"] == "window:budget=8"
    assert lines[2]["series"] == "window"
    assert float(lines[2]["value"]) == evaluation.value(window)
    last = lines[-1]
    assert (last["context"], last["position_from"], last["position_to"]) == ("9", "1", "2")
    assert float(last["logit_kl"]) == evaluation.kl(window, (9, (1, 2)))


@pytest.mark.parametrize(
    ("spec", "series"),
    [
        ("window:budget=8", "window"),
        ("h2o:budget=64,scope=layer,interval=1", "h2o:interval=1,scope=layer"),
        ("fam:block=8,slots=8,budget=32", "fam:block=8,slots=8"),
        ("full", "full"),
    ],
)
def test_series_are_specs_without_budgets(spec, series):
    """Points at several budgets have one name."""
    assert series_of(parse(spec)) == series


@pytest.mark.parametrize(
    ("spec", "seen"),
    [
        ("full", "seen"),
        ("h2o:budget=8", "unseen"),
        ("h2o:budget=8,prefill=bulk", "seen"),
        ("h2o:budget=8,protect=prompt", "seen"),
        ("snapkv:budget=8,window=2", "seen"),
    ],
)
def test_only_policies_that_wait_for_the_prompt_have_seen_its_question(spec, seen):
    """Streaming evicts before the question is read, wherever the prompt ends."""
    assert question_of(parse(spec), "seen") == seen
    assert question_of(parse(spec), "unseen") == "unseen"
