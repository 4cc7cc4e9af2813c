"""numba, in a state in which vLLM starts beside it: import it from here.

vLLM 0.32 reads ``__dict__`` of everything in every loaded module when an engine starts, and the
proxy of the library below numba answers with a C function, which ends the engine.
"""

from contextlib import suppress

import llvmlite.binding.ffi
import numba

with suppress(AttributeError):  # another release, with other attributes
    llvmlite.binding.ffi.lib._fntab.setdefault("__dict__", {})

__all__ = ["numba"]
