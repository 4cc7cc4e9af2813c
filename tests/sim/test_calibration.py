"""docs/figures/calibrate.py: replays and closed loop of the same texts, put in order."""

import importlib.util
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

import numpy as np
import pytest

from kvpolicy import parse

SCRIPT = Path(__file__).parents[2] / "docs" / "figures" / "calibrate.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """The script, imported."""
    spec = importlib.util.spec_from_file_location("calibrate", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_budgets_are_told_apart_from_policies(script):
    """A figure that follows budgets only correlates over all points, not within a budget."""
    specs = [f"{name}:budget={budget}" for budget in (8, 16) for name in ("window", "h2o", "tova")]
    policies = [parse(spec) for spec in specs]

    def figure(*values: float) -> dict:
        return {p: np.array([x, 3 * x]) for p, x in zip(policies, values, strict=True)}

    divergence, shares = figure(0.6, 0.5, 0.4, 0.3, 0.2, 0.1), np.array([0.5, 0.5])
    # Ranks 6..1 beside 4, 5, 6, 1, 2, 3: squared differences 4, 0, 4, 4, 0, 4 of 6 points.
    by_budget = script.correlations(divergence, figure(4, 5, 6, 1, 2, 3), shares)
    assert by_budget == pytest.approx((1 - 6 * 16 / (6 * 35), -1.0))
    by_policy = script.correlations(divergence, figure(36, 25, 16, 9, 4, 1), shares)
    assert by_policy == pytest.approx((1.0, 1.0))


def test_an_interval_spans_what_windows_disagree_about(script):
    """Where one window ranks policies and another reverses them, everything is possible."""
    policies = [parse(f"{name}:budget=8") for name in ("window", "h2o", "tova")]
    divergence = {p: np.array([x, x]) for p, x in zip(policies, (3.0, 2.0, 1.0), strict=True)}
    agreed = {p: kl**2 for p, kl in divergence.items()}
    disputed = {p: kl * np.array([2, -1]) for p, kl in divergence.items()}
    assert script.shown(divergence, agreed) == ["1.00 (1.00 .. 1.00)"] * 2
    assert script.shown(divergence, disputed) == ["1.00 (-1.00 .. 1.00)"] * 2


def test_the_script_measures_what_it_draws(script, tmp_path, monkeypatch, capsys):
    """From the text to the picture: a row per figure, a point per policy and budget."""
    monkeypatch.setattr(script, "SPECS", ("window", "h2o", "centroid"))
    drawn, draw = [], script.draw

    def recorded(axes, series, reference, **options):
        drawn.extend(series)
        return draw(axes, series, reference, **options)

    monkeypatch.setattr(script, "draw", recorded)
    arguments = ["--context", "96", "--samples", "2", "--budgets", "16,32", "--out", str(tmp_path)]
    script.main(arguments)
    printed = capsys.readouterr().out
    assert printed.startswith("2 windows of 96 tokens, 8 points")
    assert all(f"| {name} |" in printed for name in script.LOSSES)
    picture = ElementTree.fromstring((tmp_path / "calibration.svg").read_text("utf-8"))
    assert picture.tag.endswith("svg")
    assert sum(len(series.points) for series in drawn) == 8
