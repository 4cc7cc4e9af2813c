"""What layers that attend to a sliding window hold, as the worker's book counts it.

vLLM gives their blocks back as tokens leave the window, and tells the worker nothing: what they
hold follows from how many tokens a request has.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from kvpolicy.footprint import window_blocks


@dataclass(frozen=True)
class SlidingGroup:
    """Sliding layers with one block table.

    Attributes:
        window: Tokens that a query attends to, its own included.
        block_size: Slots of a block.
        num_layers: The layers.
        page_bytes: Bytes of a block in one layer.
        full_page_bytes: Bytes of a block in one layer of stock vLLM.
    """

    window: int
    block_size: int
    num_layers: int
    page_bytes: int
    full_page_bytes: int


class Beside(NamedTuple):
    """What all sliding layers hold of a request.

    Attributes:
        blocks: Blocks of the pool.
        num_bytes: Bytes of these blocks.
        bytes_saved: Against stock vLLM, whose pages are narrower: never positive.
    """

    blocks: int
    num_bytes: int
    bytes_saved: int


def beside(groups: Iterable[SlidingGroup], tokens: int) -> Beside:
    """What sliding layers hold once token number `tokens` was decoded."""
    blocks = num_bytes = bytes_saved = 0
    for group in groups:
        count = window_blocks(tokens, group.window, group.block_size)
        blocks += count
        num_bytes += count * group.num_layers * group.page_bytes
        bytes_saved += count * group.num_layers * (group.full_page_bytes - group.page_bytes)
    return Beside(blocks, num_bytes, bytes_saved)
