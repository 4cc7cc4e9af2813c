"""A page that needs nothing but itself (no script, no font, no network), and its pictures."""

import os
import re
from base64 import b64encode
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING

from kvpolicy import __version__
from kvpolicy.ledger import SEMANTICS
from kvpolicy.page import require_matplotlib
from kvpolicy.page.markup import Markup, breakable, element, join
from kvpolicy.page.themes import DARK, LIGHT, Theme

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Picture:
    """A picture with its numbers beside it.

    Attributes:
        name: Of its file, without suffix.
        alt: What it shows, for who cannot see it.
        draw: Draws it with a theme's colours.
        numbers: A table of what is drawn.
    """

    name: str
    alt: str
    draw: Callable[[Theme], "Figure"]
    numbers: Markup

    def markup(self) -> Markup:
        """The picture for light and for dark paper, and its numbers to be opened."""
        figures = {theme: self.draw(theme) for theme in (LIGHT, DARK)}
        width, height = (round(100 * inches) for inches in figures[LIGHT].get_size_inches())
        dark = element(
            "source",
            srcset=_address(DARK, figures[DARK]),
            media="(prefers-color-scheme: dark)",
            width=width,
            height=height,
        )
        image = element(
            "img", src=_address(LIGHT, figures[LIGHT]), alt=self.alt, width=width, height=height
        )
        summary = element("summary", "The numbers of this picture")
        return element(
            "figure",
            element("picture", dark, image),
            element("figcaption", element("details", summary, self.numbers)),
        )


@dataclass(frozen=True)
class Section:
    """A part of a page.

    Attributes:
        heading: Its title.
        introduction: What is shown, and how to read it.
        content: Text and pictures, in order.
        short: The title in the table of contents; default the heading.
    """

    heading: str
    introduction: str
    content: Sequence[Markup | Picture]
    short: str = ""

    @property
    def name(self) -> str:
        """What links call it."""
        return slug(self.short or self.heading)

    def markup(self) -> Markup:
        """The section with its pictures drawn."""
        heading = f"{self.name}-heading"
        return element(
            "section",
            element("h2", self.heading, id=heading),
            element("p", self.introduction, class_="introduction"),
            *(x.markup() if isinstance(x, Picture) else x for x in self.content),
            id=self.name,
            aria_labelledby=heading,
        )


@dataclass(frozen=True)
class Document:
    """A page before it is written.

    Attributes:
        command: What made it, such as ``replay``.
        title: What it is about.
        facts: Names and values that stand at the top.
        caveat: What its figures cannot say.
        sections: In order; no two of one name.
    """

    command: str
    title: str
    facts: dict[str, str]
    caveat: Markup
    sections: Sequence[Section]

    @property
    def pictures(self) -> list[Picture]:
        """All pictures, in order."""
        return [x for each in self.sections for x in each.content if isinstance(x, Picture)]

    def html(self) -> str:
        """The page.

        Raises:
            UnsupportedError: There is nothing to draw with.
        """
        require_matplotlib()
        folder = files("kvpolicy.page")
        links = (
            element("li", element("a", each.short or each.heading, href=f"#{each.name}"))
            for each in self.sections
        )
        return Template(folder.joinpath("page.html").read_text(encoding="utf-8")).substitute(
            light=LIGHT.properties(),
            dark=DARK.properties(),
            style=folder.joinpath("page.css").read_text(encoding="utf-8"),
            title=join([f"{self.title}: kvpolicy {self.command}"]),
            header=self._header(),
            contents=join(links),
            sections=join(each.markup() for each in self.sections),
            version=f"kvpolicy {__version__}, semantics {SEMANTICS}",
        )

    def write_html(self, path: Path) -> None:
        """Write the page, completely or not at all.

        Raises:
            OSError: The file cannot be written.
            UnsupportedError: There is nothing to draw with.
        """
        # A model's name may hold half a surrogate pair, which UTF-8 cannot.
        _write(path, self.html().encode("utf-8", errors="replace"))

    def write_pictures(self, folder: Path) -> list[Path]:
        """Write every picture as a PNG on light paper, the folder made if it is missing.

        All are drawn before the first is written.

        Raises:
            OSError: The folder or a file cannot be written.
            UnsupportedError: There is nothing to draw with.
        """
        require_matplotlib()
        from kvpolicy.page.canvas import png

        drawn = {
            folder / f"{each.name}.png": png(LIGHT, each.draw(LIGHT)) for each in self.pictures
        }
        folder.mkdir(exist_ok=True)
        for path, data in drawn.items():
            _write(path, data)
        return [*drawn]

    def _header(self) -> Markup:
        items = (
            element("div", element("dt", name), element("dd", value))
            for name, value in self.facts.items()
        )
        return element(
            "header",
            element("p", f"kvpolicy {self.command}", class_="over"),
            element("h1", breakable(self.title)),
            element("dl", *items, class_="facts"),
            element("p", self.caveat),
        )


def slug(text: str) -> str:
    """Text as addresses and names of files have it; numbers keep their digits together."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower().replace(",", "")).strip("-")


def _address(theme: Theme, figure: "Figure") -> str:
    """An address that holds all of a picture."""
    from kvpolicy.page.canvas import svg

    return "data:image/svg+xml;base64," + b64encode(svg(theme, figure)).decode()


def _write(path: Path, data: bytes) -> None:
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(data)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
