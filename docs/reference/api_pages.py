"""The pages of docs/reference/api: which names a reader may import, and from where.

Their texts come from docstrings when the site is built; the tables of names stand in the pages,
so that they can be read without the site. `generate.py` writes them, a test holds them to the code.
"""

import importlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from inspect import getdoc, isclass, isroutine
from pathlib import Path
from types import ModuleType
from typing import Any

FOLDER = Path(__file__).with_name("api")


@dataclass(frozen=True)
class Door:
    """A module that names are imported from.

    Attributes:
        module: Its name.
        names: The names; its `__all__` unless given.
    """

    module: str
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Page:
    """A page of the reference.

    Attributes:
        file: Its file's name.
        title: What it is called.
        introduction: What the names are for, in Markdown.
        doors: The modules.
    """

    file: str
    title: str
    introduction: str
    doors: tuple[Door, ...]


PAGES = (
    Page(
        "kvpolicy.md",
        "`kvpolicy`",
        "Policies: reading them from specs, writing one of your own ([how to]"
        "(../../how-to/write-a-policy.md)), and what every host raises and counts. Importing it "
        "loads neither torch nor a host.",
        (
            Door("kvpolicy"),
            Door("kvpolicy.policy", ("GuardedPolicy",)),
            Door("kvpolicy.attention", ("Kernel", "Answer")),
        ),
    ),
    Page(
        "kvpolicy_hf.md",
        "`kvpolicy_hf`: transformers",
        "[Run a policy in transformers](../../how-to/run-in-transformers.md) says how it is used.",
        (
            Door("kvpolicy_hf"),
            Door("kvpolicy_hf.checkpoint", ("Checkpoint", "load_checkpoint")),
            Door("kvpolicy_hf.closed_loop", ("ClosedLoop",)),
        ),
    ),
    Page(
        "kvpolicy_xformers.md",
        "`kvpolicy_xformers`: xformers",
        "[Attend with xformers](../../how-to/run-with-xformers.md) says how it is used.",
        (Door("kvpolicy_xformers"),),
    ),
    Page(
        "kvpolicy_vllm.md",
        "`kvpolicy_vllm`: vLLM",
        "[Run a policy in vLLM](../../how-to/run-in-vllm.md) and [Capture traces from live vLLM]"
        "(../../how-to/capture-from-vllm.md) say how it is used. Importing it does not import "
        "vLLM.",
        (Door("kvpolicy_vllm"),),
    ),
    Page(
        "kvpolicy-trace.md",
        "`kvpolicy.trace`: trace files",
        "Reading and writing `.kvtrace` files without a simulator or a model; the bytes are in "
        "[The trace format](../trace-format.md).",
        (Door("kvpolicy.trace"),),
    ),
    Page(
        "kvpolicy_sim.md",
        "`kvpolicy_sim`: the simulator",
        "[Capture a trace](../../how-to/capture-a-trace.md) and [Replay a trace]"
        "(../../how-to/replay-a-trace.md) say how it is used, [The oracle]"
        "(../../explanation/oracle.md) what is bounded.",
        (
            Door("kvpolicy_sim"),
            Door("kvpolicy_sim.result", ("PolicyResult", "LayerResult", "Regret")),
            Door("kvpolicy_sim.recommend", ("Recommendation",)),
            Door("kvpolicy_sim.fit", ("Fitted", "LayerFit")),
            Door("kvpolicy_sim.weights", ("Weights", "load_weights")),
            Door("kvpolicy_sim.text", ("read_passage",)),
            Door("kvpolicy_sim.oracle", ("Problem", "Optimum", "solve")),
            Door("kvpolicy_sim.oracle.problem", ("Losses",)),
        ),
    ),
    Page(
        "kvpolicy-memory.md",
        "`kvpolicy.memory`: memories",
        "What a policy with a memory of its own imports ([how to]"
        "(../../how-to/write-a-policy.md#with-a-memory)).",
        (
            Door(
                "kvpolicy.memory.state",
                (
                    "Memory",
                    "SlotMemory",
                    "Passage",
                    "Question",
                    "Attended",
                    "Setting",
                    "Shape",
                    "slots_of",
                ),
            ),
            Door("kvpolicy.memory.fifo", ("push",)),
            Door("kvpolicy.memory.parameters", ("load_parameters",)),
        ),
    ),
    Page(
        "kvpolicy-testing.md",
        "`kvpolicy.testing`: the contract",
        "The promises of a policy as tests, for policies of your own ([how to]"
        "(../../how-to/write-a-policy.md#check-it)). Needs the extra `testing`.",
        (Door("kvpolicy.testing"), Door("kvpolicy.errors", ("ContractError",))),
    ),
    Page(
        "kvpolicy-evaluation.md",
        "`kvpolicy.evaluation`: quality",
        "What `kvpolicy eval` is made of, for tasks and hosts of your own ([how to]"
        "(../../how-to/evaluate.md#from-python)).",
        (
            Door("kvpolicy.bundled", ("bundled_model", "heldout_text")),
            Door("kvpolicy.evaluation.source", ("Source",)),
            Door("kvpolicy.evaluation.sample", ("Sample", "Target")),
            Door("kvpolicy.evaluation.task", ("Task",)),
            Door("kvpolicy.evaluation.tasks.recall", ("Recall",)),
            Door("kvpolicy.evaluation.run", ("Host", "Run", "evaluate")),
            Door("kvpolicy.evaluation.result", ("Comparison", "Evaluation")),
        ),
    ),
    Page(
        "kvpolicy-sweep.md",
        "`kvpolicy.cli.sweep`: sweeps",
        "Reading a sweep's results in Python ([how to](../../how-to/sweep.md#from-python)).",
        (
            Door("kvpolicy.cli.sweep.grid", ("ReplayEntry", "EvalEntry", "read_grid")),
            Door("kvpolicy.cli.sweep.sources", ("open_units",)),
            Door("kvpolicy.cli.sweep.results", ("Results",)),
            Door(
                "kvpolicy.cli.sweep.summary",
                ("Summary", "ReplayFound", "EvalFound", "Failure", "summarise"),
            ),
        ),
    ),
)

INDEX = """\
# Python

Names that are kept: what is not listed may change without notice. Generated by \
`docs/reference/generate.py`; a test compares these pages with the code, and with what the other \
pages import.

"""


class Absent(ModuleType):
    """Stands for a module that is not installed: every name in it is a class of that name."""

    def __getattr__(self, name: str) -> Any:
        """Make the class."""
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {"__module__": self.__name__})


def stand_in_for_xformers() -> None:
    """Let kvpolicy_xformers be imported where its library, which needs CUDA, is missing."""
    if find_spec("xformers") is None:
        for name in (
            "xformers",
            "xformers.ops",
            "xformers.ops.fmha",
            "xformers.ops.fmha.attn_bias",
        ):
            sys.modules[name] = Absent(name)


def public_names(door: Door) -> tuple[str, ...]:
    """The names of a door, in their order."""
    return door.names or tuple(importlib.import_module(door.module).__all__)


def doors() -> Iterator[Door]:
    """All doors."""
    for page in PAGES:
        yield from page.doors


def pages() -> dict[Path, str]:
    """Texts of all pages."""
    stand_in_for_xformers()
    index = "".join(f"- [{page.title}]({page.file}): {_names(page)}\n" for page in PAGES)
    texts = {FOLDER / page.file: _text(page) for page in PAGES}
    return {FOLDER / "index.md": INDEX + index, **texts}


def _names(page: Page) -> str:
    return ", ".join(f"`{name}`" for door in page.doors for name in public_names(door))


def _text(page: Page) -> str:
    parts = [f"# {page.title}\n\n{page.introduction}\n"]
    for door in page.doors:
        if len(page.doors) > 1:
            parts.append(f"\n## `{door.module}`\n")
        names = public_names(door)
        rows = "".join(f"| `{name}` | {_summary(door, name)} |\n" for name in names)
        directives = "\n".join(_directive(door, name) for name in names)
        parts.append(
            f"\n| name | what it is |\n| --- | --- |\n{rows}\n```{{eval-rst}}\n{directives}```\n"
        )
    return "".join(parts)


def _summary(door: Door, name: str) -> str:
    """First line of a docstring, as Markdown."""
    found = getattr(importlib.import_module(door.module), name)
    if not (isclass(found) or isroutine(found)):
        return CONSTANTS[name]
    text = (getdoc(found) or "").partition("\n\n")[0]
    return " ".join(text.split()).replace("``", "`").replace("|", "\\|")


def _directive(door: Door, name: str) -> str:
    found = getattr(importlib.import_module(door.module), name)
    path = f"{door.module}.{name}"
    home = _home(found)
    if home != path:
        return f"``{path}`` is :py:obj:`{home}`.\n"
    if isclass(found):
        kind = "exception" if issubclass(found, BaseException) else "class"
        inherits = "" if found.__base__ is object else "   :show-inheritance:\n"
        return f".. auto{kind}:: {path}\n{inherits}"
    if isroutine(found):
        return f".. autofunction:: {path}\n"
    return f".. py:data:: {path}\n\n   {CONSTANTS[name]}\n"


def _home(found: object) -> str:
    """The first of the names under which an object is shown, which is where links lead."""
    return next(
        f"{door.module}.{name}"
        for door in doors()
        for name in public_names(door)
        if getattr(importlib.import_module(door.module), name) is found
    )


CONSTANTS = {
    "CONTRACT": "Every promise of a policy, as functions of a policy and a case.",
    "Mark": "A name and a half-open span of positions: `(name, first, last)`.",
    "SEMANTICS": "Version of the rules that all hosts follow; reports and ledgers carry it.",
    "Check": "A promise: a function of a policy and a case that raises where it is broken.",
}
