"""A policy that fails harms no other request, and its own goes on under a window.

Policies are asked about all their rows at once. When that fails, every row is asked about alone,
so that only those go without their policy whose policy fails for them. Nothing is stored before
everything of a call is decided, so that a failed call leaves no trace.

A row that fails is contained in the layer where it does, from the very token on: there the
fallback evicts, by the same occupancy law and with the same pinned spans. Its other layers keep
their policy. So what a request retains still depends on its tokens alone: had the whole request
changed over, the layers before the failing one would have changed at the next token when it
decodes, but only behind the scheduler's chunk when it is computed again after preemption.

What cannot be contained here: KeyboardInterrupt and its like, a policy that never returns, and
rows of one policy that look at each other. Where heads are spread over processes, each rank
contains what fails on its heads with ``scope=head``. With ``scope=layer`` a failure on one rank is
one on all of them (`Ranks.agree`), so that they make the same attempts, and meet in each.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from kvpolicy import EvictionPolicy, Occupancy, PolicyError
from kvpolicy.memory.policy import SlotMemoryPolicy
from kvpolicy.memory.reading import attend_jointly
from kvpolicy.memory.state import slots_of
from kvpolicy_vllm.book import Book, Fault

if TYPE_CHECKING:
    from torch import Tensor

    from kvpolicy import CachePolicy, View
    from kvpolicy.memory.state import Attended, Memory, Question
    from kvpolicy_vllm.rows import Row

_MAX_POLICIES = 256


class Fallback(EvictionPolicy):
    """A window under another policy's law.

    Attributes:
        law: That law.
    """

    law: ClassVar[Occupancy]

    def validate(self) -> None:
        """Everything was validated with the policy that it stands in for."""

    @property
    def occupancy(self) -> Occupancy:
        """The other policy's law."""
        return self.law

    def score(self, view: "View") -> "Tensor":
        """Rate a slot by its position: the oldest goes first."""
        return view.positions


class MaskedMemory(SlotMemoryPolicy):
    """The same where the other policy keeps memory slots: they stay, and nobody reads them.

    Attributes:
        law: The other policy's law.
    """

    law: ClassVar[Occupancy]

    def validate(self) -> None:
        """Everything was validated with the policy that it stands in for."""

    @property
    def occupancy(self) -> Occupancy:
        """The other policy's law."""
        return self.law

    def absorb(self, memory: "Memory", passage: object) -> "Memory":
        """Leave the slots as they are."""
        del passage
        return memory

    def merged(self, memory: "Memory", row: int, evicted: int) -> float:
        """The slots stand for nothing any more."""
        del memory, row, evicted
        return 0

    def attend(self, memory: "Memory", question: "Question") -> "Attended":
        """Attend to the tokens alone, whatever the slots hold."""
        slots = slots_of(memory)
        nothing = torch.zeros_like(slots.keys), torch.zeros_like(slots.values)
        return attend_jointly(question, *nothing, torch.full_like(slots.mass, -torch.inf), None)


@lru_cache(_MAX_POLICIES)
def fallback_of(policy: "CachePolicy") -> EvictionPolicy:
    """What rows go on under where their policy failed; the same one for equal policies."""
    if isinstance(policy, Fallback | MaskedMemory):
        return policy
    assert isinstance(policy, EvictionPolicy), "other policies have nothing to say"
    law = policy.occupancy
    base = MaskedMemory if law.state_slots else Fallback
    fallback: Any = type(base.__name__, (base,), {"law": law, "__module__": __name__})
    return fallback(budget=policy.budget, protect=policy.protect)


def contain(rows: "Sequence[Row]", layer: int, run: "Callable[[Row], None]", book: Book) -> None:
    """Run rows of one policy one by one, because together they failed.

    Args:
        rows: The rows, whose slots are as they were before.
        layer: Index of the layer.
        run: Carries out everything about a row, or some of its tokens, in this layer; a failure
            leaves the slots as they were.
        book: Takes note of the failures.
    """
    for row in rows:
        try:
            run(row)
        except Exception as error:
            policy = row.policy.of_layer(layer)
            if not isinstance(policy, EvictionPolicy) or fallback_of(policy) is policy:
                raise  # no policy's fault
            reason = _reason(error)
        else:
            continue
        _contain_row(row, reason, layer, run, book)


def _contain_row(
    row: "Row", reason: str, layer: int, run: "Callable[[Row], None]", book: Book
) -> None:
    """Find the token at which a row's policy fails, and let the fallback go on from there.

    Of errors only the reason is kept: one held here would hold this very frame, and with it the
    tensors of all frames below, until Python looks for cycles.
    """
    done, failing = 0, row.num_tokens
    while failing - done > 1:
        middle = (done + failing) // 2
        try:
            run(_tokens_of(row, done, middle))
            done = middle
        except Exception as error:
            reason, failing = _reason(error), middle
    book.contain(row.account, Fault(row.seen + failing, layer, reason))
    fallback = fallback_of(row.policy.of_layer(layer))
    run(replace(_tokens_of(row, done, row.num_tokens), policy=fallback))


def _tokens_of(row: "Row", first: int, last: int) -> "Row":
    """Tokens [first, last) of a row, those before them being done."""
    return replace(
        row, first_token=row.first_token + first, num_tokens=last - first, seen=row.seen + first
    )


def _reason(error: Exception) -> str:
    """What went wrong, on one line."""
    text = " ".join(str(error).split())
    return text if isinstance(error, PolicyError) else f"{type(error).__name__}: {text}"
