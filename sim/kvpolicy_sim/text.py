"""The text of a traced sequence, from its token ids."""

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from kvpolicy import PolicyError
from kvpolicy.passage import Passage, spell
from kvpolicy.spec import shown
from kvpolicy.trace import Trace

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def read_passage(trace: Trace, sequence: int, tokenizer: str | Path) -> Passage | None:
    """A sequence's text, each token at its place; None if the trace has no token ids.

    Args:
        trace: The trace.
        sequence: Index of the sequence.
        tokenizer: The ``tokenizer.json`` that made the ids.

    Raises:
        PolicyError: It is no tokenizer, or not the one that the trace names.
        TraceError: The ids are damaged.
    """
    if not trace.has("tokens", None, sequence):
        return None
    found = tokenizer_hash(tokenizer)
    if trace.header.tokenizer and found != trace.header.tokenizer:
        raise PolicyError(
            f"the trace was made with another tokenizer: {str(tokenizer)!r} has SHA-256 "
            f"{shown(found[:12])}, expected {shown(trace.header.tokenizer[:12])}; give the traced "
            "model's tokenizer.json"
        )
    return spell(trace.read("tokens", None, sequence).tolist(), _load(tokenizer))


def tokenizer_hash(tokenizer: str | Path) -> str:
    """SHA-256 of a tokenizer's file, as traces name it; empty if there is none."""
    path = Path(tokenizer)
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""


def _load(tokenizer: str | Path) -> "Tokenizer":
    """Read a tokenizer.

    Raises:
        PolicyError: The file is none.
    """
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(tokenizer))
    except Exception as error:  # tokenizers raises nothing more particular
        raise PolicyError(
            f"cannot read a tokenizer from {str(tokenizer)!r}: {str(error).splitlines()[0]}; "
            "give the traced model's tokenizer.json"
        ) from error
