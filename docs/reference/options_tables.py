"""Tables of options in docs/reference/cli.md, from the commands' own parsers.

Each stands between two comments that readers do not see; the rest of the page is written by hand.
"""

import argparse
import re
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

from kvpolicy.cli import COMMANDS, main
from kvpolicy_vllm.cli import add_flag

PAGE = Path(__file__).with_name("cli.md")

TABLE = re.compile(r"<!-- options of ([a-z ]+) -->\n(.*?)<!-- end of options -->\n", re.DOTALL)

SUBCOMMANDS = {"trace": ("trace synth",)}
"""Commands of commands."""


def pages() -> dict[Path, str]:
    """The page with its tables renewed."""
    return {PAGE: TABLE.sub(lambda found: _between(found[1]), PAGE.read_text("utf-8"))}


def commands() -> Iterator[str]:
    """Every command that has options."""
    for name in COMMANDS:
        yield from SUBCOMMANDS.get(name, (name,))


def parser_of(command: str) -> argparse.ArgumentParser:
    """The parser that prints a command's help; of ``serve``, the one that adds to vLLM's."""
    if command == "serve":
        parser = argparse.ArgumentParser(add_help=False)
        add_flag(parser)
        return parser
    asked: list[argparse.ArgumentParser] = []

    def note(self: argparse.ArgumentParser) -> None:
        asked.append(self)

    with patch.object(argparse.ArgumentParser, "print_help", note):  # a help option calls it
        main([*command.split(), "--help"])
    [parser] = asked
    return parser


def actions_of(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """A parser's arguments but for its help: places first, ``--json`` last."""
    actions = [action for action in parser._actions if "--help" not in action.option_strings]
    return sorted(actions, key=lambda x: (bool(x.option_strings), x.dest == "json"))


def _between(command: str) -> str:
    rows = "".join(
        f"| {_form(action)} | {_cell(action.help)} |\n" for action in actions_of(parser_of(command))
    )
    head = f"<!-- options of {command} -->\n| argument | |\n| --- | --- |\n"
    return f"{head}{rows}<!-- end of options -->\n"


def _form(action: argparse.Action) -> str:
    """How an argument is written, such as ``--policy SPEC...``."""
    value = action.metavar or "|".join(map(str, action.choices or ())) or action.dest.upper()
    assert isinstance(value, str), "no argument of ours takes a tuple"
    value += {"+": "...", "*": "..."}.get(str(action.nargs), "")
    names = "/".join(action.option_strings)
    parts = [names] if action.nargs == 0 else [names, value]
    text = " ".join(part for part in parts if part)
    text = f"`{text}`" + ("" if names or action.nargs != "?" else ", optional")
    return _cell(text + (", required" if names and action.required else ""))


def _cell(text: str | None) -> str:
    return " ".join((text or "").split()).replace("|", "\\|").replace("%%", "%")
