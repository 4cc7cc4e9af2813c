"""FIFO window: keeps the most recent tokens."""

from typing import TYPE_CHECKING, ClassVar

from kvpolicy.policy import EvictionPolicy, View

if TYPE_CHECKING:
    from torch import Tensor


class Window(EvictionPolicy):
    """Keep the newest tokens, evict the oldest: a sliding window over the cache.

    S_t = {t-k+1..t}. With ``interval=1`` this is sliding-window attention (Longformer,
    arXiv 2004.05150) imposed on a model that was trained without it. Models whose attention
    sinks leave the window collapse (StreamingLLM, arXiv 2309.17453, section 3.1); `sinks`
    mends that. All heads keep the same set. ``rope=reindex`` changes nothing here, because
    distances inside a contiguous window do not depend on where it starts.

    Deviation: eviction follows attention, so a token sees up to budget + interval slots.
    """

    name: ClassVar[str] = "window"
    paper: ClassVar[str] = "Beltagy et al. 2020, arXiv 2004.05150"
    reindexable: ClassVar[bool] = True

    def score(self, view: View) -> "Tensor":
        """Rate a slot by its position: the oldest goes first."""
        return view.positions
