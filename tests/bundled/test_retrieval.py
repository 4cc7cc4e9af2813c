"""Prompts that ask for what they stated: where answers and statements stand, and how they count."""

import numpy as np
import pytest
import torch

from kvpolicy.bundled.training import evaluate
from kvpolicy.bundled.training.evaluate import accuracy
from kvpolicy.bundled.training.retrieval import Answer, Retrieval, passkey, recall
from kvpolicy.bundled.training.tokenizer import BOS_ID, encode


def stretch(sequence, start, size):
    """Return the tokens of [start, start + size)."""
    return sequence.tokens[start : start + size].tolist()


@pytest.mark.parametrize("context", [512, 2048])
def test_recall_asks_once_for_each_of_sixteen_pairs(tasks, tokenizer, context):
    """Every answer repeats its statement, keys differ, and the prompt fills the context."""
    sequence = recall(tasks, context, 0, num_pairs=16)
    assert len(sequence.tokens) == context
    assert sequence.tokens[0] == BOS_ID
    assert len(sequence.answers) == 16
    lines = set()
    for answer in sequence.answers:
        (stated,) = answer.stated
        assert stretch(sequence, answer.start, answer.size) == stretch(
            sequence, stated, answer.size
        )
        line = tokenizer.decode(sequence.tokens[stated - 12 : stated + answer.size].tolist())
        lines.add(line.rsplit("\n", 1)[-1])
    assert len({line.split(":")[0] for line in lines}) == 16
    last = sequence.answers[-1]
    assert last.start + last.size == context


def test_statements_come_long_before_their_questions(tasks):
    """The filler lies between all statements and all questions."""
    sequence = recall(tasks, 2048, 1, num_pairs=16)
    latest_statement = max(answer.stated[0] for answer in sequence.answers)
    first_question = min(answer.start for answer in sequence.answers)
    assert first_question - latest_statement > 1200


def test_recall_refuses_a_context_that_is_too_small(tasks):
    """The error says how many tokens are needed."""
    with pytest.raises(ValueError, match=r"16 pairs .* got 64, at least \d{3} tokens"):
        recall(tasks, 64, 0, num_pairs=16)


def test_passkey_knows_both_places_of_the_key(corpus, tokenizer):
    """The key is stated twice, and the answer repeats it at the very end."""
    sequence = passkey(corpus, tokenizer, 512, 0)
    (answer,) = sequence.answers
    assert len(answer.stated) == 2
    assert answer.start + answer.size == len(sequence.tokens)
    said = tokenizer.decode(stretch(sequence, answer.start, answer.size))
    assert len(said) == 6
    assert said[1:].isdigit()
    for stated in answer.stated:
        assert stretch(sequence, stated, answer.size) == encode(tokenizer, said)


def test_an_answer_counts_only_when_every_token_is_predicted(monkeypatch):
    """One wrong token of two loses the answer; the other answer still counts."""
    tokens = np.array([BOS_ID, 5, 6, 7, 8, 9])
    answers = (Answer(start=2, size=2, stated=(0,)), Answer(start=4, size=2, stated=(0,)))
    guesses = torch.tensor([[0, 6, 99, 8, 9]])
    monkeypatch.setattr(evaluate, "predicted", lambda *_: guesses)
    tally = accuracy(None, [Retrieval(tokens, answers)])
    assert (tally.total, tally.count) == (1, 2)
