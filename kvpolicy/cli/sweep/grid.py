"""The grid of a sweep: a TOML file that is checked wholly before anything runs.

budgets = [64, 128]
policies = ["window", "h2o:recent=0.25", "tova"]

[[replay]]
traces = ["a.kvtrace", "b.kvtrace"]

[[eval]]
models = ["bundled"]
task = "passkey"
contexts = [512, 1024]

The keys of an entry are the options of the command of its name. Policies and budgets of an entry
replace those above the entries.
"""

import argparse
import tomllib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvpolicy.bundled import bundled_model
from kvpolicy.cli.arguments import indices, with_baselines, with_budgets
from kvpolicy.cli.evaluate import require_seen
from kvpolicy.cli.replay import LEVELS
from kvpolicy.errors import KVPolicyError, PolicyError
from kvpolicy.evaluation.task import Task
from kvpolicy.evaluation.tasks import TASKS, tasks_with
from kvpolicy.policy import CachePolicy
from kvpolicy.spec import shown

MOST_BYTES = 1 << 20
"""Of a grid file."""

BUNDLED = "bundled"
"""What a grid calls the model that ships with the package."""

QUESTIONS = ("seen", "unseen")

_MOST = 1 << 31


@dataclass(frozen=True, kw_only=True)
class ReplayEntry:
    """One trace, replayed under policies.

    Attributes:
        where: The entry, for error messages.
        trace: The trace.
        level: What policies observe.
        layers: Layers; None for all.
        sequences: Sequences; None for all.
        outputs: Whether attention outputs are compared.
        details: Whether recall and lost mass are measured.
        oracle: Whether regret is bounded.
        weights: Folder of the traced model; None unless given.
        policies: The full cache first.
    """

    where: str
    trace: Path
    level: str
    layers: tuple[int, ...] | None
    sequences: tuple[int, ...] | None
    outputs: bool
    details: bool
    oracle: bool
    weights: Path | None
    policies: Sequence[CachePolicy]


@dataclass(frozen=True, kw_only=True)
class EvalEntry:
    """One model on one task at one length, under policies.

    Attributes:
        where: The entry, for error messages.
        model: Folder of the model.
        model_name: What the grid calls it.
        text: File with the text; None for the bundled one.
        task: The task.
        context: Tokens of a sample.
        samples: Samples, at most.
        seed: Of what is drawn.
        policies: The full cache first.
    """

    where: str
    model: Path
    model_name: str
    text: Path | None
    task: Task
    context: int
    samples: int
    seed: int
    policies: Sequence[CachePolicy]


Entry = ReplayEntry | EvalEntry


def read_grid(path: str | Path) -> list[Entry]:
    """Read a grid file; its entries, one per trace or per model and length.

    Raises:
        PolicyError: It is no grid; the message says where, what and what is expected.
        OSError: It cannot be read.
    """
    path = Path(path)
    top = _Table(str(path), _load(path), path.parent)
    common = _Common(top.texts("policies", []), top.counts("budgets", []))
    replays, evals = top.tables("replay"), top.tables("eval")
    top.require_no_more()
    entries: list[Entry] = []
    for table in replays:
        entries += _replays(table, common)
    for table in evals:
        entries += _evals(table, common)
    if not entries:
        raise PolicyError(f"{path}: nothing to do; add a [[replay]] or an [[eval]] entry")
    return entries


@contextmanager
def naming(where: str) -> Iterator[None]:
    """Say of whatever is wrong which entry it is in.

    Raises:
        KVPolicyError: As raised inside, its message behind the entry's name.
    """
    try:
        yield
    except KVPolicyError as error:
        raise type(error)(f"{where}: {error}") from error
    except (OSError, ValueError) as error:
        raise PolicyError(f"{where}: {error}") from error


def _load(path: Path) -> dict[str, Any]:
    if not path.is_file():  # opening a pipe would wait for its other end
        raise PolicyError(f"{path}: there is no such regular file; give a grid in TOML")
    size = path.stat().st_size
    if size > MOST_BYTES:
        raise PolicyError(f"{path}: {size:,} bytes are too many for a grid ({MOST_BYTES:,})")
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:  # TOML's errors, UTF-8's, endless integers
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise PolicyError(f"{path} is not TOML: {reason}") from error


@dataclass(frozen=True)
class _Common:
    """What entries have unless they say otherwise."""

    policies: list[str]
    budgets: list[int]


class _Table:
    """The keys of a table, taken out one by one, so that what is left over is unknown."""

    def __init__(self, where: str, values: dict[str, Any], folder: Path) -> None:
        self.where = where
        self._values, self._folder = dict(values), folder
        self._known: list[str] = []

    def wrong(self, key: str, value: object, expected: str) -> PolicyError:
        """What to raise about a value."""
        return PolicyError(f"{self.where}: {key} must be {expected}, got {shown(value)}")

    def tables(self, key: str) -> list["_Table"]:
        """An array of tables; empty if there is none."""
        found = self._take(key, [], _is_list_of(dict), f"entries, each below a line [[{key}]]")
        return [
            _Table(f"{self.where}: [[{key}]] {number}", values, self._folder)
            for number, values in enumerate(found, 1)
        ]

    def text(self, key: str, default: str | None = None) -> str | None:
        """A string."""
        return self._take(key, default, lambda x: isinstance(x, str) and bool(x), "a string")

    def texts(self, key: str, default: list[str] | None = None) -> list[str]:
        """A list of strings; required unless there is a default."""
        example = f'a list such as ["{_EXAMPLES.get(key, "...")}"]'
        found = self._take(key, default, _is_list_of(str), example)
        if not found and default is None:
            raise PolicyError(f"{self.where}: {key} is missing; give {example}")
        return found

    def path(self, text: str) -> Path:
        """A path of the grid, as seen from the grid's folder."""
        if "\0" in text:
            raise PolicyError(f"{self.where}: {shown(text)} is no path")
        return (self._folder / text).absolute()

    def flag(self, key: str, default: bool) -> bool:
        """True or false."""
        return self._take(key, default, lambda x: type(x) is bool, "true or false")

    def count(self, key: str, default: int | None, least: int = 1) -> int | None:
        """An integer."""
        return self._take(key, default, _is_count(least), f"an integer of at least {least}")

    def counts(self, key: str, default: list[int], least: int = 1) -> list[int]:
        """Different integers, ascending."""
        is_count = _is_count(least)
        found = self._take(
            key,
            default,
            lambda x: isinstance(x, list) and all(map(is_count, x)),
            f"a list of integers of at least {least}",
        )
        return sorted(set(found))

    def indices(self, key: str) -> tuple[int, ...] | None:
        """Indices as the command line takes them; None for all."""
        text = self.text(key)
        if text is None:
            return None
        try:
            return tuple(indices(text))
        except argparse.ArgumentTypeError:
            raise self.wrong(key, text, 'a string such as "0,4:8"') from None

    def choice(self, key: str, choices: Sequence[str], default: str | None) -> str | None:
        """One of some words."""
        return self._take(key, default, lambda x: x in choices, f"one of {', '.join(choices)}")

    def require_no_more(self) -> None:
        """Refuse keys that nothing has asked for."""
        for key in self._values:
            raise PolicyError(
                f"{self.where}: unknown key {shown(key)}; its keys: {', '.join(self._known)}"
            )

    def _take(self, key: str, default: Any, fits: Callable[[Any], bool], expected: str) -> Any:
        self._known.append(key)
        if key not in self._values:
            return default
        value = self._values.pop(key)
        if not fits(value):
            raise self.wrong(key, value, expected)
        return value


_EXAMPLES = {"policies": "h2o:budget=256", "traces": "t.kvtrace", "models": BUNDLED}


def _is_list_of(kind: type) -> Callable[[Any], bool]:
    return lambda x: (
        isinstance(x, list) and all(isinstance(each, kind) and each != "" for each in x)
    )


def _is_count(least: int) -> Callable[[Any], bool]:
    return lambda x: type(x) is int and least <= x < _MOST


def _policies(table: _Table, common: _Common) -> list[CachePolicy]:
    """The entry's policies behind their baselines: full, and sinks at each budget."""
    specs = table.texts("policies", common.policies)
    budgets = table.counts("budgets", common.budgets)
    if not specs:
        raise PolicyError(
            f"{table.where}: no policies; give some in the entry or above all entries, such as "
            'policies = ["window", "h2o"] with budgets = [64, 128]'
        )
    with naming(table.where):
        return with_baselines(with_budgets(specs, budgets))


def _replays(table: _Table, common: _Common) -> list[ReplayEntry]:
    traces = table.texts("traces")
    weights = table.text("weights")
    settings: dict[str, Any] = {
        "level": table.choice("level", LEVELS, LEVELS[0]),
        "layers": table.indices("layers"),
        "sequences": table.indices("sequences"),
        "outputs": table.flag("outputs", default=True),
        "details": table.flag("details", default=True),
        "oracle": table.flag("oracle", default=False),
        "weights": None if weights is None else table.path(weights),
        "policies": _policies(table, common),
    }
    table.require_no_more()
    return [ReplayEntry(where=table.where, trace=table.path(x), **settings) for x in traces]


def _evals(table: _Table, common: _Common) -> list[EvalEntry]:
    models, text = table.texts("models", [BUNDLED]), table.text("text")
    question = table.choice("question", QUESTIONS, None)
    settings: dict[str, Any] = {
        "text": None if text is None else table.path(text),
        "task": _task(table, question),
        "samples": table.count("samples", 20),
        "seed": table.count("seed", 0, least=0),
        "policies": _policies(table, common),
    }
    contexts = table.counts("contexts", [1024], least=8)
    table.require_no_more()
    with naming(table.where):
        require_seen(question, settings["policies"])
    return [
        EvalEntry(
            where=table.where,
            model=Path(bundled_model()) if name == BUNDLED else table.path(name),
            model_name=name,
            context=context,
            **settings,
        )
        for name in dict.fromkeys(models)
        for context in contexts
    ]


def _task(table: _Table, question: str | None) -> Task:
    """The task of an entry, with the settings that it has."""
    name = table.choice("task", list(TASKS), "ppl") or "ppl"
    given = {
        "prompt_tokens": ("prompt_len", table.count("prompt_len", None)),
        "question": ("question", question),
        "pairs": ("pairs", table.count("pairs", None)),
    }
    chosen = {setting: value for setting, (_, value) in given.items() if value is not None}
    for setting in chosen:
        having = tasks_with(setting)
        if name not in having:
            raise PolicyError(
                f"{table.where}: {given[setting][0]} is for task {' or '.join(having)}, and {name} "
                "has no use for it; drop it"
            )
    return TASKS[name](**chosen)
