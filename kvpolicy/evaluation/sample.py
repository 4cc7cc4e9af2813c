"""What a task asks: a sequence of tokens, and which of them are to be predicted."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass


@dataclass(frozen=True, kw_only=True)
class Target:
    """Consecutive tokens to be predicted: one answer, or a part of a text.

    Attributes:
        first: Index of the first one in the sample's tokens.
        last: Index behind the last one.
        group: Half-open range of what the task groups by, such as depths or lags.
    """

    first: int
    last: int
    group: tuple[float, float]

    @property
    def size(self) -> int:
        """Tokens to be predicted."""
        return self.last - self.first


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One sequence.

    Every predicted token is also input: an answer whose tokens are all the likeliest ones is what
    greedy decoding would have written.

    Attributes:
        tokens: Token ids.
        prompt_tokens: How many of them are the prompt, for policies that set prompts apart.
        targets: What is to be predicted, in ascending order, without overlaps.
    """

    tokens: list[int]
    prompt_tokens: int
    targets: list[Target]

    def predicted(self) -> Iterator[int]:
        """Indices of the tokens to be predicted."""
        for target in self.targets:
            yield from range(target.first, target.last)

    @property
    def num_predicted(self) -> int:
        """Tokens to be predicted."""
        return sum(target.size for target in self.targets)


def digest_of(samples: Mapping[int, Sequence[Sample]]) -> str:
    """Tell samples, by context length, from any others: SHA-256 of all that is in them."""
    written = json.dumps({n: [asdict(s) for s in group] for n, group in samples.items()})
    return hashlib.sha256(written.encode()).hexdigest()
