"""Attention sinks: keeps the first tokens and the most recent ones."""

from typing import TYPE_CHECKING, ClassVar

from kvpolicy.errors import PolicyError
from kvpolicy.policy import EvictionPolicy, View

if TYPE_CHECKING:
    from torch import Tensor


class Sinks(EvictionPolicy):
    """Keep the first `sinks` tokens and a window of the newest (StreamingLLM, Window+i).

    S_t = {0..i-1} u {t-w+1..t}, i + w = budget. Softmax must put its mass somewhere, and
    trained models put the surplus on the first tokens; evicting those inflates all other
    weights (section 3.1 of the paper). ``rope=keep`` leaves original positions, as the
    TOVA paper's Window+i does; ``rope=reindex`` attends at cache ranks, as StreamingLLM
    does (section 3.2): kept [0, 1, 2, 3, 6, 7, 8], the next token sits at rank 7.

    Deviations: cached keys are never rotated again. Ranks differ from positions by the same
    number of evicted tokens for every sink, so the query is turned back by that number for
    the sink slots, which gives the same logits. Eviction follows attention.

    Attributes:
        sinks: First tokens that are never evicted.
    """

    name: ClassVar[str] = "sinks"
    paper: ClassVar[str] = "Xiao et al. 2023, arXiv 2309.17453"
    reindexable: ClassVar[bool] = True

    sinks: int = 4

    def validate(self) -> None:
        """Refuse a budget without room beside the sinks."""
        if not 0 <= self.sinks < self.budget:
            raise PolicyError(
                f"sinks: budget must exceed sinks and sinks must not be negative, got "
                f"budget={self.budget}, sinks={self.sinks}; raise budget or lower sinks"
            )
        super().validate()

    @property
    def sink_slots(self) -> int:
        """Number of first tokens that are never evicted."""
        return self.sinks

    def score(self, view: View) -> "Tensor":
        """Rate a slot by its position; the sinks themselves are protected."""
        return view.positions
