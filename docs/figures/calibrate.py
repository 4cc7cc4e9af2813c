"""Do a replay's figures foretell what eviction does to a model's predictions?

    .venv/bin/python docs/figures/calibrate.py --resume cells.jsonl

The same windows of the held-out text run through a model under policies at several budgets
(`kvpolicy eval`), and through replays of one trace of them (`kvpolicy replay`). For each figure
of a replay this prints Spearman's rank correlation with the divergence of predictions from the
full cache's: over all policies and budgets, and over the policies of one budget, the mean of
budgets; then the same without policies that have a memory, whose part a replay's figures of mass
leave out. Budgets alone put most of the first in order; only the second says whether a replay
ranks policies. Intervals are 95 % of a bootstrap over windows. It also draws the points into
calibration.svg.

Replays leave out steps at which a budget has evicted nothing yet; there nothing diverges either,
so divergences are shared among the same number of steps.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from kvpolicy import CachePolicy, bundled_model
from kvpolicy.bundled import heldout_text
from kvpolicy.cli.arguments import with_baselines, with_budgets
from kvpolicy.evaluation.cells import CellFile, Cells
from kvpolicy.evaluation.plot import Axes, Point, Series, draw
from kvpolicy.evaluation.run import evaluate
from kvpolicy.evaluation.sample import Sample
from kvpolicy.evaluation.source import Source
from kvpolicy.evaluation.statistics import rank_correlation
from kvpolicy.evaluation.tasks.ppl import Perplexity
from kvpolicy.memory.policy import MemoryPolicy
from kvpolicy.series import budget_of, series_of
from kvpolicy_hf.checkpoint import load_checkpoint
from kvpolicy_hf.closed_loop import ClosedLoop
from kvpolicy_sim import capture, replay

SPECS = (
    "window",
    "h2o",
    "h2o:scope=layer",
    "tova",
    "tova:scope=head",
    "random",
    "compressive",
    "centroid",
    "fam:block=8,slots=8",
)
BUDGETS = (32, 64, 128, 256, 512)

LOSSES: dict[str, Callable[[dict[str, Any]], float]] = {
    "lost mass": lambda r: 1 - r["retained_mass"]["mean"],
    "lost mass, worst 5 %": lambda r: 1 - r["retained_mass"]["p5"],
    "output error": lambda r: r["output_error"]["mean"],
    "output error, worst 5 %": lambda r: r["output_error"]["p95"],
    "missed of the 16 most attended": lambda r: 1 - r["recall"]["16"],
}
"""Figures of a replay, the higher the worse."""

Figure = Mapping[CachePolicy, np.ndarray]
"""One figure of every policy in every window, [windows]; the higher the worse."""

RESAMPLES = 500
"""Draws of windows that an interval rests on."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the correlations and draw the points."""
    given = _parser().parse_args(arguments)
    torch.set_num_threads(1)
    policies = with_baselines(with_budgets(SPECS, [int(b) for b in given.budgets.split(",")]))
    checkpoint = load_checkpoint(given.model)
    source = Source(heldout_text(), checkpoint.encode, checkpoint.start)
    samples = Perplexity().samples(source, given.context, given.samples, seed=0)
    host = ClosedLoop(checkpoint.model)
    cells = Cells()
    if given.resume:
        settings = {
            "model": host.fingerprint(),
            "context": given.context,
            "windows": len(samples),
            "rows": host.batch_size(samples),
        }
        cells = CellFile(given.resume, settings)
    runs = evaluate(host, {given.context: samples}, policies, cells)
    diverged = {
        run.policy: np.array([sum(m.kl) for m in run.measured]) / (given.context - 1 - budget)
        for run in runs
        if (budget := budget_of(run.policy))
    }
    lost = replayed(checkpoint.model, samples, [*diverged])
    print(f"{len(samples)} windows of {given.context} tokens, {len(diverged)} points\n")
    evicting = {policy: kl for policy, kl in diverged.items() if not has_memory(policy)}
    print("| a replay's figure | all | of one budget | evicting only | of one budget |")
    print("|---|---|---|---|---|")
    for name, figure in lost.items():
        cells = [*shown(diverged, figure), *shown(evicting, figure)]
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)
    picture = Path(given.out) / "calibration.svg"
    picture.write_text(drawn(diverged, lost, "output error"), encoding="utf-8")
    print(f"\nwrote {picture.name}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Calibrate replays against predictions.")
    parser.add_argument("--model", default=bundled_model(), help="model folder")
    parser.add_argument("--context", type=int, default=1024, help="tokens of a window")
    parser.add_argument("--samples", type=int, default=16, help="windows")
    parser.add_argument("--budgets", default=",".join(map(str, BUDGETS)))
    parser.add_argument("--resume", help="file of finished cells")
    parser.add_argument("--out", default=Path(__file__).parent, help="folder of the picture")
    return parser


def has_memory(policy: CachePolicy) -> bool:
    """Whether evicted tokens leave something behind."""
    return isinstance(policy, MemoryPolicy) and policy.has_memory


def replayed(
    model: Any, samples: Sequence[Sample], policies: Sequence[CachePolicy]
) -> dict[str, Figure]:
    """Capture the windows once and replay the policies on each of them: figures by name."""
    with TemporaryDirectory() as scratch:
        path = Path(scratch) / "windows.kvtrace"
        capture(model, [torch.tensor(sample.tokens) for sample in samples], path).close()
        windows = [
            replay(path, policies, sequences=[window]).as_dict()["results"]
            for window in range(len(samples))
        ]
    return {
        name: {
            policy: np.array([loss(results[index]) for results in windows])
            for index, policy in enumerate(policies)
        }
        for name, loss in LOSSES.items()
    }


def shown(divergence: Figure, figure: Figure) -> list[str]:
    """Both correlations of a figure with the divergence, with intervals over drawn windows."""
    num_windows = len(next(iter(divergence.values())))
    whole = correlations(divergence, figure, np.full(num_windows, 1 / num_windows))
    draws = np.random.default_rng(0).multinomial(
        num_windows, np.full(num_windows, 1 / num_windows), size=RESAMPLES
    )
    drawn_again = [correlations(divergence, figure, draw / num_windows) for draw in draws]
    low, high = np.percentile(drawn_again, [2.5, 97.5], axis=0)
    return [f"{x:.2f} ({a:.2f} .. {b:.2f})" for x, a, b in zip(whole, low, high, strict=True)]


def correlations(divergence: Figure, figure: Figure, shares: np.ndarray) -> tuple[float, float]:
    """Rank correlation of a figure with the divergence: of all points, and within budgets.

    Args:
        divergence: From the full cache's predictions, of the policies to be ranked.
        figure: What a replay says of them, and of others.
        shares: [windows] what each window counts.
    """
    groups: dict[int | None, list[CachePolicy]] = {}
    for policy in divergence:
        groups.setdefault(budget_of(policy), []).append(policy)

    def correlation(policies: Sequence[CachePolicy]) -> float:
        return rank_correlation(
            [float(figure[policy] @ shares) for policy in policies],
            [float(divergence[policy] @ shares) for policy in policies],
        )

    within = [correlation(policies) for policies in groups.values()]
    return correlation([*divergence]), float(np.mean(within))


def drawn(divergence: Figure, lost: Mapping[str, Figure], name: str) -> str:
    """One line per series of policies, from budget to budget."""
    series: dict[str, list[Point]] = {}
    for policy, kl in divergence.items():
        point = Point(float(lost[name][policy].mean()), float(kl.mean()))
        series.setdefault(series_of(policy), []).append(point)
    axes = Axes(
        title="What a replay foretells",
        x=f"replay: {name}",
        y="closed loop: KL from the full cache, nats",
    )
    lines = [Series(label, sorted(points, key=lambda p: p.x)) for label, points in series.items()]
    return draw(axes, lines, None, dodge=0)


if __name__ == "__main__":
    main()
