"""A trace as a safetensors file, for other tools."""

import json
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from kvpolicy.errors import TraceError
from kvpolicy.extras import require
from kvpolicy.trace.disk import beside
from kvpolicy.trace.header import row_axis
from kvpolicy.trace.slice import Sliced

Advance = Callable[[int], object]

METADATA_KEY = "kvtrace"
"""Key of the header and the sequences, as JSON, in the exported file's metadata."""


def export_safetensors(sliced: Sliced, path: str | Path, advance: Advance = lambda _: None) -> None:
    """Write tensors ``s0.l3.q`` of sequence 0 and layer 3, and so on; ids are ``s0.tokens``.

    The format wants all tensors at once, so that they must fit into memory together.

    Args:
        sliced: What to export.
        path: The file to write; an existing one is replaced when the new one is complete.
        advance: Told the bytes done.

    Raises:
        UnsupportedError: safetensors is not installed.
        TraceError: Memory does not suffice, or the trace is damaged.
        OSError: The file cannot be written.
    """
    require("safetensors", "the export")
    from safetensors.torch import save_file

    path = Path(path)
    _require_memory(sliced.num_bytes)
    tensors: dict[str, Tensor] = {}
    for sequence, layer, kind in sliced.streams():
        parts = [part.rows for part in sliced.parts(sequence, layer, kind)]
        rows = torch.cat(parts, dim=row_axis(kind))
        tensors[f"s{sequence}.{kind}" if layer is None else f"s{sequence}.l{layer}.{kind}"] = rows
        advance(rows.nbytes)
    about = {
        "header": sliced.header.as_dict(),
        "sequences": [asdict(sequence) for sequence in sliced.sequences],
    }
    part = beside(path, ".part")
    try:
        save_file(tensors, part, metadata={METADATA_KEY: json.dumps(about)})
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _require_memory(needed: int) -> None:
    """Raise unless some bytes are free, as far as the system says."""
    free = free_memory()
    if free is not None and needed > free:
        raise TraceError(
            f"the export holds all tensors in memory, {needed / 2**30:.1f} GiB, and "
            f"{free / 2**30:.1f} GiB are free; export less of the trace with --slice"
        )


def free_memory() -> int | None:
    """Bytes of memory that could be had without swapping; None where that is not known."""
    try:
        for line in Path("/proc/meminfo").read_text("ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    names = ("SC_AVPHYS_PAGES", "SC_PAGE_SIZE")
    if not all(name in os.sysconf_names for name in names):
        return None
    pages, size = (os.sysconf(name) for name in names)
    return pages * size if pages > 0 < size else None
