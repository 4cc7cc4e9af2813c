"""Compiled loops on torch's own threads.

Idle threads of an OpenMP runtime spin for a while, so that a second pool of threads, such as
numba's, fights torch's for every core. So loops run in the runtime that torch and vLLM's kernels
use, on the threads that vLLM has bound to cores.
"""

import ctypes
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

_Parallel = Callable[[int, int, int, int], None]


def share(loop: Any, call: Sequence[int], tasks: int) -> None:
    """Run a loop on as many of torch's threads as there is work for, and wait until all are done.

    Args:
        loop: A numba C callback whose argument points to int64 numbers; it takes tasks until
            none is left.
        call: These numbers, the same for all threads.
        tasks: How many there are.
    """
    numbers = (ctypes.c_int64 * len(call))(*call)
    parallel, threads = _runtime(), min(tasks, torch.get_num_threads())
    if parallel is None or threads <= 1:
        loop.ctypes(numbers)
    else:
        parallel(loop.address, ctypes.addressof(numbers), threads, 0)


@cache
def _runtime() -> _Parallel | None:
    """OpenMP's entry point, ``GOMP_parallel``, as torch's own calls resolve it; None without one.

    It runs a function, by address, with one address as its argument, on so many threads at once,
    and returns when all are done. LLVM's and Intel's runtimes have it too.
    """
    # What was preloaded comes before what torch brings along.
    for library in (None, Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"):
        try:
            parallel = ctypes.CDLL(library and str(library)).GOMP_parallel
        except (OSError, AttributeError):
            continue
        parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
        parallel.restype = None
        return parallel
    return None
