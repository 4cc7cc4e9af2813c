"""Results as one self-contained page with pictures, or as pictures alone."""

from importlib.util import find_spec

from kvpolicy.errors import UnsupportedError


def require_matplotlib() -> None:
    """Raise UnsupportedError, with what to install, unless matplotlib is there to draw."""
    if find_spec("matplotlib") is None:
        raise UnsupportedError(
            "pages and pictures are drawn by matplotlib, which is not installed; install the "
            "extra report of kvpolicy, see docs/how-to/install.md"
        )
