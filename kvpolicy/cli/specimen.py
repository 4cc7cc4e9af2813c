"""One text in detail, for pages: what every policy holds of it, and a replay of its attention."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeAlias

from kvpolicy.cli.output import Steps
from kvpolicy.errors import UnsupportedError
from kvpolicy.page.document import Section
from kvpolicy.page.keys import Key
from kvpolicy.page.ledgers import ledger_section
from kvpolicy.page.text import Held, text_section
from kvpolicy.passage import Passage, kept_shares
from kvpolicy.policy import CachePolicy

# Types of hosts and simulator: this package may import them only inside functions.
Model: TypeAlias = Any
Report: TypeAlias = Any


@dataclass(frozen=True)
class Outcome:
    """What became of a text under one policy.

    Attributes:
        retained: Positions held at the end, by layer and KV head.
        ledger: Of the request.
        written: What the model wrote after it.
    """

    retained: Sequence[Sequence[Sequence[int]]]
    ledger: Mapping[str, Any]
    written: str


@dataclass(frozen=True)
class Specimen:
    """A text that ran under policies.

    Attributes:
        passage: The text; None if its tokens could not be told apart in it.
        outcomes: By spec.
        report: A replay of its attention; None if it could not be recorded or replayed.
    """

    passage: Passage | None
    outcomes: Mapping[str, Outcome]
    report: Report | None

    def sections(self, keys: Mapping[str, Key], what: str) -> list[Section]:
        """The text, its ledgers, and the replay.

        Args:
            keys: The page's policies, by spec.
            what: Which text it is, such as ``The first prompt``.
        """
        found: list[Section] = []
        if self.passage is not None:
            tokens = len(self.passage.tokens)
            held = [
                Held(keys[spec], kept_shares(outcome.retained, tokens), outcome.written)
                for spec, outcome in self.outcomes.items()
            ]
            found.append(
                text_section(
                    self.passage, held, f"{what}, once the model has written what follows it."
                )
            )
        ledgers = ((keys[spec], outcome.ledger) for spec, outcome in self.outcomes.items())
        found.append(ledger_section(ledgers, f"{what}, with what the model wrote."))
        if self.report is not None:
            from kvpolicy_sim.page.html import embedded_sections

            found += embedded_sections(self.report, keys, what)
        return found


def replay_text(
    model: Model,
    tokens: Sequence[int],
    prompt_tokens: int | None,
    policies: Sequence[CachePolicy],
    steps: Steps,
    *,
    oracle: bool,
) -> Report | None:
    """Record a text's attention and replay it under the policies that can be replayed.

    Args:
        model: A model of transformers.
        tokens: The text.
        prompt_tokens: How many of them are the prompt; None if nothing tells.
        policies: In the order of the report.
        steps: Shows progress.
        oracle: Whether to bound regrets, where numba is there to do it.

    Returns:
        None if the model's attention cannot be recorded, or no policy replayed.
    """
    import torch

    from kvpolicy_sim.capture import capture
    from kvpolicy_sim.replay import replay
    from kvpolicy_sim.support import require_oracle

    with TemporaryDirectory(prefix="kvpolicy-") as folder:
        try:
            trace = capture(
                model,
                [torch.tensor(list(tokens))],
                Path(folder) / "text.kvtrace",
                prompt_len=None if prompt_tokens is None else [prompt_tokens],
            )
        except UnsupportedError:
            return None
        with trace:
            possible = _replayable(trace, policies)
            has_oracle = oracle and _holds(lambda: require_oracle(trace.header))
            if not possible:
                return None
            header = trace.header
            work = len(tokens) * len(header.layers) * len(header.kv_heads) * len(possible)
            return replay(
                trace,
                possible,
                oracle=has_oracle,
                advance=steps.begin("replay of the text shown", work, "head steps"),
            )


def _replayable(trace: Any, policies: Sequence[CachePolicy]) -> list[CachePolicy]:
    """Those of some policies that a trace allows."""
    from kvpolicy_sim.support import require_prompts, require_supported

    return [
        policy
        for policy in policies
        if _holds(lambda p=policy: require_supported(trace.header, [p], "layer-local"))
        and _holds(lambda p=policy: require_prompts(trace, trace.sequences, [p]))
    ]


def _holds(requirement: Callable[[], None]) -> bool:
    try:
        requirement()
    except UnsupportedError:
        return False
    return True
