"""SnapKV: keeps the tokens of a prompt that its last queries attend to."""

from dataclasses import field
from typing import TYPE_CHECKING, ClassVar, Literal

from kvpolicy.errors import PolicyError
from kvpolicy.policy import Accumulation, ScorePolicy, View

if TYPE_CHECKING:
    from torch import Tensor


class SnapKV(ScorePolicy):
    """Let a prompt's last queries vote for what stays of it, smoothed along the text.

    With the last `window` queries of the prompt, a token before them gets the attention that
    they give it, summed; the votes are averaged over `kernel` neighbouring tokens, so that what
    surrounds a vote stays with it (Li et al. 2024, section 4). The window itself always stays.
    The vote needs a prompt that was attended densely, so prompts are evicted from in bulk.

    Evictions after the prompt do the same with the queries since the eviction before, at most
    `window` of them, which all see the same slots; neighbours are those that are still held.

    Deviations: pooled by the mean as in kvpress (the authors' code has both, with windows of 8
    to 32 and kernels of 5 and 7), and over the query heads of a KV head, as kvpress does. kvpress
    keeps the window by a score above all others, here it is protected. A sum over the window
    ranks as its mean does.

    Attributes:
        window: Queries that vote; their tokens are never evicted.
        kernel: Neighbouring tokens over which votes are averaged, an odd number.
    """

    name: ClassVar[str] = "snapkv"
    paper: ClassVar[str] = "Li et al. 2024, arXiv 2404.14469"
    needs: ClassVar[tuple[str, ...]] = ("accumulated",)

    window: int = 64
    kernel: int = 5
    recent: int | float = field(init=False, default=0)
    prefill: Literal["bulk"] = "bulk"

    def validate(self) -> None:
        """Refuse windows without tokens to vote for, and kernels without a middle."""
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise PolicyError(f"snapkv: kernel must be odd and at least 1, got {self.kernel}")
        if not 1 <= self.window < self.budget:
            raise PolicyError(
                f"snapkv: budget must exceed window and window must be at least 1, got "
                f"budget={self.budget}, window={self.window}; raise budget or lower window"
            )
        super().validate()

    @property
    def recent_slots(self) -> int:
        """The tokens that vote stay."""
        return self.window

    @property
    def accumulation(self) -> Accumulation:
        """Sums over the window before an eviction."""
        return Accumulation(window=self.window)

    def score(self, view: View) -> "Tensor":
        """Rate a slot by the votes for it and its neighbours in the text."""
        import torch
        from torch.nn.functional import avg_pool1d

        assert view.accumulated is not None
        candidates = view.valid & (view.positions < view.n - self.window)
        votes = view.accumulated.where(candidates, 0.0)
        last = torch.iinfo(torch.int64).max  # past what slots that are not held may say
        in_order = view.positions.where(candidates, last).argsort(dim=-1)
        pooled = avg_pool1d(
            votes.gather(-1, in_order), self.kernel, stride=1, padding=self.kernel // 2
        )
        return torch.zeros_like(pooled).scatter(-1, in_order, pooled).where(candidates, 0.0)
