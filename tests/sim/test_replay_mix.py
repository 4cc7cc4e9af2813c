"""Policies by layers in a replay: each layer as under its own policy, figures as means."""

import pytest

from fixtures.traces import Shape, header_of, random_layers, write_trace
from kvpolicy import PolicyError
from kvpolicy.cli import main
from kvpolicy.trace import Trace
from kvpolicy_sim import replay
from kvpolicy_sim.estimate import estimate

SHAPE = Shape(tokens=120)
BUDGETED = ("full", "h2o:budget=24,interval=4", "tova:budget=24,interval=4")


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A small random trace."""
    path = tmp_path_factory.mktemp("traces") / "t.kvtrace"
    return write_trace(path, random_layers(SHAPE), header=header_of(SHAPE))


def mix_of(first: str, rest: str) -> str:
    """The first layer under one policy, all others under another."""
    return f"mix:layers=(0:{first};1-:{rest})"


@pytest.mark.parametrize(
    ("first", "rest"),
    [(BUDGETED[0], BUDGETED[1]), (BUDGETED[1], BUDGETED[2]), ("window:budget=9", BUDGETED[1])],
)
def test_every_layer_keeps_what_its_policy_keeps(path, first, rest):
    """After any number of tokens a layer holds what it holds under its policy alone."""
    spec = mix_of(first, rest)
    report = replay(path, [spec, first, rest], oracle=True)
    for layer in report.layers:
        own = first if layer == 0 else rest
        for tokens in (20, 57, None):
            mixed = report.retained_positions(spec, layer, tokens=tokens)
            assert mixed.tolist() == report.retained_positions(own, layer, tokens=tokens).tolist()


def test_figures_are_means_over_layers(path):
    """Retention, evicted tokens and bytes lie between those of the parts, weighted by layers."""
    spec = mix_of("full", BUDGETED[1])
    report = replay(path, [spec, "full", BUDGETED[1]])
    mixed, full, alone = report.as_dict()["results"]
    layers = len(report.layers)
    assert mixed["evicted"] == pytest.approx(alone["evicted"] * (layers - 1) / layers)
    expected = (full["bytes_kept"] + (layers - 1) * alone["bytes_kept"]) / layers
    assert mixed["bytes_kept"] == pytest.approx(expected)
    assert mixed["budget"] is None
    assert mixed["retained_mass"]["mean"] > alone["retained_mass"]["mean"]


def test_budget_is_the_mean_of_the_layers(path):
    """Parts with budgets of their own are shown by their mean over layers."""
    report = replay(path, mix_of("window:budget=9", BUDGETED[1]))
    [result] = report.as_dict()["results"]
    layers = len(report.layers)
    assert result["budget"] == pytest.approx((9 + 24 * (layers - 1)) / layers)


def test_a_trace_with_more_layers_is_refused(path):
    """A mix that ends before the model does is refused before anything is replayed."""
    with pytest.raises(PolicyError, match="no policy for layer 1"):
        replay(path, "mix:layers=(0:full)")


def test_the_command_replays_estimates_and_draws_a_mix(path, tmp_path, capsys):
    """Kvpolicy replay shows a mix beside sinks at its budget, and draws its page."""
    page = tmp_path / "r.html"
    spec = "mix:layers=(0:full;1-:h2o),budget=24"
    assert main(["replay", str(path), "--policy", spec, "--html", str(page)]) == 0
    text = capsys.readouterr().out
    assert spec in text
    assert "sinks:budget=24" in text
    assert "mix:layers" in page.read_text("utf-8")
    with Trace.open(path) as trace:
        from kvpolicy import parse

        found = estimate(trace.header, trace.sequences, 2, [parse(spec)], 1, oracle=True)
    assert found.bytes > 0
    assert found.seconds > 0
