"""LoRA adapters in one batch with requests that bring none.

vLLM numbers a token's adapter by its slot, and calls none -1. Its CPU kernels take that for an
index, so that a request without an adapter is computed with the one in the last slot as soon as
another request of its batch has one. They see zeros here in the place of such tokens, of which
every adapter makes nothing.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

if TYPE_CHECKING:
    from torch import Tensor


class AdaptersApart(PunicaWrapperCPU):
    """vLLM's products with adapters, for the tokens that have one."""

    def add_lora_linear(self, y: "Tensor", x: "Tensor", *args: Any, **kwargs: Any) -> None:
        """Add what the tokens' adapters make of a linear layer's input."""
        super().add_lora_linear(y, _adapted(x, self.token_lora_indices), *args, **kwargs)

    def add_lora_embedding(self, y: "Tensor", x: "Tensor", *args: Any, **kwargs: Any) -> None:
        """Add what they make of embeddings."""
        super().add_lora_embedding(y, _adapted(x, self.token_lora_indices), *args, **kwargs)

    def add_lora_logits(self, y: "Tensor", x: "Tensor", *args: Any, **kwargs: Any) -> None:
        """Add what they make of the last hidden states, one per request."""
        super().add_lora_logits(y, _adapted(x, self.sampler_indices), *args, **kwargs)


@contextmanager
def adapters_apart() -> Iterator[None]:
    """Let a model that is loaded meanwhile use `AdaptersApart`."""
    from vllm.platforms import current_platform

    name = f"{AdaptersApart.__module__}.{AdaptersApart.__qualname__}"
    current_platform.get_punica_wrapper = lambda: name
    try:
        yield
    finally:
        del current_platform.get_punica_wrapper


def _adapted(x: "Tensor", indices: "Tensor") -> "Tensor":
    """Inputs [..., D], flattened to [T, D], with zeros where a token has no adapter."""
    return x.reshape(-1, x.shape[-1]).masked_fill((indices < 0)[:, None], 0)
