"""``kvpolicy demo``: real vLLM under several policies, checked against transformers."""

import argparse
import os
import re
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from rich.padding import Padding
from rich.text import Text

from kvpolicy.bundled import bundled_model, heldout_text
from kvpolicy.cli import FAILED, demo_passkey
from kvpolicy.cli.arguments import command_parser, positive, require_plugin
from kvpolicy.cli.highlight import highlight
from kvpolicy.cli.output import Output, Steps, figure, size, table
from kvpolicy.cli.pages import add_pages, page_output, write_pages
from kvpolicy.extras import require
from kvpolicy.ledger import SEMANTICS
from kvpolicy.passage import Passage, kept_shares
from kvpolicy.registry import parse

# The hosts' types: this package may import hosts only inside functions.
Checkpoint: TypeAlias = Any
Generation: TypeAlias = Any
GreedyRun: TypeAlias = Any
Plan: TypeAlias = Any
Speed: TypeAlias = Any
Trial: TypeAlias = Any

EXAMPLES = """
  kvpolicy demo
  kvpolicy demo --budget 64 --json demo.json
  kvpolicy demo --html demo.html
  kvpolicy demo | less
"""

PROMPT_TOKENS = (320, 150, 500, 800)
"""Lengths of the prompts that run as one batch; the first one is shown."""

NEW_TOKENS = 48
WINDOW_TOKENS = 1024


@dataclass
class Row:
    """What the demo found out about one policy.

    Attributes:
        policy: Spec.
        generation: vLLM's run.
        reference: transformers' runs of the same prompts.
        speed: Decode speed beside stock vLLM.
        perplexity: On held-out prose.
        differences: What vLLM and transformers disagree on; empty is parity.
    """

    policy: str
    generation: Generation
    reference: list[GreedyRun]
    speed: Speed | None = None
    perplexity: float | None = None
    differences: list[str] = field(default_factory=list)


def run(arguments: Sequence[str]) -> int:
    """Run the demo; 1 if vLLM and transformers disagree or a ledger fails its check."""
    options = _parser().parse_args(arguments)
    policies = _policies(options.budget)
    require("vllm")
    require("transformers")
    require_plugin(os.environ)
    from kvpolicy_vllm.plugin import check_version
    from kvpolicy_vllm.trial import Trial as VllmTrial

    check_version()
    began, output = time.perf_counter(), page_output(options)
    with VllmTrial() as trial, output.progress() as steps:
        checkpoint = _load(options, steps)
        passages = make_passages(checkpoint, heldout_text(), PROMPT_TOKENS)
        plan = _plan(options, policies, passages)
        stock, rows = _generate(trial, plan, checkpoint, steps)
        _add_perplexities(rows, checkpoint, options.windows, steps)
        _add_speeds(rows, trial, steps)
        searches = _search(trial, plan, options.budget, checkpoint, steps)
        specimen = None
        if options.html or options.png:
            from kvpolicy.cli.demo_page import examine

            generations = [stock, *(row.generation for row in rows)]
            specimen = examine(checkpoint, passages[0], generations, options.budget, steps)
    seconds = time.perf_counter() - began
    _show_texts(output, rows, passages[0], checkpoint)
    _show_table(output, stock, rows, plan)
    demo_passkey.show(output, searches)
    output.print(f"\n{seconds:.0f} s")
    result = _result(options, plan, stock, rows, seconds)
    result["passkey"] = [search.as_dict() for search in searches]
    output.json(result)
    if specimen is not None:
        from kvpolicy.cli.demo_page import document

        write_pages(options, document(result, specimen, _legend(plan)), output)
    return FAILED if any(row.differences for row in rows) else 0


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(
        "demo",
        "Generate text with real, unmodified vLLM under several policies; compare tokens and "
        "retained positions with transformers; show memory, concurrency, speed beside stock "
        "vLLM, and held-out perplexity. Needs no network.",
        EXAMPLES,
    )
    parser.add_argument(
        "--budget", type=positive(8), default=96, metavar="N", help="slots kept (default: 96)"
    )
    parser.add_argument("--model", metavar="DIR", help="model folder (default: the bundled one)")
    parser.add_argument(
        "--kv-memory",
        type=positive(),
        default=256,
        metavar="MIB",
        help="KV cache of every engine (default: 256 MiB)",
    )
    parser.add_argument(
        "--rounds",
        type=positive(),
        default=5,
        metavar="N",
        help="pairs of speed measurements per policy (default: 5)",
    )
    parser.add_argument(
        "--windows",
        type=positive(),
        default=8,
        metavar="N",
        help=f"windows of {WINDOW_TOKENS} tokens for perplexity (default: 8)",
    )
    add_pages(parser)
    return parser


def _policies(budget: int) -> tuple[str, ...]:
    return ("full", *(f"{name}:budget={budget}" for name in ("window", "sinks", "h2o", "tova")))


def make_passages(checkpoint: Checkpoint, text: str, lengths: Sequence[int]) -> list[Passage]:
    """Take passages of prose, each from the beginning of a paragraph, as prompts."""
    paragraphs = [0, *(gap.end() for gap in re.finditer(r"\n+", text.rstrip()))]
    passages: list[Passage] = []
    for index, length in enumerate(lengths):
        begin = paragraphs[index * len(paragraphs) // len(lengths)]
        # English prose has far fewer than 16 characters per token.
        encoded = checkpoint.tokenizer(
            text[begin : begin + 16 * length], add_special_tokens=False, return_offsets_mapping=True
        )
        room = length - len(checkpoint.start)
        spans = [(0, 0)] * len(checkpoint.start) + encoded["offset_mapping"][:room]
        tokens = checkpoint.start + encoded["input_ids"][:room]
        passages.append(Passage(text[begin : begin + spans[-1][1]], tokens, spans))
    return passages


def _load(options: argparse.Namespace, steps: Steps) -> Checkpoint:
    advance = steps.begin("loading transformers, and vLLM in its own process", 1)
    import torch

    from kvpolicy_hf.checkpoint import load_checkpoint

    torch.set_num_threads(1)
    checkpoint = load_checkpoint(options.model or bundled_model())
    advance(1)
    return checkpoint


def _plan(
    options: argparse.Namespace, policies: tuple[str, ...], passages: Sequence[Passage]
) -> Plan:
    from kvpolicy_vllm.trial import Plan as VllmPlan

    return VllmPlan(
        model=options.model or bundled_model(),
        policies=policies,
        prompts=tuple(tuple(passage.tokens) for passage in passages),
        new_tokens=NEW_TOKENS,
        kv_memory=options.kv_memory << 20,
        rounds=options.rounds,
    )


def _generate(
    trial: Trial, plan: Plan, checkpoint: Checkpoint, steps: Steps
) -> tuple[Generation, list[Row]]:
    """Generate with vLLM and, meanwhile, with transformers; compare."""
    from kvpolicy_hf.greedy import generate_greedy

    generations = trial.generate(plan)
    advance_vllm = steps.begin("vLLM: stock and policies", 1 + len(plan.policies))
    num_prompts = len(plan.policies) * len(plan.prompts)
    advance_reference = steps.begin("transformers: the same prompts", num_prompts)
    stock = next(generations)
    advance_vllm(1)
    rows: list[Row] = []
    for policy, generation in zip(plan.policies, generations, strict=True):
        advance_vllm(1)
        reference: list[GreedyRun] = []
        for prompt in plan.prompts:
            reference.append(generate_greedy(checkpoint.model, prompt, policy, plan.new_tokens))
            advance_reference(1)
        row = Row(policy, generation, reference)
        row.differences = differences(generation, reference)
        if policy == "full" and generation.tokens != stock.tokens:
            row.differences.append("full differs from stock vLLM")
        rows.append(row)
    return stock, rows


def differences(generation: Generation, reference: Sequence[GreedyRun]) -> list[str]:
    """Where vLLM's tokens or retained positions are not transformers', one line per request."""
    found: list[str] = []
    for index, expected in enumerate(reference):
        tokens, retained = generation.tokens[index], generation.retained[index]
        if tokens != expected.tokens:
            pairs = zip(tokens, expected.tokens, strict=True)
            at = next(i for i, (a, b) in enumerate(pairs) if a != b)
            found.append(f"request {index}: tokens differ from new token {at} on")
        elif retained != expected.retained:
            pairs = zip(retained, expected.retained, strict=True)
            layers = [str(i) for i, (a, b) in enumerate(pairs) if a != b]
            found.append(f"request {index}: retained sets differ in layers {', '.join(layers)}")
    return found


def _add_perplexities(
    rows: Sequence[Row], checkpoint: Checkpoint, limit: int, steps: Steps
) -> None:
    from kvpolicy.evaluation.result import Evaluation
    from kvpolicy.evaluation.run import evaluate
    from kvpolicy.evaluation.source import Source
    from kvpolicy.evaluation.tasks.ppl import Perplexity
    from kvpolicy_hf.closed_loop import ClosedLoop

    task, source = Perplexity(), Source(heldout_text(), checkpoint.encode, checkpoint.start)
    samples = {WINDOW_TOKENS: task.samples(source, WINDOW_TOKENS, limit, seed=0)}
    tokens = WINDOW_TOKENS * len(samples[WINDOW_TOKENS]) * len(rows)
    advance = steps.begin("held-out perplexity", tokens, "tokens")
    policies = [parse(row.policy) for row in rows]
    runs = evaluate(ClosedLoop(checkpoint.model), samples, policies, advance=advance)
    found = Evaluation(task, samples, runs)
    for row, each in zip(rows, runs, strict=True):
        row.perplexity = found.value(each)


def _add_speeds(rows: Sequence[Row], trial: Trial, steps: Steps) -> None:
    advance = steps.begin("decode speed, alternating with stock vLLM", len(rows))
    for row, speed in zip(rows, trial.measure(), strict=True):
        row.speed = speed
        advance(1)


def _search(
    trial: Trial, plan: Plan, budget: int, checkpoint: Checkpoint, steps: Steps
) -> list[demo_passkey.Search]:
    """Ask stock vLLM and two policies for hidden pass keys."""
    hidden = demo_passkey.hide_keys(checkpoint)
    plan = hidden.plan(plan, budget)
    advance = steps.begin("vLLM: hidden pass keys", 1 + len(plan.policies))
    searches: list[demo_passkey.Search] = []
    for generation in trial.generate(plan):
        searches.append(hidden.search(generation, checkpoint))
        advance(1)
    return searches


def _show_texts(
    output: Output, rows: Sequence[Row], passage: Passage, checkpoint: Checkpoint
) -> None:
    """Print the shown prompt under every policy, and what vLLM wrote after it."""
    if output.is_terminal:
        legend = "[bold green]kept by most heads[/], [yellow]by some[/], [bright_black]evicted[/]"
    else:
        legend = "\\[kept by at least half of the heads], the rest kept by fewer or evicted"
    output.print(f"The prompt's tokens at the end of the request: {legend}\n")
    for row in rows:
        ledger = row.generation.ledgers[0]
        output.print(
            f"[bold]{row.policy}[/bold]  holds {ledger['retained']} of "
            f"{ledger['logical_tokens']} tokens in {ledger['blocks_held']} blocks"
        )
        shares = kept_shares(row.generation.retained[0], len(passage.tokens))
        output.print(
            Padding(
                highlight(passage, shares, is_terminal=output.is_terminal), (0, 2), expand=False
            )
        )
        written = Text("vLLM writes: ", "bold")
        written.append(checkpoint.decode(row.generation.tokens[0]).strip(), "cyan")
        output.print(Padding(written, (0, 2, 1, 2), expand=False))


def _show_table(output: Output, stock: Generation, rows: Sequence[Row], plan: Plan) -> None:
    """Print the figures, what they mean, and what broke parity."""
    headings = "policy,parity,blocks,KV cache,concurrency,tokens/s,of stock,ppl"
    shown = table(*headings.split(","), left=2)
    concurrency, speed = f"{stock.max_concurrency:,.2f}x", figure(_stock_speed(rows), 0)
    shown.add_row("stock vLLM", "", "", "", concurrency, speed, "1.00", "")
    for row in rows:
        shown.add_row(*_cells(row))
    output.print(shown)
    output.print(_legend(plan))
    for row in rows:
        for difference in row.differences:
            output.print(f"[bold red]{row.policy}: {difference}[/]")


def _cells(row: Row) -> list[str]:
    """A policy's line of the table."""
    ledger, speed = _longest_ledger(row), row.speed
    return [
        row.policy,
        "[bold red]NO[/]" if row.differences else "[green]yes[/]",
        str(ledger["blocks_held"]),
        size(ledger["bytes_held"]),
        f"{row.generation.max_concurrency:,.2f}x",
        figure(speed and statistics.median(speed.tokens_per_second), 0),
        figure(speed and speed.ratio),
        figure(row.perplexity),
    ]


def _legend(plan: Plan) -> str:
    """What the table's columns mean."""
    longest = max(map(len, plan.prompts)) + plan.new_tokens
    return (
        f"\nparity: {len(plan.prompts)} prompts in one chunked batch, {plan.new_tokens} greedy "
        "tokens each, float32: vLLM's tokens, and its retained positions in every layer and "
        "head, equal transformers'\n"
        f"blocks, KV cache: of the longest request, {longest} tokens, policy state included "
        "(from the ledger)\n"
        f"concurrency: vLLM's own figure for requests of {plan.max_model_len:,} tokens in "
        f"{size(plan.kv_memory)} of KV cache\n"
        f"tokens/s: decode, batch of {len(plan.prompts)}, one thread; `of stock` is the median "
        f"of {plan.rounds} alternating pairs\n"
        f"ppl: held-out prose in windows of {WINDOW_TOKENS} tokens, with transformers"
    )


def _stock_speed(rows: Sequence[Row]) -> float:
    """Median decode speed of stock vLLM over all rounds."""
    return statistics.median(x for row in rows if row.speed for x in row.speed.stock)


def _longest_ledger(row: Row) -> dict[str, Any]:
    return max(row.generation.ledgers, key=lambda ledger: ledger["logical_tokens"])


def _result(
    options: argparse.Namespace,
    plan: Plan,
    stock: Generation,
    rows: Sequence[Row],
    seconds: float,
) -> dict[str, Any]:
    """The demo as JSON."""
    return {
        "schema": 1,
        "semantics": SEMANTICS,
        "model": options.model or "bundled",
        "max_model_len": plan.max_model_len,
        "kv_memory_bytes": plan.kv_memory,
        "prompt_tokens": [len(prompt) for prompt in plan.prompts],
        "new_tokens": plan.new_tokens,
        "stock": {
            "max_concurrency": stock.max_concurrency,
            "tokens_per_second": _stock_speed(rows),
        },
        "seconds": seconds,
        "results": [_entry(row) for row in rows],
    }


def _entry(row: Row) -> dict[str, Any]:
    """One policy of the JSON."""
    ledger, speed = _longest_ledger(row), row.speed
    return {
        "policy": row.policy,
        "parity": not row.differences,
        "differences": row.differences,
        "blocks_per_request": ledger["blocks_held"],
        "bytes_per_request": ledger["bytes_held"],
        "max_concurrency": row.generation.max_concurrency,
        "tokens_per_second": speed and statistics.median(speed.tokens_per_second),
        "stock_tokens_per_second": speed and statistics.median(speed.stock),
        "ratio_to_stock": speed and speed.ratio,
        "ratios": speed and speed.ratios,
        "ppl": row.perplexity,
        "ledger": ledger,
    }
