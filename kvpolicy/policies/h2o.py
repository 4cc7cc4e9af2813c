"""H2O: keeps heavy hitters by accumulated attention, and recent tokens."""

from typing import TYPE_CHECKING, ClassVar, Literal

from kvpolicy.errors import PolicyError
from kvpolicy.policy import Accumulation, ScorePolicy, View, spec_key

if TYPE_CHECKING:
    from torch import Tensor


class H2O(ScorePolicy):
    """Keep the tokens that received most attention so far, and the newest ones.

    A_s <- A_s + a_{t,s} over every token t since slot s was written; the lowest A outside
    the recent window goes (Zhang et al. 2023, sections 4 and 5.1: half of the budget is
    recent). Weights are the softmax over what is still held, per KV head, the query heads of
    a group reduced by `group_pool`; evictions leave the survivors' sums as they are.

    `statistic` (spec key ``score``): ``sum`` is the paper's; ``mean`` divides by the number
    of observations; ``relative`` takes the mean of weight x visible slots, which unlike the
    sum does not favour tokens that were there early. ``decay`` below 1 forgets old attention
    (A2SF, arXiv 2407.20485).

    Deviations: the authors' code knows no grouped KV heads and scores a prompt at once, with
    column sums that look into the future; here scores only ever use the past, as the text of
    the paper says. Algorithm 1 read literally scores by the current row, which is `tova`.

    Attributes:
        recent: Newest tokens that are never evicted; a float is a fraction of the budget.
        statistic: Spec key ``score``: sum, mean or mean relative to uniform attention.
        decay: Factor on the accumulated attention before each token's addition.
    """

    name: ClassVar[str] = "h2o"
    paper: ClassVar[str] = "Zhang et al. 2023, arXiv 2306.14048"
    needs: ClassVar[tuple[str, ...]] = ("accumulated",)

    recent: int | float = 0.5
    statistic: Literal["sum", "mean", "relative"] = spec_key("score", "sum")
    decay: float = 1.0

    def validate(self) -> None:
        """Refuse decay factors outside (0, 1]."""
        if not 0.0 < self.decay <= 1.0:
            raise PolicyError(f"h2o: decay must lie in (0, 1], got {self.decay}")
        super().validate()

    @property
    def accumulation(self) -> Accumulation:
        """Plain, decayed or relative sums."""
        return Accumulation(decay=self.decay, relative=self.statistic == "relative")

    def score(self, view: View) -> "Tensor":
        """Rate a slot by its accumulated attention."""
        assert view.accumulated is not None
        if self.statistic == "sum":
            return view.accumulated
        return view.accumulated / (view.n - view.positions).clamp(min=1)
