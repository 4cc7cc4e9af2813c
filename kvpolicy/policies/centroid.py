"""Content centroids: tokens that leave the window join the centroid most like them."""

from typing import TYPE_CHECKING, ClassVar

from kvpolicy.errors import PolicyError
from kvpolicy.memory.policy import SlotMemoryPolicy, memory_slots
from kvpolicy.occupancy import Occupancy

if TYPE_CHECKING:
    from torch import Tensor

    from kvpolicy.memory.state import Memory, Passage, SlotMemory


class Centroid(SlotMemoryPolicy):
    """Keep the newest tokens; older ones live on in centroids of like content.

    Every token that leaves the window joins the centroid whose key has the largest product with
    its own, before rotation; a centroid's key and value are the means of its tokens, and
    log(number of tokens) is added to its logits. This is the memory update of KVM (arXiv
    2605.09877) without its learned gate, norm and temperature: hard assignment instead of a
    softmax, so that mass is conserved. Averages of like tokens answer as they would; averages of
    neighbours (`compressive`) need not.

    A centroid has no position of its own. All of them are attended at the position of the
    token that left last, right behind the window; the query is turned, cached keys never are.

    Attributes:
        budget: Slots kept per KV head after an eviction, centroids included.
        slots: Centroids; a float is a fraction of the budget.
        sinks: First tokens that are never evicted nor merged.
    """

    name: ClassVar[str] = "centroid"
    paper: ClassVar[str] = "after KVM, arXiv 2605.09877"

    slots: int | float = 0.25
    sinks: int = 0

    def validate(self) -> None:
        """Refuse sizes that do not fit together."""
        if self.sinks < 0:
            raise PolicyError(f"centroid: sinks must not be negative, got {self.sinks}")
        if self.protect:
            raise PolicyError(
                "centroid: centroids stand where the token stood that left last, which protect "
                "would blur; drop protect, or use sinks"
            )
        memory_slots(self, self.slots, self.sinks)
        super().validate()

    @property
    def occupancy(self) -> Occupancy:
        """Centroids are reserved from the start."""
        assert self.interval is not None, "filled in by __post_init__"
        reserved = memory_slots(self, self.slots, self.sinks)
        return Occupancy(self.budget - reserved, self.interval, reserved)

    @property
    def sink_slots(self) -> int:
        """Number of first tokens that are never evicted."""
        return self.sinks

    def frame(self, evicted: "Tensor") -> "Tensor":
        """Position of the token that left last."""
        return evicted + (self.sinks - 1)

    def absorb(self, memory: "Memory", passage: "Passage") -> "SlotMemory":
        """Assign the evicted tokens and move the centroids."""
        from kvpolicy.memory import centroids
        from kvpolicy.memory.state import slots_of

        return centroids.absorb(slots_of(memory), passage, offsets=None)
