"""Kernels that attend in the core's place: the same decisions and outputs, and what is refused."""

import pytest
import torch

import kvpolicy
from kvpolicy import UnsupportedError
from kvpolicy.attention import (
    Answer,
    AttentionLayer,
    query_key_products,
    weighted_values,
)
from kvpolicy.engine import step
from kvpolicy.lookahead import extend
from kvpolicy.rotary import Rotary

SPECS = (
    "full",
    "window:budget=12,interval=1",
    "sinks:budget=12,interval=5",
    "h2o:budget=12,interval=3",
    "h2o:budget=12,score=relative,decay=0.9,group_pool=max",
    "h2o:budget=12,scope=layer,prefill=bulk",
    "tova:budget=12,interval=4",
    "tova:budget=12,scope=head,protect=prompt",
    "snapkv:budget=12,window=3,kernel=3",
    "keydiff:budget=12,interval=3",
    "random:budget=12,interval=2",
    "bswa:block=4,segments=2",
    "mix:layers=(0:window;1-:h2o),budget=12",
)
TOKENS, PROMPT = 70, 20


class Plain:
    """A kernel as its protocol describes it, in plain torch; it counts its calls."""

    def __init__(self):
        self.calls = 0

    def __call__(self, q, keys, values, visible, scale):
        """Attend row by row to the slots that each query sees, and to nothing behind them."""
        self.calls += 1
        parts = []
        for row, count in enumerate(visible):
            here = slice(row, row + 1)
            logits = query_key_products(q[here], keys[here, :, :count], scale)
            later = torch.ones(q.shape[2], count, dtype=torch.bool).triu(count - q.shape[2] + 1)
            logits = logits.masked_fill(later, -torch.inf)
            output = weighted_values(logits.softmax(-1), values[here, :, :count])
            parts.append((output.to(q.dtype), logits.logsumexp(-1).flatten(1, 2)))
        outputs, lses = zip(*parts, strict=True)
        return Answer(torch.cat(outputs), torch.cat(lses))


def tensors(batch=2):
    """Queries of four heads, keys and values of two."""
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randn(batch, heads, TOKENS, 16, generator=generator) for heads in (4, 2, 2))


def feed(spec, sizes, kernel=None):
    """Feed tokens in chunks; outputs, and positions held after each chunk."""
    layer = AttentionLayer(kvpolicy.parse(spec), 1, 0.25, kernel=kernel)
    q, k, v = tensors()
    slots = layer.new_slots(q, k, v, [PROMPT] * 2)
    outputs, held = [], []
    for chunk in zip(*(x.split(sizes, dim=2) for x in (q, k, v)), strict=True):
        if chunk[0].shape[2] == 1:
            outputs.append(step(layer, slots, *(x[:, :, 0] for x in chunk))[:, :, None])
        else:
            outputs.append(extend(layer, slots, *chunk))
        count = slots.tokens[0] - slots.evicted[0]
        held.append(slots.positions[:, :, :count].sort(-1).values)
    return torch.cat(outputs, dim=2), held


@pytest.mark.parametrize("sizes", [[1] * TOKENS, [TOKENS], [33, 1, 1, 35]], ids=len)
@pytest.mark.parametrize("spec", SPECS)
def test_a_kernel_changes_nothing(spec, sizes):
    """One token at a time, all at once, or mixed: the same sets, and outputs but for rounding."""
    kernel = Plain()
    expected, kept = feed(spec, sizes)
    output, held = feed(spec, sizes, kernel)
    assert kernel.calls > 0
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=0)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(held, kept, strict=True))


def test_rows_of_unequal_lengths_reach_a_kernel_as_they_are():
    """A step of rows that hold unequally many slots tells each row's own number."""
    layer = AttentionLayer(kvpolicy.parse("tova:budget=12"), 0, 0.25, kernel=Plain())
    plain = AttentionLayer(kvpolicy.parse("tova:budget=12"), 0, 0.25)
    q, k, v = tensors()
    outputs = []
    for each in (layer, plain):
        slots = each.new_slots(q, k, v)
        first = slots.rows([0], 0)
        extend(each, first, *(x[:1, :, :9] for x in (q, k, v)))
        slots.put_rows([0], first, each.occupancy)
        outputs.append([step(each, slots, *(x[:, :, n] for x in (q, k, v))) for n in range(9, 30)])
    torch.testing.assert_close(*outputs, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("centroid:budget=16,slots=4", "a memory is attended together with the slots"),
        ("sinks:budget=16,rope=reindex", "turns queries differently for sinks"),
    ],
)
def test_what_a_kernel_cannot_do_is_refused(spec, message):
    """Policies whose attention is more than a softmax over slots are refused, with the reason."""
    rotary = Rotary(torch.ones(8))
    with pytest.raises(UnsupportedError, match=message):
        AttentionLayer(kvpolicy.parse(spec), 0, 0.25, rotary, kernel=Plain())
