"""Facts that are used again and again, some of them often and others hardly ever."""

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

from kvpolicy.evaluation.sample import Sample, Target
from kvpolicy.evaluation.source import Source
from kvpolicy.evaluation.task import Measure, Task
from kvpolicy.evaluation.tasks.recall import draw_pairs

LAGS = (0, 64, 128, 256, 512, 1024, 2048, 4096)
"""Edges of the groups: tokens since a fact was last stated or used."""

PROSE = (8, 64)
"""Fewest and most tokens of prose at a time."""

PROSE_SHARE = 0.3
"""How often prose follows instead of a question."""


@dataclass(frozen=True, kw_only=True)
class Reuse(Task):
    """A list of pairs, then questions and prose in turns; the list is the prompt.

    The k-th pair is asked for in proportion to 1 / k (Zipf). Answers are part of the text, so
    that every use is one more occasion to notice what is needed. The digits of all answers count;
    the blank before them does not, which needs no memory.

    Attributes:
        pairs: Pairs in the list.
    """

    name: ClassVar[str] = "reuse"
    summary: ClassVar[str] = "facts that are used again and again"
    title: ClassVar[str] = "digits right"
    measure: ClassVar[Measure] = "tokens"
    grouped_by: ClassVar[str] = "lag"

    pairs: int = 16

    def samples(self, source: Source, context: int, count: int, seed: int) -> list[Sample]:
        """Draw lists and what is asked of them."""
        return [self._sample(source, context, index, seed) for index in range(count)]

    def _sample(self, source: Source, context: int, index: int, seed: int) -> Sample:
        rng = self.random(context, index, seed)
        pairs = draw_pairs(source, rng, self.pairs)
        blank = source.encode(" ")
        popularity = [1 / rank for rank in range(1, self.pairs + 1)]
        rng.shuffle(popularity)
        tokens, used = list(source.start), list[int]()
        for pair in pairs:
            tokens += pair.key + pair.value
            used.append(len(tokens))
        prompt, targets = len(tokens), list[Target]()
        while len(tokens) < context:
            if rng.random() < PROSE_SHARE:
                passage = source.passage(rng, rng.randint(*PROSE))
                tokens += [token for sentence in passage for token in sentence]
                continue
            [chosen] = rng.choices(range(self.pairs), popularity)
            pair = pairs[chosen]
            first, last = len(tokens) + len(pair.key), len(tokens) + len(pair.key + pair.value)
            if last > context:
                break
            tokens += pair.key + pair.value
            skipped = len(blank) if pair.value[: len(blank)] == blank else 0
            group = _group(first - used[chosen])
            targets.append(Target(first=first + skipped, last=last, group=group))
            used[chosen] = last
        if not targets:
            raise ValueError(
                f"context must hold the list and questions: got {context} tokens, and the list of "
                f"{self.pairs} pairs takes {prompt}; raise it, or lower the number of pairs"
            )
        padding = [token for sentence in source.passage(rng, context) for token in sentence]
        tokens = (tokens + padding)[:context]
        return Sample(tokens=tokens, prompt_tokens=prompt, targets=targets)


def _group(lag: int) -> tuple[float, float]:
    """The range that a lag lies in; longer ones than the last edge lie in the last range."""
    return next((edges for edges in pairwise(LAGS) if lag < edges[1]), LAGS[-2:])
