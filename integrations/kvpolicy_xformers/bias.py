"""Retained slots as xformers attention biases.

Every KV head of every row keeps tokens of its own. In storage [B, H_kv, C, D] each is a stretch of
C slots whose first ones are held, so that each is a block of a block-diagonal bias, and the slots
behind those that are held are its gap. No key is moved, and no slot of a gap is read.

Axes: B rows, H_kv KV heads, C slots of capacity, Q queries of consecutive tokens, N blocks of a
paged cache, P slots of a block, D head dimension.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from xformers.ops.fmha.attn_bias import (  # pyright: ignore[reportMissingImports]
    AttentionBias,
    BlockDiagonalCausalWithOffsetGappyKeysMask,
    BlockDiagonalGappyKeysMask,
    PagedBlockDiagonalCausalWithOffsetGappyKeysMask,
    PagedBlockDiagonalGappyKeysMask,
)

from kvpolicy import PolicyError


def slot_bias(
    visible: Sequence[int],
    kv_heads: int,
    capacity: int,
    queries: int = 1,
    device: torch.device | str = "cpu",
) -> AttentionBias:
    """The bias of slots [B, H_kv, C, D], seen as keys [1, B * H_kv * C, ...].

    Queries are packed alike: those of a row's KV head stand together, Q at a time, with the query
    heads of its group as heads.

    Args:
        visible: Slots that each row's last query sees, the first of its storage in every head;
            those of its own Q tokens come last, in order.
        kv_heads: H_kv.
        capacity: C.
        queries: Q.
        device: Where the bias is to lie.

    Raises:
        PolicyError: A row sees more slots than there are, or fewer than its own tokens.
    """
    _require_room(visible, queries, capacity)
    lengths = [count for count in visible for _ in range(kv_heads)]
    kind = (
        BlockDiagonalGappyKeysMask if queries == 1 else BlockDiagonalCausalWithOffsetGappyKeysMask
    )
    return kind.from_seqlens(
        q_seqlen=[queries] * len(lengths),
        kv_seqstarts=[capacity * index for index in range(len(lengths) + 1)],
        kv_seqlen=lengths,
        device=torch.device(device),
    )


def block_bias(
    visible: Sequence[int],
    block_table: Tensor,
    block_size: int,
    kv_heads: int,
    queries: int = 1,
) -> AttentionBias:
    """The bias of a paged cache [N, H_kv, P, D], seen as keys [1, N * H_kv * P, ...].

    As `slot_bias`: each KV head of each row is a block of the bias, with pages of its own.

    Args:
        visible: As in `slot_bias`.
        block_table: [B, blocks] int32, each row's blocks in order.
        block_size: P.
        kv_heads: H_kv.
        queries: Q.

    Raises:
        PolicyError: A row sees more slots than its blocks have, or fewer than its own tokens.
    """
    heads = torch.arange(kv_heads, device=block_table.device, dtype=block_table.dtype)
    pages = block_table[:, None] * kv_heads + heads[:, None]  # [B, H_kv, blocks]
    return _paged(
        [count for count in visible for _ in range(kv_heads)],
        pages.flatten(0, 1),
        block_size,
        queries,
    )


def paged_bias(
    visible: Sequence[int], block_table: Tensor, block_size: int, queries: int = 1
) -> AttentionBias:
    """The bias of a paged cache [N, P, H_kv, D], seen as keys [1, N * P, H_kv, ...].

    All heads of a row hold equally many slots, each with tokens of its own: one block of the bias
    serves them all.

    Args:
        visible: As in `slot_bias`.
        block_table: [B, blocks] int32, each row's blocks in order.
        block_size: P.
        queries: Q.

    Raises:
        PolicyError: A row sees more slots than its blocks have, or fewer than its own tokens.
    """
    return _paged(list(visible), block_table, block_size, queries)


def _paged(lengths: list[int], pages: Tensor, page_size: int, queries: int) -> AttentionBias:
    """A bias over pages [sequences, pages] of each sequence."""
    room = pages.shape[1] * page_size
    _require_room(lengths, queries, room)
    # The paged classes' own from_seqlens contradicts itself in xformers 0.0.35: one of its checks
    # wants as many starts as lengths, the other one more.
    apart = slot_bias(lengths, 1, room, queries, pages.device)
    is_causal = queries > 1
    kind = (
        PagedBlockDiagonalCausalWithOffsetGappyKeysMask
        if is_causal
        else PagedBlockDiagonalGappyKeysMask
    )
    return apart.make_paged(pages.to(torch.int32), page_size, room, kind)


def _require_room(visible: Sequence[int], queries: int, room: int) -> None:
    if queries < 1 or not visible or not all(queries <= count <= room for count in visible):
        raise PolicyError(
            f"a bias needs rows that see at least their own {queries} tokens and at most the "
            f"{room} slots that there are; got {list(visible)[:8]}"
        )
