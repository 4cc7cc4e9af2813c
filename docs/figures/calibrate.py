"""Do a replay's figures foretell what eviction does to a model's predictions?

    .venv/bin/python docs/figures/calibrate.py --resume cells.jsonl

The same windows of the held-out text run through a model under policies at several budgets
(`kvpolicy eval`), and through replays of one trace of them (`kvpolicy replay`). For each figure
of a replay this prints Spearman's rank correlation with the divergence of predictions from the
full cache's: over all policies and budgets, and over the policies of one budget, the mean of
budgets; then the same without policies that have a memory, whose part a replay's figures of mass
leave out. Budgets alone put most of the first in order; only the second says whether a replay
ranks policies. It also draws the points into calibration.svg.

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

from kvpolicy import CachePolicy, bundled_model, parse
from kvpolicy.bundled import heldout_text
from kvpolicy.cli.arguments import with_baselines, with_budgets
from kvpolicy.evaluation.cells import CellFile, Cells
from kvpolicy.evaluation.plot import Axes, Point, Series, draw
from kvpolicy.evaluation.result import Evaluation, budget_of, series_of
from kvpolicy.evaluation.run import evaluate
from kvpolicy.evaluation.sample import Sample
from kvpolicy.evaluation.source import Source
from kvpolicy.evaluation.statistics import rank_correlation
from kvpolicy.evaluation.tasks.ppl import Perplexity
from kvpolicy.memory.policy import MemoryPolicy
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

Losses = Mapping[CachePolicy, Mapping[str, float]]


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
    found = Evaluation(Perplexity(), {given.context: samples}, runs)
    divergence = {
        run.policy: found.kl(run) * (given.context - 1) / (given.context - 1 - budget)
        for run in runs
        if (budget := budget_of(run.policy))
    }
    losses = replayed(checkpoint.model, samples, [*divergence])
    print(f"{len(samples)} windows of {given.context} tokens, {len(divergence)} points\n")
    evicting = {p: kl for p, kl in divergence.items() if not has_memory(p)}
    print("| a replay's figure | all | of one budget | evicting only | of one budget |")
    print("|---|---|---|---|---|")
    without = correlations(evicting, losses)
    for name, pair in correlations(divergence, losses).items():
        print(f"| {name} | " + " | ".join(f"{x:.2f}" for x in (*pair, *without[name])) + " |")
    picture = Path(given.out) / "calibration.svg"
    picture.write_text(drawn(divergence, losses, "output error"), encoding="utf-8")
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


def replayed(model: Any, samples: Sequence[Sample], policies: Sequence[CachePolicy]) -> Losses:
    """Capture the windows once and replay the policies on them."""
    with TemporaryDirectory() as scratch:
        path = Path(scratch) / "windows.kvtrace"
        capture(model, [torch.tensor(sample.tokens) for sample in samples], path).close()
        results = replay(path, policies).as_dict()["results"]
    return {
        parse(result["policy"]): {name: loss(result) for name, loss in LOSSES.items()}
        for result in results
    }


def correlations(
    divergence: Mapping[CachePolicy, float], losses: Losses
) -> dict[str, tuple[float, float]]:
    """Rank correlation of each figure with the divergence: of all points, and within budgets."""
    groups: dict[int | None, list[CachePolicy]] = {}
    for policy in divergence:
        groups.setdefault(budget_of(policy), []).append(policy)

    def correlation(name: str, policies: Sequence[CachePolicy]) -> float:
        return rank_correlation(
            [losses[policy][name] for policy in policies], [divergence[p] for p in policies]
        )

    return {
        name: (
            correlation(name, [*divergence]),
            float(np.mean([correlation(name, group) for group in groups.values()])),
        )
        for name in LOSSES
    }


def drawn(divergence: Mapping[CachePolicy, float], losses: Losses, name: str) -> str:
    """One line per series of policies, from budget to budget."""
    series: dict[str, list[Point]] = {}
    for policy, value in divergence.items():
        series.setdefault(series_of(policy), []).append(Point(losses[policy][name], value))
    axes = Axes(
        title="What a replay foretells",
        x=f"replay: {name}",
        y="closed loop: KL from the full cache, nats",
    )
    lines = [Series(label, sorted(points, key=lambda p: p.x)) for label, points in series.items()]
    return draw(axes, lines, None, dodge=0)


if __name__ == "__main__":
    main()
