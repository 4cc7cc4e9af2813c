"""The program ``kvpolicy``: one literal table of commands, each imported only when used.

Exit codes: 0 success, 1 a result that fails its own check, 2 bad usage. Errors are one line.
"""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from kvpolicy.errors import KVPolicyError, PolicyError

FAILED = 1
USAGE = 2
_INTERRUPTED = 130


class Command(NamedTuple):
    """Where a command lives, and its line in the program's help.

    The module has ``run(arguments: list[str]) -> int``.
    """

    module: str
    summary: str


COMMANDS = {
    "policies": Command("kvpolicy.cli.policies", "list the policies, or explain one"),
    "doctor": Command("kvpolicy.cli.doctor", "check this environment and say what to change"),
    "demo": Command("kvpolicy.cli.demo", "run real vLLM under several policies and compare"),
    "serve": Command("kvpolicy.cli.serve", "start vLLM's OpenAI server under a policy"),
    "eval": Command("kvpolicy.cli.evaluate", "measure perplexity and retrieval under policies"),
    "capture": Command("kvpolicy.cli.capture", "record a trace of a model's attention"),
    "inspect": Command("kvpolicy.cli.inspection", "describe, verify, repair or cut a trace"),
    "replay": Command("kvpolicy.cli.replay", "replay a trace under policies"),
    "recommend": Command("kvpolicy.cli.recommend", "find the smallest budget that keeps enough"),
    "sweep": Command("kvpolicy.cli.sweep.command", "run a grid of policies, budgets and sources"),
    "fit": Command("kvpolicy.cli.fit", "fit the parameters of a memory to a trace"),
    "allocate": Command("kvpolicy.cli.allocate", "give layers budgets of their own, by a trace"),
    "trace": Command("kvpolicy.cli.trace", "make synthetic traces"),
    "plan": Command("kvpolicy.cli.plan", "compute memory and concurrency of policies on a model"),
    "new": Command("kvpolicy.cli.new", "make a package for a policy of your own"),
    "check": Command("kvpolicy.cli.check", "check a policy: contract, hosts, speed"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program on its arguments and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    _look_here_too()
    try:
        chosen = _parser().parse_args(arguments[:1])
        command = importlib.import_module(COMMANDS[chosen.command].module)
        return command.run(arguments[1:])
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else USAGE
    except KeyboardInterrupt:
        return _INTERRUPTED
    except BrokenPipeError:
        # The reader of our output has gone; keep the interpreter from writing to it again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except UnicodeDecodeError as error:
        print(f"kvpolicy: error: a text is not UTF-8: {one_line(error)}", file=sys.stderr)
        return USAGE
    except (KVPolicyError, OSError) as error:
        print(f"kvpolicy: error: {one_line(error)}", file=sys.stderr)
        return USAGE if isinstance(error, PolicyError | OSError) else FAILED


def _look_here_too() -> None:
    """Let specs name classes of modules in the working directory, behind all that is installed."""
    with suppress(OSError):  # it may have been removed
        here = str(Path.cwd())
        if not {here, ""} & {*sys.path}:
            sys.path.append(here)


def one_line(error: BaseException) -> str:
    """An error's message on one line."""
    return " ".join(str(error).split()) or type(error).__name__


def _parser() -> argparse.ArgumentParser:
    """The program's own parser: it reads the command's name and leaves the rest."""
    width = max(map(len, COMMANDS))
    commands = "\n".join(f"  {name:{width}}  {c.summary}" for name, c in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="kvpolicy",
        usage="kvpolicy COMMAND [arguments]",
        description="KV-cache retention policies for transformers and stock vLLM.",
        epilog=f"commands:\n{commands}\n\n`kvpolicy COMMAND --help` shows examples.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help=argparse.SUPPRESS)
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version")
    return parser


class _Version(argparse.Action):
    """Prints the version and ends."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        """Look the version up when it is asked for."""
        import kvpolicy

        print(f"kvpolicy {kvpolicy.__version__}")
        parser.exit()
