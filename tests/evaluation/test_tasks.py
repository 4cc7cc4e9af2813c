"""Samples of the tasks: exactly as long as asked, and with one right answer that can be read."""

import re
from collections import Counter

import pytest

from fixtures.evaluations import BOS, Words, source
from kvpolicy.evaluation.source import Source, interleave
from kvpolicy.evaluation.tasks import TASKS
from kvpolicy.evaluation.tasks.needle import Needle
from kvpolicy.evaluation.tasks.passkey import Passkey
from kvpolicy.evaluation.tasks.ppl import Perplexity
from kvpolicy.evaluation.tasks.recall import Recall
from kvpolicy.evaluation.tasks.repeat import READINGS, Repeat
from kvpolicy.evaluation.tasks.reuse import LAGS, Reuse

CONTEXT = 512


def answers(sample, words):
    """The texts that a sample wants predicted."""
    return [words.decode(sample.tokens[t.first : t.last]) for t in sample.targets]


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("context", [200, 512])
def test_samples_fill_the_context_and_repeat_with_the_seed(name, context):
    """Every sample has exactly the asked length; a seed gives the same samples, another not."""
    text, _ = source()
    task = TASKS[name]()
    samples = task.samples(text, context, 7, 3)
    assert samples == task.samples(text, context, 7, 3)
    assert name == "ppl" or samples != task.samples(text, context, 7, 4)
    assert len({tuple(sample.tokens) for sample in samples}) == 7
    for sample in samples:
        indices = list(sample.predicted())
        assert len(sample.tokens) == context
        assert sample.tokens[0] == BOS
        assert indices == sorted(set(indices))
        assert 1 <= indices[0] <= indices[-1] < context
        assert sample.prompt_tokens <= indices[0]


@pytest.mark.parametrize(
    ("prompt", "first"),
    [(0, 1), (1, 1), (100, 100)],
    ids=["without a prompt", "of one token", "of many"],
)
def test_perplexity_predicts_everything_behind_the_prompt_once(prompt, first):
    """Windows follow each other in the text, and their parts cover what is to be predicted."""
    text, _ = source()
    samples = Perplexity(prompt_tokens=prompt).samples(text, CONTEXT, 3, 0)
    body = [token for sample in samples for token in sample.tokens[1:]]
    assert body == text.tokens[: len(body)]
    for sample in samples:
        assert list(sample.predicted()) == list(range(first, CONTEXT))
        assert sample.prompt_tokens == prompt
        assert all(t.group == (t.first, t.last) for t in sample.targets)


@pytest.mark.parametrize(("question", "is_last"), [("seen", True), ("unseen", False)])
def test_passkeys_lie_evenly_and_are_asked_last(question, is_last):
    """The key stands once in the prose, at each depth in turn, and the answer is that key."""
    text, words = source()
    samples = Passkey(question=question).samples(text, CONTEXT, 10, 0)
    for index, sample in enumerate(samples):
        [target], written = sample.targets, words.decode(sample.tokens)
        [(key, again)] = re.findall(r" The pass key is (\d{5})\. Remember it\. (\d{5}) is", written)
        assert answers(sample, words) == [f" {key}"] == [f" {again}"]
        assert written.endswith(f"\nWhat is the pass key? The pass key is {key}")
        place = written.index(" The pass key is") / len(written)
        assert abs(place - (index + 0.5) / 10) < 0.08
        assert target.group[0] <= (index + 0.5) / 10 < target.group[1]
        prompt = words.decode(sample.tokens[: sample.prompt_tokens])
        assert prompt.endswith("The pass key is") is is_last
        assert ("What is" in prompt) is is_last


def test_needles_have_one_right_answer_among_facts_of_their_kind():
    """Four facts about four subjects stand in the prose, and the one that is asked for is there."""
    text, words = source()
    for index, sample in enumerate(Needle().samples(text, CONTEXT, 10, 0)):
        written = words.decode(sample.tokens)
        told, _, asked = written.rpartition("\nWhat is ")
        facts = dict(re.findall(r" (The (?:secret|number)[\w ]+?) is (\w+)\.", told))
        subject = re.findall(r"\? (.*) is \w+$", asked)[0]
        assert len(facts) == 4
        assert ("number" in subject) is (index % 2 == 1)
        assert answers(sample, words) == [f" {facts[subject]}"]


def test_pairs_are_listed_once_and_each_is_asked_in_turn():
    """The list has different keys and values, and the answer is the asked key's value."""
    text, words = source()
    samples = Recall(pairs=5, question="unseen").samples(text, CONTEXT, 10, 0)
    for index, sample in enumerate(samples):
        lines = re.findall(r"\n (\w+): (\d{4})", words.decode(sample.tokens))
        *listed, asked = lines
        assert len(set(dict(listed))) == len({value for _, value in listed}) == 5
        assert asked == listed[index % 5]
        assert answers(sample, words) == [f" {asked[1]}"]
        assert sample.prompt_tokens + len(words.encode(f"\n {asked[0]}: {asked[1]}")) == CONTEXT


def test_distractors_do_not_repeat():
    """Between the list and the question stands running text, no sentence of it twice."""
    text, words = source()
    [sample] = Recall(pairs=5).samples(text, CONTEXT, 1, 0)
    prose = words.decode(sample.tokens).split("\n")[5]
    sentences = re.findall(r"[A-Z][a-z ]+\.", prose)
    assert len(set(sentences)) == len(sentences) > 20


def test_reused_facts_are_grouped_by_the_tokens_since_their_last_use():
    """Counted again from the text: every asked value is the listed one, and its lag is right."""
    text, words = source()
    for sample in Reuse(pairs=6).samples(text, 1024, 4, 0):
        used: dict[str, int] = {}
        listed: dict[str, str] = {}
        expected = []
        pieces = [words.decode([token]) for token in sample.tokens]
        for at, piece in enumerate(pieces):
            if piece != ":" or pieces[at - 2] != "\n":
                continue
            key, value = pieces[at - 1], "".join(pieces[at + 2 : at + 6])
            if at < sample.prompt_tokens:
                listed[key] = value
            else:
                assert value == listed[key]
                lag = at + 1 - used[key]
                group = max(edge for edge in LAGS if edge <= lag)
                expected.append((at + 2, at + 6, group))
            used[key] = at + 6
        assert len(listed) == 6
        assert [(t.first, t.last, t.group[0]) for t in sample.targets] == expected


def test_some_facts_are_used_far_more_often_than_others():
    """The commonest of eight facts is asked for at least four times as often as the rarest."""
    text, words = source()
    [sample] = Reuse(pairs=8).samples(text, 8192, 1, 0)
    counts = Counter(answers(sample, words)).most_common()
    assert len(counts) == 8
    assert counts[0][1] >= 4 * counts[-1][1]


def test_repetitions_are_the_passage_without_its_first_token():
    """What is predicted is the same passage each time, behind as much fresh text."""
    text, _ = source()
    for sample in Repeat().samples(text, CONTEXT, 3, 0):
        size = (CONTEXT - 1) // (2 * READINGS - 1)
        passage = sample.tokens[1 : 1 + size]
        assert [t.group[0] for t in sample.targets] == [2, 3, 4]
        for reading, target in enumerate(sample.targets, 1):
            assert sample.tokens[target.first : target.last] == passage[1:]
            assert target.first == 1 + 2 * reading * size + 1
        gaps = [sample.tokens[1 + (2 * i + 1) * size :][:size] for i in range(READINGS - 1)]
        assert len({tuple(gap) for gap in gaps}) == READINGS - 1


def test_inserts_stand_between_sentences_nearest_to_their_depth():
    """By hand: ten tokens in three sentences, inserts at the beginning, in the middle, behind."""
    sentences = [[1, 1, 1, 1], [2, 2], [3, 3, 3, 3]]
    woven = interleave(sentences, [[7], [8], [9]], [0.0, 0.55, 1.0])
    assert woven == [7, 1, 1, 1, 1, 2, 2, 8, 3, 3, 3, 3, 9]
    assert interleave(sentences, [], []) == [1, 1, 1, 1, 2, 2, 3, 3, 3, 3]


@pytest.mark.parametrize("name", TASKS)
def test_what_does_not_fit_is_refused(name):
    """A context too small for what is stated and asked is an error that says so."""
    text, _ = source()
    with pytest.raises(ValueError, match=r"context|text"):
        TASKS[name]().samples(text, 9 if name != "ppl" else 1 << 20, 1, 0)


def test_a_text_without_words_is_refused():
    """Keys need words, prose needs sentences: texts without them are errors that say so."""
    words = Words()
    with pytest.raises(ValueError, match="16 words are needed"):
        Recall().samples(Source("To be. Or not.", words.encode, []), 200, 1, 0)
    with pytest.raises(ValueError, match="no sentence"):
        Passkey().samples(Source("  \n ", words.encode, []), 200, 1, 0)
