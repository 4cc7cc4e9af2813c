"""The model and the text that commands measure, as their options name them."""

import argparse
from pathlib import Path
from typing import Any, TypeAlias

from kvpolicy.bundled import bundled_model, heldout_text
from kvpolicy.cli.arguments import positive

# The host's type: this package may import hosts only inside functions.
Checkpoint: TypeAlias = Any


def add_source(parser: argparse.ArgumentParser) -> None:
    """Declare ``--model``, ``--text`` and ``--threads``."""
    parser.add_argument("--model", metavar="DIR", help="model folder (default: the bundled one)")
    parser.add_argument("--text", metavar="FILE", help="text (default: bundled held-out prose)")
    parser.add_argument(
        "--threads",
        type=positive(),
        metavar="N",
        help="torch threads (default: 1 for the bundled model, otherwise torch's own choice)",
    )


def read_text(options: argparse.Namespace) -> str:
    """The text that the options name."""
    return heldout_text() if options.text is None else Path(options.text).read_text("utf-8")


def load_model(options: argparse.Namespace, dtype: str = "float32") -> Checkpoint:
    """Load the model that the options name, to run on as many threads as they say."""
    import torch

    from kvpolicy_hf.checkpoint import load_checkpoint

    threads = options.threads or (1 if options.model is None else None)
    if threads:
        torch.set_num_threads(threads)
    return load_checkpoint(options.model or bundled_model(), getattr(torch, dtype))
