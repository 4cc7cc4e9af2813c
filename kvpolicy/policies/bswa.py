"""Block sliding window: whole blocks of tokens leave at once."""

from dataclasses import field
from typing import TYPE_CHECKING, ClassVar

from kvpolicy.errors import PolicyError
from kvpolicy.policy import EvictionPolicy, View

if TYPE_CHECKING:
    from torch import Tensor


class BSWA(EvictionPolicy):
    """Keep the current block of tokens and the `segments` blocks before it (TransformerBSWA).

    With blocks of B tokens counted from position `sinks`, block tau sees blocks tau-m .. tau-1
    whole, itself up to the current token, and the sinks (TransformerFAM, equation 1 and
    algorithm 1): between m B + 1 and (m + 1) B tokens beside the sinks. It holds
    segments * block + sinks slots after an eviction and evicts `block` at a time, so that it has
    neither budget nor interval.

    With one segment of M tokens this is Transformer-XL's memory at inference (Dai et al. 2019,
    arXiv 1901.02860): cached keys and values of the previous segment are what its cached hidden
    states would be projected to. Its exact-window mask makes no difference beyond noise
    (TransformerFAM, appendix B.4.7) and is `window`. ``segments=0`` is attention within blocks.

    Deviation: a block leaves when the next one is complete, not when its successor begins, so
    that eviction follows attention as everywhere; what a token sees is the same.

    Attributes:
        block: Tokens of a block, B.
        segments: Blocks kept before the current one, m.
        sinks: First tokens that are never evicted, outside all blocks.
    """

    name: ClassVar[str] = "bswa"
    paper: ClassVar[str] = "Hwang et al. 2024, arXiv 2404.09173"
    reindexable: ClassVar[bool] = True
    sets_prompts_apart: ClassVar[bool] = False
    smallest_budget: ClassVar[int] = 0

    block: int
    segments: int
    sinks: int = 0
    budget: int = field(init=False, default=0)
    interval: int | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        """Work out what the law keeps."""
        if isinstance(self.block, int) and isinstance(self.segments, int):
            object.__setattr__(self, "budget", self.segments * self.block + self.sinks)
            object.__setattr__(self, "interval", self.block)
        super().__post_init__()

    def validate(self) -> None:
        """Refuse blocks that are none, and spans that would break them."""
        require_blocks(self, self.block, self.segments, self.sinks)
        super().validate()

    @property
    def sink_slots(self) -> int:
        """Number of first tokens that are never evicted."""
        return self.sinks

    def score(self, view: View) -> "Tensor":
        """Rate a slot by its position: the oldest block goes first."""
        return view.positions


def require_blocks(policy: EvictionPolicy, block: int, segments: int, sinks: int) -> None:
    """Refuse sizes that make no blocks.

    Raises:
        PolicyError: With the size to change.
    """
    if block < 1 or segments < 0 or sinks < 0:
        raise PolicyError(
            f"{policy.label}: block must be at least 1, segments and sinks must not be negative, "
            f"got block={block}, segments={segments}, sinks={sinks}"
        )
    if policy.protect:
        raise PolicyError(
            f"{policy.label}: it keeps whole blocks, which protect would break; drop protect, or "
            "use window"
        )
