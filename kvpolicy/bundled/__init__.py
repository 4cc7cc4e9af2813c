"""The language model that ships with the package, and text to judge it by."""

from pathlib import Path


def bundled_model() -> str:
    """Path of the bundled model, ready for vLLM and transformers."""
    return str(Path(__file__).parent / "model")


def heldout_text() -> str:
    """English prose that the bundled model was not trained on."""
    return (Path(__file__).parent / "heldout.txt").read_text(encoding="utf-8")
