"""Files of fitted or trained parameters that a policy names.

They are safetensors files: raw tensors behind a checked header, nothing that is executed.
"""

from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from kvpolicy.errors import PolicyError
from kvpolicy.extras import require

_MAX_BYTES = 1 << 31

_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


@lru_cache(maxsize=16)
def load_parameters(path: str) -> dict[str, Tensor]:
    """Read a file's tensors as float32, once per process.

    Raises:
        PolicyError: There is no such file, it is damaged, or safetensors is not installed.
    """
    require("safetensors", f"reading {path}")
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if not Path(path).is_file():  # opening a pipe would wait for its other end
            raise OSError("there is no such regular file")
        size = Path(path).stat().st_size
        tensors = load_file(path) if size <= _MAX_BYTES else {}
    except (OSError, ValueError, SafetensorError) as error:  # a NUL in a path is a ValueError
        raise PolicyError(f"{path}: cannot read parameters: {error}") from error
    if size > _MAX_BYTES:
        raise PolicyError(f"{path}: {size} bytes are too many for a policy's parameters")
    return {name: _checked(path, name, tensor) for name, tensor in tensors.items()}


def _checked(path: str, name: str, tensor: Tensor) -> Tensor:
    """Give a tensor as float32, in which it must be finite."""
    if tensor.dtype not in _DTYPES:
        kinds = ", ".join(str(dtype).removeprefix("torch.") for dtype in _DTYPES)
        raise PolicyError(
            f"{path}: tensor {name!r} must hold finite floats of {kinds}, got {tensor.dtype}"
        )
    numbers = tensor.float()
    if not bool(numbers.isfinite().all()):
        raise PolicyError(
            f"{path}: tensor {name!r} must hold finite floats in the range of float32"
        )
    return numbers
