"""The sections of a page, from a report to HTML; a section without data is empty.

Axes: H_kv KV heads.
"""

from collections.abc import Sequence

import numpy as np

from kvpolicy_sim.page import png
from kvpolicy_sim.page.charts import (
    Axis,
    Curve,
    colour_bar,
    heat_map,
    labelled,
    line_chart,
    round_ticks,
)
from kvpolicy_sim.page.markup import Markup, breakable, element, figure
from kvpolicy_sim.page.series import mass_over_time, median_place, retention_map
from kvpolicy_sim.page.series import similarity as similarities
from kvpolicy_sim.page.tables import MOST_MARKS, Row, mark_table, policy_table, similarity_table
from kvpolicy_sim.report import Report
from kvpolicy_sim.statistics import uncounted_steps

LEVELS = {
    "layer-local": "policies observe attention renormalised over what they retained, as in a host",
    "open-loop": "policies observe the weights that full attention gives to what they retained",
}

CAVEAT = (
    "; queries, keys and values are those of the traced run in every layer, so this isolates which "
    "tokens are kept and says nothing about how errors compound over layers and generated tokens."
)

OPACITY = np.concatenate([[0.0, 0.1], np.linspace(0.35, 1.0, png.LEVELS - 2)])
"""Of a retention map: not seen yet, evicted, held from few of a pixel's tokens to all."""

EMPTY = Markup()


def title(report: Report) -> Markup:
    """Which trace, and what was done with it."""
    header, sequences = report.header, report.sequences.values()
    facts = {
        "tokens": figure(sum(sequence.tokens for sequence in sequences)),
        "sequences": figure(len(sequences)),
        "layers": f"{len(report.layers):,} of {header.num_layers:,}",
        "KV heads": f"{len(header.kv_heads):,} of {header.num_kv_heads:,}",
        "query heads per KV head": figure(header.group),
        "budget": ", ".join(map(figure, _budgets(report))) or "none",
    }
    items = (
        element("div", element("dt", name), element("dd", value)) for name, value in facts.items()
    )
    return element(
        "header",
        element("p", "kvpolicy replay", class_="over"),
        element("h1", breakable(model_name(report))),
        element("dl", *items, class_="facts"),
        element("p", element("b", report.level), ": ", LEVELS.get(report.level, ""), CAVEAT),
    )


def model_name(report: Report) -> str:
    """What the trace calls the model."""
    return report.header.model or "unnamed model"


def policies(report: Report, rows: Sequence[Row]) -> Markup:
    """The table of all figures."""
    remark = "★ best among the policies with the same budget."
    if len(report.sequences) > 1:
        remark += " Below a mean: its 95 % bootstrap interval over sequences."
    return _section(
        "Policies",
        "What each policy kept, and what that cost. The pictures call policies by their number "
        "and by what sets them apart.",
        policy_table(rows),
        element("p", remark, class_="remark"),
    )


def over_the_sequence(report: Report, rows: Sequence[Row]) -> Markup:
    """Retained mass against tokens seen."""
    over_time = mass_over_time(report)
    last = float(over_time.tokens[-1])
    along = [tick for tick in round_ticks(0, last) if tick <= last]
    up = round_ticks(min(float(over_time.mass.min()), 0.99), 1, 7)
    chart = line_chart(
        Axis("tokens seen", 0, last, [(tick, figure(tick)) for tick in along]),
        Axis("retained mass", up[0], up[-1], labelled(up)),
        [
            Curve(row.key, over_time.tokens, mass)
            for row, mass in zip(rows, over_time.mass, strict=True)
        ],
        rules=[start for start in _starts(report) if start < last],
    )
    return _section(
        "Retained mass over the sequence",
        "The share of full attention that falls on what each token still saw: the mean over "
        "layers and heads. Dotted lines: where a budget is reached, or a bulk prompt ends, and "
        "evictions begin.",
        chart,
    )


def by_age(rows: Sequence[Row]) -> Markup:
    """Attention on evicted tokens against their age."""
    lost = {
        row.key: np.array(row.entry["lost_mass_by_age"])
        for row in rows
        if row.entry["lost_mass_by_age"] is not None
    }
    highest = max((float(values.max()) for values in lost.values()), default=0.0)
    if highest <= 0:
        return EMPTY
    last = max(int(np.flatnonzero(values)[-1]) for values in lost.values() if values.any())
    up = round_ticks(0, highest)
    along = range(0, last + 1, 1 if last <= 10 else 2)
    chart = line_chart(
        Axis("age in tokens", 0, max(last, 1), [(b, figure(2**b)) for b in along]),
        Axis("attention lost", 0, up[-1], labelled(up)),
        [Curve(key, np.arange(last + 1), values[: last + 1]) for key, values in lost.items()],
        dots=True,
    )
    return _section(
        "Lost attention by age",
        "How old the evicted tokens were that full attention would have looked at. A point covers "
        "the ages from its label up to the next, and the points of a line add up to what was lost.",
        chart,
    )


def by_head(report: Report, rows: Sequence[Row]) -> Markup:
    """Loss of every layer and KV head."""
    rows = [row for row in rows if row.evicts]
    if not rows:
        return EMPTY
    high = round_ticks(0, max(1e-4, *(float(row.loss.max()) for row in rows)), 4)[-1]
    layers, heads = sorted(report.layers), report.header.kv_heads
    names = [[f"layer {layer}, head {head}" for layer in layers] for head in heads]

    def picture(row: Row) -> Markup:
        loss = row.loss.T  # [H_kv, layers]
        head, layer = np.unravel_index(int(loss.argmax()), loss.shape)
        extent = (
            f"mean {figure(float(loss.mean()), 4)}, "
            f"most {figure(float(loss.max()), 4)} in {names[head][layer]}"
        )
        caption = element("figcaption", row.key.name(), element("small", extent))
        return element("figure", caption, heat_map(loss, high, names))

    return _section(
        "Loss by layer and head",
        f"One minus retained mass. Columns: {_range('layer', layers)}; rows: "
        f"{_range('KV head', heads)}. One scale for all policies; it grows with the square root.",
        colour_bar(high),
        element("div", *map(picture, rows), class_="heats"),
    )


def retention(report: Report, rows: Sequence[Row]) -> Markup:
    """What one KV head held, at every moment."""
    rows = [row for row in rows if row.evicts]
    if not rows:
        return EMPTY
    loss = np.mean([row.loss for row in rows], axis=0)  # [layers, H_kv]
    at, head = median_place(loss)
    layer, sequence = sorted(report.layers)[at], next(iter(report.sequences))
    tokens = report.sequences[sequence].tokens

    def picture(row: Row) -> Markup:
        shares = retention_map(row.result.outcomes[sequence, layer].evicted_at[head])
        image = element(
            "img",
            src=png.data_uri(opacity_levels(shares), OPACITY),
            alt=f"Positions that {row.key.spec} held, after every number of tokens",
            width=shares.shape[1],
            height=shares.shape[0],
        )
        return element("figure", image, element("figcaption", row.key.name()))

    return _section(
        f"What was held: layer {layer}, KV head {report.header.kv_heads[head]}",
        f"The head with the median loss, {figure(float(loss[at, head]), 4)} on average over "
        f"policies, in sequence {sequence}. Across: positions 0 to {figure(tokens - 1)}. Down: "
        f"tokens seen, 1 to {figure(tokens)}. Solid: held; faint: evicted. A sink is a line down "
        "the left edge, a window a band along the diagonal, a heavy hitter a line that goes on "
        "below the band.",
        element("div", *map(picture, rows), class_="maps"),
    )


def opacity_levels(shares: np.ndarray) -> np.ndarray:
    """Degrees of `OPACITY`; the root lets a single token of a pixel be seen."""
    held = 1 + np.ceil((png.LEVELS - 2) * np.sqrt(np.nan_to_num(shares)))
    return np.where(np.isnan(shares), 0, held).astype(np.uint8)


def similarity(rows: Sequence[Row]) -> Markup:
    """How alike the sets are that policies hold at the end."""
    if len(rows) < 2:
        return EMPTY
    return _section(
        "Similarity of what is held at the end",
        "Jaccard similarity: tokens that both policies hold, over tokens that either does; the "
        "mean over layers and KV heads.",
        similarity_table([row.key for row in rows], similarities([row.result for row in rows])),
    )


def marks(rows: Sequence[Row]) -> Markup:
    """What became of marked spans."""
    number = len(rows[0].entry["marks"])
    if not number:
        return EMPTY
    more = f" The first {MOST_MARKS} of {figure(number)}." if number > MOST_MARKS else ""
    return _section(
        "Marked spans",
        "Of the attention that later tokens pay to a span, the share that was retained; and the "
        "share of its tokens held at the end." + more,
        mark_table(rows),
    )


def _section(heading: str, introduction: str, *content: Markup) -> Markup:
    return element("section", element("h2", heading), element("p", introduction), *content)


def _budgets(report: Report) -> Sequence[float]:
    """Budgets of all policies, ascending; those that keep no token past a segment have none."""
    return sorted({r.budget for r in report.results.values() if r.budget})


def _starts(report: Report) -> list[int]:
    """Tokens seen where policies begin to evict, in any sequence, ascending."""
    laws = [
        r.law(sequence, layer)
        for r in report.results.values()
        for sequence in r.sequences
        for layer in report.layers
    ]
    found = {uncounted_steps(law) + law.state_slots for law in laws if law.retained is not None}
    return sorted(found - {0})


def _range(noun: str, indices: Sequence[int]) -> str:
    """First and last of some things."""
    if len(indices) == 1:
        return f"{noun} {indices[0]}"
    return f"{noun}s {indices[0]} to {indices[-1]}"
