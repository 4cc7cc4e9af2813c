"""Policies that absorb what they evict, and how their memories are read."""

import math
from typing import TYPE_CHECKING, ClassVar, Literal

from kvpolicy.errors import PolicyError
from kvpolicy.policy import EvictionPolicy, View

if TYPE_CHECKING:
    from torch import Tensor

    from kvpolicy.memory.state import (
        Attended,
        Memory,
        Passage,
        Question,
        Setting,
        Shape,
        SlotMemory,
    )


PARAMETER_SUFFIX = ".safetensors"
"""What names of files with fitted or trained parameters end in."""


class MemoryPolicy(EvictionPolicy):
    """A window that hands the tokens leaving it over to a memory.

    The oldest tokens outside the sinks go first, so that a memory takes in a text in order.
    """

    sets_prompts_apart: ClassVar[bool] = False

    @property
    def needs_decoder(self) -> bool:
        """Whether the memory needs the layer's own weights."""
        return False

    @property
    def has_memory(self) -> bool:
        """Whether anything is kept beside tokens; a memory without room is none."""
        return True

    def score(self, view: View) -> "Tensor":
        """Rate a slot by its position: the oldest goes first."""
        return view.positions

    def new_memory(self, shape: "Shape", setting: "Setting") -> "Memory":
        """Make the memory of rows that have seen nothing.

        Raises:
            PolicyError: The policy's parameters do not fit the model.
        """
        raise self._missing("new_memory(shape, setting)")

    def absorb(self, memory: "Memory", passage: "Passage") -> "Memory":
        """Take in the tokens of one eviction; the given memory stays as it is."""
        raise self._missing("absorb(memory, passage)")

    def attend(self, memory: "Memory", question: "Question") -> "Attended":
        """Attend to tokens and memory together."""
        raise self._missing("attend(memory, question)")

    def _missing(self, method: str) -> PolicyError:
        return PolicyError(f"{type(self).__name__} defines no {method} method; add one")

    def merged(self, memory: "Memory", row: int, evicted: int) -> float:
        """Evicted tokens of a row that the memory stands for, mean over KV heads; default all."""
        del memory, row
        return evicted

    def next_boundary(self, n: int) -> int | None:
        """Smallest m > n after whose token `reflect` is called; None if there never is one."""
        del n
        return None

    @property
    def boundary_tokens(self) -> int:
        """How many of the newest tokens `reflect` is shown; they are all retained then."""
        return 0

    def reflect(self, memory: "Memory", newest: "Passage") -> "Memory":
        """Rewrite the memory at a block boundary, before the eviction that may fall there.

        Args:
            memory: As it was read by the block's tokens; stays as it is.
            newest: The newest `boundary_tokens` tokens.
        """
        del newest
        return memory

    @property
    def hidden_rows(self) -> int:
        """Hidden states of the model's width that a memory keeps per layer."""
        return 0

    def memory_floats(self, head_dim: int, group: int) -> int:
        """Float32 numbers that a memory needs per KV head beside its state slots."""
        del head_dim, group
        return 0


class SlotMemoryPolicy(MemoryPolicy):
    """A policy whose memory is slots of the cache, attended in one softmax with the tokens.

    Attributes:
        bias: ``log`` adds the logarithm of a slot's mass to its logits, so that it weighs as
            much as the tokens it stands for; ``none`` lets it weigh as one token.
    """

    bias: Literal["log", "none"] = "log"

    @property
    def has_memory(self) -> bool:
        """Whether there is a slot."""
        return self.occupancy.state_slots > 0

    def new_memory(self, shape: "Shape", setting: "Setting") -> "SlotMemory":
        """Make empty slots."""
        from kvpolicy.memory.state import SlotMemory

        del setting

        return SlotMemory.empty(shape, self.occupancy.state_slots)

    def slot_bias(self, memory: "SlotMemory") -> "Tensor":
        """What is added to a slot's logits, -inf where it is empty; [B, H_kv, M]."""
        weight = memory.mass if self.bias == "log" else memory.mass.sign()
        return weight.log()

    def frame(self, evicted: "Tensor") -> "Tensor | None":
        """Position at which slots' keys start to be rotated, given the tokens evicted.

        None: keys were rotated for good when they were written. Otherwise keys lie in a frame
        that moves on with the window, and it is the query that is turned: a cached key is
        never rotated again.
        """
        del evicted
        return None

    def attend(self, memory: "Memory", question: "Question") -> "Attended":
        """Attend to slots and tokens in one softmax."""
        from kvpolicy.memory.reading import attend_jointly
        from kvpolicy.memory.state import slots_of

        slots, base = slots_of(memory), self.frame(question.evicted)
        return attend_jointly(question, slots.keys, slots.values, self.slot_bias(slots), base)


def memory_slots(policy: EvictionPolicy, share: int | float, sinks: int) -> int:
    """Slots of the budget that a memory takes; a float is a fraction of the budget.

    Raises:
        PolicyError: No room is left for recent tokens.
    """
    if isinstance(share, float) and not 0.0 <= share <= 1.0:
        raise PolicyError(
            f"{policy.label}: {share} of the budget for memory must lie in 0.0..1.0; write an int "
            "for a number of slots"
        )
    slots = math.floor(share * policy.budget) if isinstance(share, float) else share
    if slots < 0 or slots + sinks >= policy.budget:
        raise PolicyError(
            f"{policy.label}: {slots} memory slots and {sinks} sinks leave no recent token in "
            f"budget={policy.budget}; raise budget or lower them"
        )
    return slots
