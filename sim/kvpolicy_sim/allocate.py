"""Budgets by layer: as many slots in all, where they keep most attention.

Axes: L layers, b budgets tried.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch

from kvpolicy import CachePolicy, PolicyError, UnsupportedError, parse
from kvpolicy.extras import require
from kvpolicy.policy import EvictionPolicy, parameters
from kvpolicy.spec import split_spec
from kvpolicy.trace import Trace
from kvpolicy_sim.fit import write_parameters
from kvpolicy_sim.replay import replay
from kvpolicy_sim.report import Report
from kvpolicy_sim.support import choose_layers

By = Literal["mass", "pyramid"]
"""How budgets are found: from the trace, or falling evenly from the first layer to the last."""

FRACTIONS = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0)
"""Budgets that are tried, as parts of the equal one."""

BETA = 20.0
"""PyramidKV's: the last layer gets one part in so many of the equal budget (arXiv 2406.02069)."""


class LayerBudget(NamedTuple):
    """What a layer got.

    Attributes:
        layer: Index in the model.
        budget: Its slots.
        before: Mean retained mass with the equal budget, over all steps.
        after: The same with its own.
    """

    layer: int
    budget: int
    before: float
    after: float


@dataclass(frozen=True)
class Allocation:
    """What was found and written.

    Attributes:
        policy: The policy that reads the file.
        equal: The same policy with the same budget in all layers.
        path: The file.
        layers: One per layer, ascending.
    """

    policy: CachePolicy
    equal: CachePolicy
    path: Path
    layers: tuple[LayerBudget, ...]

    @property
    def before(self) -> float:
        """Mean retained mass with equal budgets."""
        return float(np.mean([layer.before for layer in self.layers]))

    @property
    def after(self) -> float:
        """Mean retained mass with the budgets found."""
        return float(np.mean([layer.after for layer in self.layers]))

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "schema": 1,
            "policy": str(self.policy),
            "equal": str(self.equal),
            "file": str(self.path),
            "retained_mass": {"before": self.before, "after": self.after},
            "layers": [layer._asdict() for layer in self.layers],
        }


def allocate(
    trace: Trace | str | Path,
    policy: str | CachePolicy,
    out: str | Path,
    *,
    by: By = "mass",
    threads: int | None = None,
    advance: Callable[[int], object] = lambda _: None,
) -> Allocation:
    """Give the layers of a model budgets of their own and write them as a safetensors file.

    ``mass`` replays the policy with several budgets. Of each layer's retained mass as a function
    of its budget the concave hull is taken, and slots go where they add most; the sum of all
    budgets stays what it was. ``pyramid`` looks at nothing: budgets fall evenly from layer to
    layer.

    Args:
        trace: A trace with all layers of the model, or its path.
        policy: What rules every layer, with the mean budget.
        out: The file.
        by: How budgets are found.
        threads: Layers at a time; default one per CPU.
        advance: Told the rounds done, of two.

    Raises:
        PolicyError: The policy has no budget, or the file cannot be named in a spec.
        UnsupportedError: The trace lacks layers, or safetensors is not installed.
        TraceError: The trace is damaged.
    """
    require("safetensors", "writing budgets")
    if by not in get_args(By):
        raise PolicyError(f"unknown way {by!r} to allocate; choose from {', '.join(get_args(By))}")
    if not isinstance(trace, Trace):
        with Trace.open(trace) as opened:
            return allocate(opened, policy, out, by=by, threads=threads, advance=advance)
    equal, path = parse(policy), Path(out)
    if not isinstance(equal, EvictionPolicy) or "budget" not in parameters(type(equal)):
        raise PolicyError(f"{equal} has no budget that layers could share; choose another policy")
    layers = choose_layers(trace.header, None)
    if len(layers) < trace.header.num_layers:
        raise UnsupportedError(
            f"{trace.path} has {len(layers)} of {trace.header.num_layers} layers, and budgets are "
            "for all of a model; capture without --layers"
        )
    budgets = (
        _by_mass(trace, equal, len(layers), threads)
        if by == "mass"
        else equal.budget * np.linspace(2 - 1 / BETA, 1 / BETA, len(layers))
    )
    advance(1)
    shares = torch.from_numpy(budgets / budgets.mean()).float()
    write_parameters(path, {"share": shares}, about=str(equal))
    found = _mix(equal, path)
    report = replay(trace, [equal, found], outputs=False, details=False, threads=threads)
    advance(1)
    before, after = (_masses(report, each) for each in (equal, found))
    made = zip(layers, before, after, strict=True)
    return Allocation(
        found, equal, path, tuple(LayerBudget(i, _budget(found, i), x, y) for i, x, y in made)
    )


def _mix(equal: EvictionPolicy, path: Path) -> CachePolicy:
    """The policy in every layer, with budgets from the file.

    Raises:
        PolicyError: No spec can name the file, or a layer's budget is too small for the policy.
    """
    name, given = split_spec(str(equal))
    rest = ",".join(f"{key}={value}" for key, value in given.items() if key != "budget")
    part = f"{name}:{rest}" if rest else name
    return parse(f"mix:layers=(0-:{part}),budget={equal.budget},budgets={path}")


def _budget(policy: CachePolicy, layer: int) -> int:
    member = policy.of_layer(layer)
    assert isinstance(member, EvictionPolicy), "all layers have budgets"
    return member.budget


def _masses(report: Report, policy: CachePolicy) -> list[float]:
    """Retained mass of each layer, mean over all steps, heads and sequences."""
    outcomes = report.result(policy).outcomes
    return [
        float(np.mean([outcomes[i, layer].retained_mass.mean() for i in report.sequences]))
        for layer in report.layers
    ]


def _by_mass(
    trace: Trace, equal: EvictionPolicy, num_layers: int, threads: int | None
) -> np.ndarray:
    """Budgets [L] that keep most attention in all; their sum is that of equal ones."""
    tried: dict[int, CachePolicy] = {}
    for fraction in FRACTIONS:
        budget = max(1, round(fraction * equal.budget))
        try:
            tried[budget] = replace(equal, budget=budget, interval=None)
        except PolicyError:
            continue  # too small for what it protects
    report = replay(trace, list(tried.values()), outputs=False, details=False, threads=threads)
    masses = np.array([_masses(report, policy) for policy in tried.values()])  # [b, L]
    return spread(np.array(list(tried), float), masses, float(num_layers * equal.budget))


def spread(budgets: np.ndarray, masses: np.ndarray, total: float) -> np.ndarray:
    """Spread slots over layers so that the sum of their masses is largest.

    Every layer gets the smallest budget; what is left goes along the concave hulls of the layers'
    curves, steepest first, which is optimal for concave curves.

    Args:
        budgets: [b] ascending, tried in every layer.
        masses: [b, L] what each layer keeps with them.
        total: Sum of all budgets, at least L times the smallest one.

    Returns:
        [L], their sum being `total` as far as the largest budget allows.
    """
    found = np.full(masses.shape[1], budgets[0])
    rises = [
        (slope, layer, size)
        for layer in range(masses.shape[1])
        for slope, size in _hull(budgets, masses[:, layer])
    ]
    left = total - found.sum()
    for _, layer, size in sorted(rises, key=lambda rise: -rise[0]):
        taken = min(size, left)
        found[layer] += taken
        left -= taken
    return found


def _hull(x: np.ndarray, y: np.ndarray) -> list[tuple[float, float]]:
    """Slope and width of each segment of the upper concave hull, from left to right."""
    corners: list[int] = []
    for index in range(len(x)):
        while len(corners) > 1 and _slope(x, y, corners[-1], index) >= _slope(
            x, y, corners[-2], corners[-1]
        ):
            corners.pop()
        corners.append(index)
    return [(_slope(x, y, a, b), float(x[b] - x[a])) for a, b in pairwise(corners)]


def _slope(x: np.ndarray, y: np.ndarray, first: int, last: int) -> float:
    return float((y[last] - y[first]) / (x[last] - x[first]))
