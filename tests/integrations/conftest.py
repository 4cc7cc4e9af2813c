"""The model that most engines of these tests run."""

from pathlib import Path

import pytest
from transformers import LlamaForCausalLM

from fixtures.models import random_llama, save_model


@pytest.fixture(scope="session")
def model() -> LlamaForCausalLM:
    """A random Llama of two layers, with two KV heads."""
    return random_llama(num_hidden_layers=2)


@pytest.fixture(scope="session")
def path(model: LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model on disk."""
    return save_model(model, tmp_path_factory.mktemp("llama"))
