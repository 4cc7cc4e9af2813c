"""Files of fitted or trained parameters that a policy names.

They are safetensors files: raw tensors behind a checked header, nothing that is executed.
"""

import importlib.util
from functools import lru_cache
from pathlib import Path

from torch import Tensor

from kvpolicy.errors import PolicyError

_MAX_BYTES = 1 << 31


@lru_cache(maxsize=16)
def load_parameters(path: str) -> dict[str, Tensor]:
    """Read a file's tensors, once per process.

    Raises:
        PolicyError: There is no such file, it is damaged, or safetensors is not installed.
    """
    if importlib.util.find_spec("safetensors") is None:
        raise PolicyError(f"{path}: reading it needs safetensors: pip install safetensors")
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        size = Path(path).stat().st_size
        tensors = load_file(path) if size <= _MAX_BYTES else {}
    except (OSError, ValueError, SafetensorError) as error:  # a NUL in a path is a ValueError
        raise PolicyError(f"{path}: cannot read parameters: {error}") from error
    if size > _MAX_BYTES:
        raise PolicyError(f"{path}: {size} bytes are too many for a policy's parameters")
    for name, tensor in tensors.items():
        if not (tensor.is_floating_point() and bool(tensor.isfinite().all())):
            raise PolicyError(f"{path}: tensor {name!r} must hold finite floats")
    return tensors
