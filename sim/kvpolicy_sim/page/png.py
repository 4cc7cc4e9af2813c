"""A picture in one colour, as a PNG that stands inside a page."""

import struct
import zlib
from base64 import b64encode

import numpy as np

LEVELS = 16
"""Degrees of opacity: half a byte per pixel."""


def data_uri(levels: np.ndarray, opacity: np.ndarray) -> str:
    """A black picture whose pixels differ in opacity.

    Args:
        levels: [height, width], integers below `LEVELS`.
        opacity: [LEVELS], from 0 to 1.
    """
    height, width = levels.shape
    even = np.pad(levels.astype(np.uint8), ((0, 0), (0, width % 2)))
    packed = even[:, ::2] << 4 | even[:, 1::2]  # two pixels per byte
    rows = np.pad(packed, ((0, 0), (1, 0)))  # each row begins with its filter: none
    png = b"\x89PNG\r\n\x1a\n" + b"".join(
        (
            _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 4, 3, 0, 0, 0)),
            _chunk(b"PLTE", bytes(3 * LEVELS)),
            _chunk(b"tRNS", np.round(255 * opacity).astype(np.uint8).tobytes()),
            _chunk(b"IDAT", zlib.compress(rows.tobytes(), 9)),
            _chunk(b"IEND", b""),
        )
    )
    return "data:image/png;base64," + b64encode(png).decode()


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
