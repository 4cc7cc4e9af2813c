"""KeyDiff: keeps the tokens whose keys are unlike the others."""

from typing import TYPE_CHECKING, ClassVar

from kvpolicy.policy import GuardedPolicy, View

if TYPE_CHECKING:
    from torch import Tensor


class KeyDiff(GuardedPolicy):
    """Evict the tokens whose keys are most like the mean direction of all, per KV head.

    score_s = -cos(k_s, anchor), where the anchor is the mean over the held slots of k / ||k||
    (Park et al. 2025, section 3): what is left is spread out, and distinctive keys tend to be
    the ones that get attention. It looks at no attention. Keys are compared as they are cached,
    rotated, as in the authors' description and in kvpress.

    Deviations: the paper evicts block by block of a prompt; ``prefill=stream`` with an interval
    of the block's size does that, ``prefill=bulk`` rates the whole prompt at once as kvpress's
    press does.
    """

    name: ClassVar[str] = "keydiff"
    paper: ClassVar[str] = "Park et al. 2025, arXiv 2504.15364"
    needs: ClassVar[tuple[str, ...]] = ("keys",)

    def score(self, view: View) -> "Tensor":
        """Rate a slot by how far its key points away from the mean direction."""
        from torch.nn.functional import normalize

        assert view.keys is not None
        valid = view.valid[..., None]
        directions = normalize(view.keys.float(), dim=-1).where(valid, 0.0)  # [B, H_kv, S, D]
        anchor = directions.sum(dim=2, keepdim=True) / valid.sum(dim=2, keepdim=True)
        return -(directions * normalize(anchor, dim=-1)).sum(dim=-1)
