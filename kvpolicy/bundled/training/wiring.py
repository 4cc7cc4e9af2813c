"""Initial weights that look back: the model starts with the circuit of an induction head.

Learning to find a repetition (https://arxiv.org/abs/2209.11895) from scratch takes a model of this
size millions of tokens, because two layers must come to agree. Here they agree from the first
step: layer 0 writes the tokens one and two positions back into the residual stream, and layer 1
attends to where the same two tokens were seen before and copies what came next. Everything stays
trainable; only the start is different.

The residual stream is laid out as half-open ranges of coordinates:

    [0, 1)      a constant, the same in every embedding
    [1, 128)    the token itself; what is written here becomes logits, since embeddings are tied
    [128, 192)  the token one position back, compressed to 64 numbers
    [192, 256)  the token two positions back, likewise
"""

import torch
from torch import Tensor

from kvpolicy.bundled.training.model import Llama, rotary_frequency

CONSTANT = 0
TOKEN = slice(1, 128)
ONE_BACK = slice(128, 192)
TWO_BACK = slice(192, 256)

CONSTANT_SIZE = 7.0
TOKEN_NORM = 7.0
FINAL_NORM = 0.09
LOOK_BACK_STRENGTH = 0.8
NUM_FAST_FREQUENCIES = 10
WRITE_STRENGTH = 0.85
NUM_SLOW_FREQUENCIES = 14
MATCH_STRENGTH = 3.0
COPY_STRENGTH = 1.7


@torch.no_grad()
def wire(model: Llama, seed: int) -> None:
    """Overwrite the embedding and the attention of the first two layers; needs hidden = 256."""
    if model.sizes.hidden != TWO_BACK.stop:
        raise ValueError(f"the layout needs hidden = 256: got {model.sizes.hidden}")
    generator = torch.Generator().manual_seed(seed)
    width = TOKEN.stop - TOKEN.start
    # A large residual stream, so that what the other layers write in the first steps does not
    # drown the circuit; a small final norm brings the logits back to their usual size.
    model.norm.weight.fill_(FINAL_NORM)
    embedding = model.embed_tokens.weight
    embedding.zero_()
    embedding[:, CONSTANT] = CONSTANT_SIZE
    tokens = torch.randn(len(embedding), width, generator=generator)
    # All equally long, or the first norm would make the constant of some louder than of others.
    embedding[:, TOKEN] = TOKEN_NORM * torch.nn.functional.normalize(tokens)
    # Rows of one orthogonal matrix: the two kv heads of layer 1 copy complementary halves.
    halves = _orthogonal(width, generator).split(model.sizes.head_dim)
    for index in range(model.sizes.num_layers):
        attention = model.layer(index).self_attn
        attention.q_proj.weight[:, CONSTANT] = 0.0
        attention.k_proj.weight[:, CONSTANT] = 0.0
    _wire_look_back(model, halves[0])
    _wire_match(model, halves, generator)


def _wire_look_back(model: Llama, compress: Tensor) -> None:
    """Make query heads 0 and 1 of layer 0 attend one and two positions back.

    A key made of the constant alone has the same phase everywhere before rotation; a query whose
    phase lags by `offset` positions then fits best `offset` positions back.
    """
    sizes = model.sizes
    attention = model.layer(0).self_attn
    frequency = rotary_frequency(sizes.head_dim, sizes.rope_theta)[:NUM_FAST_FREQUENCIES]
    # A coordinate and its partner half a head away rotate together.
    first = torch.arange(NUM_FAST_FREQUENCIES)
    second = first + sizes.head_dim // 2
    key = attention.k_proj.weight[: sizes.head_dim]
    key.zero_()
    key[first, CONSTANT] = LOOK_BACK_STRENGTH
    value = attention.v_proj.weight[: sizes.head_dim]
    value.zero_()
    value[:, TOKEN] = compress
    for head, (offset, place) in enumerate(((1, ONE_BACK), (2, TWO_BACK))):
        rows = slice(head * sizes.head_dim, (head + 1) * sizes.head_dim)
        query = attention.q_proj.weight[rows]
        query.zero_()
        query[first, CONSTANT] = LOOK_BACK_STRENGTH * torch.cos(offset * frequency)
        query[second, CONSTANT] = -LOOK_BACK_STRENGTH * torch.sin(offset * frequency)
        attention.o_proj.weight[place, rows] = WRITE_STRENGTH * torch.eye(sizes.head_dim)


def _wire_match(model: Llama, halves: tuple[Tensor, ...], generator: torch.Generator) -> None:
    """Make the first query head of each kv head of layer 1 match two tokens and copy the next.

    Queries and keys meet in slowly rotating coordinates only, so that distance matters little.
    """
    sizes = model.sizes
    attention = model.layer(1).self_attn
    half = sizes.head_dim // 2
    slow = torch.arange(half - NUM_SLOW_FREQUENCIES, half)
    slow = torch.cat((slow, slow + half))
    group = sizes.num_query_heads // sizes.num_kv_heads
    for kv_head, copied in enumerate(halves):
        kv_rows = slice(kv_head * sizes.head_dim, (kv_head + 1) * sizes.head_dim)
        first_row = kv_head * group * sizes.head_dim
        rows = slice(first_row, first_row + sizes.head_dim)
        match_one, match_two = (
            MATCH_STRENGTH * _orthogonal(sizes.head_dim, generator)[: len(slow)] for _ in range(2)
        )
        key = attention.k_proj.weight[kv_rows]
        key.zero_()
        key[slow, ONE_BACK] = match_one
        key[slow, TWO_BACK] = match_two
        query = attention.q_proj.weight[rows]
        query.zero_()
        query[slow, TOKEN] = match_one @ halves[0]
        query[slow, ONE_BACK] = match_two
        value = attention.v_proj.weight[kv_rows]
        value.zero_()
        value[: len(copied), TOKEN] = copied
        copy = attention.o_proj.weight[:, rows]
        copy[TOKEN, : len(copied)] = COPY_STRENGTH * copied.mT


def _orthogonal(size: int, generator: torch.Generator) -> Tensor:
    return torch.linalg.qr(torch.randn(size, size, generator=generator)).Q
