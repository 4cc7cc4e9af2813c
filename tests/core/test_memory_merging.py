"""Identities of merging and of reading: when a slot answers exactly as its tokens would."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

import kvpolicy
from kvpolicy.attention import AttentionLayer, query_key_products
from kvpolicy.engine import step
from kvpolicy.memory.pooling import most_used
from kvpolicy.memory.reading import attend_jointly, attend_tokens, merge_by_lse, merge_by_sum
from kvpolicy.memory.state import Passage, Question, Setting, SlotMemory
from kvpolicy.rehearsal import HEAD_DIM, Case, Host, Row, by_steps
from kvpolicy.rotary import Rotary
from strategies import SEEDS, cases

STILL = Rotary(torch.zeros(HEAD_DIM // 2))
"""A rotation that turns nothing: equal tokens stay equal wherever they stand."""


def outputs_without_rotation(spec: str, row: Row) -> Tensor:
    """Step one row through a layer whose positions turn nothing; [H, T, D]."""
    layer = AttentionLayer(kvpolicy.parse(spec), 0, HEAD_DIM**-0.5, STILL)
    slots = layer.new_slots(*(x[None] for x in row))
    tokens = [step(layer, slots, *(x[None, :, t] for x in row))[0] for t in range(row.length)]
    return torch.stack(tokens, dim=1)


@pytest.mark.parametrize("fn", ["mean", "max", "conv", "attention"])
def test_merging_equal_tokens_changes_nothing(fn: str) -> None:
    """Proves that a slot of c equal tokens with bias log c answers as they would."""
    row = Case(lengths=(30, 1), group=2).rows()[0]
    groups = Row(row.q, *(x[:, ::3].repeat_interleave(3, dim=1) for x in row[1:]))
    merged = outputs_without_rotation(f"compressive:budget=15,memory=9,interval=6,fn={fn}", groups)
    full = outputs_without_rotation("full", groups)
    torch.testing.assert_close(merged, full, rtol=0, atol=2e-5)


@pytest.mark.parametrize("spec", ["centroid:budget=9,slots=3", "fam:block=3,segments=2,slots=3"])
def test_centroids_of_equal_tokens_change_nothing(spec: str) -> None:
    """Proves that as many centroids as there are contents lose nothing, with log-mass."""
    row = Case(lengths=(40, 1), group=2).rows()[0]
    turns = torch.arange(40) % 3
    keys = torch.nn.functional.normalize(row.k, dim=-1) * 3  # each is its own best match
    contents = Row(row.q, keys[:, turns], row.v[:, turns])
    full = outputs_without_rotation("full", contents)
    torch.testing.assert_close(outputs_without_rotation(spec, contents), full, rtol=0, atol=2e-5)


def test_equal_centroids_are_joined_from_the_lowest_slot_on() -> None:
    """Proves the tie rule: seeds fill slots in order, then the first of equal slots wins."""
    layer = AttentionLayer(
        kvpolicy.parse("centroid:budget=6,slots=3,interval=4"), 0, HEAD_DIM**-0.5, STILL
    )
    x = torch.ones(1, 1, HEAD_DIM)
    slots = layer.new_slots(x, x, x)
    for _ in range(11):
        step(layer, slots, x, x, x)
    assert isinstance(slots.memory, SlotMemory)
    assert slots.memory.mass.tolist() == [[[6, 1, 1]]]


def test_equal_use_keeps_the_newest() -> None:
    """Proves the tie rule of most-used: of equally used tokens the newest survive."""
    setting = Setting(0, 1.0, STILL, 0, None)
    positions = torch.arange(4).expand(1, 2, -1)
    accumulated = 6.0 - positions  # one half of a row of attention for each row that saw them
    passage = Passage(
        rotated_keys=torch.randn(1, 2, 4, HEAD_DIM),
        values=torch.randn(1, 2, 4, HEAD_DIM),
        positions=positions,
        accumulated=accumulated / 2,
        n=torch.tensor([[[6]]]),
        query=torch.zeros(1, 2, 1, HEAD_DIM),
        lse=torch.zeros(1, 2, 1),
        setting=setting,
    )
    kept = most_used(passage, 2)
    assert kept.positions.tolist() == [[[2, 3]] * 2]
    assert torch.equal(kept.keys, passage.rotated_keys[:, :, 2:])
    assert torch.equal(kept.values, passage.values[:, :, 2:])


def test_attention_preserving_slots_answer_their_reference_query() -> None:
    """Proves that for one query head the merge is exact for the query that it was made with."""
    case = Case(lengths=(24, 24), group=1)
    host = Host(kvpolicy.parse("compressive:budget=12,interval=12,fn=attention"), case, case.rows())
    for n in range(1, 19):
        host.step([0, 1])
        if not host.layer.occupancy.is_due(n):
            continue
        held, slots = host.layer.occupancy.held(n), host.slots
        q = torch.stack([row.q[:, n - 1] for row in host.rows])[:, :, None]
        keys, values = slots.keys[:, :, :held], slots.values[:, :, :held]
        assert slots.memory is not None
        again = host.layer.attend(
            slots.memory,
            q,
            query_key_products(q, keys, host.layer.scale),
            values,
            positions=torch.tensor([n - 1]),
            evicted=torch.tensor([host.layer.occupancy.evicted(n)]),
        )
        before = torch.stack([outputs[:, n - 1] for outputs in host.run.outputs])
        torch.testing.assert_close(again.output[:, :, 0], before, rtol=0, atol=2e-5)
        return
    raise AssertionError("no eviction was due")


@pytest.mark.parametrize("fn", ["mean", "max", "most-used", "conv", "attention"])
@pytest.mark.parametrize(("memory", "interval"), [(6, 3), (4, 4), (5, 1), (4, 2)])
def test_rate_one_is_a_window(fn: str, memory: int, interval: int) -> None:
    """Proves compressive:rate=1 == window, tokens and memory together, when interval divides it."""
    case = Case(lengths=(40, 40))
    spec = f"compressive:budget=10,rate=1,memory={memory},interval={interval},fn={fn}"
    window = by_steps(kvpolicy.parse(f"window:budget=10,interval={interval}"), case)
    host = Host(kvpolicy.parse(spec), case, case.rows())
    for n in range(1, 41):
        host.step([0, 1])
        slots = host.slots.memory
        assert isinstance(slots, SlotMemory)
        for row in range(2):
            for head in range(case.kv_heads):
                filled = slots.positions[row, head][slots.mass[row, head] > 0].tolist()
                held = [*host.run.retained[row][n][head], *filled]
                assert sorted(held) == list(window.retained[row][n][head])
    for ours, theirs in zip(host.run.outputs, window.outputs, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)


def test_averaging_kernels_are_mean_pooling(tmp_path: Path) -> None:
    """Proves that a kernel file of I / c is fn=mean."""
    kernel = torch.eye(HEAD_DIM).expand(1, 2, 3, -1, -1) / 3
    path = tmp_path / "mean.safetensors"
    save_file({"keys": kernel.clone(), "values": kernel.clone()}, path)
    case = Case(lengths=(40, 23))
    spec = "compressive:budget=12,interval=6"
    runs = (by_steps(kvpolicy.parse(x), case) for x in (f"{spec},fn=conv,weights={path}", spec))
    for by_kernel, by_mean in zip(*(run.outputs for run in runs), strict=True):
        torch.testing.assert_close(by_kernel, by_mean, rtol=0, atol=2e-5)


@given(case=cases(rows=1), interval=st.sampled_from([4, 8]))
@settings(max_examples=20)
def test_most_used_is_a_choice_by_dense_attention(case: Case, interval: int) -> None:
    """Proves that before any loss the kept are those with most dense attention per observer."""
    due, count = 6 + interval, interval // 2
    row = Case(**{**case.__dict__, "lengths": (due, due)}).rows()[0]
    spec = f"compressive:budget=10,memory=4,rate=2,interval={interval},fn=most-used"
    host = Host(kvpolicy.parse(spec), case, [row])
    while not host.is_done(0):
        host.step([0])
    keys = row.k.repeat_interleave(case.group, dim=0).double()
    logits = row.q.double() @ keys.transpose(1, 2) / HEAD_DIM**0.5
    is_future = torch.ones(due, due).triu(1).bool()
    received = logits.masked_fill(is_future, -torch.inf).softmax(dim=-1).sum(dim=1)  # [H, T]
    use = received.unflatten(0, (-1, case.group)).mean(dim=1) / (due - torch.arange(due))
    memory = host.slots.memory
    assert isinstance(memory, SlotMemory)
    for head in range(case.kv_heads):
        best = use[head, :interval].argsort(descending=True)[:count].sort().values
        filled = memory.mass[0, head] > 0
        assert torch.equal(memory.positions[0, head][filled].sort().values, best)


# --- reading ----------------------------------------------------------------------------------


def a_question(seed: int, chosen: Tensor) -> tuple[Question, Tensor, Tensor]:
    """Ask a layer of 12 tokens; those that are not chosen are hidden; their keys and values."""
    row = Case(lengths=(12, 1), group=2, seed=seed).rows()[0]
    q, k, v = (x[None] for x in row)
    logits = query_key_products(q[:, :, -2:], k, HEAD_DIM**-0.5)
    setting = Setting(0, HEAD_DIM**-0.5, STILL, 0, None)
    places = torch.tensor([10, 11])
    visible = logits.masked_fill(~chosen, -torch.inf)
    return Question(q[:, :, -2:], places, 0 * places, visible, v, setting), k, v


MASKS = st.lists(st.booleans(), min_size=12, max_size=12).filter(lambda mask: 0 < sum(mask) < 12)


@given(seed=SEEDS, mask=MASKS)
@settings(max_examples=30)
def test_any_partition_merged_by_log_sum_exp_is_dense(seed: int, mask: list[bool]) -> None:
    """Proves that attention splits: slots and tokens in one softmax are the whole, L included."""
    chosen = torch.tensor(mask)
    question, k, v = a_question(seed, chosen)
    jointly = attend_jointly(
        question, k[:, :, ~chosen], v[:, :, ~chosen], torch.zeros(1, 2, 12 - sum(mask)), None
    )
    dense = attend_tokens(a_question(seed, torch.ones(12).bool())[0])
    torch.testing.assert_close(jointly.output, dense.output, rtol=0, atol=2e-6)
    torch.testing.assert_close(jointly.lse, dense.lse, rtol=0, atol=2e-6)
    torch.testing.assert_close(
        jointly.weights[..., chosen], dense.weights[..., chosen], rtol=0, atol=2e-6
    )


@given(seed=SEEDS, mask=MASKS)
@settings(max_examples=30)
def test_branches_join_by_log_sum_exp_and_by_sums(seed: int, mask: list[bool]) -> None:
    """Proves that a branch merged by its L, or by numerator and denominator, gives the whole."""
    chosen = torch.tensor(mask)
    tokens = attend_tokens(a_question(seed, chosen)[0])
    branch = attend_tokens(a_question(seed, ~chosen)[0])
    dense = attend_tokens(a_question(seed, torch.ones(12).bool())[0])
    mass = branch.lse.exp()
    sums = branch.output * mass.flatten(1, 2)[..., None], mass
    for whole in (merge_by_lse(tokens, branch.output, branch.lse), merge_by_sum(tokens, *sums)):
        torch.testing.assert_close(whole.output, dense.output, rtol=0, atol=2e-6)
        torch.testing.assert_close(whole.lse, dense.lse, rtol=0, atol=2e-6)
        seen = dense.weights[..., chosen]
        torch.testing.assert_close(whole.weights[..., chosen], seen, rtol=0, atol=2e-6)


def test_branches_without_mass_leave_tokens_as_they_are() -> None:
    """Proves that an empty branch, or a sum that is not positive, adds exactly nothing."""
    tokens = attend_tokens(a_question(0, torch.ones(12).bool())[0])
    nothing, rubbish = torch.zeros_like(tokens.lse), torch.full_like(tokens.output, torch.nan)
    negative = -2 * tokens.lse.exp()
    for whole in (
        merge_by_lse(tokens, rubbish, nothing - torch.inf),
        merge_by_sum(tokens, torch.zeros_like(tokens.output), nothing),
        merge_by_sum(tokens, torch.ones_like(tokens.output), negative),
    ):
        assert torch.equal(whole.output, tokens.output)
        assert torch.equal(whole.lse, tokens.lse)


@given(seed=SEEDS, mask=MASKS, bias=st.floats(-5, 5))
@settings(max_examples=30)
def test_a_bias_of_a_group_shifts_its_log_sum_exp(seed: int, mask: list[bool], bias: float) -> None:
    """Proves that two calls merged with L + b are one call in which the group has bias b."""
    chosen = torch.tensor(mask)
    question, k, v = a_question(seed, chosen)
    biases = torch.full((1, 2, 12 - sum(mask)), bias)
    jointly = attend_jointly(question, k[:, :, ~chosen], v[:, :, ~chosen], biases, None)
    tokens, group = attend_tokens(question), attend_tokens(a_question(seed, ~chosen)[0])
    total = torch.logaddexp(tokens.lse, group.lse + bias)
    shares = [
        (lse - total).exp().flatten(1, 2)[..., None] for lse in (tokens.lse, group.lse + bias)
    ]
    expected = shares[0] * tokens.output + shares[1] * group.output
    torch.testing.assert_close(jointly.output, expected, rtol=0, atol=2e-6)
    torch.testing.assert_close(jointly.lse, total, rtol=0, atol=2e-6)
