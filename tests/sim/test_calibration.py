"""docs/figures/calibrate.py: replays and closed loop of the same texts, put in order."""

import importlib.util
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

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
    divergence = dict(zip(policies, [0.6, 0.5, 0.4, 0.3, 0.2, 0.1], strict=True))
    by_budget = dict(zip(policies, [4, 5, 6, 1, 2, 3], strict=True))
    losses = {
        policy: dict.fromkeys(script.LOSSES, 0.0)
        | {"lost mass": by_budget[policy], "output error": divergence[policy] ** 2}
        for policy in policies
    }
    found = script.correlations(divergence, losses)
    # Ranks 6..1 beside 4, 5, 6, 1, 2, 3: squared differences 4, 0, 4, 4, 0, 4 of 6 points.
    assert found["lost mass"] == pytest.approx((1 - 6 * 16 / (6 * 35), -1.0))
    assert found["output error"] == pytest.approx((1.0, 1.0))


def test_the_script_measures_what_it_draws(script, tmp_path, monkeypatch, capsys):
    """From the text to the picture: a row per figure, a point per policy and budget."""
    monkeypatch.setattr(script, "SPECS", ("window", "h2o", "centroid"))
    arguments = ["--context", "96", "--samples", "2", "--budgets", "16,32", "--out", str(tmp_path)]
    script.main(arguments)
    printed = capsys.readouterr().out
    assert printed.startswith("2 windows of 96 tokens, 8 points")
    assert all(f"| {name} |" in printed for name in script.LOSSES)
    picture = ElementTree.fromstring((tmp_path / "calibration.svg").read_text("utf-8"))
    assert len(list(picture.iter("{http://www.w3.org/2000/svg}circle"))) == 8
