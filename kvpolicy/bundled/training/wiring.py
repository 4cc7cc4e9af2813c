"""Initial weights that look back: an induction head, and attention sinks.

Learning to find a repetition (https://arxiv.org/abs/2209.11895) from scratch takes a model of this
size millions of tokens, because two layers must come to agree. Here they agree from the first
step: layer 0 writes earlier tokens into the residual stream, and layer 1 attends to where the same
tokens were seen before and copies what came next. Two tokens do not tell the values of a list
apart (": 4" stands in many lines), so that a blur of those before them counts as well.

Attention sinks take longer still: https://arxiv.org/abs/2410.10781 finds them in models trained on
billions of tokens. Here every head behind layer 0 starts with one: a query that finds nothing
better attends to BOS, whose value is zero, so that the head is silent unless it has something to
say. As in large models (https://arxiv.org/abs/2603.05498), a massive activation keeps the sink in
place: the feed-forward network of layer 0 writes a number to the residual stream of BOS that
outweighs whatever is written there later, so that the norms before later keys let nothing else
through. Everything stays trainable; only the start is different.

The residual stream is laid out as half-open ranges of coordinates:

    [0, 1)      a constant, the same in every embedding
    [1, 2)      whether the token is BOS, in its embedding
    [2, 3)      the same, written by layer 0, and many times larger
    [3, 128)    the token itself; what is written here becomes logits, since embeddings are tied
    [128, 176)  the token one position back, compressed to 48 numbers
    [176, 216)  the token two positions back, compressed to the first 40 of these numbers
    [216, 256)  the tokens three to seven positions back, likewise, blurred into one
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kvpolicy.bundled.training.model import Architecture, Llama, rotary_frequency
from kvpolicy.bundled.training.tokenizer import BOS_ID

CONSTANT = 0
IS_BOS = 1
MASSIVE = 2
TOKEN = slice(3, 128)
ONE_BACK = slice(128, 176)
TWO_BACK = slice(176, 216)
CONTEXT = slice(216, 256)

CONSTANT_SIZE = 7.0
TOKEN_NORM = 7.0
FINAL_NORM = 0.09
WRITE_STRENGTH = 0.85
NUM_SLOW_FREQUENCIES = 14
MATCH_STRENGTH = 3.0
CONTEXT_STRENGTH = 3.0
COPY_STRENGTH = 1.7
NUM_SINK_FREQUENCIES = 4
SINK_STRENGTH = 0.32
MASSIVE_SIZE = 200.0


@dataclass(frozen=True, kw_only=True)
class LookBack:
    """A head of layer 0 that attends `offset` positions back and writes to `place`.

    Keys and queries meet in the half-open range `frequencies`, fastest first. Slower ones and less
    `strength` blur what the head sees.
    """

    offset: float
    place: slice
    frequencies: tuple[int, int]
    strength: float


# Two heads share each of the two kv heads.
LOOK_BACKS = (
    LookBack(offset=1, place=ONE_BACK, frequencies=(0, 10), strength=0.8),
    LookBack(offset=2, place=TWO_BACK, frequencies=(0, 10), strength=0.8),
    LookBack(offset=3.5, place=CONTEXT, frequencies=(2, 10), strength=0.35),
    LookBack(offset=6, place=CONTEXT, frequencies=(2, 10), strength=0.35),
)


@torch.no_grad()
def wire(model: Llama, seed: int, *, has_sinks: bool = True) -> None:
    """Overwrite the embedding and parts of the attention; needs hidden = 256.

    Args:
        model: Freshly initialised.
        seed: The same seed gives the same weights.
        has_sinks: Whether heads start with attention sinks beside the induction head.
    """
    if model.sizes.hidden != CONTEXT.stop:
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
    embedding[BOS_ID, TOKEN] = 0.0
    embedding[BOS_ID, IS_BOS] = TOKEN_NORM
    # Rows of one orthogonal matrix: the two kv heads of layer 1 copy complementary halves.
    halves = _orthogonal(width, generator).split(model.sizes.head_dim)
    for index in range(model.sizes.num_layers):
        attention = model.layer(index).self_attn
        attention.q_proj.weight[:, CONSTANT] = 0.0
        attention.k_proj.weight[:, CONSTANT] = 0.0
    _wire_look_back(model, halves[0])
    _wire_match(model, halves, generator)
    if has_sinks:
        _wire_massive_activation(model)
        for index in range(1, model.sizes.num_layers):
            _wire_sinks(model, index)


def _wire_look_back(model: Llama, compress: Tensor) -> None:
    """Make the heads of layer 0 attend to what stands a few positions back.

    A key made of the constant alone has the same phase everywhere before rotation; a query whose
    phase lags by `offset` positions then fits best `offset` positions back.
    """
    sizes = model.sizes
    attention = model.layer(0).self_attn
    speeds = rotary_frequency(sizes.head_dim, sizes.rope_theta)
    group = sizes.num_query_heads // sizes.num_kv_heads
    attention.k_proj.weight.zero_()
    for head, look in enumerate(LOOK_BACKS):
        kv_rows = _rows(sizes, head // group)
        rows = _rows(sizes, head)
        # A coordinate and its partner half a head away rotate together.
        first = torch.arange(*look.frequencies)
        second = first + sizes.head_dim // 2
        frequency = speeds[first]
        attention.k_proj.weight[kv_rows][first, CONSTANT] = look.strength
        attention.v_proj.weight[kv_rows] = 0.0
        attention.v_proj.weight[kv_rows, TOKEN] = compress
        query = attention.q_proj.weight[rows]
        query.zero_()
        query[first, CONSTANT] = look.strength * torch.cos(look.offset * frequency)
        query[second, CONSTANT] = -look.strength * torch.sin(look.offset * frequency)
        width = look.place.stop - look.place.start
        write = attention.o_proj.weight[look.place, rows]
        write[:, :width] = WRITE_STRENGTH * torch.eye(width)


def _wire_match(model: Llama, halves: tuple[Tensor, ...], generator: torch.Generator) -> None:
    """Make the first query head of each kv head of layer 1 match earlier tokens and copy the next.

    Queries and keys meet in slowly rotating coordinates only, so that distance matters little.
    """
    sizes = model.sizes
    attention = model.layer(1).self_attn
    half = sizes.head_dim // 2
    slow = torch.arange(half - NUM_SLOW_FREQUENCIES, half)
    slow = torch.cat((slow, slow + half))
    group = sizes.num_query_heads // sizes.num_kv_heads
    one, two, context = (place.stop - place.start for place in (ONE_BACK, TWO_BACK, CONTEXT))
    for kv_head, copied in enumerate(halves):
        kv_rows, rows = _rows(sizes, kv_head), _rows(sizes, kv_head * group)
        match_one, match_two, match_context = (
            strength * _orthogonal(sizes.head_dim, generator)[: len(slow), :width]
            for strength, width in (
                (MATCH_STRENGTH, one),
                (MATCH_STRENGTH, two),
                (CONTEXT_STRENGTH, context),
            )
        )
        key = attention.k_proj.weight[kv_rows]
        key.zero_()
        key[slow, ONE_BACK] = match_one
        key[slow, TWO_BACK] = match_two
        key[slow, CONTEXT] = match_context
        query = attention.q_proj.weight[rows]
        query.zero_()
        query[slow, TOKEN] = match_one @ halves[0][:one]
        query[slow, ONE_BACK] = torch.nn.functional.pad(match_two, (0, one - two))
        query[slow, CONTEXT] = match_context
        value = attention.v_proj.weight[kv_rows]
        value.zero_()
        value[: len(copied), TOKEN] = copied
        copy = attention.o_proj.weight[:, rows]
        copy[TOKEN, : len(copied)] = COPY_STRENGTH * copied.mT


def _wire_massive_activation(model: Llama) -> None:
    """Give one neuron of layer 0 to BOS: silent for other tokens, it writes `MASSIVE_SIZE`."""
    network, neuron = model.layer(0).mlp, 0
    for weight in (network.gate_proj.weight, network.up_proj.weight):
        weight[neuron] = 0.0
        weight[neuron, IS_BOS] = 1.0
    # What the norm before the network makes of the embedding of BOS, which layer 0 adds nothing to.
    flag = TOKEN_NORM * (model.sizes.hidden / (CONSTANT_SIZE**2 + TOKEN_NORM**2)) ** 0.5
    network.down_proj.weight[MASSIVE, neuron] = MASSIVE_SIZE / flag**2


def _wire_sinks(model: Llama, index: int) -> None:
    """Make all heads of one layer attend to BOS for want of something better, and read nothing.

    The constant in every query meets the key of BOS alone, in the coordinates that hardly rotate
    within any context the model sees.
    """
    attention, half = model.layer(index).self_attn, model.sizes.head_dim // 2
    slowest = torch.arange(half - NUM_SINK_FREQUENCIES, half)
    slowest = torch.cat((slowest, slowest + half))
    queries, keys = (
        projection.weight.unflatten(0, (-1, model.sizes.head_dim))  # [H, D, hidden], a view
        for projection in (attention.q_proj, attention.k_proj)
    )
    queries[:, slowest, CONSTANT] = SINK_STRENGTH
    keys[:, :, MASSIVE] = 0.0
    keys[:, slowest, MASSIVE] = SINK_STRENGTH
    attention.v_proj.weight[:, [CONSTANT, IS_BOS, MASSIVE]] = 0.0


def _rows(sizes: Architecture, head: int) -> slice:
    """Return the half-open range of rows that belong to one head."""
    return slice(head * sizes.head_dim, (head + 1) * sizes.head_dim)


def _orthogonal(size: int, generator: torch.Generator) -> Tensor:
    return torch.linalg.qr(torch.randn(size, size, generator=generator)).Q
