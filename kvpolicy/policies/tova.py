"""TOVA: keeps the tokens that the newest token attends to."""

from typing import TYPE_CHECKING, ClassVar, Literal

from kvpolicy.policy import ScorePolicy, View

if TYPE_CHECKING:
    from torch import Tensor


class TOVA(ScorePolicy):
    """Evict what the newest token attends to least, one set for all heads of a layer.

    After attention at step t, m_s = mean over all query heads of a_{t,s}; the lowest m goes,
    the newest token itself included (Oren et al. 2024, section 4 and algorithm 1). It keeps
    no statistic, no window and no sinks; ``scope=head`` is the paper's weaker variant, which
    decides per KV head by the mean over its query heads.

    Deviations: with an interval above 1 the row of the token at whose step the eviction
    falls decides for all surplus slots at once.
    """

    name: ClassVar[str] = "tova"
    paper: ClassVar[str] = "Oren et al. 2024, arXiv 2401.06104"
    needs: ClassVar[tuple[str, ...]] = ("last_row",)

    scope: Literal["head", "layer"] = "layer"

    def score(self, view: View) -> "Tensor":
        """Rate a slot by the newest token's attention to it."""
        assert view.weights is not None
        return view.weights
