"""The words of a replay's page, beside its pictures; a section without data is None.

Axes: T tokens.
"""

from collections.abc import Sequence
from importlib.resources import files

import numpy as np

from kvpolicy.page.document import Section
from kvpolicy.page.ledgers import ledger_section
from kvpolicy.page.markup import Markup, amount, element, figure, join
from kvpolicy.page.tables import matrix_table
from kvpolicy.page.text import Held, text_section
from kvpolicy.passage import Passage
from kvpolicy_sim.page.pictures import some
from kvpolicy_sim.page.series import similarity as similarities
from kvpolicy_sim.page.tables import MOST_MARKS, Row, mark_table, policy_table
from kvpolicy_sim.report import Report
from kvpolicy_sim.statistics import is_retained

LEVELS = {
    "layer-local": "policies observe attention renormalised over what they retained, as in a host",
    "open-loop": "policies observe the weights that full attention gives to what they retained",
}

CAVEAT = (
    "; queries, keys and values are those of the traced run in every layer, so this isolates which "
    "tokens are kept and says nothing about how errors compound over layers and generated tokens."
)

HOW_TO_READ = Section(
    "How to read this",
    "A trace holds the queries, keys and values of a run with the full cache. A replay walks each "
    "policy over them, token by token: the token attends to what is held, itself included, and "
    "then the policy may evict. p(t, s) is the weight that query t gives token s in full "
    "attention.",
    [Markup(files("kvpolicy_sim.page").joinpath("terms.html").read_text(encoding="utf-8"))],
    short="Terms",
)


def facts(report: Report) -> dict[str, str]:
    """Which trace, and how much of it."""
    header, sequences = report.header, report.sequences.values()
    return {
        "tokens": figure(sum(sequence.tokens for sequence in sequences)),
        "sequences": figure(len(sequences)),
        "layers": f"{len(report.layers):,} of {header.num_layers:,}",
        "KV heads": f"{len(header.kv_heads):,} of {header.num_kv_heads:,}",
        "query heads per KV head": figure(header.group),
        "budget": ", ".join(map(amount, _budgets(report))) or "none",
    }


def caveat(report: Report) -> Markup:
    """What a replay at this level leaves out."""
    return join([element("b", report.level), ": ", LEVELS.get(report.level, ""), CAVEAT])


def policies(report: Report, rows: Sequence[Row]) -> Section:
    """The table of all figures."""
    remark = "★ best among the policies with the same budget."
    if len(report.sequences) > 1:
        remark += " Below a mean: its 95 % bootstrap interval over sequences."
    return Section(
        "Policies",
        "What each policy kept, and what that cost. The pictures call policies by their number "
        "and by what sets them apart.",
        [policy_table(rows), element("p", remark, class_="remark")],
    )


def text(report: Report, rows: Sequence[Row], passage: Passage | None) -> Section | None:
    """The text of the first sequence as every policy holds it at the end."""
    rows, remark = some([row for row in rows if row.evicts])
    if passage is None or not rows:
        return None
    sequence = next(iter(report.sequences))
    held = [Held(row.key, _shares(row, sequence)) for row in rows]
    where = f"Sequence {sequence} at its end, over all layers and KV heads replayed." + remark
    return text_section(passage, held, where)


def ledger(report: Report, rows: Sequence[Row]) -> Section:
    """What every policy did to the first sequence."""
    sequence = next(iter(report.sequences))
    return ledger_section(
        ((row.key, row.entry["ledgers"][0]) for row in rows),
        f"Of sequence {sequence} in the layers replayed. A replay holds no blocks.",
    )


def similarity(rows: Sequence[Row]) -> Section | None:
    """How alike the sets are that policies hold at the end."""
    if len(rows) < 2:
        return None
    return Section(
        "Similarity of what is held at the end",
        "Jaccard similarity: tokens that both policies hold, over tokens that either does; the "
        "mean over layers and KV heads.",
        [
            matrix_table(
                "Jaccard similarity of every pair of policies",
                [row.key for row in rows],
                similarities([row.result for row in rows]),
                digits=2,
            )
        ],
        short="Similarity",
    )


def marks(rows: Sequence[Row]) -> Section | None:
    """What became of marked spans."""
    number = len(rows[0].entry["marks"])
    if not number:
        return None
    more = f" The first {MOST_MARKS} of {figure(number)}." if number > MOST_MARKS else ""
    return Section(
        "Marked spans",
        "Of the attention that later tokens pay to a span, the share that was retained; and the "
        "share of its tokens held at the end." + more,
        [mark_table(rows)],
    )


def _shares(row: Row, sequence: int) -> list[float]:
    """Share of all layers and KV heads that hold each token at the end; T of them."""
    places = [o for (at, _), o in row.result.outcomes.items() if at == sequence]
    held = np.concatenate([is_retained(outcome.evicted_at) for outcome in places])
    return held.mean(axis=0).tolist()


def _budgets(report: Report) -> Sequence[float]:
    """Budgets of all policies, ascending; those that keep no token past a segment have none."""
    return sorted({r.budget for r in report.results.values() if r.budget})
