"""One spec key of a policy class: which values it takes, read from text or given."""

from dataclasses import MISSING, dataclass
from types import NoneType
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

from kvpolicy.errors import PolicyError
from kvpolicy.spec import parse_number, parse_spans, shown, split_spec

if TYPE_CHECKING:
    from kvpolicy.policy import CachePolicy

Spans = tuple[tuple[int, int], ...]

Protection = Spans | Literal["prompt"]
"""What `protect` may pin: spans of positions, or the prompt."""


@dataclass(frozen=True)
class Parameter:
    """One spec key of a policy class.

    Attributes:
        attribute: Field name on the policy.
        kind: The annotation: int, float, bool, str, a union, a Literal or Protection.
        default: Default value, or MISSING when the key is required.
    """

    attribute: str
    kind: Any
    default: Any

    @property
    def is_required(self) -> bool:
        """Whether a spec must give the key."""
        return self.default is MISSING

    def default_for(self, policy: "CachePolicy") -> Any:
        """The value that a spec may leave out, given the policy's other parameters."""
        return policy.implied.get(self.attribute, self.default)

    @property
    def kinds(self) -> tuple[type, ...]:
        """The plain types of a value, absence left out."""
        return tuple(kind for kind in get_args(self.kind) or (self.kind,) if kind is not NoneType)

    def describe(self) -> str:
        """Say which values the key takes."""
        if get_origin(self.kind) is Literal:
            return " | ".join(str(choice) for choice in get_args(self.kind))
        if self.kind == Protection:
            return "prompt or spans (a:b,c:d)"
        return " or ".join(kind.__name__ for kind in self.kinds)

    def read(self, text: str, where: str) -> Any:
        """Convert a spec's text into a value of this parameter's type."""
        if self.kind == Protection:
            value = text if text == "prompt" else parse_spans(text)
        elif get_origin(self.kind) is Literal:
            value = {str(choice): choice for choice in get_args(self.kind)}.get(text)
        else:
            value = self._read_plain(text)
        if value is None:
            raise PolicyError(f"{where}: got {shown(text)}, expected {self.describe()}")
        return value

    def _read_plain(self, text: str) -> int | float | bool | str | None:
        if bool in self.kinds and text.lower() in ("true", "false"):
            return text.lower() == "true"
        number = parse_number(text) if {int, float} & {*self.kinds} else None
        return text if number is None and str in self.kinds else number

    def check(self, value: Any, where: str) -> None:
        """Raise PolicyError unless `value` has this parameter's type and a moderate size."""
        if get_origin(self.kind) is Literal:
            fits = typed(value) in map(typed, get_args(self.kind))
        elif self.kind == Protection:
            fits = value == "prompt" or _is_spans(value)
        elif value is None:
            fits = NoneType in get_args(self.kind)
        else:
            kinds = (*self.kinds, int) if float in self.kinds else self.kinds
            fits = isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool))
        if not fits:
            raise PolicyError(f"{where}: got {shown(value)}, expected {self.describe()}")
        if not is_moderate(value):
            raise PolicyError(f"{where}: got {shown(value)}, expected numbers below 2**62")
        if isinstance(value, str) and value != self.default and not self._is_spelled(value):
            raise PolicyError(
                f"{where}: got {shown(value)}, which no spec can say; leave out commas, lone "
                "parentheses and spaces at the ends"
            )

    def _is_spelled(self, text: str) -> bool:
        """Whether a spec with this text gives it back."""
        try:
            return self.read(split_spec(f"policy:key={text}").parameters["key"], "") == text
        except PolicyError:
            return False


def typed(value: Any) -> tuple[type, Any]:
    """A value beside its type, because 1 == 1.0 == True."""
    return type(value), value


def _is_spans(value: Any) -> bool:
    return isinstance(value, tuple) and all(
        isinstance(span, tuple) and len(span) == 2 and all(type(end) is int for end in span)
        for span in value
    )


def is_moderate(value: Any) -> bool:
    """Whether numbers are finite and leave int64 tensors room to add two of them."""
    if isinstance(value, tuple):
        return all(is_moderate(item) for item in value)
    return not isinstance(value, int | float) or abs(value) < 1 << 62
