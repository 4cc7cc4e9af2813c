"""Loading a model and its tokenizer from a folder, ready to be judged."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging

from kvpolicy import UnsupportedError
from kvpolicy.passage import Passage, spell


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """A model's tokenizer.

    Attributes:
        tokenizer: The tokenizer.
    """

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

    def passage(self, tokens: list[int]) -> Passage | None:
        """Token ids as text, each at its place; None of a tokenizer written in Python."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        return None if backend is None else spell(tokens, backend)


@dataclass(frozen=True, kw_only=True)
class Checkpoint(Vocabulary):
    """A model with its tokenizer.

    Attributes:
        model: The model, in evaluation mode.
    """

    model: PreTrainedModel


def load_checkpoint(path: str, dtype: torch.dtype = torch.float32) -> Checkpoint:
    """Load a model for evaluation, by default in float32; its weights are never unpickled.

    Raises:
        UnsupportedError: There is no model that transformers can load.
    """
    logging.disable_progress_bar()
    with _refusing(path):
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, use_safetensors=True)
        tokenizer = AutoTokenizer.from_pretrained(path)
    return Checkpoint(model=model.eval(), tokenizer=tokenizer)


def load_vocabulary(path: str) -> Vocabulary:
    """Load a model's tokenizer alone.

    Raises:
        UnsupportedError: There is none that transformers can load.
    """
    with _refusing(path):
        return Vocabulary(tokenizer=AutoTokenizer.from_pretrained(path))


def load_config(path: str) -> PretrainedConfig:
    """Load a model's configuration alone.

    Raises:
        UnsupportedError: There is none that transformers can load.
    """
    with _refusing(path):
        return AutoConfig.from_pretrained(path)


@contextmanager
def _refusing(path: str) -> Iterator[None]:
    """Turn what transformers raises about a folder into an error of ours."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise UnsupportedError(
            f"cannot load a model from {path!r}: {str(error).splitlines()[0]}"
        ) from error
