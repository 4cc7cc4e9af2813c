"""docs/reference/cli.md: every command, every option, and usage lines that can be typed."""

import re
import sys
from importlib.util import module_from_spec, spec_from_file_location
from types import ModuleType

import pytest

from fixtures.documents import ROOT
from kvpolicy.cli import COMMANDS

PAGE = ROOT / "docs" / "reference" / "cli.md"


@pytest.fixture(scope="module")
def tables() -> ModuleType:
    """The script that makes the tables of options."""
    path = PAGE.with_name("options_tables.py")
    spec = spec_from_file_location("options_tables", path)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def sections() -> dict[str, str]:
    """The page's text about each command."""
    parts = re.split(r"^## ", PAGE.read_text("utf-8"), flags=re.MULTILINE)[1:]
    return {part.partition("\n")[0]: part for part in parts}


def test_every_command_has_a_section_and_a_line() -> None:
    """The page's sections and its first table list the commands that the program has."""
    listed = re.findall(r"^\| \[`(\w+)`\]\(#\w+\)", PAGE.read_text("utf-8"), re.MULTILINE)
    assert {*sections()} == {*listed} == {*COMMANDS}


def test_every_command_has_its_table(tables: ModuleType) -> None:
    """No command is left out of what `generate.py` renews; that it is current is tested there."""
    found = [match[0] for match in tables.TABLE.findall(PAGE.read_text("utf-8"))]
    assert sorted(found) == sorted(tables.commands())


@pytest.mark.parametrize("name", COMMANDS)
def test_usage_names_the_options_that_there_are(name: str, tables: ModuleType) -> None:
    """A usage line has every option of its command, and no other."""
    usage = re.search(r"```\w*\n(kvpolicy .*?)```", sections()[name], re.DOTALL)
    assert usage is not None
    [command] = [each for each in tables.commands() if each.split()[0] == name]
    actions = tables.actions_of(tables.parser_of(command))
    options = {option for action in actions for option in action.option_strings}
    if name == "serve":  # the others are explained below its samples
        options = {"--kv-policy", "--kv-policy-allow"}
    assert {*re.findall(r"--[a-z-]+", usage[1])} == options


def test_a_parser_is_found_without_running_its_command(tables: ModuleType) -> None:
    """Looking at a command's options changes nothing and leaves its parser as it was."""
    before = sys.modules.get("vllm")
    assert "--policy" in tables.parser_of("replay").format_help()
    assert sys.modules.get("vllm") is before
