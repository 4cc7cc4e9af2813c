"""Attention over tokens and memory together.

Parts of a softmax can be attended apart: each gives its output and the log-sum-exp L of its
logits, and the whole is sum_i exp(L_i - L) o_i with L = lse(L_i), exactly. A bias that all slots
of a part share is added to its L alone.

Axes as in `kvpolicy.memory.state`.
"""

import torch
from torch import Tensor

from kvpolicy.attention import query_key_products, weighted_values
from kvpolicy.memory.state import Attended, Question


def attend_jointly(
    question: Question, keys: Tensor, values: Tensor, bias: Tensor, frame: Tensor | None
) -> Attended:
    """Attend to memory slots and tokens in one softmax.

    Args:
        question: Queries, and logits over the tokens that they see.
        keys: [B, H_kv, M, D] of the memory slots.
        values: [B, H_kv, M, D] of the memory slots.
        bias: [B, H_kv, M] added to their logits, -inf for a slot that does not count.
        frame: Position from which keys are rotated, like `question.evicted`; None if keys lie
            at their final rotation.
    """
    q = question.q if frame is None else question.setting.rotary.shift(question.q, -frame)
    remembered = query_key_products(q, keys, question.setting.scale) + bias[:, :, None, None]
    num_slots = keys.shape[2]
    logits = torch.cat([remembered, question.logits], dim=-1)
    weights, lse = _softmax(logits)
    output = weighted_values(weights[..., :num_slots], values)
    output += weighted_values(weights[..., num_slots:], question.values)
    return Attended(output, weights[..., num_slots:], lse)


def attend_tokens(question: Question) -> Attended:
    """Attend to the tokens alone."""
    weights, lse = _softmax(question.logits)
    return Attended(weighted_values(weights, question.values), weights, lse)


def merge_by_lse(tokens: Attended, output: Tensor, lse: Tensor) -> Attended:
    """Join a branch that knows its log-mass to tokens, as parts of one softmax.

    Args:
        tokens: Attention over the tokens alone.
        output: [B, H, Q, D] of the branch; any numbers where its `lse` is -inf.
        lse: [B, H_kv, G, Q] of the branch, -inf where it is empty.
    """
    total = torch.logaddexp(tokens.lse, lse)
    kept, added = (tokens.lse - total).exp(), (lse - total).exp()
    branch = output.masked_fill((added == 0).flatten(1, 2)[..., None], 0)
    joined = tokens.output * kept.flatten(1, 2)[..., None]
    joined = joined + branch * added.flatten(1, 2)[..., None]
    return Attended(joined, tokens.weights * kept[..., None], total)


def merge_by_sum(tokens: Attended, numerator: Tensor, denominator: Tensor) -> Attended:
    """Join a branch that gives sums over its tokens j of w_j v_j and of w_j, w_j ~ exp(logit).

    Kernel features estimate such sums (RFA, arXiv 2103.02143). Estimates may be negative, for
    which there is no log-mass; a sum of all weights that is not positive counts as tokens alone.

    Args:
        tokens: Attention over the tokens alone.
        numerator: [B, H, Q, D].
        denominator: [B, H_kv, G, Q].
    """
    scale = (-tokens.lse).exp()  # in units of the tokens' own mass, which is 1
    total = 1 + denominator * scale
    is_usable = total > 0
    share = torch.where(is_usable, 1 / total, 1.0)
    added = numerator * (scale * share * is_usable).flatten(1, 2)[..., None]
    return Attended(
        tokens.output * share.flatten(1, 2)[..., None] + added,
        tokens.weights * share[..., None],
        tokens.lse - share.log(),
    )


def _softmax(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax over the last axis, and the log-sum-exp read off its largest weight."""
    weights = logits.softmax(dim=-1)
    return weights, logits.amax(dim=-1) - weights.amax(dim=-1).log()
