"""Selection against plain Python: order, ties, masks, exact counts, refusals."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import kvpolicy
from fixtures.faults import Faulty, FaultyWatcher
from kvpolicy.policy import EvictionPolicy, View
from kvpolicy.selection import lowest, new_statistic, protected, select_victims
from kvpolicy.slots import survivors
from strategies import Choice, choices


def sorted_out(choice: Choice) -> Tensor:
    """Mark victims with Python's own sort."""
    marked = torch.zeros_like(choice.candidates)
    for row, head in torch.cartesian_prod(*map(torch.arange, marked.shape[:2])).tolist():
        slots = choice.candidates[row, head].nonzero().flatten().tolist()
        scores, positions = choice.scores[row, head].tolist(), choice.positions[row, head].tolist()
        slots.sort(key=lambda slot: (scores[slot], positions[slot]))
        marked[row, head, slots[: choice.count]] = True
    return marked


def first_in_order(choice: Choice) -> Tensor:
    """Mark victims by sorting every slot by score and position."""
    scores, positions, candidates, count = choice
    by_position = positions.argsort(dim=-1)
    by_score = scores.gather(-1, by_position).argsort(dim=-1, stable=True)
    order = by_position.gather(-1, by_score)
    eligible = candidates.gather(-1, order)
    marked = eligible & (eligible.cumsum(-1) <= count)
    return torch.zeros_like(candidates).scatter(-1, order, marked)


def a_view(positions: list[int], n: int, **shown: Tensor) -> View:
    """Show one row and head."""
    at = torch.tensor([[positions]])
    nothing = dict.fromkeys(("weights", "accumulated", "keys", "values"))
    return View(
        positions=at,
        valid=torch.ones_like(at, dtype=torch.bool),
        n=torch.tensor([[[n]]]),
        visible=torch.tensor([[[len(positions)]]]),
        kv_heads=torch.zeros(1, 1, 1, dtype=torch.int64),
        budget=4,
        layer=0,
        **{**nothing, **shown},
    )


class Scripted(EvictionPolicy):
    """Scores whatever the test put into the view."""

    needs = ("accumulated",)
    by_layer: bool = False

    @property
    def scope_is_layer(self) -> bool:
        return self.by_layer

    def score(self, view: View) -> Tensor:
        return view.accumulated


@given(choice=choices())
def test_lowest_scores_go_and_ties_go_by_position(choice: Choice) -> None:
    """Proves the one total order for every dtype, infinities and -0.0 included."""
    assert torch.equal(lowest(*choice), sorted_out(choice))


@given(choice=choices())
def test_selecting_equals_sorting(choice: Choice) -> None:
    """Proves that looking for the highest score that goes marks what sorting all slots marks."""
    assert torch.equal(lowest(*choice), first_in_order(choice))


@pytest.mark.parametrize("num_values", [1, 3, 10**6])
@pytest.mark.parametrize("slots", [1088, 8704])
def test_long_rows_are_selected_as_sorted(slots: int, num_values: int) -> None:
    """Proves the same at a server's sizes, where many, some or no scores are equal."""
    shape = (2, 4, slots)
    choice = Choice(
        scores=torch.randint(num_values, shape).float(),
        positions=torch.rand(shape).argsort(-1) * 3,
        candidates=torch.rand(shape) < 0.9,
        count=slots // 17,
    )
    assert torch.equal(lowest(*choice), first_in_order(choice))


def test_nan_goes_last_of_the_candidates() -> None:
    """Proves that a broken row loses exact counts too: numbers first, then NaN by position."""
    scores = torch.tensor([[[torch.nan, torch.inf, torch.nan, 1.0, -torch.inf]]])
    positions = torch.tensor([[[9, 2, 1, 3, 0]]])
    candidates = torch.tensor([[[True, True, True, True, False]]])
    gone = [lowest(scores, positions, candidates, count) for count in range(5)]
    order = [[], [3], [1, 3], [1, 2, 3], [0, 1, 2, 3]]
    assert [marked[0, 0].nonzero().flatten().tolist() for marked in gone] == order


@given(choice=choices())
def test_exactly_the_count_goes_from_every_row_and_head(choice: Choice) -> None:
    """Proves exact counts, and that only candidates go."""
    marked = lowest(*choice)
    assert (marked.sum(-1) == choice.count).all()
    assert not (marked & ~choice.candidates).any()


@given(choice=choices(), seed=st.integers(0, 99))
def test_slot_order_does_not_matter(choice: Choice, seed: int) -> None:
    """Proves that permuted slots give the permuted answer."""
    order = torch.rand(choice.scores.shape, generator=torch.Generator().manual_seed(seed)).argsort(
        -1
    )
    shuffled = [x.gather(-1, order) for x in choice[:3]]
    assert torch.equal(lowest(*shuffled, choice.count), lowest(*choice).gather(-1, order))


def test_rubbish_in_slots_that_are_no_candidates_is_ignored() -> None:
    """Proves that NaN scores and repeated positions outside the candidates are harmless."""
    scores = torch.tensor([[[torch.nan, 3.0, torch.nan, 1.0, -torch.inf]]])
    positions = torch.tensor([[[7, 7, -1, 8, 2**62]]])
    candidates = torch.tensor([[[False, True, False, True, False]]])
    assert lowest(scores, positions, candidates, 1).nonzero()[:, 2].tolist() == [3]


def test_int64_scores_keep_all_their_bits() -> None:
    """Proves that integer scores are not rounded to floats on the way."""
    scores = torch.tensor([[[2**62 + 1, 2**62, 2**62 + 2]]])
    positions, everyone = torch.tensor([[[0, 1, 2]]]), torch.ones(1, 1, 3, dtype=torch.bool)
    assert lowest(scores, positions, everyone, 1).nonzero()[:, 2].tolist() == [1]


@pytest.mark.parametrize(
    ("spec", "kept"),
    [
        ("h2o:budget=4,recent=0", []),
        ("h2o:budget=4,recent=1", [9]),
        ("h2o:budget=4,recent=0.5", [9]),
        ("h2o:budget=5,recent=0.5", [9]),
        ("h2o:budget=6,recent=0.5", [7, 9]),
        ("h2o:budget=4,recent=1.0", [7, 9]),
        ("h2o:budget=4,recent=3,sinks=1", [0, 7, 9]),
        ("sinks:budget=4,sinks=2", [0, 1]),
        ("window:budget=4,protect=(1:4,7:8)", [1, 3, 7]),
        ("window:budget=4", []),
    ],
)
def test_protection_goes_by_position(spec: str, kept: list[int]) -> None:
    """Proves sinks, recent (the current token, 9, counts) and spans on shuffled, gappy slots."""
    positions = [9, 3, 0, 1, 7]
    mask = protected(kvpolicy.parse(spec), a_view(positions, n=10))
    assert sorted(torch.tensor(positions)[mask[0, 0]].tolist()) == kept


def test_no_score_protects_a_slot() -> None:
    """Proves that protection is a mask: infinite scores go before protected -infinite ones."""
    policy = kvpolicy.parse("window:budget=2,interval=2,protect=(0:2)")
    view = a_view([0, 1, 2, 3], n=4)
    scores = torch.tensor([[[-torch.inf, -torch.inf, torch.inf, torch.inf]]])
    marked = lowest(scores, view.positions, ~protected(policy, view), 2)
    assert marked[0, 0].tolist() == [False, False, True, True]


def test_layer_scope_decides_by_the_mean_over_heads() -> None:
    """Proves that all heads lose the slot with the lowest mean score."""
    view = a_view([0, 1, 2], n=3)
    view = replace(
        view,
        positions=view.positions.expand(1, 2, 3),
        valid=view.valid.expand(1, 2, 3),
        accumulated=torch.tensor([[[0.0, 4.0, 3.0], [9.0, 1.0, 3.0]]]),
    )
    marked = select_victims(Scripted(budget=2, by_layer=True), view, 1)
    assert marked.tolist() == [[[False, True, False]] * 2]
    marked = select_victims(Scripted(budget=2), view, 1)
    assert marked.nonzero()[:, 2].tolist() == [0, 1]


@pytest.mark.parametrize(
    ("scores", "word"),
    [
        (torch.zeros(1, 1, 2), r"\(1, 1, 3\), got \(1, 1, 2\)"),
        (torch.zeros(3), r"\(1, 1, 3\), got \(3,\)"),
        (None, "got NoneType"),
        ([0.0, 1.0, 2.0], "got list"),
        (torch.zeros(1, 1, 3, dtype=torch.complex64), "complex64; return real"),
        (torch.tensor([[[0.0, torch.nan, 1.0]]]), "NaN for a held slot"),
    ],
)
def test_scores_that_cannot_be_ordered_are_refused(scores: Tensor, word: str) -> None:
    """Proves that wrong shapes, types and NaN name the policy and what is right."""

    class Wrong(kvpolicy.ScorePolicy):
        """Answers what it likes."""

        def score(self, view: View) -> Tensor:
            return scores

    with pytest.raises(kvpolicy.PolicyError, match=word):
        select_victims(Wrong(budget=2), a_view([0, 1, 2], n=3), 1)


def test_scores_without_a_mean_are_refused_where_heads_share_a_set() -> None:
    """Proves that opposite infinities do not pass as NaN, which would protect the slot."""
    scores = torch.tensor([[[0.0, torch.inf, 1.0], [0.0, -torch.inf, 1.0]]])
    one = a_view([0, 1, 2], n=3)
    view = replace(one, positions=one.positions.expand(1, 2, 3), valid=one.valid.expand(1, 2, 3))
    marked = select_victims(Scripted(budget=2), replace(view, accumulated=scores), 1)
    assert marked.tolist() == [[[True, False, False], [False, True, False]]]

    class Opposite(kvpolicy.ScorePolicy):
        """Rates one slot infinitely high and low."""

        scope: str = "layer"

        def score(self, view: View) -> Tensor:
            return scores

    with pytest.raises(kvpolicy.PolicyError, match="NaN for a held slot"):
        select_victims(Opposite(budget=2), view, 1)


def test_more_protected_slots_than_the_budget_holds_are_refused() -> None:
    """Proves that an eviction takes as many slots as the law says, or none at all."""
    view = a_view([0, 1, 2], n=3, accumulated=torch.zeros(1, 1, 3))
    with pytest.raises(kvpolicy.PolicyError, match="1 slots must go, but only 0 are not protected"):
        select_victims(Faulty(budget=2, how="protect"), view, 1)


@pytest.mark.parametrize(
    ("how", "word"),
    [
        ("shape", r"observe\(\) must return a tensor"),
        ("complex", r"observe\(\) returned torch.complex64"),
        ("nothing", "got NoneType"),
        ("nan", r"observe\(\) returned NaN"),
    ],
)
def test_statistics_that_are_none_are_refused(how: str, word: str) -> None:
    """Proves that what a policy remembers is held to the form of its scores."""
    seen = torch.ones(1, 2, 3)
    one = a_view([0, 1, 2], n=3, weights=seen, accumulated=seen)
    view = replace(one, positions=one.positions.expand(1, 2, 3), valid=one.valid.expand(1, 2, 3))
    with pytest.raises(kvpolicy.PolicyError, match=word):
        new_statistic(FaultyWatcher(budget=2, how=how), view)


def test_a_policy_may_write_into_what_it_is_shown() -> None:
    """Proves that slots, protection and the other hosts' tensors never follow a policy's pen."""
    evidence = {name: torch.tensor([[[3.0, 1.0, 2.0]]]) for name in ("weights", "accumulated")} | {
        "values": torch.ones(1, 1, 3, 2)
    }
    view = a_view([0, 1, 2], n=3, **evidence)
    before = {name: x.clone() for name, x in vars(view).items() if isinstance(x, Tensor)}
    marked = select_victims(Faulty(budget=2, how="scribble"), view, 1)
    assert marked[0, 0].tolist() == [False, True, False]
    statistic = new_statistic(FaultyWatcher(budget=2, how="scribble"), view)
    assert statistic.tolist() == [[[3.0, 1.0, 2.0]]]
    for name, x in before.items():
        assert torch.equal(getattr(view, name), x), name


def test_nan_in_a_slot_that_is_not_held_is_no_error() -> None:
    """Proves that only valid slots need scores."""
    view = replace(
        a_view([0, 1, 2], n=2, accumulated=torch.tensor([[[1.0, 0.0, torch.nan]]])),
        valid=torch.tensor([[[True, True, False]]]),
    )
    marked = select_victims(Scripted(budget=1), view, 1)
    assert marked[0, 0].tolist() == [False, True, False]


def test_a_row_with_nan_evidence_does_not_fail_its_batch() -> None:
    """Proves that the row whose inputs are broken is excused, and the others decided as ever."""
    view = a_view([0, 1, 2], n=3)
    view = replace(
        view,
        positions=view.positions.expand(2, 1, 3),
        valid=view.valid.expand(2, 1, 3),
        accumulated=torch.tensor([[[torch.nan, 1.0, 2.0]], [[3.0, 1.0, 2.0]]]),
    )
    marked = select_victims(Scripted(budget=2), view, 1)
    assert marked[1, 0].tolist() == [False, True, False]
    assert marked.sum(-1).tolist() == [[1], [1]]


def test_missing_score_method_is_named() -> None:
    """Proves that a policy without score() says so instead of failing somewhere else."""
    with pytest.raises(kvpolicy.PolicyError, match="EvictionPolicy defines no score"):
        EvictionPolicy(budget=1).score(a_view([0], n=1))


@given(choice=choices())
def test_survivors_are_the_rest_in_slot_order(choice: Choice) -> None:
    """Proves that victims and survivors partition the slots."""
    slots = choice.scores.shape[-1]
    kept = survivors(lowest(*choice), slots, choice.count)
    for victims, stay in zip(lowest(*choice).flatten(0, 1), kept.flatten(0, 1), strict=True):
        assert stay.tolist() == (~victims).nonzero().flatten().tolist()
