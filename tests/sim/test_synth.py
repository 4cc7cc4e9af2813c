"""Synthetic traces: full attention over them shows the pattern that their name promises."""

import numpy as np
import pytest
import torch

from kvpolicy import KVPolicyError, PolicyError, TraceError
from kvpolicy.trace import Trace
from kvpolicy_sim.patterns import NEEDLE, PATTERNS, SINKS, question_length
from kvpolicy_sim.synth import synth
from oracles.dense import replay_layer

KINDS = ("q", "k", "v", "lse", "out")


def weights(trace, layer=0):
    """Full attention's weights in float64, mean over query heads, [H_kv, T, T]."""
    q, k = (trace.read(kind, layer, dtype=torch.float64) for kind in ("q", "k"))
    logits = q.unflatten(0, (len(k), -1)) @ k[:, None].transpose(-1, -2) * trace.header.scale
    future = torch.ones(logits.shape[-2:], dtype=torch.bool).triu(1)
    return logits.masked_fill(future, -torch.inf).softmax(-1).mean(1)


def shares(trace, first, last, rows):
    """Mean weight of the positions [first, last) in some rows, per KV head."""
    return weights(trace)[:, rows, first:last].sum(-1).mean(-1)


def ages(num_tokens):
    """Distance of each column from each row, negative in the future."""
    positions = torch.arange(num_tokens)
    return positions[:, None] - positions


@pytest.mark.parametrize("tokens", [256, 1500])
@pytest.mark.parametrize("seed", [0, 1])
def test_sinks_draw_much_weight_and_recent_tokens_some(tokens, seed, tmp_path):
    """The first tokens hold more than 30 % of any row, however long the context."""
    trace = synth(tmp_path / "t.kvtrace", pattern="sink", tokens=tokens, seed=seed)
    late = slice(tokens // 2, tokens)
    assert bool((shares(trace, 0, SINKS, late) > 0.3).all())
    found = weights(trace)[:, late]
    recent = ((ages(tokens) >= 0) & (ages(tokens) < tokens // 8))[late]
    others = found.masked_fill(~recent, 0).sum(-1) / (1 - found[..., :SINKS].sum(-1))
    assert bool((others.mean(-1) > 2 / 8).all())


def test_heavy_hitters_hold_zipf_like_shares_for_good(tmp_path):
    """One token in twenty holds half of the weight of old tokens, and the same ones later on."""
    trace = synth(tmp_path / "t.kvtrace", pattern="heavy", tokens=1024)
    for head in weights(trace):
        old = head[512:, :384]
        received = [part.sum(0) for part in (old[:256], old[256:])]
        heaviest = [set(part.topk(20).indices.tolist()) for part in received]
        assert len(heaviest[0] & heaviest[1]) >= 15
        for part in received:
            assert float(part.topk(20).values.sum()) > 0.5 * float(part.sum())
        ranked = received[1].sort(descending=True).values[:64]
        slope = np.polyfit(np.log(np.arange(1, 65)), ranked.log().numpy(), 1)[0]
        assert -2 < slope < -0.6


@pytest.mark.parametrize("head_dim", [32, 64])
def test_topics_return_after_they_were_of_no_use(head_dim, tmp_path):
    """Tokens get more than their due, next to nothing for a while, and much again."""
    trace = synth(tmp_path / "t.kvtrace", pattern="drift", tokens=2048, head_dim=head_dim)
    for head in weights(trace):
        # Weight of stretches of 32 tokens in stretches of 32 rows, against an even spread.
        spread = head.view(64, 32, 64, 32).sum(-1).mean(1) * torch.arange(1, 65)[:, None]
        returned = 0
        for column in range(48):
            rows = spread[column + 1 :, column]
            idle = (rows < 0.2).nonzero().flatten()
            returned += bool(len(idle) and (rows[int(idle[0]) :] > 2).any())
        assert returned >= 12


def test_the_needle_is_attended_to_only_at_the_end(tmp_path):
    """The marked span gets no more than its neighbours until it gets nearly everything."""
    tokens = 1024
    trace = synth(tmp_path / "t.kvtrace", pattern="needle", tokens=tokens)
    ((name, first, last),) = trace.sequences[0].marks
    assert (name, last - first) == ("needle", NEEDLE)
    question = tokens - question_length(tokens)
    assert last + 64 < question
    assert bool((shares(trace, first, last, slice(question, tokens)) > 0.5).all())
    before = slice(last + 64, question)
    neighbours = shares(trace, first - 50, first, before) / 50
    assert bool((shares(trace, first, last, before) / NEEDLE < 1.5 * neighbours).all())


@pytest.mark.parametrize("pattern", PATTERNS)
def test_results_are_those_of_dense_attention(pattern, tmp_path):
    """Log-sum-exps and outputs agree with attention in float64, across blocks."""
    trace = synth(tmp_path / "t.kvtrace", pattern=pattern, tokens=560, kv_heads=2, group=3)
    q, k, v, lse, out = (trace.read(kind, 0) for kind in KINDS)
    np.testing.assert_allclose(out, replay_layer("full", q, k, v).outputs, atol=1e-4)
    logits = q.double() @ k.repeat_interleave(3, dim=0).double().transpose(1, 2) / 8
    future = torch.ones(560, 560, dtype=torch.bool).triu(1)
    dense = logits.masked_fill(future, -torch.inf).logsumexp(-1)
    np.testing.assert_allclose(lse, dense, atol=1e-4)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_same_arguments_give_the_same_file(pattern, tmp_path):
    """Every byte follows from the arguments; another seed gives another trace."""
    arguments = {"pattern": pattern, "tokens": 700, "layers": 2}
    torch.manual_seed(1)
    first = synth(tmp_path / "a.kvtrace", **arguments).path.read_bytes()
    torch.manual_seed(2)
    assert synth(tmp_path / "b.kvtrace", **arguments).path.read_bytes() == first
    assert synth(tmp_path / "c.kvtrace", **arguments, seed=1).path.read_bytes() != first


def test_layers_and_heads_are_made_independently(tmp_path):
    """A head's numbers do not depend on how many others there are, and heads differ."""
    small = synth(tmp_path / "a.kvtrace", pattern="heavy", tokens=300, kv_heads=1, group=2)
    large = synth(
        tmp_path / "b.kvtrace", pattern="heavy", tokens=300, layers=2, kv_heads=3, group=2
    )
    for kind in KINDS:
        heads = small.header.num_heads(kind)
        assert torch.equal(large.read(kind, 0)[:heads], small.read(kind, 0))
    keys = [*large.read("k", 0), *large.read("k", 1)]
    assert all(
        not torch.allclose(one, other) for i, one in enumerate(keys) for other in keys[i + 1 :]
    )


def test_the_header_describes_the_trace(tmp_path):
    """Shape, dtype, prompt and source are what was asked for."""
    trace = synth(
        tmp_path / "t.kvtrace",
        pattern="sink",
        tokens=100,
        layers=3,
        kv_heads=4,
        group=2,
        head_dim=48,
        dtype="bfloat16",
        prompt_len=60,
        seed=5,
    )
    header = Trace.open(trace.path).header
    assert (header.model, header.layers, header.kv_heads) == ("synth-sink", (0, 1, 2), (0, 1, 2, 3))
    assert (header.group, header.head_dim, header.value_dim) == (2, 48, 48)
    assert (header.dtype, header.scale, header.rope) == ("bfloat16", 48**-0.5, None)
    (sequence,) = trace.sequences
    assert (sequence.tokens, sequence.prompt_len) == (100, 60)
    assert sequence.source == "sink, seed 5"
    assert trace.read("q", 2).shape == (8, 100, 48)
    assert trace.verify() == []


def test_rounded_traces_hold_results_of_rounded_numbers(tmp_path):
    """In bfloat16, log-sum-exps belong to the keys as stored, not to those before rounding."""
    trace = synth(tmp_path / "t.kvtrace", pattern="heavy", tokens=200, dtype="bfloat16")
    q, k = trace.read("q", 0).double(), trace.read("k", 0).double()
    logits = q @ k.repeat_interleave(4, dim=0).transpose(1, 2) * trace.header.scale
    future = torch.ones(200, 200, dtype=torch.bool).triu(1)
    dense = logits.masked_fill(future, -torch.inf).logsumexp(-1)
    np.testing.assert_allclose(trace.read("lse", 0), dense, atol=1e-4)


def test_results_can_be_left_out(tmp_path):
    """Without them, queries, keys and values stay the same and memory needs no history."""
    whole = synth(tmp_path / "a.kvtrace", pattern="drift", tokens=600)
    bare = synth(tmp_path / "b.kvtrace", pattern="drift", tokens=600, outputs=False, lse=False)
    assert [kind for kind in KINDS if bare.has(kind, 0)] == ["q", "k", "v"]
    for kind in ("q", "k", "v"):
        assert torch.equal(bare.read(kind, 0), whole.read(kind, 0))
    only = synth(tmp_path / "c.kvtrace", pattern="drift", tokens=600, outputs=False)
    assert torch.equal(only.read("lse", 0), whole.read("lse", 0))
    assert not only.has("out", 0)


def test_progress_counts_tokens_per_layer(tmp_path):
    """`advance` hears of every block of every layer."""
    told = []
    synth(tmp_path / "t.kvtrace", pattern="sink", tokens=600, layers=2, advance=told.append)
    assert told == [512, 88, 512, 88]


@pytest.mark.parametrize(
    "arguments",
    [
        {"pattern": "waves"},
        {"tokens": 63},
        {"head_dim": 31},
        {"dtype": "float64"},
        {"layers": 0},
        {"kv_heads": 0},
        {"group": 0},
        {"prompt_len": -1},
    ],
)
def test_impossible_arguments_are_refused(arguments, tmp_path):
    """Nothing is written for arguments that cannot be right."""
    given = {"pattern": "sink", "tokens": 100} | arguments
    with pytest.raises((PolicyError, TraceError)) as caught:
        synth(tmp_path / "t.kvtrace", **given)
    assert isinstance(caught.value, KVPolicyError)
    assert list(tmp_path.iterdir()) == []
