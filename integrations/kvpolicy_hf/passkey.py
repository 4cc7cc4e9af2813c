"""Passkey retrieval under policies: a number hidden in a long text, asked for at its end."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from transformers import PreTrainedModel

from kvpolicy import CachePolicy
from kvpolicy.bundled.passkey import make_passkey
from kvpolicy_hf.cache import PolicyCache
from kvpolicy_hf.checkpoint import Checkpoint

BATCH = 8


@dataclass(frozen=True)
class Question:
    """One prompt as tokens.

    Attributes:
        prompt: Token ids, the first token included.
        answer: Token ids that must follow.
        depth: Share of the filler before the pass key.
    """

    prompt: list[int]
    answer: list[int]
    depth: float


@dataclass
class PasskeyScore:
    """How one policy did.

    Attributes:
        policy: The policy.
        found: For each question, whether greedy decoding wrote the whole answer.
        tokens: Tokens processed.
        seconds: Time taken.
    """

    policy: CachePolicy
    found: list[bool]
    tokens: int = 0
    seconds: float = 0.0

    @property
    def accuracy(self) -> float:
        """Share of exact answers."""
        return sum(self.found) / len(self.found)


def make_questions(
    checkpoint: Checkpoint, filler: str, context: int, samples: int, seed: int = 0
) -> list[Question]:
    """Make prompts whose pass keys lie evenly spread over the depth of the text.

    Args:
        checkpoint: Gives the tokenizer.
        filler: Text of sentences around the pass key.
        context: Tokens that prompt and answer may take together.
        samples: Number of prompts.
        seed: The same seed gives the same prompts.

    Raises:
        ValueError: The filler has no sentence, or the context is too small.
    """
    questions: list[Question] = []
    for sample in range(samples):
        rng = Random(seed * 1_000_003 + sample)
        depth = (sample + 0.5) / samples
        drawn = make_passkey(rng, filler, checkpoint.encode, context, depth)
        questions.append(
            Question(
                prompt=checkpoint.start + checkpoint.encode(drawn.prompt),
                answer=checkpoint.encode(drawn.answer),
                depth=depth,
            )
        )
    return questions


def score_passkeys(
    model: PreTrainedModel,
    questions: Sequence[Question],
    policies: Sequence[CachePolicy],
    pad_token: int,
    advance: Callable[[int], object] = lambda _: None,
) -> list[PasskeyScore]:
    """Ask every question under every policy, in left-padded batches, greedily.

    Raises:
        LedgerError: A cache evicted other than its occupancy law demands.
    """
    scores = [PasskeyScore(policy, []) for policy in policies]
    for score in scores:
        for first in range(0, len(questions), BATCH):
            batch = questions[first : first + BATCH]
            began = time.perf_counter()
            written = _answer(model, batch, score.policy, pad_token)
            score.seconds += time.perf_counter() - began
            score.found += [
                tokens[: len(question.answer)] == question.answer
                for tokens, question in zip(written, batch, strict=True)
            ]
            processed = sum(len(q.prompt) + len(q.answer) for q in batch)
            score.tokens += processed
            advance(processed)
    return scores


@torch.inference_mode()
def _answer(
    model: PreTrainedModel, batch: Sequence[Question], policy: CachePolicy, pad_token: int
) -> list[list[int]]:
    """Generate as many tokens as the longest answer has, per question."""
    longest = max(len(question.prompt) for question in batch)
    padding = [longest - len(question.prompt) for question in batch]
    ids = [[pad_token] * pad + q.prompt for pad, q in zip(padding, batch, strict=True)]
    mask = [[0] * pad + [1] * (longest - pad) for pad in padding]
    cache = PolicyCache(model, policy)
    generate: Any = model.generate
    written = generate(
        torch.tensor(ids),
        attention_mask=torch.tensor(mask),
        past_key_values=cache,
        max_new_tokens=max(len(question.answer) for question in batch),
        do_sample=False,
        pad_token_id=pad_token,
    )
    for row in range(len(batch)):
        cache.ledger(row)
    return written[:, longest:].tolist()
