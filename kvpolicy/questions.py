"""What a policy was asked in a rehearsal, and asking it again in another way."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kvpolicy.policy import CachePolicy, EvictionPolicy, View
from kvpolicy.rehearsal import Case, Decision, reference


def settings_of_torch() -> dict[str, Any]:
    """What a policy must not change of torch."""
    return {
        "torch's random state": torch.get_rng_state().tolist(),
        "torch's default dtype": torch.get_default_dtype(),
        "torch's number of threads": torch.get_num_threads(),
        "whether torch records gradients": torch.is_grad_enabled(),
    }


def vectors(view: View) -> dict[str, Tensor]:
    """Keys and values of a view, as far as it shows them."""
    return {name: x for name, x in slot_tensors(view) if name in ("keys", "values")}


def decisions(policy: CachePolicy, case: Case, most: int = 4) -> list[Decision]:
    """Some of the decisions of the reference run, from all over it."""
    made = list({id(x.view): x for x in reference(policy, case).decisions.values()}.values())
    return made[:: max(1, len(made) // most)]


def questions(policy: CachePolicy, case: Case) -> list[Callable[[View], Tensor]]:
    """What hosts ask of the policy of the case's layer."""
    policy = policy.of_layer(case.layer)
    assert isinstance(policy, EvictionPolicy), "others make no decisions"
    return [policy.score, *([policy.observe] if policy.observes_every_token else [])]


def slot_tensors(view: View) -> list[tuple[str, Tensor]]:
    """The tensors of a view that have slots, by name."""
    names = ("positions", "valid", "weights", "accumulated", "keys", "values")
    return [(name, x) for name in names if (x := getattr(view, name)) is not None]


def mapped(view: View, change: Callable[[Tensor], Tensor]) -> View:
    """The view with every tensor of slots changed."""
    return replace(view, **{name: change(x) for name, x in slot_tensors(view)})


def gathered(x: Tensor, order: Tensor) -> Tensor:
    """Reorder the slots of [B, H_kv, S] or [B, H_kv, S, D]."""
    return x.gather(2, order if x.dim() == 3 else order[..., None].expand_as(x))


def with_rubbish(view: View) -> View:
    """The view with three more slots that are not held and hold the worst."""
    rubbish = {"positions": -7, "valid": False, "weights": 0.0}
    return replace(
        view,
        **{
            name: torch.cat([x, torch.full_like(x[:, :, :1], rubbish.get(name, math.nan))], dim=2)
            for name, x in slot_tensors(view)
        },
    )
