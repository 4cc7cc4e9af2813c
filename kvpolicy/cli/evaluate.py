"""``kvpolicy eval``: closed-loop quality of policies, the full cache beside every number."""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, TypeAlias

from kvpolicy.cli.arguments import (
    add_budgets,
    add_policies,
    command_parser,
    positive,
    sizes,
    with_baselines,
    with_budgets,
)
from kvpolicy.cli.output import Output
from kvpolicy.cli.pages import add_pages, page_output, write_pages
from kvpolicy.cli.source import add_source, load_model, read_text
from kvpolicy.errors import PolicyError
from kvpolicy.evaluation.sample import Sample, digest_of
from kvpolicy.evaluation.source import Source
from kvpolicy.evaluation.task import Task
from kvpolicy.evaluation.tasks import TASKS, tasks_with
from kvpolicy.extras import require
from kvpolicy.ledger import SEMANTICS
from kvpolicy.page import require_matplotlib
from kvpolicy.policy import CachePolicy

# Types of modules that load tensor libraries: this one is imported for `--help` too.
Checkpoint: TypeAlias = Any
ClosedLoop: TypeAlias = Any
Evaluation: TypeAlias = Any

EXAMPLES = """
  kvpolicy eval --policy window:budget=128 h2o:budget=128
  kvpolicy eval --policy tova:budget=256 --context 2048 --text book.txt --json result.json
  kvpolicy eval --policy window h2o tova --budgets 32,64,128,256 --plot ppl.svg --resume cells.jsonl
  kvpolicy eval --task passkey --policy h2o:budget=256 --context 512,1024,2048 --html passkey.html
  kvpolicy eval --task recall --question unseen --policy snapkv:budget=256 --pairs 32
  kvpolicy eval --task reuse --policy window:budget=512 h2o:budget=512 --context 2048
"""

OPTIONS = {"prompt_tokens": "prompt_len", "question": "question", "pairs": "pairs"}
"""Settings of tasks, and the options that bring them; not every task has each."""


def run(arguments: Sequence[str]) -> int:
    """Evaluate policies on a task."""
    parser = _parser()
    options = parser.parse_args(arguments)
    task = _task(options)
    policies = with_baselines(with_budgets(options.policy, options.budgets or ()))
    require_seen(options.question, policies)
    if options.plot and not any(getattr(policy, "budget", None) for policy in policies):
        raise PolicyError("--plot draws quality against budget, and no policy has one; add one")
    require("transformers")
    text = read_text(options)
    if options.plot:
        require_matplotlib()
    output = page_output(
        options,
        inputs=[options.text],
        others=[options.resume, options.csv, options.plot],
    )
    try:
        evaluation, checkpoint = _evaluate(options, task, policies, text, output)
    except ValueError as error:
        parser.error(str(error))
    _report(options, evaluation, checkpoint, output)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(
        "eval",
        "Measure what policies cost in quality, in transformers. The full cache and, at each "
        "budget, sinks are measured beside the policies asked for.",
        EXAMPLES,
    )
    add_policies(parser)
    parser.add_argument(
        "--task",
        choices=TASKS,
        default="ppl",
        help="; ".join(f"{task.name}: {task.summary}" for task in TASKS.values())
        + " (default: ppl)",
    )
    add_source(parser)
    parser.add_argument(
        "--context",
        type=sizes(8),
        default=[1024],
        metavar="N[,N]",
        help="tokens of a sample; several to compare (default: 1024)",
    )
    parser.add_argument(
        "--samples",
        type=positive(),
        default=20,
        metavar="N",
        help="samples of each context; ppl: at most, as the text allows (default: 20)",
    )
    add_budgets(parser)
    parser.add_argument(
        "--question",
        choices=("seen", "unseen"),
        help="passkey, recall, needle: whether the question belongs to the prompt, behind which "
        "prefill=bulk evicts, or comes after it (default: seen, by policies that can)",
    )
    parser.add_argument(
        "--pairs", type=positive(), metavar="N", help="recall, reuse: pairs (default: 16)"
    )
    parser.add_argument(
        "--prompt-len",
        type=positive(),
        metavar="N",
        help="ppl: first tokens of each window that are its prompt and are not predicted; what "
        "prefill=bulk and protect=prompt need (default: none)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn (default: 0)")
    parser.add_argument(
        "--resume",
        metavar="FILE",
        help="note what is finished in FILE, and go on from it if it exists",
    )
    parser.add_argument("--csv", metavar="FILE", help="write figures and curves as a table")
    parser.add_argument("--plot", metavar="FILE", help="draw quality against budget, as SVG")
    add_pages(parser)
    return parser


def _task(options: argparse.Namespace) -> Task:
    """The task that the options describe.

    Raises:
        PolicyError: An option is for other tasks.
    """
    chosen = {
        setting: value
        for setting, option in OPTIONS.items()
        if (value := getattr(options, option)) is not None
    }
    for setting in chosen:
        having = tasks_with(setting)
        if options.task not in having:
            raise PolicyError(
                f"--{OPTIONS[setting].replace('_', '-')} is for --task {' or '.join(having)}, and "
                f"{options.task} has no use for it; drop it"
            )
    return TASKS[options.task](**chosen)


def require_seen(question: str | None, policies: Sequence[CachePolicy]) -> None:
    """Refuse to call a question seen that some policy reads after evicting.

    Args:
        question: What was asked for; None if nothing was.
        policies: The policies.

    Raises:
        PolicyError: One does, and the question was to be seen.
    """
    if question != "seen":
        return
    for policy in reversed(policies):  # what was asked for comes after the baselines
        if policy.evicts and policy.prompts == "stream":
            raise PolicyError(
                f"{policy} streams: it evicts the text before it reads the question, so none is "
                "seen; add prefill=bulk to it, or ask with --question unseen"
            )


def _evaluate(
    options: argparse.Namespace,
    task: Task,
    policies: Sequence[CachePolicy],
    text: str,
    output: Output,
) -> tuple[Evaluation, Checkpoint]:
    """Load the model, make the samples and run them."""
    from kvpolicy.evaluation.cells import CellFile, Cells
    from kvpolicy.evaluation.result import Evaluation as Found
    from kvpolicy.evaluation.run import evaluate
    from kvpolicy_hf.closed_loop import ClosedLoop as Transformers

    checkpoint = load_model(options)
    source = Source(text, checkpoint.encode, checkpoint.start)
    samples = {
        context: task.samples(source, context, options.samples, options.seed)
        for context in options.context
    }
    host, cells = Transformers(checkpoint.model), Cells()
    if options.resume:
        cells = CellFile(options.resume, _settings(options, task, samples, host))
    tokens = sum(len(sample.tokens) for group in samples.values() for sample in group)
    with output.progress() as steps:
        advance = steps.begin(task.name, tokens * len(policies), "tokens")
        runs = evaluate(host, samples, policies, cells, advance)
    return Found(task, samples, runs), checkpoint


def _settings(
    options: argparse.Namespace,
    task: Task,
    samples: Mapping[int, Sequence[Sample]],
    host: ClosedLoop,
) -> dict[str, Any]:
    """Whatever finished cells depend on beside policies."""
    return {
        "semantics": SEMANTICS,
        "task": task.name,
        **asdict(task),
        "context": list(samples),
        "samples": options.samples,
        "seed": options.seed,
        "rows": [host.batch_size(group) for group in samples.values()],
        "text and tokenizer": digest_of(samples),
        "model": host.fingerprint(),
    }


def _report(
    options: argparse.Namespace, evaluation: Evaluation, checkpoint: Checkpoint, output: Output
) -> None:
    """Print the tables and write what else was asked for."""
    from kvpolicy.cli.evaluate_report import WIDE, legend, plot, tables
    from kvpolicy.evaluation.result import question_of
    from kvpolicy_hf.closed_loop import ClosedLoop as Transformers

    host = Transformers(checkpoint.model)
    longest, question = max(evaluation.samples), getattr(evaluation.task, "question", None)
    prompt = max(sample.prompt_tokens for sample in evaluation.samples[longest])
    policies = [run.policy for run in evaluation.runs]
    taken = {policy: host.bytes_per_request(policy, longest, prompt) for policy in policies}
    is_sweep, is_narrow = bool(options.budgets), output.width < WIDE
    for each in tables(evaluation, taken, is_sweep=is_sweep, is_narrow=is_narrow):
        output.print(each)
    output.print(legend(evaluation, is_sweep=is_sweep))
    results = [
        {
            **evaluation.as_dict(run),
            "bytes_per_request": taken[run.policy],
            "question": question and question_of(run.policy, question),
        }
        for run in evaluation.runs
    ]
    output.json(
        {
            "schema": 1,
            "semantics": SEMANTICS,
            "model": options.model or "bundled",
            "task": options.task,
            "context": longest,
            "contexts": list(evaluation.samples),
            "samples": {str(n): len(group) for n, group in evaluation.samples.items()},
            "prompt_len": options.prompt_len,
            "seed": options.seed,
            "results": results,
        }
    )
    if options.csv:
        output.write(options.csv, evaluation.as_csv())
        output.print(f"wrote {options.csv}")
    if options.plot:
        output.write(options.plot, plot(evaluation))
        output.print(f"wrote {options.plot}")
    if options.html or options.png:
        from kvpolicy.cli.evaluate_page import document, examine

        with output.progress() as steps:
            specimen = examine(checkpoint, evaluation, steps)
        name = options.model or "bundled"
        write_pages(options, document(evaluation, taken, name, specimen), output)
