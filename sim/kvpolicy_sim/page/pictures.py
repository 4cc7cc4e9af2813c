"""The pictures of a replay's page, each a section with its numbers; one without data is None.

Axes: H_kv KV heads.
"""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from matplotlib.figure import Figure

from kvpolicy.axes import round_ticks
from kvpolicy.page.charts import (
    Band,
    Curve,
    Scale,
    budget_scale,
    labelled,
    line_chart,
    share_scale,
)
from kvpolicy.page.document import Picture, Section
from kvpolicy.page.keys import series_keys
from kvpolicy.page.markup import Markup, amount, figure, interval
from kvpolicy.page.panels import Grid, Panel, heat_maps, held_maps
from kvpolicy.page.tables import plain_table
from kvpolicy.page.themes import Theme
from kvpolicy.series import drawn
from kvpolicy_sim.page.series import (
    BudgetLine,
    Optimum,
    budget_lines,
    mass_over_time,
    median_place,
    optimum,
    retention_map,
    spans,
)
from kvpolicy_sim.page.tables import Row
from kvpolicy_sim.report import Report
from kvpolicy_sim.statistics import is_retained, uncounted_steps

_OPTIMUM = "the optimum, between bounds"


def by_budget(rows: Sequence[Row]) -> Section | None:
    """Retained mass against budget, the optimum behind it."""
    lines, best = budget_lines(rows), optimum(rows)
    if not lines:
        return None
    budgets = sorted({budget for line in lines for budget in line.budgets.tolist()})
    largest = max(lines, key=lambda line: float(line.mass[-1]))
    alt = (
        f"Retained mass of {len(lines)} kinds of policy at budgets from {amount(budgets[0])} to "
        f"{amount(budgets[-1])} slots. At its largest budget, {largest.series} retains most: "
        f"{largest.mass[-1]:.4f}."
    )
    introduction = (
        "The mean share of full attention that falls on what each token still saw; the full cache "
        "retains 1. Lines join policies that differ in their budgets alone."
    )
    if best is not None:
        introduction += (
            " The grey band is the optimum: what a policy that knows the future can reach lies "
            "within it."
        )
    picture = Picture(
        "retained-mass-by-budget",
        alt,
        _budget_chart(lines, best, budgets),
        _budget_numbers(lines, best, budgets),
    )
    return Section("Retained mass by budget", introduction, [picture], short="Budgets")


def _budget_chart(
    lines: Sequence[BudgetLine], best: Optimum | None, budgets: Sequence[float]
) -> Callable[[Theme], Figure]:
    """A line per series; intervals where there are several sequences."""
    has_ends = any((line.low < line.high).any() for line in lines)
    curves = [
        Curve(key, line.budgets, line.mass, *((line.low, line.high) if has_ends else ()))
        for key, line in zip(series_keys([x.series for x in lines]), lines, strict=True)
    ]
    least = [float(line.low.min()) for line in lines]
    band = None
    if best is not None:
        least.append(float(best.low.min()))
        # A single budget is widened, so that there is something to see.
        x = best.budgets if len(best.budgets) > 1 else best.budgets[0] * np.array([0.95, 1.05])
        low, high = (np.broadcast_to(y, x.shape) for y in (best.low, best.high))
        band = Band(_OPTIMUM, x, low, high)
    return partial(
        line_chart,
        x=budget_scale("budget, slots per KV head", budgets),
        y=share_scale("retained mass", least),
        curves=curves,
        band=band,
        dots=True,
        dodge=2 if has_ends else 0,
    )


def _budget_numbers(
    lines: Sequence[BudgetLine], best: Optimum | None, budgets: Sequence[float]
) -> Markup:
    """A row per series, a column per budget."""
    table = [
        [line.series, *(figure(mean.get(budget), 4) for budget in budgets)]
        for line in lines
        for mean in [dict(zip(line.budgets.tolist(), line.mass.tolist(), strict=True))]
    ]
    if best is not None:
        at = {b: (x, y) for b, x, y in zip(best.budgets, best.low, best.high, strict=True)}
        bounds = (interval(*at[b], 4) if b in at else figure(None) for b in budgets)
        table.append([_OPTIMUM, *bounds])
    return plain_table("Mean retained mass", ["slots", *map(amount, budgets)], table)


def over_the_sequence(report: Report, rows: Sequence[Row]) -> Section:
    """Retained mass against tokens seen."""
    rows, remark = some(rows)
    over_time = mass_over_time(report, [row.result for row in rows])
    last = float(over_time.tokens[-1])
    along = [tick for tick in round_ticks(0, last) if tick <= last]
    chart = partial(
        line_chart,
        x=Scale("tokens seen", 0, last, [(tick, figure(tick)) for tick in along]),
        y=share_scale("retained mass", [float(over_time.mass.min())], 7),
        curves=[
            Curve(row.key, over_time.tokens, mass)
            for row, mass in zip(rows, over_time.mass, strict=True)
        ],
        rules=[start for start in _starts(rows) if start < last],
    )
    worst = rows[int(over_time.mass[:, -1].argmin())].key
    alt = (
        f"Retained mass of {len(rows)} policies over {last:,.0f} tokens. At the end "
        f"{worst.spec} retains least: {over_time.mass[:, -1].min():.4f}."
    )
    numbers = plain_table(
        "Mean retained mass around a number of tokens seen",
        ["tokens seen", *(row.key.short for row in rows)],
        (
            [figure(tokens, 1), *(figure(mass, 4) for mass in masses)]
            for tokens, masses in zip(
                over_time.tokens.tolist(), over_time.mass.T.tolist(), strict=True
            )
        ),
    )
    return Section(
        "Retained mass over the sequence",
        "The share of full attention that falls on what each token still saw: the mean over "
        "layers and heads. Dotted lines: where a budget is reached, or a bulk prompt ends, and "
        "evictions begin." + remark,
        [Picture("retained-mass-over-the-sequence", alt, chart, numbers)],
        short="Over the sequence",
    )


def by_age(rows: Sequence[Row]) -> Section | None:
    """Attention on evicted tokens against their age."""
    rows, remark = some([row for row in rows if row.entry["lost_mass_by_age"] is not None])
    lost = {row.key: np.array(row.entry["lost_mass_by_age"]) for row in rows}
    highest = max((float(values.max()) for values in lost.values()), default=0.0)
    if highest <= 0:
        return None
    last = max(int(np.flatnonzero(values)[-1]) for values in lost.values() if values.any())
    up = round_ticks(0, highest)
    along = range(0, last + 1, 1 if last <= 10 else 2)
    chart = partial(
        line_chart,
        x=Scale("age in tokens", 0, max(last, 1), [(b, figure(2**b)) for b in along]),
        y=Scale("attention lost", 0, up[-1], labelled(up)),
        curves=[
            Curve(key, np.arange(last + 1), values[: last + 1]) for key, values in lost.items()
        ],
        dots=True,
    )
    total = {key: float(values.sum()) for key, values in lost.items()}
    most = max(total, key=lambda key: total[key])
    alt = (
        f"Attention lost by age of the evicted tokens, under {len(lost)} policies. {most.spec} "
        f"loses most: {total[most]:.4f} over all ages."
    )
    numbers = plain_table(
        "Attention lost by age in tokens",
        ["age", *(key.short for key in lost)],
        (
            [_ages(b), *(figure(float(values[b]), 5) for values in lost.values())]
            for b in range(last + 1)
        ),
    )
    return Section(
        "Lost attention by age",
        "How old the evicted tokens were that full attention would have looked at. A point covers "
        "the ages from its label up to the next, and the points of a line add up to what was lost."
        + remark,
        [Picture("lost-attention-by-age", alt, chart, numbers)],
        short="Lost by age",
    )


def by_head(report: Report, rows: Sequence[Row]) -> Section | None:
    """Loss of every layer and KV head."""
    rows, remark = some([row for row in rows if row.evicts])
    if not rows:
        return None
    high = round_ticks(0, max(1e-4, *(float(row.loss.max()) for row in rows)), 4)[-1]
    layers, heads = sorted(report.layers), report.header.kv_heads
    chart = partial(
        heat_maps,
        panels=[Panel(row.key, row.loss.T) for row in rows],
        grid=Grid("layer", "KV head", layers, heads),
        high=high,
    )
    worst = max(rows, key=lambda row: float(row.loss.max()))
    at, head = np.unravel_index(int(worst.loss.argmax()), worst.loss.shape)
    alt = (
        f"Loss of {len(layers)} layers and {len(heads)} KV heads under {len(rows)} policies. The "
        f"greatest, {worst.loss.max():.4f}, is that of layer {layers[at]}, head {heads[head]} "
        f"under {worst.key.spec}."
    )
    numbers = plain_table(
        "Loss by policy, KV head and layer",
        ["policy, KV head", *(f"layer {layer}" for layer in layers)],
        (
            [f"{row.key.short}, head {head}", *(figure(loss, 4) for loss in losses)]
            for row in rows
            for head, losses in zip(heads, row.loss.T.tolist(), strict=True)
        ),
    )
    return Section(
        "Loss by layer and head",
        "One minus retained mass, of every KV head of every layer. One scale for all policies; it "
        "grows with the square root." + remark,
        [Picture("loss-by-layer-and-head", alt, chart, numbers)],
        short="Layers and heads",
    )


def retention(report: Report, rows: Sequence[Row]) -> Section | None:
    """What one KV head held, at every moment."""
    rows, remark = some([row for row in rows if row.evicts])
    if not rows:
        return None
    loss = np.mean([row.loss for row in rows], axis=0)  # [layers, H_kv]
    at, head = median_place(loss)
    layer, sequence = sorted(report.layers)[at], next(iter(report.sequences))
    tokens = report.sequences[sequence].tokens
    evicted_at = [row.result.outcomes[sequence, layer].evicted_at[head] for row in rows]
    chart = partial(
        held_maps,
        panels=[
            Panel(row.key, retention_map(times))
            for row, times in zip(rows, evicted_at, strict=True)
        ],
        grid=Grid(
            "position",
            "tokens seen",
            extent=(0, tokens, tokens, 0),
            columns=4,
            height=2.4,
        ),
    )
    where = f"layer {layer}, KV head {report.header.kv_heads[head]}"
    alt = (
        f"Which of {tokens:,} positions {len(rows)} policies held after every number of tokens, "
        f"in {where}."
    )
    held = [np.flatnonzero(is_retained(times[None])[0]) for times in evicted_at]
    numbers = plain_table(
        f"Positions held at the end, in {where}",
        ("policy", "tokens", "positions"),
        (
            [row.key.short, figure(len(positions)), _shown_spans(positions)]
            for row, positions in zip(rows, held, strict=True)
        ),
    )
    return Section(
        f"What was held: {where}",
        f"The head with the median loss, {figure(float(loss[at, head]), 4)} on average over "
        f"policies, in sequence {sequence}. Blue: held; grey: evicted; blank: still to come. A "
        "sink is a line down the left edge, a window a band along the diagonal, a heavy hitter a "
        "line that goes on below the band." + remark,
        [Picture("what-was-held", alt, chart, numbers)],
        short="Retained set",
    )


def some(rows: Sequence[Row]) -> tuple[list[Row], str]:
    """The policies that a picture of single ones shows, and a remark on the others."""
    return drawn(rows, lambda row: row.result.budget)


def _ages(bin_: int) -> str:
    first, last = 2**bin_, 2 ** (bin_ + 1) - 1
    return figure(first) if first == last else f"{first:,}\N{EN DASH}{last:,}"


def _shown_spans(positions: np.ndarray) -> str:
    return ", ".join(
        str(first) if first == last else f"{first}\N{EN DASH}{last}"
        for first, last in spans(positions)
    )


def _starts(rows: Sequence[Row]) -> list[int]:
    """Tokens seen where policies begin to evict, in any sequence, ascending."""
    laws = [
        row.result.law(sequence, layer) for row in rows for sequence, layer in row.result.outcomes
    ]
    found = {uncounted_steps(law) + law.state_slots for law in laws if law.retained is not None}
    return sorted(found - {0})
