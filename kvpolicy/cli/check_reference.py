"""The reference of `kvpolicy check`: one token at a time in transformers, every decision noted.

The model is a random one of the bundled one's shape, whose attention is spread, so that scores
lie apart. A host's sets are compared with the reference's KV head by KV head; a difference is
legal only where rounding may have turned a decision.
"""

import math
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import torch

from kvpolicy.agreement import NEAR_TIE
from kvpolicy.bundled import bundled_model
from kvpolicy.policy import CachePolicy, EvictionPolicy
from kvpolicy.rehearsal import Decision, Notes, margins, spied

Model: TypeAlias = Any

NEW_TOKENS = 24

_LOGIT_MARGIN = 1e-3
"""Between the likeliest tokens; below it rounding may choose another one."""

_WEIGHT_SCALE = 1.9
"""Standard deviation of a random layer's outputs: logits of attention spread over a few units."""


@dataclass
class Tally:
    """Comparisons of one host, KV head by KV head.

    Attributes:
        agreeing: Sets that are the reference's.
        excused: Sets that differ where rounding may have turned a decision, or behind one.
        difference: The first one that nothing excuses.
    """

    agreeing: int = 0
    excused: int = 0
    difference: str | None = None

    def add(self, difference: str | None, *, is_legal: bool = False) -> None:
        """Add one comparison; None is agreement."""
        if difference is None:
            self.agreeing += 1
        elif is_legal:
            self.excused += 1
        elif self.difference is None:
            self.difference = difference


@dataclass
class Walk:
    """The reference: one prompt and greedy tokens, one token at a time, in transformers.

    Attributes:
        prompt: Token ids.
        tokens: New tokens.
        retained: Positions held at the end, by layer and KV head, ascending.
        smallest_logit_margin: Between the likeliest tokens, over all choices.
        margins: Smallest margin of each (layer, KV head)'s decisions.
    """

    prompt: list[int]
    tokens: list[int]
    retained: list[list[list[int]]]
    smallest_logit_margin: float
    margins: dict[tuple[int, int], float] = field(default_factory=dict)

    def compare(
        self, tally: Tally, tokens: list[int], retained: list[list[list[int]]], where: str
    ) -> None:
        """Add every layer and head, then the tokens.

        Layers above one that differs saw other inputs.
        """
        is_disturbed = False
        for layer, (ours, theirs) in enumerate(zip(self.retained, retained, strict=True)):
            was_disturbed = is_disturbed
            for head, kept in enumerate(ours):
                at = f"{where}, layer {layer}, KV head {head}"
                apart = sets_apart(kept, theirs[head], at, "one token at a time it")
                is_tie = self.margins.get((layer, head), math.inf) < NEAR_TIE
                tally.add(apart, is_legal=is_tie or was_disturbed)
                is_disturbed |= apart is not None
        if tokens != self.tokens:
            at = next(i for i, (a, b) in enumerate(zip(tokens, self.tokens, strict=True)) if a != b)
            tally.add(
                f"{where}: other tokens from new token {at} on",
                is_legal=is_disturbed or self.smallest_logit_margin < _LOGIT_MARGIN,
            )


def sets_apart(ours: list[int], theirs: list[int], where: str, reference: str) -> str | None:
    """What sets two sets of positions apart; None if nothing does."""
    only, instead = sorted({*ours} - {*theirs}), sorted({*theirs} - {*ours})
    if not only and not instead:
        return None
    return f"{where}: {reference} keeps {only[:8]}, the host {instead[:8]} instead"


def walk_through(model: Model, prompt: list[int], policy: CachePolicy) -> Walk:
    """Feed one token at a time, and note every decision."""
    from kvpolicy_hf import PolicyCache

    notes = Notes()
    cache = PolicyCache(model, spied(policy, notes), len(prompt))
    tokens, margin_of_logits = list[int](), math.inf
    smallest: dict[tuple[int, int], float] = {}
    with torch.inference_mode():
        for n in range(1, len(prompt) + NEW_TOKENS):
            token = prompt[n - 1] if n <= len(prompt) else tokens[-1]
            logits = model(torch.tensor([[token]]), past_key_values=cache, use_cache=True).logits
            for view, scores in notes.take():
                assert isinstance(policy, EvictionPolicy), "others are asked nothing"
                law = policy.occupancy.of_prompt(len(prompt))
                made = Decision(policy, view, scores, 0, law.surplus(n))
                for head, each in enumerate(margins(made)):
                    place = view.layer, head
                    smallest[place] = min(each, smallest.get(place, math.inf))
            if n >= len(prompt):
                first, second = logits[0, -1].topk(2).values.tolist()
                margin_of_logits = min(margin_of_logits, first - second)
                tokens.append(int(logits[0, -1].argmax()))
    retained = [cache.retained_positions(layer).tolist() for layer in range(len(cache.layers))]
    cache.ledger()  # checks what was evicted against the law
    return Walk(prompt, tokens, retained, margin_of_logits, smallest)


def random_model(folder: Path) -> Model:
    """Draw the weights of a model as the bundled one and save it, with its tokenizer."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    config = AutoConfig.from_pretrained(bundled_model())
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                deviation = _WEIGHT_SCALE / math.sqrt(parameter.shape[-1])
                parameter.normal_(std=deviation, generator=generator)
            else:
                parameter.fill_(1.0)
    model.save_pretrained(folder)
    for path in Path(bundled_model()).glob("tokenizer*"):
        shutil.copy(path, folder)
    return model
