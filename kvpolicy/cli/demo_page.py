"""What ``kvpolicy demo`` found, as a page with pictures."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from kvpolicy.cli.output import Steps
from kvpolicy.cli.specimen import Outcome, Specimen, replay_text
from kvpolicy.page.document import Document, Section
from kvpolicy.page.keys import Key, keys_of
from kvpolicy.page.markup import NOTHING, Markup, element, figure, size
from kvpolicy.page.tables import plain_table
from kvpolicy.passage import Passage
from kvpolicy.registry import parse

# The hosts' types: this package may import hosts only inside functions.
Checkpoint: TypeAlias = Any
Generation: TypeAlias = Any

_LEAST = 8
"""Slots of the smallest budget that is replayed."""

Result = Mapping[str, Any]
"""The demo's JSON."""


def document(result: Result, specimen: Specimen, legend: str) -> Document:
    """The page of a demo.

    Args:
        result: What was found.
        specimen: The prompt that is shown.
        legend: What the figures mean, in lines.
    """
    specs = [entry["policy"] for entry in result["results"]]
    replayed = [] if specimen.report is None else [*map(str, specimen.report.results)]
    policies = [parse(spec) for spec in dict.fromkeys([*specs, *replayed])]
    keys = {key.spec: key for key in keys_of(policies)}
    facts = {
        "prompts, in tokens": ", ".join(map(figure, result["prompt_tokens"])),
        "new tokens each": figure(result["new_tokens"]),
        "KV cache of an engine": size(result["kv_memory_bytes"]),
        "seconds": figure(result["seconds"]),
    }
    caveat = element(
        "span",
        "Real, unmodified vLLM under every policy, held to transformers token by token and "
        "position by position. Speeds are those of this machine while it ran.",
    )
    sections = [
        _policies(result, keys, legend),
        *_differences(result),
        _pass_keys(result),
        *specimen.sections(keys, "The first prompt"),
    ]
    return Document("demo", result["model"], facts, caveat, sections)


def examine(
    checkpoint: Checkpoint,
    passage: Passage,
    generations: Sequence[Generation],
    budget: int,
    steps: Steps,
) -> Specimen:
    """Collect what vLLM held of a prompt, and replay it with transformers' attention.

    Args:
        checkpoint: The model.
        passage: The first prompt.
        generations: vLLM's runs, one without a policy first.
        budget: Slots that policies keep; half and twice as many are replayed too.
        steps: Shows progress.
    """
    stock, *others = generations
    outcomes = {
        run.policy: Outcome(
            run.retained[0], run.ledgers[0], checkpoint.decode(run.tokens[0]).strip()
        )
        for run in others
    }
    sweep = [
        spec.replace(f"budget={budget}", f"budget={other}")
        for other in sorted({max(budget // 2, _LEAST), 2 * budget} - {budget})
        for spec in outcomes
        if spec != "full"
    ]
    report = replay_text(
        checkpoint.model,
        [*passage.tokens, *stock.tokens[0]],
        len(passage.tokens),
        [parse(spec) for spec in (*outcomes, *sweep)],
        steps,
        oracle=True,
    )
    return Specimen(passage, outcomes, report)


def _policies(result: Result, keys: Mapping[str, Key], legend: str) -> Section:
    """Parity, memory, concurrency, speed and perplexity."""
    titles = (
        "policy",
        "parity",
        "blocks",
        "KV cache",
        "concurrency",
        "tokens/s",
        "of stock",
        "perplexity",
    )
    stock = result["stock"]
    rows: list[Sequence[str]] = [
        (
            "stock vLLM",
            NOTHING,
            NOTHING,
            NOTHING,
            f"{stock['max_concurrency']:,.2f}x",
            figure(stock["tokens_per_second"]),
            figure(1, 2),
            NOTHING,
        )
    ]
    rows += [
        (
            keys[entry["policy"]].full_name(),
            "yes" if entry["parity"] else element("b", "NO"),
            figure(entry["blocks_per_request"]),
            size(entry["bytes_per_request"]),
            f"{entry['max_concurrency']:,.2f}x",
            figure(entry["tokens_per_second"]),
            figure(entry["ratio_to_stock"], 2),
            figure(entry["ppl"], 2),
        )
        for entry in result["results"]
    ]
    remarks = (element("p", line, class_="remark") for line in legend.strip().splitlines())
    return Section(
        "Policies",
        "What every policy took and cost. The pictures call policies by their number and by what "
        "sets them apart.",
        [plain_table("Figures of every policy", titles, rows), *remarks],
    )


def _differences(result: Result) -> list[Section]:
    """What broke parity; nothing if all is well."""
    found = [
        element("li", f"{entry['policy']}: {difference}")
        for entry in result["results"]
        for difference in entry["differences"]
    ]
    if not found:
        return []
    return [
        Section(
            "Differences",
            "Where vLLM and transformers disagree; there should be none.",
            [element("ul", *found)],
        )
    ]


def _pass_keys(result: Result) -> Section:
    """Keys that were hidden, and what was answered."""
    searches = result["passkey"]
    rows = (
        (search["policy"], *_answers(search), f"{search['found']} of {len(search['keys'])}")
        for search in searches
    )
    return Section(
        "Pass keys",
        "Numbers hidden in prose and asked for at its end; evicted once, behind the question. A "
        "heading is the key, a cell what vLLM wrote; right answers are bold.",
        [
            plain_table(
                "What vLLM writes when asked for each key",
                ("policy", *searches[0]["keys"], "found"),
                rows,
            )
        ],
    )


def _answers(search: Result) -> list[Markup | str]:
    return [
        element("b", answer) if answer == key else answer
        for key, answer in zip(search["keys"], search["answers"], strict=True)
    ]
