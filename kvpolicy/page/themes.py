"""Colours of pages and pictures, on light and on dark paper."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Theme:
    """Colours, six hexadecimal digits each.

    Attributes:
        paper: Behind everything.
        ink: Text.
        soft: Text of less weight.
        line: Grids and borders.
        plain: The line of what keeps everything.
        colours: Lines of policies.
        ramp: From no loss to the greatest.
        gone: What was evicted, in a map.
        held: What is held, in a map: from few of a pixel's tokens to all.
        most: Behind text that most heads hold.
        some: Behind text that some heads hold.
        likeness: Behind the similarity of two sets.
    """

    paper: str
    ink: str
    soft: str
    line: str
    plain: str
    colours: tuple[str, ...]
    ramp: tuple[str, ...]
    gone: str
    held: tuple[str, str]
    most: str
    some: str
    likeness: str

    def colour(self, name: str) -> str:
        """A line's colour: ``plain``, or ``c0``, ``c1``, ..."""
        return self.plain if name == "plain" else self.colours[int(name[1:])]

    def properties(self) -> str:
        """The colours that a style sheet uses, as its custom properties."""
        names = ("paper", "ink", "soft", "line", "plain", "most", "some", "likeness")
        pairs = [(name, getattr(self, name)) for name in names]
        pairs += [(f"c{index}", colour) for index, colour in enumerate(self.colours)]
        return " ".join(f"--{name}: {colour};" for name, colour in pairs)


LIGHT = Theme(
    paper="#ffffff",
    ink="#1d1d1f",
    soft="#66666c",
    line="#e3e3e6",
    plain="#8a8a90",
    colours=tuple("#1257e0 #dd7a0d #1d5c2e #b8188f #4d0b45 #24a1c0 #87702b".split()),
    ramp=tuple("#fbf7f0 #f7c988 #e2743d #a02c33 #4a0f2d".split()),
    gone="#eeeef1",
    held=("#a9c4f5", "#0f3f9e"),
    most="#bcd4ff",
    some="#fbe7b5",
    likeness="#b9cff5",
)

DARK = Theme(
    paper="#17181a",
    ink="#ececee",
    soft="#a2a2a9",
    line="#333438",
    plain="#8e8e95",
    colours=tuple("#346dfb #faa34a #5d831f #bd97dd #9e3e93 #95edfa #f6fd60".split()),
    ramp=tuple("#201f24 #54213f #a83b4a #ee8d50 #fdebb8".split()),
    gone="#26272b",
    held=("#34548f", "#a9c8ff"),
    most="#274f9c",
    some="#54430f",
    likeness="#2c4674",
)
