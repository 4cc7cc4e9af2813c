"""kvpolicy in Hugging Face transformers: a `Cache` that keeps what its policy retains."""

from kvpolicy_hf.cache import PolicyCache

__all__ = ["PolicyCache"]
