"""What the soak forgives: noise of float32, near-ties of tokens, near-ties of evictions."""

import pytest

from fixtures.models import oracle_of, random_llama, random_prompt
from oracles.dense import NEAR_TIE
from soak.cases import Case
from soak.clients import Answer
from soak.solo import NOISE, Solo, Soloist, Verdict

pytestmark = pytest.mark.vllm

SPEC = "h2o:budget=16,interval=1,decay=0.8"
WINDOW = "window:budget=16,interval=1"
NUM_TOKENS = 12
PLACE = 7


@pytest.fixture(scope="module")
def model():
    """A random Llama, whose attention is broad enough that scores differ."""
    return random_llama(num_hidden_layers=2)


@pytest.fixture(scope="module")
def tipped(model):
    """A request and its answer, in which `PLACE` is the first token behind a near-tie."""
    ids, oracle = random_prompt(model, 400, seed=0), oracle_of(model, SPEC)
    num_fed = next(
        n for n, _ in enumerate(map(oracle.feed, ids), 1) if oracle.min_margin < NEAR_TIE
    )
    # The eviction behind the last of them changes the forward of the next, which gives another.
    first = num_fed + 1 - PLACE
    tokens = ids[first : first + NUM_TOKENS]
    return Case(tuple(ids[:first]), SPEC, NUM_TOKENS), tokens


def verdict_on(model, case, tokens, *, parts_at=None, louder_at=None, gap=1.0):
    """The verdict on an answer that parts from its solo run in a token, or in a log-probability."""
    soloist = Soloist()
    soloist._model = model
    soloist._answers[case] = Solo(tokens, [-1.0] * NUM_TOKENS, [gap] * NUM_TOKENS)
    theirs = [token + (place == parts_at) for place, token in enumerate(tokens)]
    logprobs = [-1.0 + 2 * NOISE * (place == louder_at) for place in range(NUM_TOKENS)]
    answer = Answer(case, "whole", "a", [theirs], [logprobs], True, None, 1.0)
    verdict = Verdict()
    soloist.compare(answer, verdict)
    return verdict


@pytest.mark.parametrize("how", ["parts_at", "louder_at"])
def test_an_answer_may_part_behind_a_near_tie_of_an_eviction(model, tipped, how):
    """It may from the very token on that the eviction could change, but not one earlier."""
    case, tokens = tipped
    forgiven = verdict_on(model, case, tokens, **{how: PLACE})
    assert (forgiven.set_ties, forgiven.token_ties, forgiven.faults) == (1, 0, [])
    early = verdict_on(model, case, tokens, **{how: PLACE - 1})
    assert early.set_ties == 0
    assert len(early.faults) == 1
    assert f"token {PLACE - 1}: " in early.faults[0]


def test_what_positions_decide_is_no_excuse(model, tipped):
    """A window has no near-ties, so that an answer under it never parts."""
    case, tokens = tipped
    verdict = verdict_on(model, Case(case.prompt, WINDOW, NUM_TOKENS), tokens, parts_at=PLACE)
    assert (verdict.set_ties, len(verdict.faults)) == (0, 1)


def test_two_tokens_may_change_places_within_the_noise(model, tipped):
    """Where the best two are nearer than twice the noise either may come, but not beyond."""
    case, tokens = tipped
    near = verdict_on(model, case, tokens, parts_at=0, gap=1.9 * NOISE)
    assert (near.token_ties, near.set_ties, near.faults) == (1, 0, [])
    far = verdict_on(model, case, tokens, parts_at=0, gap=2.1 * NOISE)
    assert (far.token_ties, far.set_ties, len(far.faults)) == (0, 0, 1)


def test_an_equal_answer_is_no_tie(model, tipped):
    """Nothing is forgiven where nothing differs, near-ties or not."""
    case, tokens = tipped
    verdict = verdict_on(model, case, tokens)
    assert (verdict.token_ties, verdict.set_ties, verdict.faults) == (0, 0, [])
    assert (verdict.choices, verdict.tokens, verdict.noise) == (1, NUM_TOKENS, 0.0)
