"""The bundled model and a corpus of the bundled held-out text, as the training code reads them."""

from pathlib import Path

import numpy as np
import pytest

from kvpolicy import bundled_model
from kvpolicy.bundled import heldout_text
from kvpolicy.bundled.training.corpus import Corpus
from kvpolicy.bundled.training.export import load
from kvpolicy.bundled.training.tasks import Tasks
from kvpolicy.bundled.training.tokenizer import encode


@pytest.fixture(scope="session")
def loaded():
    """Model and tokenizer."""
    return load(Path(bundled_model()))


@pytest.fixture(scope="session")
def model(loaded):
    """The bundled model in the training code's own classes, in float32."""
    return loaded[0]


@pytest.fixture(scope="session")
def tokenizer(loaded):
    """The bundled model's."""
    return loaded[1]


@pytest.fixture(scope="session")
def corpus(tokenizer):
    """Two "books", the halves of the held-out text."""
    text = heldout_text()
    halves = [encode(tokenizer, part) for part in (text[:100_000], text[100_000:])]
    return Corpus(
        tokens=np.array([token for half in halves for token in half], dtype=np.uint16),
        starts=np.cumsum([0, *map(len, halves)]),
        num_bytes=len(text.encode("utf-8")),
    )


@pytest.fixture
def tasks(corpus, tokenizer):
    """Sequences made from the corpus."""
    return Tasks(corpus, tokenizer)
