"""The traced model's own layers, for memories that pass rows through them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch

from kvpolicy import UnsupportedError
from kvpolicy.extras import require
from kvpolicy.memory.decoder import Decoder
from kvpolicy.rotary import Rotary
from kvpolicy.trace import Header

# transformers' type: it is imported only where a model is loaded.
PreTrainedModel: TypeAlias = Any


@dataclass(frozen=True)
class Weights:
    """A model's layers, taken apart.

    Attributes:
        layers: One per layer of the model.
    """

    layers: Sequence[Decoder]


def load_weights(model: str | Path | PreTrainedModel, header: Header) -> Weights:
    """Load the model that a trace was captured from, in float32, and take it apart.

    Args:
        model: A transformers model, or the folder of one.
        header: The trace's header.

    Raises:
        UnsupportedError: transformers is not installed, there is no such model, it is not the
            traced one, or its layers cannot be taken apart exactly.
    """
    require("transformers", "reading a model's weights")
    from kvpolicy.memory.modules import reason_against, take_apart

    loaded = _load(model) if isinstance(model, str | Path) else model
    for reason in (_difference(loaded.config, header), reason_against(loaded.get_decoder())):
        if reason:
            raise UnsupportedError(f"{_name(model)}: {reason}")
    stack = loaded.get_decoder()
    rotary = Rotary(stack.rotary_emb.inv_freq.detach().float().clone())
    return Weights(take_apart(stack, rotary))


def _load(path: str | Path) -> PreTrainedModel:
    """Load a folder without touching the network."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        found = AutoModelForCausalLM.from_pretrained(
            str(path), dtype=torch.float32, local_files_only=True, use_safetensors=True
        )
    except (OSError, ValueError, KeyError) as error:
        raise UnsupportedError(f"{path}: cannot load a model from it: {error}") from error
    return found.eval().requires_grad_(False)


def _difference(config: Any, header: Header) -> str | None:
    """Say how a model differs from the traced one; None if it does not."""
    from kvpolicy_sim.eligible import fingerprint_of

    heads = getattr(config, "num_attention_heads", None)
    width = getattr(config, "hidden_size", 0)
    facts = {
        "layers": (getattr(config, "num_hidden_layers", None), header.num_layers),
        "query heads": (heads, header.num_query_heads),
        "KV heads": (getattr(config, "num_key_value_heads", heads), header.num_kv_heads),
        "head_dim": (getattr(config, "head_dim", None) or width // (heads or 1), header.head_dim),
    }
    for name, (got, expected) in facts.items():
        if got != expected:
            return (
                f"it has {name} = {got}, the trace was captured from {header.model} with "
                f"{expected}; give the traced model"
            )
    if header.fingerprint and fingerprint_of(config) != header.fingerprint:
        return (
            f"its configuration is not that of {header.model}, which was traced: the fingerprints "
            "differ; give the traced model"
        )
    return None


def _name(model: object) -> str:
    return str(model) if isinstance(model, str | Path) else type(model).__name__
