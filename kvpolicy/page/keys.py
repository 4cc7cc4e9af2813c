"""How a page tells policies apart: a number, a short label, a colour and a dash."""

from collections.abc import Sequence
from dataclasses import dataclass

from kvpolicy.errors import PolicyError
from kvpolicy.page.markup import Markup, breakable, element
from kvpolicy.policy import CachePolicy
from kvpolicy.series import series_of
from kvpolicy.spec import split_spec

COLOURS = 7
"""Of lines: ``c0``, ``c1``, ... of the themes and the style sheet."""

DASHES = (None, "9 4", "2 3", "9 3 2 3", "5 3", "14 3 3 3")
"""In pixels; their number has no factor in common with that of the colours."""


@dataclass(frozen=True)
class Key:
    """What a policy goes by.

    Attributes:
        number: Its place in the report, from 1; None of what is not one policy.
        spec: Its canonical spec.
        label: The spec without what all policies have in common.
        colour: ``plain``, ``c0``, ``c1``, ...: a class of the style sheet.
        dash: An SVG dash array; None for a solid line.
    """

    number: int | None
    spec: str
    label: str
    colour: str
    dash: str | None

    def swatch(self) -> Markup:
        """A piece of the policy's line."""
        line = element("path", d="M1 5H27", stroke_dasharray=self.dash)
        return element(
            "svg", line, class_=f"swatch {self.colour}", viewBox="0 0 28 10", aria_hidden="true"
        )

    @property
    def short(self) -> str:
        """Number and label, as pictures and the headings of tables have them."""
        return self.label if self.number is None else f"{self.number}  {self.label}"

    def name(self) -> Markup:
        """Swatch, number and label; the whole spec where a mouse rests."""
        return self._written(self.label, self.spec)

    def full_name(self) -> Markup:
        """Swatch, number and spec."""
        return self._written(self.spec, None)

    def _written(self, text: str, title: str | None) -> Markup:
        number = [] if self.number is None else [element("b", str(self.number))]
        spec = element("span", breakable(text), class_="spec")
        return element("span", self.swatch(), *number, spec, class_="key", title=title)


def keys_of(policies: Sequence[CachePolicy]) -> list[Key]:
    """A key for every policy; those that keep everything share a plain line.

    Policies that differ in their budgets alone share a colour.
    """
    evicting = [policy for policy in policies if policy.evicts]
    specs = [_items(str(policy)) for policy in evicting]
    common = set(specs[0]).intersection(*specs) if len(specs) > 1 else set[str]()
    seen: dict[str, int] = {}
    places = {
        series: index for index, series in enumerate(dict.fromkeys(map(series_name, evicting)))
    }
    keys: list[Key] = []
    for number, policy in enumerate(policies, 1):
        colour, dash = "plain", None
        if policy in evicting:
            series = series_name(policy)
            nth = seen[series] = seen.get(series, -1) + 1
            colour, dash = _line(places[series], nth)
        keys.append(Key(number, str(policy), _label(str(policy), common), colour, dash))
    return keys


def series_keys(series: Sequence[str]) -> list[Key]:
    """Keys of lines that join policies of several budgets."""
    return [Key(None, name, name, *_line(place, 0)) for place, name in enumerate(series)]


def series_name(policy: CachePolicy) -> str:
    """What a policy has in common with those of other budgets; its spec if that is no spec."""
    try:
        return series_of(policy)
    except PolicyError:
        return str(policy)


def _line(series: int, nth: int) -> tuple[str, str | None]:
    """Colour and dash of the nth policy of a series."""
    return f"c{series % COLOURS}", DASHES[(series + nth) % len(DASHES)]


def _items(spec: str) -> list[str]:
    """A spec's parameters as text; none if a policy prints itself against the grammar."""
    try:
        return [f"{key}={value}" for key, value in split_spec(spec).parameters.items()]
    except PolicyError:
        return []


def _label(spec: str, common: set[str]) -> str:
    """The class or name, and the parameters that are not in common."""
    name = spec.partition(":")[0].rpartition(".")[-1]
    items = [item for item in _items(spec) if item not in common]
    return f"{name}:{','.join(items)}" if items else name
