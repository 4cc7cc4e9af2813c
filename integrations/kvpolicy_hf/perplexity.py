"""Perplexity under policies: teacher-forced, closed-loop, beside the full cache.

The text is cut into consecutive windows, each behind the model's first token. A window goes
through the model as one sequence whose cache evicts as it would one token at a time, so that
every prediction sees exactly what the policy had retained. Its first tokens may be a prompt, for
policies that set prompts apart; then only what follows is scored, under every policy.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvpolicy import CachePolicy
from kvpolicy_hf.cache import PolicyCache
from kvpolicy_hf.checkpoint import Checkpoint

MAX_BATCH = 8
MAX_LOGITS = 1 << 25
"""Logits held at a time per policy; bounds the batch for long windows and large vocabularies."""


@dataclass
class WindowScores:
    """How one policy did, window by window.

    Attributes:
        policy: The policy.
        nll: Mean negative log-likelihood per predicted token of each window, in nats.
        kl: Mean divergence of the predictions from the full cache's, per window, in nats.
        agreement: Share of predictions whose likeliest token is the full cache's, per window.
        tokens: Predictions scored.
        seconds: Time taken.
    """

    policy: CachePolicy
    nll: list[float] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)
    agreement: list[float] = field(default_factory=list)
    tokens: int = 0
    seconds: float = 0.0

    @property
    def perplexity(self) -> float:
        """The exponential of the mean negative log-likelihood; windows are equally long."""
        return math.exp(_mean(self.nll))

    @property
    def mean_kl(self) -> float:
        """Mean divergence from the full cache."""
        return _mean(self.kl)

    @property
    def mean_agreement(self) -> float:
        """Mean agreement with the full cache."""
        return _mean(self.agreement)

    def ratio_interval(self, full: "WindowScores") -> tuple[float, float] | None:
        """Two standard errors around perplexity / the full cache's, paired by window.

        None of a single window.
        """
        if len(self.nll) < 2:
            return None
        ratios = torch.tensor(self.nll, dtype=torch.float64) - torch.tensor(full.nll)
        error = 2 * ratios.std().item() / math.sqrt(len(ratios))
        centre = ratios.mean().item()
        return math.exp(centre - error), math.exp(centre + error)


def cut_windows(checkpoint: Checkpoint, text: str, length: int, limit: int | None = None) -> Tensor:
    """Cut a text into consecutive windows of `length` tokens, [windows, length].

    Args:
        checkpoint: Gives the tokenizer and the token that begins each window.
        text: The text; a remainder shorter than a window is left out.
        length: Tokens per window, the first one included.
        limit: Most windows, from the beginning of the text.

    Raises:
        ValueError: The text does not fill one window.
    """
    start, tokens = checkpoint.start, checkpoint.encode(text)
    body = length - len(start)
    count = len(tokens) // body
    if count == 0:
        raise ValueError(
            f"the text has {len(tokens)} tokens, too few for a window of {length}; "
            "give a longer text or a smaller context"
        )
    kept = range(count if limit is None else min(count, limit))
    return torch.tensor([start + tokens[i * body : (i + 1) * body] for i in kept])


def score_windows(
    model: PreTrainedModel,
    windows: Tensor,
    policies: Sequence[CachePolicy],
    advance: Callable[[int], object] = lambda _: None,
    prompt_tokens: int = 0,
) -> list[WindowScores]:
    """Score windows [W, T] under policies; the first one is the reference of the others.

    Args:
        model: A model that `PolicyCache` supports.
        windows: Token ids.
        policies: The full cache first.
        advance: Told the tokens of every batch done, per policy.
        prompt_tokens: First tokens of each window that are its prompt and are not predicted.

    Raises:
        ValueError: A policy sets prompts apart where there are none, or nothing follows them.
        LedgerError: A cache evicted other than its occupancy law demands.
    """
    _require_prompts(policies, prompt_tokens, windows.shape[1])
    first = max(prompt_tokens, 1)  # the first prediction, made by the token before
    scores = [WindowScores(policy) for policy in policies]
    for batch in _batches(windows, model.config.vocab_size):
        reference: Tensor | None = None
        for score in scores:
            began = time.perf_counter()
            logits = _logits(model, batch, score.policy, prompt_tokens)  # [B, T - 1, V]
            logits = logits[:, first - 1 :]
            reference = logits if reference is None else reference
            _add(score, logits, reference, batch[:, first:])
            score.seconds += time.perf_counter() - began
            advance(batch.numel())
    return scores


def _require_prompts(policies: Sequence[CachePolicy], prompt_tokens: int, length: int) -> None:
    """Raise ValueError unless policies find the prompts that they set apart."""
    if prompt_tokens >= length:
        raise ValueError(
            f"a prompt of {prompt_tokens} tokens leaves nothing to predict in windows of {length}; "
            "give a shorter prompt"
        )
    needing = [str(policy) for policy in policies if policy.occupancy.needs_prompt]
    if needing and not prompt_tokens:
        raise ValueError(
            f"{needing[0]} sets the prompt apart, and perplexity has none: a window is one text; "
            "say how many of its first tokens are the prompt (--prompt-len)"
        )


def _batches(windows: Tensor, vocabulary: int) -> Iterator[Tensor]:
    rows = max(1, min(MAX_BATCH, MAX_LOGITS // (windows.shape[1] * vocabulary)))
    yield from windows.split(rows)


@torch.inference_mode()
def _logits(
    model: PreTrainedModel, batch: Tensor, policy: CachePolicy, prompt_tokens: int
) -> Tensor:
    """Log-probabilities of the next token at every position but the last."""
    cache = PolicyCache(model, policy, prompt_tokens)
    logits = model(batch, past_key_values=cache, use_cache=True).logits[:, :-1]
    for row in range(batch.shape[0]):
        cache.ledger(row)
    return logits.float().log_softmax(dim=-1)


def _add(score: WindowScores, logits: Tensor, reference: Tensor, targets: Tensor) -> None:
    """Add one batch's windows to a policy's scores."""
    nll = -logits.gather(-1, targets[..., None])[..., 0]  # [B, T - 1]
    agreement = (logits.argmax(-1) == reference.argmax(-1)).float()
    score.nll += nll.double().mean(-1).tolist()
    score.agreement += agreement.mean(-1).tolist()
    for row, ideal in zip(logits, reference, strict=True):
        score.kl.append((ideal.exp() * (ideal - row)).sum(-1).mean().item())
    score.tokens += targets.numel()


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
