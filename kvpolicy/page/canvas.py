"""What all pictures have in common: matplotlib's settings in a theme's colours, and files.

Names of policies come from anywhere, so text is never read as mathematics, and characters that the
font may lack are replaced.
"""

import io
from contextlib import AbstractContextManager

from matplotlib import rc_context
from matplotlib.figure import Figure

from kvpolicy.page.themes import Theme

WIDTH = 9.6
"""Of a picture, in inches."""

LONGEST = 34
"""Characters of a name that a picture shows."""

_DPI = 160
"""Of pictures made of pixels."""


def on_paper(theme: Theme) -> AbstractContextManager[None]:
    """Matplotlib's settings, around whatever draws or writes a picture."""
    return rc_context(
        {
            "axes.edgecolor": theme.line,
            "axes.facecolor": theme.paper,
            "axes.labelcolor": theme.soft,
            "axes.titlecolor": theme.ink,
            "figure.facecolor": theme.paper,
            "font.family": "DejaVu Sans",
            "font.size": 9,
            "lines.scale_dashes": False,
            "savefig.facecolor": theme.paper,
            "svg.fonttype": "path",
            "svg.hashsalt": "kvpolicy",
            "text.color": theme.ink,
            "text.parse_math": False,
            "xtick.color": theme.soft,
            "ytick.color": theme.soft,
        }
    )


def svg(theme: Theme, figure: Figure) -> bytes:
    """A picture as the contents of an SVG file."""
    file = io.BytesIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with on_paper(theme):
        figure.savefig(file, format="svg", metadata=nothing)
    return file.getvalue()


def png(theme: Theme, figure: Figure) -> bytes:
    """A picture as the contents of a PNG file."""
    file = io.BytesIO()
    with on_paper(theme):
        figure.savefig(file, format="png", dpi=_DPI)
    return file.getvalue()


def plain(text: str, longest: int = LONGEST) -> str:
    """Text cut to what a picture has room for, without what its font may lack."""
    cut = text if len(text) <= longest else f"{text[: longest - 3]}..."
    return "".join(x if " " <= x <= "~" else "?" for x in cut)
