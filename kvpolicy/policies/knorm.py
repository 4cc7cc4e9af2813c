"""KNorm: keeps the tokens whose keys are short."""

from typing import TYPE_CHECKING, ClassVar

from kvpolicy.policy import GuardedPolicy, View

if TYPE_CHECKING:
    from torch import Tensor


class KNorm(GuardedPolicy):
    """Evict the tokens with the longest keys, per KV head.

    score_s = -||k_s||_2 (Devoto et al. 2024, section 3): in trained models tokens with short
    keys, attention sinks among them, tend to receive most attention. It looks at no attention,
    and a rotation changes no norm, so that a slot's score never changes.

    Deviations: the paper skips its first two layers, where the correlation is weak; here, as in
    kvpress, every layer is treated alike.
    """

    name: ClassVar[str] = "knorm"
    paper: ClassVar[str] = "Devoto et al. 2024, arXiv 2406.11430"
    needs: ClassVar[tuple[str, ...]] = ("keys",)

    def score(self, view: View) -> "Tensor":
        """Rate a slot by the shortness of its key."""
        import torch

        assert view.keys is not None
        return -torch.linalg.vector_norm(view.keys, dim=-1, dtype=torch.float32)
