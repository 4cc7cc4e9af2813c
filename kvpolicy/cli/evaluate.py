"""``kvpolicy eval``: closed-loop quality of policies, the full cache beside every number."""

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeAlias

from rich.table import Table

from kvpolicy.cli.arguments import add_policies, command_parser, positive, require, with_baselines
from kvpolicy.cli.output import Output, figure, size, table
from kvpolicy.cli.source import add_source, load_model, read_text
from kvpolicy.footprint import Layout, floats_beside, peak_slots
from kvpolicy.ledger import SEMANTICS
from kvpolicy.memory.policy import MemoryPolicy
from kvpolicy.model_facts import windows_of
from kvpolicy.policy import CachePolicy

# The host's types: this package may import hosts only inside functions.
Checkpoint: TypeAlias = Any
WindowScores: TypeAlias = Any

EXAMPLES = """
  kvpolicy eval --policy window:budget=128 h2o:budget=128
  kvpolicy eval --policy tova:budget=256 --context 2048 --text book.txt --json result.json
  kvpolicy eval --task passkey --policy h2o:budget=256 --context 1024
"""


def run(arguments: Sequence[str]) -> int:
    """Evaluate policies on a task."""
    parser = _parser()
    options = parser.parse_args(arguments)
    policies = with_baselines(options.policy)
    require("transformers")
    text = read_text(options)
    output = Output(options.json, inputs=[options.text])
    checkpoint = load_model(options)
    task = _passkey if options.task == "passkey" else _perplexity
    if options.task == "passkey" and options.prompt_len:
        parser.error("--prompt-len is for --task ppl; in passkey, all that is asked is the prompt")
    try:
        results = task(options, checkpoint, policies, text, output)
    except ValueError as error:
        parser.error(str(error))
    output.json(
        {
            "schema": 1,
            "semantics": SEMANTICS,
            "model": options.model or "bundled",
            "task": options.task,
            "context": options.context,
            "prompt_len": options.prompt_len,
            "seed": options.seed,
            "results": results,
        }
    )
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
        choices=("ppl", "passkey"),
        default="ppl",
        help="ppl: perplexity of consecutive windows of the text; passkey: exact answers about "
        "a number hidden in it (default: ppl)",
    )
    add_source(parser)
    parser.add_argument(
        "--context", type=positive(8), default=1024, metavar="N", help="tokens (default: 1024)"
    )
    parser.add_argument(
        "--samples",
        type=positive(),
        default=20,
        metavar="N",
        help="most windows of ppl, or prompts of passkey (default: 20)",
    )
    parser.add_argument(
        "--prompt-len",
        type=positive(),
        metavar="N",
        help="ppl: first tokens of each window that are its prompt and are not predicted; what "
        "prefill=bulk and protect=prompt need (default: none)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the prompts (default: 0)")
    return parser


def _perplexity(
    options: argparse.Namespace,
    checkpoint: Checkpoint,
    policies: Sequence[CachePolicy],
    text: str,
    output: Output,
) -> list[dict[str, Any]]:
    """Score windows and print the table."""
    from kvpolicy_hf.perplexity import cut_windows, score_windows

    windows = cut_windows(checkpoint, text, options.context, options.samples)
    with output.progress() as steps:
        advance = steps.begin("perplexity", windows.numel() * len(policies), "tokens")
        prompt = options.prompt_len or 0
        scores = score_windows(checkpoint.model, windows, policies, advance, prompt)
    bytes_of = partial(_bytes_per_request, checkpoint, options.context, prompt)
    output.print(_perplexity_table(scores, bytes_of))
    output.print(
        f"\n{len(windows)} windows of {options.context} tokens"
        + (f", of which the first {prompt} are the prompt" if prompt else "")
        + "; `against full` is the ratio of perplexities, two standard errors, paired by window"
    )
    return [
        _result(
            score.policy,
            ppl=score.perplexity,
            ppl_ratio=score.ratio_interval(scores[0]),
            logit_kl=score.mean_kl,
            top1_agreement=score.mean_agreement,
            bytes_per_request=bytes_of(score.policy),
            tokens=score.tokens,
            seconds=score.seconds,
        )
        for score in scores
    ]


def _perplexity_table(
    scores: Sequence[WindowScores], bytes_of: Callable[[CachePolicy], int]
) -> Table:
    """One line per policy."""
    rows = table("policy", "bytes", "ppl", "against full", "KL", "top-1", "tokens/s")
    for score in scores:
        interval = None if score is scores[0] else score.ratio_interval(scores[0])
        rows.add_row(
            str(score.policy),
            size(bytes_of(score.policy)),
            figure(score.perplexity),
            "-" if interval is None else f"x {interval[0]:.3f} .. {interval[1]:.3f}",
            figure(score.mean_kl, 4),
            figure(100 * score.mean_agreement, 1) + " %",
            figure(score.tokens / score.seconds, 0),
        )
    return rows


def _passkey(
    options: argparse.Namespace,
    checkpoint: Checkpoint,
    policies: Sequence[CachePolicy],
    text: str,
    output: Output,
) -> list[dict[str, Any]]:
    """Ask for pass keys and print the table."""
    from kvpolicy_hf.passkey import make_questions, score_passkeys

    questions = make_questions(checkpoint, text, options.context, options.samples, options.seed)
    work = sum(len(question.prompt) + len(question.answer) for question in questions)
    pad = checkpoint.tokenizer.pad_token_id or 0
    with output.progress() as steps:
        advance = steps.begin("passkey", work * len(policies), "tokens")
        scores = score_passkeys(checkpoint.model, questions, policies, pad, advance)
    longest = max(len(question.prompt) for question in questions)
    bytes_of = partial(_bytes_per_request, checkpoint, options.context, longest)
    rows = table("policy", "bytes", "passkey", "found", "tokens/s")
    for score in scores:
        rows.add_row(
            str(score.policy),
            size(bytes_of(score.policy)),
            figure(100 * score.accuracy, 0) + " %",
            f"{sum(score.found)}/{len(score.found)}",
            figure(score.tokens / score.seconds, 0),
        )
    output.print(rows)
    output.print(
        f"\n{len(questions)} prompts of {options.context} tokens; the question comes last, so "
        "a policy cannot know what will be asked when it evicts"
        + (
            ", unless it evicts behind the prompt (prefill=bulk)"
            if any(policy.occupancy.prompts == "bulk" for policy in policies)
            else ""
        )
    )
    return [
        _result(
            score.policy,
            passkey=score.accuracy,
            bytes_per_request=bytes_of(score.policy),
            tokens=score.tokens,
            seconds=score.seconds,
        )
        for score in scores
    ]


def _bytes_per_request(
    checkpoint: Checkpoint, tokens: int, prompt: int, policy: CachePolicy
) -> int:
    """What a request of so many tokens takes at its fullest moment, memory and state included."""
    config, element_bytes = checkpoint.model.config, checkpoint.model.dtype.itemsize
    heads, head_dim = config.num_key_value_heads, config.head_dim
    windows = [window for window in windows_of(config) if window is not None]
    layout = Layout(
        num_layers=config.num_hidden_layers - len(windows),
        num_kv_heads=heads,
        head_dim=head_dim,
        element_bytes=element_bytes,
        num_sliding=len(windows),
        window=max(windows, default=1),
    )
    floats = floats_beside(policy, head_dim, config.num_attention_heads // heads)
    rows = policy.hidden_rows if isinstance(policy, MemoryPolicy) else 0
    hidden = config.num_hidden_layers * rows * config.hidden_size * element_bytes
    law = policy.occupancy.of_prompt(prompt)
    slots = layout.dense_bytes(peak_slots(law, tokens), floats)
    return hidden + slots + layout.dense_window_bytes(tokens)


def _result(policy: CachePolicy, **measured: Any) -> dict[str, Any]:
    """One entry of the JSON: every key of the contract, null where not measured."""
    tasks = dict.fromkeys(("ppl", "passkey", "recall", "logit_kl", "top1_agreement"))
    return {"policy": str(policy), "budget": getattr(policy, "budget", None), **tasks, **measured}
