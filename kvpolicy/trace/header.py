"""What a trace says about itself: the model, the heads and layers recorded, and its sequences.

A kind of tensor and the header together determine shape and dtype, so that a file cannot
declare either of them wrongly. Loads no torch.
"""

# pyright: reportUnnecessaryIsInstance=false

import math
from collections.abc import Iterator
from dataclasses import KW_ONLY, MISSING, asdict, dataclass, fields, replace
from itertools import pairwise
from typing import Any

from kvpolicy.errors import TraceError
from kvpolicy.spec import shown

VERSION = 1
"""Version of the format that this code reads and writes."""

ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
"""Element types of queries, keys, values and outputs."""

REQUIRED = ("q", "k", "v")
"""Kinds that every layer of every sequence has."""

OPTIONAL = ("lse", "out")
"""Kinds that a layer of a sequence has completely or not at all."""

KINDS = REQUIRED + OPTIONAL
"""Of every layer: rotated queries and keys, values, log-sum-exp of the logits, outputs."""

TOKENS = "tokens"
"""Kind of a sequence's token ids, which belong to no layer; complete or absent."""

_EVERY_TOKEN = ("k", "v", TOKENS)
"""Kinds with a row for every token, whatever the stride of queries."""

_BYTES = {**ITEM_BYTES, "uint32": 4}
"""Element types of all kinds."""

MAX_ITEMS = 4096
"""Most layers, KV heads, frequencies, or marks of a sequence."""

MAX_SIZE = 1 << 16
"""Most of any other count in a header."""

MAX_TEXT = 4096
"""Most bytes of a text, in UTF-8."""

MAX_NUMBER = 1 << 48
"""Bound of counts and positions: what they are compared with is far smaller."""

_INFINITE = 1e300
"""Above it, what is computed from a number overflows."""

Mark = tuple[str, int, int]
"""A named half-open span of positions."""


@dataclass(frozen=True)
class Rope:
    """The rotary embedding that recorded queries and keys carry.

    Attributes:
        kind: Its type as transformers names it, ``default`` for plain RoPE.
        inverse_frequencies: Radians per position, one for each rotated pair of dimensions.
        interleaved: Pairs are (2i, 2i + 1); otherwise (i, i + rotary_dim / 2).
        scaling: Factor on cosines and sines, which some kinds have.
    """

    kind: str
    inverse_frequencies: tuple[float, ...]
    _: KW_ONLY
    interleaved: bool = False
    scaling: float = 1.0

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
            TraceError: One has no possible value.
        """
        _text("rope.kind", self.kind)
        if type(self.interleaved) is not bool:
            raise _wrong("rope.interleaved", self.interleaved, "true or false")
        object.__setattr__(self, "scaling", _number("rope.scaling", self.scaling))
        what = "finite numbers >= 0"
        values = _items("rope.inverse_frequencies", self.inverse_frequencies, what)
        name = "rope.inverse_frequencies"
        numbers = tuple(_number(name, value, may_be_zero=True) for value in values)
        object.__setattr__(self, "inverse_frequencies", numbers)


@dataclass(frozen=True, kw_only=True)
class Header:
    """What all sequences of a trace have in common.

    Attributes:
        model: Name of the model.
        model_type: Its architecture as transformers names it.
        fingerprint: SHA-256 of its configuration, in hexadecimal; empty if there is none.
        num_layers: Layers of the model.
        num_query_heads: Query heads of each of its layers.
        num_kv_heads: KV heads of each of its layers.
        layers: Layers recorded, ascending.
        kv_heads: KV heads recorded, ascending, each with its whole group of query heads.
        head_dim: Size of a query and of a key.
        value_dim: Size of a value and of an output.
        dtype: Element type of everything but `lse`, which is float32: float32, float16, bfloat16.
        scale: Factor on query-key products.
        query_stride: Queries, log-sum-exps and outputs are those of the tokens 0, query_stride,
            2 * query_stride, ...; keys and values are always complete.
        rope: The rotary embedding; None if there is none, or one that is not known.
        tokenizer: SHA-256 of the tokenizer, in hexadecimal; empty if it is not known.
        policy: Canonical spec of the policy under which the model ran.
        producer: The programs that recorded the trace, with their versions.
    """

    model: str
    model_type: str = ""
    fingerprint: str = ""
    num_layers: int
    num_query_heads: int
    num_kv_heads: int
    layers: tuple[int, ...]
    kv_heads: tuple[int, ...]
    head_dim: int
    value_dim: int
    dtype: str
    scale: float
    query_stride: int = 1
    rope: Rope | None = None
    tokenizer: str = ""
    policy: str = "full"
    producer: str = ""

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
            TraceError: One has no possible value.
        """
        put = object.__setattr__
        for name in ("model", "model_type", "fingerprint", "tokenizer", "policy", "producer"):
            _text(name, getattr(self, name))
        if not isinstance(self.dtype, str) or self.dtype not in ITEM_BYTES:
            raise _wrong("dtype", self.dtype, " or ".join(ITEM_BYTES))
        for name in ("num_layers", "num_kv_heads"):
            require_count(name, getattr(self, name), 1, MAX_ITEMS)
        for name in ("num_query_heads", "head_dim", "value_dim", "query_stride"):
            require_count(name, getattr(self, name), 1, MAX_SIZE)
        if self.num_query_heads % self.num_kv_heads:
            what = f"a multiple of num_kv_heads, {self.num_kv_heads}"
            raise _wrong("num_query_heads", self.num_query_heads, what)
        put(self, "scale", _number("scale", self.scale))
        put(self, "layers", _indices("layers", self.layers, self.num_layers))
        put(self, "kv_heads", _indices("kv_heads", self.kv_heads, self.num_kv_heads))
        if self.rope is not None and not isinstance(self.rope, Rope):
            raise _wrong("rope", self.rope, "a Rope or None")
        if self.rope is not None and 2 * len(self.rope.inverse_frequencies) > self.head_dim:
            raise TraceError(
                f"rope.inverse_frequencies has {len(self.rope.inverse_frequencies)} pairs, more "
                f"than head_dim {self.head_dim} can hold"
            )

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return self.num_query_heads // self.num_kv_heads

    def streams(self) -> Iterator[tuple[str, int | None]]:
        """Kind and layer of everything that a sequence can have."""
        yield from ((kind, layer) for layer in self.layers for kind in KINDS)
        yield TOKENS, None

    def num_heads(self, kind: str) -> int:
        """Heads recorded of a kind of a layer."""
        return len(self.kv_heads) * (1 if kind in ("k", "v") else self.group)

    def element(self, kind: str) -> str:
        """Element type of a kind."""
        return {"lse": "float32", TOKENS: "uint32"}.get(kind, self.dtype)

    def shape(self, kind: str, rows: int) -> tuple[int, ...]:
        """Shape of some rows: [heads, rows, D], [heads, rows] of ``lse``, [rows] of ``tokens``."""
        if kind == TOKENS:
            return (rows,)
        if kind == "lse":
            return self.num_heads(kind), rows
        width = self.head_dim if kind in ("q", "k") else self.value_dim
        return self.num_heads(kind), rows, width

    def row_bytes(self, kind: str) -> int:
        """Bytes of one row of a kind, over all heads recorded."""
        return math.prod(self.shape(kind, 1)) * _BYTES[self.element(kind)]

    def num_rows(self, kind: str, tokens: int) -> int:
        """Rows of a kind that belong to the first `tokens` tokens."""
        return tokens if kind in _EVERY_TOKEN else -(-tokens // self.query_stride)

    def num_tokens(self, kind: str, rows: int) -> int:
        """Most tokens for which some rows of a kind are enough."""
        return rows if kind in _EVERY_TOKEN else rows * self.query_stride

    def as_dict(self) -> dict[str, Any]:
        """The header as JSON and msgpack know it."""
        return {"version": VERSION, **asdict(self)}

    @classmethod
    def of(cls, found: object) -> "Header":
        """Read what `as_dict` gives; keys of later minor additions are ignored.

        Raises:
            TraceError: It is of another version, incomplete or impossible.
        """
        if not isinstance(found, dict):
            raise _wrong("header", found, "a map")
        version = found.get("version")
        if type(version) is not int or version != VERSION:
            raise TraceError(
                f"the trace has format version {shown(version)}, this kvpolicy reads version "
                f"{VERSION}; use the version of kvpolicy that wrote it, or capture again"
            )
        rope = found.get("rope")
        return cls(**_known(cls, {**found, "rope": None if rope is None else _rope(rope)}))


@dataclass(frozen=True, slots=True)
class Sequence:
    """One recorded sequence.

    Attributes:
        index: Its place in the trace.
        tokens: Tokens recorded.
        prompt_len: How many of them are the prompt.
        source: Where it came from: a file, a request's id, a pattern.
        marks: Named half-open spans of positions, such as ("needle", 120, 128).
    """

    index: int
    tokens: int
    prompt_len: int
    source: str = ""
    marks: tuple[Mark, ...] = ()

    def cut(self, first: int, last: int, index: int) -> "Sequence":
        """The tokens [first, last) as a sequence of their own; spans move and shrink with it."""
        marks = (
            (name, max(begin, first) - first, min(end, last) - first)
            for name, begin, end in self.marks
            if max(begin, first) < min(end, last)
        )
        prompt_len = min(max(self.prompt_len - first, 0), last - first)
        return Sequence(index, last - first, prompt_len, self.source, tuple(marks))


def checked_sequence(sequence: Sequence) -> Sequence:
    """Check all but the number of tokens, which the data must agree with.

    Raises:
        TraceError: A field has no possible value.
    """
    require_count("index", sequence.index, 0)
    require_count("tokens", sequence.tokens, 0)
    require_count("prompt_len", sequence.prompt_len, 0)
    _text("source", sequence.source)
    marks = tuple(
        _mark(mark) for mark in _items("marks", sequence.marks, "spans", may_be_empty=True)
    )
    return replace(sequence, marks=marks)


def require_stream(header: Header, kind: object, layer: object) -> None:
    """Raise TraceError unless a trace with this header can have a kind in a layer."""
    if kind not in (*KINDS, TOKENS):
        known = ", ".join((*KINDS, TOKENS))
        raise TraceError(f"unknown kind {shown(kind)}; choose from {known}")
    if kind == TOKENS and layer is not None:
        raise TraceError(f"{TOKENS} belong to no layer: give None, not {shown(layer)}")
    if kind != TOKENS and (type(layer) is not int or layer not in header.layers):
        raise TraceError(f"layer {shown(layer)} is not recorded; it has {list(header.layers)}")


def row_axis(kind: str) -> int:
    """Axis of the rows in tensors of a kind."""
    return 0 if kind == TOKENS else 1


def name_stream(kind: str, sequence: int, layer: int | None) -> str:
    """A stream in an error message."""
    return f"{kind} of {'' if layer is None else f'layer {layer}, '}sequence {sequence}"


def require_count(name: str, value: object, least: int, most: int = MAX_NUMBER) -> int:
    """An integer in a range.

    Raises:
        TraceError: It is something else.
    """
    if type(value) is not int or not least <= value <= most:
        raise _wrong(name, value, f"an integer from {least} to {most}")
    return value


def _mark(value: Any) -> Mark:
    what = "(name, first, last) with first < last"
    if not isinstance(value, list | tuple) or len(value) != 3:
        raise _wrong("mark", value, what)
    name, first, last = value
    _text("name of a mark", name)
    require_count("first of a mark", first, 0)
    require_count("last of a mark", last, 0)
    if first >= last:
        raise _wrong("mark", value, what)
    return name, first, last


def _text(name: str, value: object) -> None:
    try:
        is_right = isinstance(value, str) and len(value.encode()) <= MAX_TEXT
    except UnicodeEncodeError:
        is_right = False
    if not is_right:
        raise _wrong(name, value, f"text of at most {MAX_TEXT} bytes")


def _number(name: str, value: object, *, may_be_zero: bool = False) -> float:
    what = f"a finite number {'>=' if may_be_zero else '>'} 0"
    # Compared before it is converted, which an integer may be too large for.
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < _INFINITE:
        raise _wrong(name, value, what)
    if not (value or may_be_zero):
        raise _wrong(name, value, what)
    return float(value)


def _items(name: str, value: object, what: str, *, may_be_empty: bool = False) -> tuple[Any, ...]:
    least = 0 if may_be_empty else 1
    if not isinstance(value, list | tuple) or not least <= len(value) <= MAX_ITEMS:
        raise _wrong(name, value, f"{least} to {MAX_ITEMS} {what}")
    return tuple(value)


def _indices(name: str, value: object, count: int) -> tuple[int, ...]:
    """Ascending indices below `count`."""
    what = f"different integers from 0 to {count - 1}, ascending"
    found = _items(name, value, what)
    if any(type(x) is not int or not 0 <= x < count for x in found):
        raise _wrong(name, value, what)
    if any(a >= b for a, b in pairwise(found)):
        raise _wrong(name, value, what)
    return found


def _rope(found: object) -> Rope:
    if not isinstance(found, dict):
        raise _wrong("rope", found, "a map")
    return Rope(**_known(Rope, found))


def _known(cls: type[Header] | type[Rope], found: dict[Any, Any]) -> dict[str, Any]:
    """The fields of a class; those with defaults may be newer than a file."""
    missing = [f.name for f in fields(cls) if f.default is MISSING and f.name not in found]
    if missing:
        raise TraceError(f"the {cls.__name__.lower()} lacks {', '.join(missing)}")
    return {field.name: found[field.name] for field in fields(cls) if field.name in found}


def _wrong(name: str, value: object, expected: str) -> TraceError:
    return TraceError(f"{name} must be {expected}, got {shown(value)}")
