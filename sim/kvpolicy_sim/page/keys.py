"""How a page tells policies apart: a number, a short label, a colour and a dash."""

from collections.abc import Sequence
from dataclasses import dataclass

from kvpolicy import CachePolicy, PolicyError
from kvpolicy.spec import split_spec
from kvpolicy_sim.page.markup import Markup, breakable, element

COLOURS = 7
"""Classes ``c0``, ``c1``, ... of the style sheet."""

DASHES = (None, "9 4", "2 3", "9 3 2 3", "5 3", "14 3 3 3")
"""In pixels; their number has no factor in common with that of the colours."""


@dataclass(frozen=True)
class Key:
    """What a policy goes by.

    Attributes:
        number: Its place in the report, from 1.
        spec: Its canonical spec.
        label: The spec without what all policies have in common.
        colour: A class of the style sheet.
        dash: An SVG dash array; None for a solid line.
    """

    number: int
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

    def name(self) -> Markup:
        """Swatch, number and label; the whole spec where a mouse rests."""
        return self._written(self.label, self.spec)

    def full_name(self) -> Markup:
        """Swatch, number and spec."""
        return self._written(self.spec, None)

    def _written(self, text: str, title: str | None) -> Markup:
        number = element("b", str(self.number))
        spec = element("span", breakable(text), class_="spec")
        return element("span", self.swatch(), number, spec, class_="key", title=title)


def keys_of(policies: Sequence[CachePolicy]) -> list[Key]:
    """A key for every policy; those that keep everything share a plain line."""
    evicting = [policy for policy in policies if policy.evicts]
    specs = [_items(str(policy)) for policy in evicting]
    common = set(specs[0]).intersection(*specs) if len(specs) > 1 else set[str]()
    keys: list[Key] = []
    for number, policy in enumerate(policies, 1):
        colour, dash = "plain", None
        if policy in evicting:
            index = evicting.index(policy)
            colour, dash = f"c{index % COLOURS}", DASHES[index % len(DASHES)]
        keys.append(Key(number, str(policy), _label(str(policy), common), colour, dash))
    return keys


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
