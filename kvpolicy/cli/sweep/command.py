"""``kvpolicy sweep``: a grid of traces and models x policies x budgets, resumable."""

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.markup import escape

from kvpolicy.cli import FAILED
from kvpolicy.cli.arguments import command_parser, positive
from kvpolicy.cli.output import Output, as_json, count, figure, size, table
from kvpolicy.cli.pages import add_png, write_pages
from kvpolicy.cli.sweep.grid import EvalEntry, read_grid
from kvpolicy.cli.sweep.pool import Outcome, run_locally
from kvpolicy.cli.sweep.report import show
from kvpolicy.cli.sweep.results import FILE, Results, exclusive
from kvpolicy.cli.sweep.sources import model_bytes, open_units
from kvpolicy.cli.sweep.summary import SCHEMA, Summary, summarise
from kvpolicy.cli.sweep.units import Cost, Unit
from kvpolicy.errors import PolicyError
from kvpolicy.extras import require
from kvpolicy.page import require_matplotlib

EXAMPLES = """
  kvpolicy sweep grid.toml --out results --dry-run
  kvpolicy sweep grid.toml --out results
  kvpolicy sweep grid.toml --out results --workers 8 --json summary.json
  kvpolicy sweep grid.toml --out results --engine ray --address auto

a grid:
  budgets = [64, 128, 256]
  policies = ["window", "h2o", "tova"]

  [[replay]]
  traces = ["t.kvtrace"]

  [[eval]]
  models = ["bundled"]
  task = "passkey"
  contexts = [512, 1024]
"""


ENGINES = ("local", "ray")

SUMMARY, PAGE = "summary.json", "summary.html"

WORK = "kvpolicy.cli.sweep.work:compute"
"""What workers do."""


def run(arguments: Sequence[str]) -> int:
    """Compute what is missing of a grid, and sum all of it up."""
    options = _parser().parse_args(arguments)
    if options.address is not None and options.engine != "ray":
        raise PolicyError("--address is where a Ray cluster is; add --engine ray, or drop it")
    output = Output(options.json, inputs=[options.grid], folders=[options.png])
    folder = Path(options.out)
    options.html = str(folder / PAGE)
    if folder.exists() and not folder.is_dir():
        raise PolicyError(f"cannot write to {options.out!r}: it is a file; choose a folder")
    if options.engine == "ray":
        require("ray")
    units = _units(options.grid, output)
    if options.dry_run:
        _estimate(options, units, Results(folder), output)
        return 0
    require_matplotlib()
    from kvpolicy.cli.sweep.page import document

    with exclusive(folder):
        results = Results(folder, is_writing=True)
        _compute(options, units, results, output)
        summary = summarise(units, results)
        output.write(str(folder / SUMMARY), as_json(summary.as_dict()))
        show(output, summary)
        output.print(
            f"\n{_counted(summary)}; wrote {escape(f'{FILE}, {SUMMARY} in {options.out}')}"
        )
        write_pages(options, document(summary, Path(options.grid).stem), output)
    output.json(summary.as_dict())
    return FAILED if summary.failures else 0


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(
        "sweep",
        "Run a grid of traces and models under policies at several budgets, on many processes. "
        "What is finished is kept in the folder: stopped at any moment, the same command goes on, "
        "and an edited grid runs only what is new. The full cache and, at each budget, sinks run "
        "beside the policies asked for.",
        EXAMPLES,
    )
    parser.add_argument("grid", metavar="GRID.toml", help="the grid, see below and the reference")
    parser.add_argument("--out", metavar="DIR", required=True, help="folder of the results")
    parser.add_argument(
        "--engine",
        choices=ENGINES,
        default=ENGINES[0],
        help="processes of this machine, or a Ray cluster that is running (default: local)",
    )
    parser.add_argument(
        "--workers",
        type=positive(),
        metavar="N",
        help="units at a time, each on one thread (default: one per CPU)",
    )
    parser.add_argument(
        "--address",
        metavar="ADDRESS",
        help="of the Ray cluster (default: RAY_ADDRESS, or the one on this machine)",
    )
    add_png(parser)
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check the grid, print units, memory and time, and stop",
    )
    return parser


def _units(path: str, output: Output) -> list[Unit]:
    """Read a grid and open what it names."""
    entries = read_grid(path)
    if any(isinstance(entry, EvalEntry) for entry in entries):
        require("transformers")
    with output.progress() as steps:
        return open_units(entries, steps.begin("reading models", model_bytes(entries), "bytes"))


def _compute(
    options: argparse.Namespace, units: Sequence[Unit], results: Results, output: Output
) -> None:
    """Compute the units that have no result, and note each as soon as it is known."""
    todo, total = results.missing(units), len({unit.id for unit in units})
    workers = _workers(options, len(todo))
    output.print(
        f"{count(total, 'unit')}: {total - len(todo)} finished before, {len(todo)} to compute"
    )
    if not todo:
        return
    if options.engine == "local":
        output.print(_told(_cost(list(todo.values()), workers), workers))
    done = total - len(todo)
    try:
        with output.progress() as steps:
            advance = steps.begin("sweep", len(todo), "units")
            for outcome in _outcomes(options, todo, workers):
                results.add(todo[outcome.name], outcome)
                done += outcome.error is None
                advance(1)
    except KeyboardInterrupt:
        told = f"stopped: {done} of {count(total, 'unit')} finished; the same command goes on"
        print(told, file=sys.stderr)
        raise


def _outcomes(
    options: argparse.Namespace, todo: dict[str, Unit], workers: int
) -> Iterator[Outcome]:
    """Run jobs on the engine that was asked for."""
    jobs = {name: unit.job for name, unit in todo.items()}
    if options.engine == "local":
        return run_locally(WORK, jobs, workers)
    from kvpolicy.cli.sweep.cluster import run_on_ray

    return run_on_ray(WORK, jobs, options.workers, options.address)


def _workers(options: argparse.Namespace, most: int) -> int:
    return max(1, min(options.workers or os.cpu_count() or 1, most))


def _estimate(
    options: argparse.Namespace, units: Sequence[Unit], results: Results, output: Output
) -> None:
    """Say what a run would do and take."""
    todo, total = list(results.missing(units).values()), len({unit.id for unit in units})
    workers = _workers(options, len(todo))
    cost = _cost(todo, workers)
    rows = table("source", "policies", "to compute", "seconds", left=1)
    for source in {id(unit.source): unit.source for unit in units}.values():
        mine = [unit for unit in todo if unit.source is source]
        seconds = sum(source.cost(unit.policy).seconds for unit in mine)
        rows.add_row(
            escape(source.label), str(len(source.policies)), str(len(mine)), figure(seconds, 0)
        )
    output.print(rows)
    output.print(f"\n{count(total, 'unit')}, {len(todo)} of them to compute")
    output.print(_told(cost, workers))
    output.json(
        {
            "schema": SCHEMA,
            "units": {"total": total, "finished": total - len(todo)},
            "workers": workers,
            "estimate": {"bytes": cost.bytes, "seconds": cost.seconds},
        }
    )


def _cost(todo: Sequence[Unit], workers: int) -> Cost:
    """Memory and time of some units on so many workers."""
    costs = [unit.source.cost(unit.policy) for unit in todo] or [Cost(0, 0.0)]
    longest = max(cost.seconds for cost in costs)
    seconds = max(longest, sum(cost.seconds for cost in costs) / workers)
    largest = sorted((cost.bytes for cost in costs), reverse=True)
    return Cost(sum(largest[:workers]), seconds)


def _told(cost: Cost, workers: int) -> str:
    return (
        f"estimate: at most {size(cost.bytes)} of memory on {count(workers, 'worker')}, about "
        f"{max(1.0, cost.seconds):,.0f} s, starting them and oracles not counted"
    )


def _counted(summary: Summary) -> str:
    finished = summary.total - len(summary.failures)
    failed = f", {len(summary.failures)} failed" if summary.failures else ""
    return f"{finished} of {count(summary.total, 'unit')} finished{failed}"
