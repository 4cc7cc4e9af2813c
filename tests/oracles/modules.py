"""Closed-loop oracle of any decoder: transformers' own modules around the oracle's attention.

For families whose layers `oracles.llama` does not define. Only attention is the oracle's here:
projections, rotation, norms, experts and residuals are transformers', in float64 (its norms and
rotary angles in float32), one token at a time and without any cache of transformers.
"""

import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

from oracles.arithmetic import Array
from oracles.dense import LayerOracle, Spec, parse
from oracles.llama import FAMILIES, ClosedLoop, ModelOracle

NAME = "oracle"
"""The oracle's attention in the registries of transformers."""


class ModuleOracle(ClosedLoop):
    """A whole model over one sequence.

    A layer that attends to a sliding window of W tokens, the newest included, follows
    ``window:budget=W-1,interval=1``, whatever the policy.

    Args:
        model: a transformers causal LM.
        spec: the policy of every layer with full attention; rope=keep and no memory.
        prompt: tokens of the prompt; only policies that set the prompt apart look at it.
    """

    def __init__(self, model: Any, spec: Spec | str, prompt: int = 0) -> None:
        spec = parse(spec) if isinstance(spec, str) else spec
        if spec.rope == "reindex" or spec.has_memory:
            raise ValueError(f"keys come rotated, which {spec.name} would undo")
        AttentionInterface.register(NAME, _attend)
        AttentionMaskInterface.register(NAME, lambda **_: None)
        self.model = copy.deepcopy(model).double()
        self.model.set_attn_implementation(NAME)
        self.model.set_experts_implementation("eager")  # others have no float64 on a CPU
        self.num_tokens = 0
        self._attentions: list[LayerOracle] = []
        for module in self.model.modules():
            if hasattr(module, "scaling") and hasattr(module, "layer_idx"):
                window = _window(model.config, module.layer_idx)
                rule = spec if window is None else parse(f"window:budget={window - 1},interval=1")
                module.oracle = LayerOracle(rule, module.layer_idx, module.scaling, prompt=prompt)
                if window is None:
                    self._attentions.append(module.oracle)

    @property
    def attentions(self) -> list[LayerOracle]:
        """Layers with full attention, in order."""
        return self._attentions

    @torch.no_grad()
    def feed(self, token_id: int) -> Array:
        """Append one token and return the logits after it, [vocab]."""
        output = self.model(
            torch.tensor([[token_id]]),
            position_ids=torch.tensor([[self.num_tokens]]),
            use_cache=False,
        )
        self.num_tokens += 1
        return output.logits[0, 0].numpy()


def oracle_of(model: Any, spec: str, prompt: int = 0) -> ClosedLoop:
    """The oracle that knows most of a model by itself."""
    slides = any(_window(model.config, i) for i in range(model.config.num_hidden_layers))
    knows_all = model.config.model_type in FAMILIES and not slides
    return (ModelOracle if knows_all else ModuleOracle)(model, spec, prompt=prompt)


def _window(config: Any, layer: int) -> int | None:
    """Tokens that a layer attends to; None: all."""
    kinds = getattr(config, "layer_types", None)
    is_sliding = kinds is not None and kinds[layer] == "sliding_attention"
    return config.sliding_window if is_sliding else None


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, **options: Any
) -> tuple[Tensor, None]:
    """Attend with one token's q [1, H, 1, D], k and v [1, H_kv, 1, D], rotated."""
    assert not options.get("softcap"), "the oracle's logits have no cap"
    q, k, v = (np.asarray(x[0, :, 0]) for x in (query, key, value))
    attended = module.oracle.step(q, k, v)  # [H, D]
    return torch.from_numpy(attended)[None, None].to(query.dtype), None
