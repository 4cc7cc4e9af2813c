"""Loading a model and its tokenizer from a folder, ready to be judged."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging

from kvpolicy import UnsupportedError


@dataclass(frozen=True)
class Checkpoint:
    """A model with its tokenizer.

    Attributes:
        model: The model, in evaluation mode.
        tokenizer: Its tokenizer.
    """

    model: PreTrainedModel
    tokenizer: Any

    @property
    def start(self) -> list[int]:
        """The token that begins every sequence; empty if the model has none."""
        bos = self.tokenizer.bos_token_id
        return [] if bos is None else [bos]

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without special tokens."""
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def decode(self, tokens: list[int]) -> str:
        """The text of token ids, special ones left out."""
        return self.tokenizer.decode(tokens, skip_special_tokens=True)


def load_checkpoint(path: str, dtype: torch.dtype = torch.float32) -> Checkpoint:
    """Load a model for evaluation, by default in float32.

    Raises:
        UnsupportedError: There is no model that transformers can load.
    """
    logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise UnsupportedError(
            f"cannot load a model from {path!r}: {str(error).splitlines()[0]}"
        ) from error
    return Checkpoint(model.eval(), tokenizer)
