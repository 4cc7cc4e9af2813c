"""What a policy says about its memory, held to the form that hosts store.

A row whose own evidence is not finite is excused from being finite, as with scores: its result
is lost already.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvpolicy.errors import PolicyError
from kvpolicy.memory.state import Attended, Memory, Passage, Question

if TYPE_CHECKING:
    from kvpolicy.memory.policy import MemoryPolicy


def absorbed(policy: "MemoryPolicy", memory: Memory, passage: Passage) -> Memory:
    """The memory with an eviction's tokens.

    Raises:
        PolicyError: The policy returns something of another form, or NaN.
    """
    return _checked(policy, policy.absorb(memory, passage), memory, passage, "absorb")


def reflected(policy: "MemoryPolicy", memory: Memory, newest: Passage) -> Memory:
    """The memory rewritten at a block boundary.

    Raises:
        PolicyError: The policy returns something of another form, or NaN.
    """
    return _checked(policy, policy.reflect(memory, newest), memory, newest, "reflect")


def attended(policy: "MemoryPolicy", memory: Memory, question: Question) -> Attended:
    """What queries find in tokens and memory.

    Raises:
        PolicyError: The policy returns something of another form, or NaN.
    """
    answer = policy.attend(memory, question)
    logits, dim = question.logits, question.values.shape[-1]
    expected = {
        "output": (*question.q.shape[:3], dim),
        "weights": logits.shape,
        "lse": logits.shape[:4],
    }
    for name, shape in expected.items():
        found = getattr(answer, name, None)
        if not isinstance(found, Tensor) or found.shape != shape:
            raise PolicyError(
                f"{policy}: attend() must return `{name}` {tuple(shape)}, got {_form(found)}"
            )
    if not bool(answer.output.isfinite().all()):
        seen = logits.masked_fill(logits == -torch.inf, 0)
        given = (question.q, question.values, seen, *memory.tensors())
        _require_numbers(policy, [answer.output], given, "attend")
    return answer


def _checked(
    policy: "MemoryPolicy", after: Memory, before: Memory, passage: Passage, method: str
) -> Memory:
    if after is before:
        return after
    forms = [tuple(x.shape) for x in before.tensors()]
    found = [_form(x) for x in after.tensors()] if type(after) is type(before) else type(after)
    if found != forms:
        raise PolicyError(
            f"{policy}: {method}() must return a {type(before).__name__} with tensors of shapes "
            f"{forms}, got {found}"
        )
    given = (passage.rotated_keys, passage.values, passage.accumulated, passage.query, passage.lse)
    _require_numbers(policy, after.tensors(), (*given, *before.tensors()), method)
    return after


def _require_numbers(
    policy: "MemoryPolicy", found: Iterable[Tensor], given: Iterable[Tensor], method: str
) -> None:
    """Refuse tensors with a row that is not finite although all that it was given is."""
    lost = _lost(found)
    if bool(lost.any()) and bool((lost & ~_lost(given)).any()):
        raise PolicyError(f"{policy}: {method}() returned NaN or infinity; return finite numbers")


def _lost(tensors: Iterable[Tensor]) -> Tensor:
    """Rows with a number that is not finite; [B] bool."""
    return torch.stack([~x.isfinite().flatten(1).all(dim=1) for x in tensors]).any(dim=0)


def _form(found: object) -> object:
    return tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
