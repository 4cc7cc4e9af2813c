"""What to record of live requests: the settings of a capture.

Front ends and the validation of every request read this module: it loads neither torch nor vLLM.
"""

# pyright: reportUnnecessaryIsInstance=false

import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, asdict, dataclass, fields
from pathlib import Path
from typing import Any

from kvpolicy import PolicyError
from kvpolicy.spec import shown

SUFFIX = ".kvtrace"

_COMMA_OUTSIDE_PARENTHESES = re.compile(r",(?![^()]*\))")


@dataclass(frozen=True)
class Capture:
    """Which requests of a server are recorded, how much of them, and where.

    Every recorded request becomes one trace, ``DIRECTORY/REQUEST_ID.kvtrace``.

    Attributes:
        directory: Where traces go; made absolute, created if it does not exist. It must hold no
            traces yet.
        every: Record every n-th request; None records those only that ask for it.
        layers: Layers to record; None records all.
        kv_heads: KV heads to record, with their query heads; None records all.
        max_tokens: Tokens recorded of a request, its first ones; None records all.
        max_requests: Requests recorded altogether; None sets no limit.
        token_ids: Record the ids of tokens too.
        max_memory: Bytes for what is not on the disk yet. Recording a request takes some, so
            that no further requests are recorded while that many are.
    """

    directory: str
    _: KW_ONLY
    every: int | None = 1
    layers: tuple[int, ...] | None = None
    kv_heads: tuple[int, ...] | None = None
    max_tokens: int | None = 8192
    max_requests: int | None = 100
    token_ids: bool = True
    max_memory: int = 2 << 30

    def __post_init__(self) -> None:
        """Validate and normalise every setting.

        Raises:
            PolicyError: A setting has no possible value.
        """
        if not isinstance(self.directory, str | os.PathLike) or not str(self.directory):
            raise PolicyError(f"capture: directory must be a path, got {shown(self.directory)}")
        put = object.__setattr__
        put(self, "directory", str(Path(self.directory).expanduser().absolute()))
        for name in ("every", "max_tokens", "max_requests", "max_memory"):
            _require_count(name, getattr(self, name), may_be_none=name != "max_memory")
        if not isinstance(self.token_ids, bool):
            raise PolicyError(f"capture: token_ids must be a bool, got {shown(self.token_ids)}")
        for name in ("layers", "kv_heads"):
            put(self, name, _indices(name, getattr(self, name)))

    @classmethod
    def of(cls, value: Any) -> "Capture":
        """Read settings given as such, as a directory or flag's text, or as a mapping.

        Raises:
            PolicyError: They are wrong.
        """
        if isinstance(value, cls):
            return value
        if isinstance(value, Mapping):
            return cls(**_known({str(key): item for key, item in value.items()}))
        if isinstance(value, os.PathLike):
            return cls(os.fspath(value))
        if isinstance(value, str):
            return cls(**_known(_split(value)))
        raise PolicyError(f"capture: expected a directory or settings, got {shown(value)}")

    def as_dict(self) -> dict[str, Any]:
        """The settings as JSON knows them."""
        return {key: list(v) if isinstance(v, tuple) else v for key, v in asdict(self).items()}

    def check_directory(self) -> None:
        """Refuse a directory that cannot take this capture's traces; changes nothing.

        Raises:
            PolicyError: It is no directory, not writable, or holds traces already.
        """
        path = Path(self.directory)
        nearest = next(place for place in (path, *path.parents) if os.path.lexists(place))
        if not nearest.is_dir():
            raise PolicyError(f"capture: {path} cannot be a directory, because {nearest} is none")
        if not os.access(nearest, os.W_OK | os.X_OK):
            raise PolicyError(f"capture: cannot write to {nearest}; choose another directory")
        earlier = next(path.glob(f"*{SUFFIX}*"), None)
        if earlier is not None:
            raise PolicyError(
                f"capture: {path} already holds {earlier.name}; traces are named after requests, "
                "so give every engine an empty directory"
            )

    def make_directory(self) -> None:
        """Create the directory and write to it once.

        Raises:
            PolicyError: As `check_directory`, or the disk says no.
        """
        self.check_directory()
        try:
            Path(self.directory).mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.directory) as probe:
                probe.write(b"kvpolicy")
        except OSError as error:
            raise PolicyError(f"capture: cannot write to {self.directory}: {error}") from error


def _split(text: str) -> dict[str, Any]:
    """Take ``DIRECTORY``, ``DIRECTORY,key=value`` or ``key=value,key=value`` apart."""
    names = {field.name for field in fields(Capture)}
    first, *rest = _COMMA_OUTSIDE_PARENTHESES.split(text)
    items = [first, *rest] if first.partition("=")[0] in names else [f"directory={first}", *rest]
    settings: dict[str, Any] = {}
    for item in items:
        key, equals, value = (part.strip() for part in item.partition("="))
        if not (equals and value):
            raise PolicyError(f"capture: got {shown(item)}, expected key=value")
        if key in settings:
            raise PolicyError(f"capture: {shown(key)} is given twice; keep one")
        settings[key] = value if key == "directory" else _read(value)
    return settings


def _read(text: str) -> Any:
    """Read an int, a bool, ``none`` or ``(int,int)``; validation names whatever else it is."""
    words = {"none": None, "true": True, "false": False}
    if text.lower() in words:
        return words[text.lower()]
    numbers = text[1:-1].split(",") if text.startswith("(") and text.endswith(")") else [text]
    try:
        values = tuple(int(number) for number in numbers if number.strip())
    except ValueError:
        return text
    return values if text.startswith("(") else values[0]


def _known(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings if all of them exist and the directory is among them."""
    names = [field.name for field in fields(Capture)]
    unknown = [name for name in settings if name not in names]
    if unknown:
        raise PolicyError(f"capture has no {shown(unknown[0])}; its settings: {', '.join(names)}")
    if "directory" not in settings:
        raise PolicyError("capture needs a directory")
    return settings


def _require_count(name: str, value: object, *, may_be_none: bool) -> None:
    if value is None and may_be_none:
        return
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        choice = " or None" if may_be_none else ""
        raise PolicyError(f"capture: {name} must be an integer >= 1{choice}, got {shown(value)}")


def _indices(name: str, value: object) -> tuple[int, ...] | None:
    """Indices in ascending order, each once."""
    if value is None:
        return None
    items: Sequence[Any] = [value] if isinstance(value, int) else value  # pyright: ignore[reportAssignmentType]
    is_list = isinstance(items, Sequence) and not isinstance(items, str) and len(items) > 0
    if not is_list or any(type(item) is not int or item < 0 for item in items):
        raise PolicyError(
            f"capture: {name} must be a list of indices such as (0, 5), got {shown(value)}"
        )
    return tuple(sorted(set(items)))
