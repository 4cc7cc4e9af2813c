"""The demo's second part: pass keys that one policy finds and another has evicted."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from kvpolicy.bundled import heldout_text
from kvpolicy.cli.output import Output, table

# The hosts' types: this package may import hosts only inside functions.
Checkpoint: TypeAlias = Any
Generation: TypeAlias = Any
Plan: TypeAlias = Any

CONTEXT, KEYS = 512, 4
"""Tokens of a text, and texts: their keys lie in its four quarters."""

_NEIGHBOURS = 13
"""Tokens over which votes are averaged, so that a vote for a key's first digit keeps the others."""


@dataclass(frozen=True)
class Search:
    """What became of the keys under one policy.

    Attributes:
        policy: Spec; None for stock vLLM.
        keys: What was hidden.
        answers: What was written instead or likewise.
        ledgers: Each request's ledger; none of stock vLLM.
    """

    policy: str | None
    keys: list[str]
    answers: list[str]
    ledgers: list[dict[str, Any]]

    @property
    def found(self) -> list[bool]:
        """Whether each key was written."""
        return [key == answer for key, answer in zip(self.keys, self.answers, strict=True)]

    def as_dict(self) -> dict[str, Any]:
        """The search as JSON."""
        return {
            "policy": self.policy or "stock",
            "keys": self.keys,
            "answers": self.answers,
            "found": sum(self.found),
        }


@dataclass(frozen=True)
class Hidden:
    """Prompts that end with the question, and the keys that answer them, as token ids."""

    prompts: tuple[tuple[int, ...], ...]
    answers: list[list[int]]

    def plan(self, plan: Plan, budget: int) -> Plan:
        """The trial of them beside one of text."""
        return replace(
            plan,
            policies=policies(budget),
            prompts=self.prompts,
            new_tokens=max(map(len, self.answers)),
        )

    def search(self, generation: Generation, checkpoint: Checkpoint) -> Search:
        """What an engine wrote, beside the keys."""
        written = [
            tokens[: len(answer)]
            for tokens, answer in zip(generation.tokens, self.answers, strict=True)
        ]
        keys, answers = (
            [checkpoint.decode(tokens).strip() for tokens in each]
            for each in (self.answers, written)
        )
        return Search(generation.policy, keys, answers, generation.ledgers)


def policies(budget: int) -> tuple[str, str]:
    """A window, and a policy that the question tells what to keep; both read it first."""
    window = max(1, budget // 6)
    return (
        f"window:budget={budget},prefill=bulk",
        f"snapkv:budget={budget},window={window},kernel={_NEIGHBOURS}",
    )


def hide_keys(checkpoint: Checkpoint) -> Hidden:
    """Hide keys in held-out prose, each in another quarter of its text."""
    from kvpolicy.evaluation.source import Source
    from kvpolicy.evaluation.tasks.passkey import Passkey

    source = Source(heldout_text(), checkpoint.encode, checkpoint.start)
    samples = Passkey(question="seen").samples(source, CONTEXT, KEYS, seed=0)
    return Hidden(
        tuple(tuple(sample.tokens[: sample.targets[0].first]) for sample in samples),
        [sample.tokens[sample.targets[0].first :] for sample in samples],
    )


def show(output: Output, searches: Sequence[Search]) -> None:
    """Print a policy per line and a key per column."""
    shown = table("policy", "slots", *searches[0].keys, "found", left=1)
    for search in searches:
        shown.add_row(*_cells(search))
    output.print(
        f"\nA pass key in each quarter of {CONTEXT} tokens of prose, asked for at the end; evicted "
        "once, behind the question. What vLLM writes:\n"
    )
    output.print(shown)


def _cells(search: Search) -> Iterator[str]:
    yield search.policy or "stock vLLM"
    yield str(search.ledgers[0]["slots_held"]) if search.ledgers else ""
    for answer, is_found in zip(search.answers, search.found, strict=True):
        # Nothing but spaces is an answer too, and an empty cell would look like none.
        shown = answer or "(blank)"
        yield f"[green]{shown}[/]" if is_found else f"[bright_black]{shown}[/]"
    yield f"{sum(search.found)} of {len(search.found)}"
