"""Feedback attention memory: memory rows that are rewritten at every block boundary."""

from typing import TYPE_CHECKING, ClassVar, Literal

from kvpolicy.errors import PolicyError
from kvpolicy.memory.policy import SlotMemoryPolicy
from kvpolicy.occupancy import Occupancy
from kvpolicy.policies.bswa import require_blocks

if TYPE_CHECKING:
    from torch import Tensor

    from kvpolicy.memory.state import Memory, Passage, Setting, Shape, SlotMemory


class FAM(SlotMemoryPolicy):
    """A block sliding window (`bswa`) beside F memory slots (TransformerFAM).

    ``level=model`` is algorithm 2 of the paper, with the model's own weights and nothing
    trained. In layer l, F hidden rows are projected to queries, keys and values like tokens;
    all tokens of block tau attend to the rows' keys, beside their window. When the block is
    complete, the rows attend to themselves and to the block's tokens, but not to older
    segments, go through the layer's own output projection and feed-forward network, and are fed
    back to the same layer for block tau + 1 (residual: the rows before, zero at the first
    update). Rows stand at the last F positions of the block they summarise. They begin as the
    mean token embedding, taken through the layers with full attention among themselves at
    positions -F .. -1.

    ``level=kv`` needs no weights: the block that leaves the window joins F centroids of like
    keys, as in `centroid`, at the same positions: a summary at the level of keys and values.

    Deviations: the paper trains the first rows and fine-tunes the model, without which summaries
    are poor; where the queries of rows stand while they read block tau is silent in the paper:
    ``query=current`` takes the last F positions of block tau, ``previous`` reads algorithm 2 to
    the letter and leaves them one block behind, so that they look at future keys.

    Attributes:
        block: Tokens of a block, B.
        segments: Blocks kept before the current one, m; or say it by `budget`.
        slots: Memory slots, F.
        level: kv, in every host; model, where hosts have the layers' weights.
        query: Positions of the rows' queries, for ``level=model``.
        sinks: First tokens that are never evicted, outside all blocks.
        budget: Instead of segments: segments * block + sinks + slots.
        interval: It is the block; may be left out.
    """

    name: ClassVar[str] = "fam"
    paper: ClassVar[str] = "Hwang et al. 2024, arXiv 2404.09173"
    smallest_budget: ClassVar[int] = 0

    block: int
    segments: int | None = None
    slots: int = 64
    level: Literal["kv", "model"] = "kv"
    query: Literal["current", "previous"] = "current"
    sinks: int = 0
    budget: int | None = None  # pyright: ignore[reportIncompatibleVariableOverride]

    def __post_init__(self) -> None:
        """Work out segments from the budget, or the budget from segments."""
        sizes = (self.block, self.slots, self.sinks)
        if all(isinstance(size, int) for size in sizes) and self.block > 0:
            rest = self.slots + self.sinks
            if self.segments is None and isinstance(self.budget, int):
                object.__setattr__(self, "segments", max(0, self.budget - rest) // self.block)
            if self.budget is None and isinstance(self.segments, int):
                object.__setattr__(self, "budget", self.segments * self.block + rest)
        super().__post_init__()

    def validate(self) -> None:
        """Refuse sizes that contradict each other and parameters that would be ignored."""
        if self.segments is None:
            raise PolicyError("fam needs segments; write fam:block=B,segments=M")
        require_blocks(self, self.block, self.segments, self.sinks)
        if self.slots < 0:
            raise PolicyError(f"fam: slots must not be negative, got {self.slots}")
        due = self.segments * self.block + self.sinks + self.slots
        if self.budget != due or self.interval != self.block:
            raise PolicyError(
                f"fam: {self.segments} segments of {self.block} tokens, {self.sinks} sinks and "
                f"{self.slots} slots make budget={due} and interval={self.block}, got "
                f"budget={self.budget}, interval={self.interval}; give segments, and leave budget "
                "and interval out"
            )
        if self.level == "model" and self.bias != "log":
            raise PolicyError("fam: rows of level=model weigh as one token each; drop bias")
        if self.level == "kv" and self.query != "current":
            raise PolicyError("fam: query is for level=model; drop it")
        super().validate()

    @property
    def default_interval(self) -> int:
        """A block leaves at once."""
        return self.block

    @property
    def occupancy(self) -> Occupancy:
        """As `bswa`, with memory slots reserved from the start."""
        assert self.segments is not None, "required by validate"
        return Occupancy(self.segments * self.block + self.sinks, self.block, self.slots)

    @property
    def sink_slots(self) -> int:
        """Number of first tokens that are never evicted."""
        return self.sinks

    @property
    def implied(self) -> dict[str, int]:
        """Budget and interval, by blocks."""
        assert self.segments is not None, "required by validate"
        rest = self.slots + self.sinks
        return {"budget": self.segments * self.block + rest, "interval": self.block}

    @property
    def needs_decoder(self) -> bool:
        """Rows go through the layer's own weights under level=model."""
        return self.level == "model"

    @property
    def hidden_rows(self) -> int:
        """The rows that are fed back, under level=model."""
        return self.slots if self.level == "model" else 0

    def frame(self, evicted: "Tensor") -> "Tensor | None":
        """Position of the token that left last; None under level=model, which rotates anew."""
        return evicted + (self.sinks - 1) if self.level == "kv" else None

    def absorb(self, memory: "Memory", passage: "Passage") -> "SlotMemory":
        """Let the block join its centroids; rows of level=model have read it long before."""
        import torch

        from kvpolicy.memory import centroids
        from kvpolicy.memory.state import slots_of

        slots = slots_of(memory)
        if self.level == "model":
            return slots
        offsets = self._places(torch.tensor(0, device=slots.mass.device))
        return centroids.absorb(slots, passage, offsets)

    def new_memory(self, shape: "Shape", setting: "Setting") -> "SlotMemory":
        """Make empty slots, or the model's first rows."""
        if self.level == "kv":
            return super().new_memory(shape, setting)
        from kvpolicy.memory.feedback import first_rows

        return first_rows(setting, shape, self.slots)

    def next_boundary(self, n: int) -> int | None:
        """End of the block that token n + 1 belongs to, under level=model."""
        if self.level == "kv":
            return None
        return max(n + self.block - (n - self.sinks) % self.block, self.sinks + self.block)

    @property
    def boundary_tokens(self) -> int:
        """The block that is complete."""
        return self.block

    def reflect(self, memory: "Memory", newest: "Passage") -> "SlotMemory":
        """Summarise the block that is complete."""
        from kvpolicy.memory.feedback import FeedbackMemory, reflect

        assert isinstance(memory, FeedbackMemory), "made by new_memory"
        is_first = newest.n == self.sinks + self.block
        stand = newest.n - 1
        look = stand
        if self.query == "previous":
            look = (stand - self.block).where(~is_first, -1)
        return reflect(memory, newest, self._places(stand), self._places(look), is_first)

    def _places(self, last: "Tensor") -> "Tensor":
        """The last F positions up to `last`, [F] or [B, 1, F] of [B, 1, 1]."""
        import torch

        return last + torch.arange(1 - self.slots, 1, device=last.device)
