"""Results as one self-contained page with pictures, or as pictures alone."""

from kvpolicy.extras import require


def require_matplotlib() -> None:
    """Raise UnsupportedError, with what to install, unless matplotlib is there to draw."""
    require("matplotlib", "drawing pages and pictures")
